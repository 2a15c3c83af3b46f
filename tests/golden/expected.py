"""What a golden store must give back: the JSON beside its archive, and the check of a reader against it.

`moments` has each recovery point, but of its volumes only those that differ from the moment before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import msgspec
import pytest
import xxhash

from dedup.errors import MomentRefused, StoreError
from dedup.reader import GroupReader
from dedup.types import Seq, VolumeState
from tests.golden.archive import DIRECTORY


class Volume(msgspec.Struct, frozen=True, array_like=True):
    """`digest`: xxh3_128 of the content, in hexadecimal."""

    size: int
    mode: int
    uid: int
    gid: int
    digest: str


class ExpectedMoment(msgspec.Struct, frozen=True):
    """`volumes`: path → volume, None for one that is gone."""

    seq: int
    time: int
    kind: str
    volumes: dict[str, Volume | None]


class Name(msgspec.Struct, frozen=True, array_like=True):
    """`path`: of the one volume that the name is about, as of `seq`."""

    name: str
    kind: str
    seq: int
    path: str | None = None
    keep_until: int | None = None


class ExpectedGap(msgspec.Struct, frozen=True, array_like=True):
    first: int
    last: int | None
    from_time: int
    to_time: int | None
    reason: str


class Asked(msgspec.Struct, frozen=True, array_like=True):
    """A TIME and the seq that it means; None when it is refused, with a message that has `refused` in it."""

    text: str
    seq: int | None
    refused: str = ""


class ExpectedGroup(msgspec.Struct):
    held: int
    covered_until: int
    moments: list[ExpectedMoment] = []
    names: list[Name] = []
    gaps: list[ExpectedGap] = []
    asked: list[Asked] = []
    paths: list[str] = []


class Expected(msgspec.Struct):
    """`made_by` is the commit whose code wrote the store."""

    made_by: str
    format: int
    groups: dict[str, ExpectedGroup] = {}

    @classmethod
    def load(cls, name: str) -> Self:
        return msgspec.json.decode(_path(name).read_bytes(), type=cls)

    def save(self, name: str) -> None:
        """One line for each thing, so that a person can read it. Never over one that is there."""
        with open(_path(name), "x") as file:
            file.write(_lines(msgspec.to_builtins(self), 4) + "\n")


def _lines(value: object, depth: int) -> str:
    if not depth or not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[\n" + ",\n".join(_lines(one, 0) for one in value) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(one, depth - 1)}" for key, one in value.items()) + "\n}"


_CHUNK_BYTES: Final = 64 << 10


def _path(name: str) -> Path:
    return DIRECTORY / f"{name}.json"


def check_group(reader: GroupReader, expected: ExpectedGroup, *, more: bool = False) -> None:
    """Every moment, name, gap and TIME of the group. `more`: it has been written to since, after what is expected."""
    reader.refresh()
    if not more:
        assert (reader.held, reader.covered_until) == (expected.held, expected.covered_until)
    assert {(gap.first, gap.last, gap.from_time, gap.to_time, gap.reason) for gap in reader.gaps()} >= {
        (gap.first, gap.last, gap.from_time, gap.to_time, gap.reason)
        for gap in expected.gaps
        if gap.last is not None or not more
    }
    assert more or len(reader.gaps()) == len(expected.gaps)
    assert reader.paths() >= set(expected.paths)
    assert more or reader.paths() == set(expected.paths)
    _check_moments(reader, expected)
    _check_names(reader, expected, more=more)
    for asked in expected.asked:
        if more and (asked.text.startswith("latest") or asked.refused.startswith("after")):
            continue  # means something else by now
        if asked.seq is None:
            with pytest.raises(StoreError, match=asked.refused):
                reader.resolve(asked.text)
        else:
            assert reader.resolve(asked.text).seq == asked.seq, asked.text


def check_thinned(reader: GroupReader, expected: ExpectedGroup) -> int:
    """What is left of the group after a consolidation is what it was, named points all. How many points that are."""
    reader.refresh()
    points = set()
    for moment, volumes in _moments(expected):
        try:
            found = reader.resolve(f"seq={moment.seq}")
        except MomentRefused as refused:
            assert not points and "before the first" in str(refused), refused
            continue
        if found.seq == moment.seq:
            _check_moment(reader, moment, volumes)
            points.add(moment.seq)
        else:
            assert found.seq == max(points)
    assert expected.moments[-1].seq in points
    names = {one.name: one.seq for one in reader.snapshots()}
    for name in expected.names:
        assert name.name == "base" or (names[name.name] == name.seq and name.seq in points)
    return len(points)


def _moments(expected: ExpectedGroup) -> Iterator[tuple[ExpectedMoment, dict[str, Volume]]]:
    """Each moment with all of its volumes."""
    volumes: dict[str, Volume] = {}
    for moment in expected.moments:
        for path, volume in moment.volumes.items():
            if volume is None:
                del volumes[path]
            else:
                volumes[path] = volume
        yield moment, volumes


def _check_moment(reader: GroupReader, moment: ExpectedMoment, volumes: dict[str, Volume]) -> None:
    found = reader.resolve(f"seq={moment.seq}")
    assert (found.seq, found.time, found.kind.value) == (moment.seq, moment.time, moment.kind)
    states = reader.volumes_at(Seq(moment.seq))
    assert {path: _described(reader, state, moment.seq) for path, state in states.items()} == volumes, moment.seq


def _check_moments(reader: GroupReader, expected: ExpectedGroup) -> None:
    points = set()
    for moment, volumes in _moments(expected):
        _check_moment(reader, moment, volumes)
        points.add(moment.seq)
    for gap in expected.gaps:
        for seq in range(gap.first, (gap.last or expected.held) + 1):
            with pytest.raises(MomentRefused, match="in a gap"):
                reader.resolve(f"seq={seq}")
            assert seq not in points


def _described(reader: GroupReader, state: VolumeState, seq: int) -> Volume:
    image = reader.image(state.volume, Seq(seq))
    content = bytearray(image.size)
    at = image.next_data(0)
    while at < image.size:
        at -= at % _CHUNK_BYTES
        content[at : at + _CHUNK_BYTES] = image.read(at, _CHUNK_BYTES)
        at = image.next_data(at + _CHUNK_BYTES)
    return Volume(image.size, state.mode, state.uid, state.gid, xxhash.xxh3_128_hexdigest(content))


def _check_names(reader: GroupReader, expected: ExpectedGroup, *, more: bool) -> None:
    found = {}
    for one in reader.snapshots():
        path = None if one.volume is None else reader.view(one.seq).state.volumes[one.volume].path
        found[one.name] = Name(one.name, one.kind, one.seq, path, one.keep_until)
    wanted = {name.name: name for name in expected.names}
    assert {name: found.get(name) for name in wanted} == wanted
    assert more or found == wanted

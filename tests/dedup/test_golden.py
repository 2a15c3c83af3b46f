"""Stores that older versions wrote: each is read, recovered, written to and rebuilt by this one.

See tests/golden/README.md for how they are made; an old one is never made anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedup.consolidator import consolidate
from dedup.gc import collect
from dedup.group_writer import GroupWriter
from dedup.reader import GroupReader, StoreReader
from dedup.retention import Policy
from dedup.store import Store
from dedup.types import Create, Epoch, EpochStart, Extent, ReconcileEnd, Record, Seq, TimeNs, Write
from dedup.verify import verify
from tests.golden.archive import DIRECTORY, unpack
from tests.golden.expected import Expected, check_group, check_thinned

SECOND = 10**9
STORES = sorted(path.name.removesuffix(".tar.xz") for path in DIRECTORY.glob("*.tar.xz"))


@pytest.fixture(params=STORES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Expected]:
    unpack(request.param, tmp_path / "store")
    return tmp_path / "store", Expected.load(request.param)


def readers(store: StoreReader | Store) -> Iterator[tuple[str, GroupReader]]:
    if isinstance(store, StoreReader):
        yield from ((name, store.group(name)) for name in store.groups())
    else:
        yield from ((group.name, group.reader()) for group in store.groups)


def check(store: StoreReader | Store, expected: Expected, *, more: bool = False) -> None:
    found = dict(readers(store))
    assert set(found) == set(expected.groups)
    for name, reader in found.items():
        check_group(reader, expected.groups[name], more=more)


def check_sound(path: Path) -> None:
    report = verify(path, read_data=True)
    assert report.ok, [found for check in report.checks for found in check.damage]


def write_more(group: GroupWriter) -> bytes:
    """An agent starts, makes a volume and reconciles; the volume's content."""
    seq, time, run = group.held, group.time, group.run
    content = b"written by a later version " * 300

    def head() -> tuple[Seq, TimeNs]:
        nonlocal seq, time
        seq, time = Seq(seq + 1), TimeNs(time + 1_000_000)
        return seq, time

    volume = group.next_volume
    records: list[Record] = [EpochStart(*head(), run, Epoch(group.epoch + 1), clean=False)]
    records.append(Create(*head(), run, volume, "written by a later version", 0, 0o600, 0, 0))
    records.append(Write(*head(), run, Extent(volume, 0, content)))
    records.append(ReconcileEnd(*head(), run))
    group.ingest(records)
    return content


def test_there_are_golden_stores() -> None:
    assert {"v1-plain", "v1-groups", "v1-kept", "v1-sealed"} <= set(STORES)


def test_an_older_store_is_read_as_it_is(golden: tuple[Path, Expected]) -> None:
    path, expected = golden
    store = StoreReader.open(path)
    check(store, expected)
    store.close()
    check_sound(path)


def test_an_older_store_is_recovered_and_written_to(golden: tuple[Path, Expected]) -> None:
    path, expected = golden
    store = Store.open(path)
    check(store, expected)
    based = [group for group in store.groups if group.has_base]
    content = {group.name: write_more(group) for group in based}
    for group in based:
        group.create_snapshot("later")
    store.close()
    check_sound(path)
    reading = StoreReader.open(path)
    check(reading, expected, more=True)
    for name, written in content.items():
        reader = reading.group(name)
        moment = reader.resolve("later")
        volume = reader.volumes_at(moment.seq)["written by a later version"]
        assert reader.image(volume.volume, moment.seq).read(0, volume.size) == written
    reading.close()


@pytest.mark.parametrize("name", ["v1-plain", "v1-kept"])
def test_an_older_store_is_thinned_and_collected(name: str, tmp_path: Path) -> None:
    path, expected = tmp_path / "store", Expected.load(name).groups["main"]
    unpack(name, path)
    store = Store.open(path)
    group = store.group("main")
    span = expected.covered_until - expected.moments[0].time
    policy = Policy(*(span * part // 100 // SECOND * SECOND for part in (5, 20, 0, 0)))
    assert consolidate(group, policy, TimeNs(expected.covered_until)).pieces > 0
    collect(store)
    kept = check_thinned(group.reader(), expected)
    assert 10 < kept < len(expected.moments)
    store.close()
    check_sound(path)
    shutil.rmtree(path / "index")
    (path / "index").mkdir()
    Store.open(path).close()
    check_sound(path)
    reading = StoreReader.open(path)
    assert check_thinned(reading.group("main"), expected) == kept
    reading.close()


def test_the_index_of_an_older_store_is_rebuilt(golden: tuple[Path, Expected]) -> None:
    path, expected = golden
    # Without an index only a last entry that is not whole may be cut off; that is what there is.
    shutil.rmtree(path / "index")
    (path / "index").mkdir()
    Store.open(path).close()
    check_sound(path)
    reading = StoreReader.open(path)
    check(reading, expected)
    reading.close()

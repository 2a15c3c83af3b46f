"""What the programs that make golden stores share: small journals, clean pages, leftovers of a crash."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest

from dedup import layout, metadata_journal
from dedup.errors import MomentRefused
from dedup.metadata_journal import EntryKind, Logged, encode, kind_of
from dedup.reader import GroupReader, StoreReader
from dedup.storage import Storage
from dedup.types import ClockRun, Heartbeat, JournalId, Seq, TimeNs
from dedup.verify import verify
from tests.golden.archive import pack
from tests.golden.expected import Expected, Name, check_group
from tests.golden.history import History

SEGMENT_BYTES = 4096
"""After so many bytes a journal segment takes no more: several of them, and still a small store."""


@contextmanager
def bench() -> Iterator[Path]:
    """A path for a store, under conditions that keep it small; gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="rewindfs-golden-"))
    opened = lmdb.open

    def open_clean(*arguments: Any, **options: Any) -> Any:
        return opened(*arguments, **(options | {"meminit": True}))  # nothing of this process's memory in the file

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lmdb, "open", open_clean)
            patch.setattr(metadata_journal, "SEGMENT_BYTES_MAX", SEGMENT_BYTES)
            yield directory / "store"
    finally:
        shutil.rmtree(directory)


def half_an_entry(store: Path, group: str, history: History) -> None:
    """Appends the first half of an entry to the group's last segment: the writer was killed while it wrote."""
    directory = store / "groups" / group / "journal"
    path = sorted(directory.glob("*.rwj"))[-1]
    header = layout.unpack_segment_header(path.read_bytes(), path)
    beat = Heartbeat(Seq(history.seq + 1), TimeNs(history.time + 1), ClockRun(history.run))
    logged = Logged(kind_of(beat), beat.seq, beat.seq, beat.time, beat.run, JournalId(0), (), beat)
    assert logged.kind is EntryKind.HEARTBEAT
    with open(path, "ab") as file:
        file.write(encode(logged, header.seed)[:40])


def thinned(history: History, reader: GroupReader) -> None:
    """Takes out of the history what a consolidation did: the points that are gone, and the base if it has moved.

    Which points those are the store says; what they hold is the history's word. A seq that is gone means the point
    before it.
    """
    kept = {seq for seq in history.moments if _is_kept(reader, seq)}
    base = next(one.seq for one in reader.snapshots() if one.name == "base")
    named = {name.seq for name in history.names.values() if name.name != "base"}
    forgotten = {name.name for name in history.names.values()} - {one.name for one in reader.snapshots()}
    assert not forgotten, forgotten
    assert named <= kept and base in kept
    history.names["base"] = Name("base", "base", base)
    history.gaps = [gap for gap in history.gaps if gap.last is None or gap.last > base]
    history.asked = []
    before = None
    for seq in sorted(history.moments):
        if seq in kept:
            before = seq
        elif before is not None and not any(before < gap.first <= seq for gap in history.gaps):
            history.ask(f"seq={seq}", before)
    history.refuse(f"seq={base - 1}", "before the first recovery point")
    history.ask("base", base)
    history.ask("latest", max(kept))
    history.moments = {seq: history.moments[seq] for seq in kept}


def _is_kept(reader: GroupReader, seq: int) -> bool:
    try:
        return reader.resolve(f"seq={seq}").seq == seq
    except MomentRefused:
        return False


def keep(store: Path, name: str, histories: dict[str, History], *, verify_wrongs: str | None = None) -> None:
    """Packs the closed store and its expectation, if a reader finds in it what the histories say.

    `verify_wrongs` is a group of which this version's `verify` says damage though there is none.
    """
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    expected = Expected(commit, layout.FORMAT_VERSION, {group: one.expected() for group, one in histories.items()})
    copy = store.with_name("copy")
    shutil.copytree(store, copy)
    reader = StoreReader.open(copy, Storage())
    try:
        for group, wanted in expected.groups.items():
            check_group(reader.group(group), wanted)
    finally:
        reader.close()
    report = verify(copy, read_data=True)
    damage = [found for check in report.checks for found in check.damage if found.group != (verify_wrongs or "")]
    assert not damage, damage
    pack(store, name)
    expected.save(name)
    size = os.path.getsize(Path(__file__).with_name(f"{name}.tar.xz"))
    points = {group: len(wanted.moments) for group, wanted in expected.groups.items()}
    print(f"{name}: {size} bytes packed, recovery points {points}")

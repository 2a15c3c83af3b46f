"""Entries for tests of the metadata journal."""

from __future__ import annotations

import numpy as np

from dedup.metadata_journal import EntryKind, Logged, LoggedExtent, kind_of
from dedup.types import ClockRun, Entry, JournalId, Seq, SnapshotCreate, TimeNs, VolumeId


def write(seq: int, blocks: int = 1) -> Logged:
    """A write whose content depends on its seq."""
    extent = LoggedExtent(
        VolumeId(1),
        seq * 4096,
        blocks * 4096,
        np.arange(seq << 16, (seq << 16) + blocks, dtype="<u8"),
        seq.to_bytes(16, "little") * blocks,
    )
    return Logged(EntryKind.WRITE, Seq(seq), Seq(seq), TimeNs(seq * 10), ClockRun(0), JournalId(1), (extent,), None)


def noted(body: Entry) -> Logged:
    return Logged(kind_of(body), body.seq, body.seq, body.time, body.run, JournalId(0), (), body)


def snapshot(seq: int) -> Logged:
    return noted(SnapshotCreate(Seq(seq), TimeNs(1), ClockRun(0), "name", Seq(seq), TimeNs(1)))

"""The records that restate what a volume is: made from the table, stamped by whoever queues them."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from functools import partial

from dedup.types import Attributes, ClockRun, Create, Rename, Resize, Retire, Seq, TimeNs, VolumeId
from fusefs.volume_table import Volume, check_path
from replication.agent_link import Build
from replication.checks import RENAME_MOVES_MAX
from replication.frame_layout import RARE

Moves = Sequence[tuple[VolumeId, str]]
"""Volumes and their new paths."""

RENAME_BYTES_MAX = RARE[Rename][1]
_HEAD_BYTES = 1024
_MOVE_BYTES = 16
"""At most: of a move besides its path; _HEAD_BYTES: of a Rename besides its moves."""


def check_moves(moves: Moves) -> None:
    """OSError E2BIG for more than one Rename can carry, ENAMETOOLONG or EILSEQ for a path that none can."""
    for _, path in moves:
        check_path(path)
    if len(list(_batches(moves))) > 1:
        raise OSError(errno.E2BIG, f"{len(moves)} volumes would be moved at once, more than can be recorded as one")


def rename_records(moves: Moves) -> Iterator[Build]:
    """The Renames that tell of these moves, as few as can be: one, but for very many."""
    for batch in _batches(moves):
        yield partial(_rename_record, tuple(batch))


def _rename_record(moves: tuple[tuple[VolumeId, str], ...], seq: Seq, time: TimeNs, run: ClockRun) -> Rename:
    return Rename(seq, time, run, moves)


def _batches(moves: Moves) -> Iterator[Moves]:
    start, nbytes = 0, _HEAD_BYTES
    for index, (_, path) in enumerate(moves):
        more = len(path.encode()) + _MOVE_BYTES
        if index - start == RENAME_MOVES_MAX or nbytes + more > RENAME_BYTES_MAX:
            yield moves[start:index]
            start, nbytes = index, _HEAD_BYTES
        nbytes += more
    if moves:
        yield moves[start:]


def retire_record(volume: VolumeId, seq: Seq, time: TimeNs, run: ClockRun) -> Retire:
    return Retire(seq, time, run, volume)


def create_record(volume: Volume, seq: Seq, time: TimeNs, run: ClockRun) -> Create:
    return Create(seq, time, run, volume.id, volume.path, volume.size, volume.mode, volume.uid, volume.gid)


def attributes_record(volume: Volume, seq: Seq, time: TimeNs, run: ClockRun) -> Attributes:
    return Attributes(seq, time, run, volume.id, volume.mode, volume.uid, volume.gid)


def resize_record(volume: Volume, seq: Seq, time: TimeNs, run: ClockRun) -> Resize:
    return Resize(seq, time, run, volume.id, volume.size)

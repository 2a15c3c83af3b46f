"""What the source really did, seen at its system calls: the other side of `replica-equals-source`.

An agent's run has a beginning (the source as it was found) and changes, each with its place among the seqs: the record
that the same task had queued for it, or, unrecorded, behind the last seq of that instant.

Invariants:
- `order`: two changes of one block are made in the order of their seqs; checked as they are made;
- a change that was recorded and not made, or not as recorded, when the agent died counts as made: such a write may be
  absent or present.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import trio

from dedup.types import BLOCK_BYTES, Correct, Create, ReconcileBegin, Record, Rename, Resize, Retire, Seq, Write
from fusefs.volume_table import list_volumes
from replication.messages import Compare
from tests.simulation.image import cut, put
from tests.simulation.trace import Trace

File = int
"""A file of the source, whatever its name: its inode number."""


@dataclass(slots=True)
class Tree:
    """Files and their names. `dirty` are the files that changed since the caller cleared it."""

    names: dict[str, File] = field(default_factory=dict)
    files: dict[File, bytearray] = field(default_factory=dict)
    dirty: set[File] = field(default_factory=set)

    @classmethod
    def of(cls, source: Path) -> Tree:
        """The source directory as it is."""
        tree = cls()
        for path, status in sorted(list_volumes(source).items()):
            tree.names[path] = status.st_ino
            tree.files[status.st_ino] = bytearray((source / path).read_bytes())
        return tree

    def copy(self) -> Tree:
        return deepcopy(self)

    def write(self, file: File, offset: int, data: bytes) -> None:
        if file in self.files:
            put(self.files[file], offset, data)
            self.dirty.add(file)

    def cut(self, file: File, size: int) -> None:
        if file in self.files:
            cut(self.files[file], size)
            self.dirty.add(file)

    def make(self, path: str, file: File) -> None:
        self.names[path] = file
        self.files[file] = bytearray()
        self.dirty.add(file)

    def remove(self, path: str) -> None:
        del self.names[path]

    def move(self, old: str, new: str, exchange: bool) -> None:
        moved = self.names.pop(old)
        if exchange:
            self.names[old] = self.names[new]
            self.dirty.add(self.names[old])
        self.names[new] = moved
        self.dirty.add(moved)


Change = Callable[[Tree], None]


class Run:
    """One epoch of the agent: from its first record to its death or its clean end."""

    def __init__(self, source: Path, trace: Trace) -> None:
        self.base = Tree.of(source)
        self.stamped: dict[Seq, Record | Compare] = {}
        self.last = Seq(0)
        self._trace = trace
        self._changes: list[tuple[float, int, Change]] = []
        self._pending: dict[trio.lowlevel.Task, Record] = {}
        """Recorded by that task, and not made yet."""
        self._uncorrected: dict[Seq, tuple[File, Record]] = {}
        self._named: tuple[trio.lowlevel.Task, Change, Seq] | None = None
        """A change of names that was made and not recorded yet."""
        self._blocks: dict[tuple[File, int], Seq] = {}
        self._by_task: dict[trio.lowlevel.Task, Seq] = {}

    def changes(self) -> list[tuple[float, Change]]:
        """In the order in which the moments after the records have them."""
        ordered = sorted(self._changes, key=lambda change: change[:2])
        return [(at, change) for at, _, change in ordered]

    # -- what the agent records --------------------------------------------------------------------------------------

    def recorded(self, record: Record | Compare) -> None:
        self.stamped[record.seq] = record
        self.last = record.seq
        task = trio.lowlevel.current_task()
        if not isinstance(record, (Correct, ReconcileBegin)):
            self._by_task[task] = record.seq
        if isinstance(record, (Write, Resize)):
            self._pending[task] = record
        elif isinstance(record, (Create, Rename, Retire)) and self._named is not None and self._named[0] is task:
            self._add(record.seq, self._named[1])
            self._named = None
        elif isinstance(record, Correct):
            self._uncorrected.pop(record.refused, None)
            self._pending = {task: held for task, held in self._pending.items() if held.seq != record.refused}

    # -- what the source does ----------------------------------------------------------------------------------------

    def wrote(self, file: File, offset: int, data: bytes, wanted: int) -> None:
        """The source took `data`, of a write of `wanted` bytes; none when it refused."""
        record = self._pending.pop(trio.lowlevel.current_task(), None)
        seq = record.seq if isinstance(record, Write) else None
        if data:
            self._ordered(file, offset, len(data), seq)
            self._add(self._place(seq), lambda tree: tree.write(file, offset, data))
        if record is not None and len(data) < wanted:
            self._uncorrected[record.seq] = (file, record)

    def cut(self, file: File, size: int) -> None:
        record = self._pending.pop(trio.lowlevel.current_task(), None)
        seq = record.seq if isinstance(record, Resize) else None
        self._add(self._place(seq), lambda tree: tree.cut(file, size))

    def named(self, change: Change) -> None:
        """A change of names was made, by a task that is about to record it."""
        self._named = (trio.lowlevel.current_task(), change, self.last)

    def answered(self, file: File | None) -> None:
        """The agent has answered this task's request."""
        task = trio.lowlevel.current_task()
        record = self._pending.pop(task, None)
        if record is not None and file is not None and not self._corrected(record.seq):
            # Recorded, and refused before the source saw it: the correction may be owed.
            self._uncorrected[record.seq] = (file, record)
        if self._named is not None and self._named[0] is task:
            _, change, last = self._named
            self._add(self._place(None, last), change)
            self._named = None

    def seq_of_task(self) -> Seq:
        """Of the last record that this task has queued; corrections and the beginning of a gap apart, for which nobody
        waits."""
        return self._by_task.get(trio.lowlevel.current_task(), Seq(0))

    def _corrected(self, seq: Seq) -> bool:
        newer = (self.stamped.get(Seq(at)) for at in range(seq + 1, self.last + 1))
        return any(isinstance(record, Correct) and record.refused == seq for record in newer)

    def ended(self, file_of: Callable[[Record], File | None]) -> None:
        """The agent died, or left: what is under way counts as made."""
        unmade = [(file_of(record), record) for record in self._pending.values()]
        for file, record in [*unmade, *self._uncorrected.values()]:
            if file is not None:
                self._add(record.seq, _as_recorded(file, record))
        self._pending.clear()
        self._uncorrected.clear()
        self._named = None

    def _add(self, at: float, change: Change) -> None:
        self._changes.append((at, len(self._changes), change))

    def _place(self, seq: Seq | None, last: Seq | None = None) -> float:
        return seq if seq is not None else (self.last if last is None else last) + 0.5

    def _ordered(self, file: File, offset: int, length: int, seq: Seq | None) -> None:
        for block in range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)):
            if seq is not None:
                before = self._blocks.get((file, block), Seq(0))
                if before > seq:
                    self._trace.violated("order", f"the source makes write {seq} after {before} of the same block")
                self._blocks[file, block] = seq


def _as_recorded(file: File, record: Record) -> Change:
    if isinstance(record, Resize):
        size = record.size
        return lambda tree: tree.cut(file, size)
    assert isinstance(record, Write)
    extent = record.extent
    return lambda tree: tree.write(file, extent.offset, bytes(extent.data))

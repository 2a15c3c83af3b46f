"""Which volumes are half restored: noted before a restore in place changes anything, until one of them has ended.

Invariants:
- a note is durable before the first change, so a volume that is half restored is known to be, whatever was killed;
- it keeps the bookmark of before the first try: a restore that is repeated can still be undone to there;
- bounded: NOTES_MAX notes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from dedup.errors import Damaged, RewindError
from dedup.types import Seq
from fusefs.restore_claim import is_below
from replication.durable_file import replace_file

NOTES_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class UnfinishedRestore:
    """`place` (a volume, a directory, or the whole group) was to become as it was at `seq`, of that store. `bookmark`
    names the moment before; empty where none was wanted."""

    store: str
    place: str
    seq: Seq
    bookmark: str


class UnfinishedRestores:
    """The notes of one source, in a file. Its methods block for as long as a sync takes: call them in a thread."""

    def __init__(self, path: Path, store: str) -> None:
        """Reads the file, if there is one; what it says of another store than that is of no use any more. Damaged."""
        self._path = path
        self._store = store
        try:
            notes = msgspec.json.decode(path.read_bytes(), type=tuple[UnfinishedRestore, ...])
            self.all = tuple(note for note in notes if note.store == store)
        except FileNotFoundError:
            self.all = ()
        except (ValueError, RecursionError) as error:
            raise Damaged(
                f"{path} is damaged ({error}), which says what is half restored; remove it, and restore that anew"
            ) from error

    def begun(self, place: str, seq: Seq, bookmark: str) -> None:
        """Durable when it returns. It stands for what was unfinished below its place."""
        kept = self._beside(place)
        if len(kept) >= NOTES_MAX:
            raise RewindError(f"{len(kept)} restores have been begun and not ended; end some of them first: "
                              "`rewindfs status` names them")  # fmt: skip
        self._keep((*kept, UnfinishedRestore(self._store, place, seq, bookmark)))

    def ended(self, place: str) -> None:
        """All below `place` is as somebody wanted it. Durable when it returns."""
        self._keep(self._beside(place))

    def _beside(self, place: str) -> tuple[UnfinishedRestore, ...]:
        return tuple(note for note in self.all if not is_below(note.place, place))

    def _keep(self, notes: tuple[UnfinishedRestore, ...]) -> None:
        if notes != self.all:
            replace_file(self._path, msgspec.json.encode(notes))
            self.all = notes

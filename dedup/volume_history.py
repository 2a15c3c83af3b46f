"""When a path was some volume's: for what can be restored of that path."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dedup.journal_reader import first_position, scan
from dedup.metadata_journal import EntryKind, decode
from dedup.storage import Storage
from dedup.types import Bookmark, Consolidated, Create, Entry, Flush, PointKind, Rename, Retire, Seq, VolumeId

PATH_KINDS: Final = frozenset(
    {
        EntryKind.CREATE,
        EntryKind.RENAME,
        EntryKind.RETIRE,
        EntryKind.FLUSH,
        EntryKind.BOOKMARK,
        EntryKind.CONSOLIDATED,
    }
)
"""Entries by which a path comes to be another volume's, or a volume's moments flushed ones."""


@dataclass(slots=True)
class PathHistory:
    """Stretches of seqs, first..last, through which the path was a volume's; the last is open (None) if it still is.

    Of what is consolidated only the points that are kept tell: who came and went between two of them is not seen.
    """

    spans: list[tuple[Seq, Seq | None]] = field(default_factory=list)
    flushes: int = 0
    """Flush records of the volumes while they had the path, and bookmarks, which flush the whole group; where history
    is consolidated, flushed points of the group."""


class PathHolder:
    """The volume that has a path, followed from entry to entry."""

    def __init__(self, path: str, volume: VolumeId | None = None) -> None:
        """`volume` has the path before the first entry that is followed."""
        self._path = path
        self.volume = volume

    def follow(self, entry: Entry) -> None:
        """Takes one entry of PATH_KINDS; they come in order."""
        path, before = self._path, self.volume
        match entry:
            case Create() if entry.path == path:
                self.volume = entry.volume
            case Rename(moves=moves, retired=retired):
                if before in {*retired, *(volume for volume, _ in moves)}:
                    self.volume = None
                self.volume = next((volume for volume, new in moves if new == path), self.volume)
            case Retire(volume=volume) if volume == before:
                self.volume = None
            case Consolidated(volumes=volumes):
                if any(state.volume == before and (state.retired or state.path != path) for state in volumes):
                    self.volume = None
                now = (state.volume for state in volumes if state.path == path and not state.retired)
                self.volume = next(now, self.volume)

    def is_flushed_by(self, entry: Entry) -> bool:
        """Whether an entry, which was followed, ends a flushed point of the path's volume."""
        if isinstance(entry, Flush) and entry.volume != self.volume:
            return False
        return self.volume is not None and self.is_flush(entry)

    @staticmethod
    def is_flush(entry: Entry) -> bool:
        """Whether an entry ends a flushed point of some volume."""
        return isinstance(entry, (Flush, Bookmark)) or (
            isinstance(entry, Consolidated) and entry.point is not PointKind.CRASH
        )


def path_history(storage: Storage, directory: Path, path: str, held: Seq) -> PathHistory:
    """Reads the group's journal at `directory` up to `held`; only headers but of the kinds that matter. Damaged.

    For a reader that has pinned everything: history must not be thinned out meanwhile.
    """
    history = PathHistory()
    holder = PathHolder(path)
    since = Seq(0)
    for scanned in scan(storage, directory, first_position(storage, directory)):
        if scanned.seq > held:
            break
        if scanned.kind not in PATH_KINDS:
            continue
        before, body = holder.volume, decode(scanned.raw).body
        assert body is not None, "each of these kinds has one"
        holder.follow(body)
        history.flushes += holder.is_flushed_by(body)
        if before is None and holder.volume is not None:
            since = scanned.seq
        elif before is not None and holder.volume is None:
            history.spans.append((since, Seq(scanned.first_seq - 1)))
    if holder.volume is not None:
        history.spans.append((since, None))
    return history

"""When a path was some volume's: for what can be restored of that path."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dedup.journal_reader import first_position, scan
from dedup.metadata_journal import EntryKind, decode
from dedup.storage import Storage
from dedup.types import Bookmark, Consolidated, Create, Flush, PointKind, Rename, Retire, Seq, VolumeId

_KINDS = frozenset(
    {
        EntryKind.CREATE,
        EntryKind.RENAME,
        EntryKind.RETIRE,
        EntryKind.FLUSH,
        EntryKind.BOOKMARK,
        EntryKind.CONSOLIDATED,
    }
)


@dataclass(slots=True)
class PathHistory:
    """Stretches of seqs, first..last, through which the path was a volume's; the last is open (None) if it still is.

    Of what is consolidated only the points that are kept tell: who came and went between two of them is not seen.
    """

    spans: list[tuple[Seq, Seq | None]] = field(default_factory=list)
    flushes: int = 0
    """Flush records of the volumes while they had the path, and bookmarks, which flush the whole group; where history
    is consolidated, flushed points of the group."""


def path_history(storage: Storage, directory: Path, path: str, held: Seq) -> PathHistory:
    """Reads the group's journal at `directory` up to `held`; only headers but of the kinds that matter. Damaged.

    For a reader that has pinned everything: history must not be thinned out meanwhile.
    """
    history = PathHistory()
    holder: VolumeId | None = None
    since = Seq(0)
    for scanned in scan(storage, directory, first_position(storage, directory)):
        if scanned.seq > held:
            break
        if scanned.kind not in _KINDS:
            continue
        before = holder
        match decode(scanned.raw).body:
            case Create() as create if create.path == path:
                holder = create.volume
            case Rename(moves=moves, retired=retired):
                if holder in {*retired, *(volume for volume, _ in moves)}:
                    holder = None
                holder = next((volume for volume, new in moves if new == path), holder)
            case Retire(volume=volume) if volume == holder:
                holder = None
            case Flush(volume=volume) if volume == holder:
                history.flushes += 1
            case Bookmark() if holder is not None:
                history.flushes += 1
            case Consolidated(volumes=volumes, point=point):
                if any(state.volume == holder and (state.retired or state.path != path) for state in volumes):
                    holder = None
                now = (state.volume for state in volumes if state.path == path and not state.retired)
                holder = next(now, holder)
                history.flushes += holder is not None and point is not PointKind.CRASH
        if before is None and holder is not None:
            since = scanned.seq
        elif before is not None and holder is None:
            history.spans.append((since, Seq(scanned.first_seq - 1)))
    if holder is not None:
        history.spans.append((since, None))
    return history

"""What has to be done to a group's volumes so that they are as they were at a moment: a plan from pointers alone.

Nothing is read and nothing is written here. Which volume a path is does not matter, only what it holds: a path that
another volume has by now is made to hold what the one had that was there then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dedup.history import ByteRange, GroupMoment, History
from dedup.types import Moment, VolumeState
from fusefs.restore_claim import WHOLE_GROUP, is_below


@dataclass(frozen=True, slots=True)
class VolumeChange:
    """What becomes of one path: `now` None, it is made; `then` None, it is removed."""

    path: str
    now: VolumeState | None
    then: VolumeState | None


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """`place`, a volume or a directory or the whole group, goes from the moment `now` to the moment `then`.

    `changes` has every volume that is there at either, ascending by path.
    """

    place: str
    now: Moment
    then: Moment
    changes: tuple[VolumeChange, ...]

    @property
    def removed(self) -> list[VolumeChange]:
        """Those that are not there then."""
        return [change for change in self.changes if change.then is None]

    @property
    def kept(self) -> list[VolumeChange]:
        """The others: those that are written."""
        return [change for change in self.changes if change.then is not None]

    @property
    def made(self) -> list[VolumeChange]:
        """Those that are not there now."""
        return [change for change in self.changes if change.now is None]

    @property
    def resized(self) -> list[VolumeChange]:
        """Those whose size changes."""
        return [one for one in self.changes if one.now and one.then and one.now.size != one.then.size]

    @property
    def restyled(self) -> list[VolumeChange]:
        """Those whose mode or owner changes."""
        return [one for one in self.changes if one.now and one.then and _style(one.now) != _style(one.then)]

    @property
    def total_bytes(self) -> int:
        """The size of all that is there then."""
        return sum(change.then.size for change in self.changes if change.then is not None)

    def ranges(self, history: History, change: VolumeChange) -> Iterator[ByteRange]:
        """What has to be written of a volume once it has its size of then, ascending; the rest is as it was.

        Within its size of then. A removed one has nothing to write.
        """
        if change.then is None:
            return
        old = None if change.now is None else (change.now.volume, self.now.seq)
        for found in history.differing(old, (change.then.volume, self.then.seq)):
            length = min(found.length, change.then.size - found.offset)
            if length <= 0:
                return
            yield ByteRange(found.offset, length)


def _style(volume: VolumeState) -> tuple[int, int, int]:
    return volume.mode, volume.uid, volume.gid


def make_plan(history: History, place: str, now: Moment, then: Moment) -> RestorePlan:
    """The plan. UnknownName when there was nothing at `place` then.

    A place that was a volume then is that volume alone; else it is a directory, and all below it.
    """
    current, past = history.group_at(now.seq), history.group_at(then.seq)
    found = volumes_at(past, place)
    paths = sorted(found.keys() | {path for path in current.volumes if is_below(path, place)})
    return RestorePlan(
        place, now, then, tuple(VolumeChange(path, current.volumes.get(path), found.get(path)) for path in paths)
    )


def volumes_at(moment: GroupMoment, place: str) -> dict[str, VolumeState]:
    """Path → volume of what there was at `place`, a volume or a directory. UnknownName lists what else there was."""
    found = {path: volume for path, volume in moment.volumes.items() if is_below(path, place)}
    if not found and place != WHOLE_GROUP:
        moment.volume(place)  # raises
    return found

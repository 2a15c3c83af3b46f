"""A group's history as those see it who go back: its names, its moments, and volumes as they were then.

`reader.GroupReader` is one over a store's own files. Another may ask an appliance elsewhere: whoever restores, clones,
browses or compares depends on this alone, and need not know where the store is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Protocol

from dedup.errors import UnknownName
from dedup.types import Moment, Seq, Snapshot, TimeNs, VolumeId, VolumeState


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes offset..offset+length of a volume; never empty."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class GroupMoment:
    """A group as it was: path → volume, of those that existed. Whether it is a recovery point is not said."""

    moment: Moment
    volumes: dict[str, VolumeState]

    def volume(self, path: str) -> VolumeState:
        """The volume that had this path. UnknownName lists those that there were."""
        found = self.volumes.get(path)
        if found is None:
            seq, group = self.moment.seq, self.moment.group
            known = ", ".join(sorted(self.volumes)) or "none"
            raise UnknownName(f"group {group} had no volume {path!r} at seq={seq}; it had: {known}")
        return found


class PastImage(Protocol):
    """The bytes of one volume at one moment. Immutable; any thread may read."""

    @property
    def size(self) -> int:
        """In bytes."""

    @property
    def time(self) -> TimeNs:
        """Of its moment: tells it from another one of that seq, in an older copy of the store that was put back."""

    @property
    def label(self) -> str:
        """Volume and moment, for messages."""

    def read(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        """The bytes offset..offset+length, fewer past the end; each block is checked against its fingerprint.

        Damaged names volume, moment and offset; MomentGone when it was thinned out and not held. With wait=False:
        WouldBlock instead of waiting for a disk, a network or another reader.
        """

    def read_into(self, offset: int, length: int, buffer: memoryview, *, wait: bool = True) -> memoryview:
        """As `read`: a part of `buffer`, which has `image.room_for(length)` bytes or more, or of other memory that is
        never changed."""

    def next_data(self, offset: int) -> int:
        """The first offset at or after `offset` whose block is not a hole; `size` when there is none."""

    def allocated(self) -> int:
        """At most so many bytes are not holes; 0 only where every block is a hole. MomentGone.

        May be as much as `size` where a better figure takes long.
        """


class History(Protocol):
    """Of one group. Not for two threads at once (but where said); its images are.

    What it says is as of the last `refresh`; `resolve` refreshes by itself.
    """

    @property
    def name(self) -> str:
        """The group's."""

    @property
    def store_uuid(self) -> str:
        """Of the store that it is in: tells any two stores apart, whatever they are called."""

    @property
    def covered_until(self) -> TimeNs:
        """Nothing happened after the last record until this time."""

    @property
    def rewritten(self) -> Hashable:
        """Differs from what it was if history may have been thinned out between two refreshes."""

    def refresh(self) -> None:
        """Sees everything that was journalled before this call."""

    def snapshots(self) -> list[Snapshot]:
        """All catalogued recovery points by seq: the base, bookmarks, snapshots."""

    def snapshot(self, name: str) -> Snapshot | None:
        """The catalogued recovery point of that name."""

    def paths(self) -> frozenset[str]:
        """Every path that a volume has had; the same object as before where none came."""

    def resolve(self, text: str, *, now: TimeNs | None = None) -> Moment:
        """The recovery point that TIME names. BadTime, UnknownName; MomentRefused names the nearest ones."""

    def group_at(self, seq: Seq) -> GroupMoment:
        """The group at the last record at or before `seq` that history still tells from others."""

    def image(self, volume: VolumeId, seq: Seq) -> PastImage:
        """The volume at `seq`. UnknownName if it did not exist then.

        Reading it raises MomentGone once the moment is thinned out; while it is held, it is not.
        """

    def differing(
        self, old: tuple[VolumeId, Seq] | None, new: tuple[VolumeId, Seq] | None, start: int = 0
    ) -> Iterator[ByteRange]:
        """The ranges of blocks whose pointers differ between two images, ascending, from offset `start` on.

        None is a volume without bytes. They are of whole blocks, cut at the end of the larger image; adjacent ones are
        joined. Equal pointers are equal bytes; pointers that differ nearly always are of bytes that differ. Reads no
        block. A size that differs is not told. UnknownName, MomentGone.
        """

    def hold(self, seq: Seq) -> None:
        """Keeps the moment until `release`, as often as it is held. `seq` is that of a `Moment`.

        MomentGone when it has been thinned out. May wait while the writer changes history: StoreBusy.
        """

    def hold_again(self, seq: Seq) -> bool:
        """As `hold`, of a moment that is held; False when it is not. Never waits. Any thread."""

    def require(self, seq: Seq) -> None:
        """MomentGone unless history, as of the last refresh, still tells the moment from others."""

    def release(self, seq: Seq) -> None:
        """Ends one `hold`."""

    def close_idle(self) -> None:
        """Closes files that nobody used lately, which may have been replaced. To be called now and then. Any thread."""

    def enter(self) -> None:
        """From here to `leave` no history is changed, so that `hold` does not wait. Any thread. StoreBusy."""

    def leave(self) -> None:
        """Ends one `enter`. Any thread."""

"""What can go wrong with a store, one type for each thing a caller does differently about it.

Every message is one line that says what, where, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future


class RewindError(Exception):
    """Base of every error that is shown to a person as `rewindfs: error: MESSAGE` (exit status 1)."""


class StoreError(RewindError):
    """A store cannot do what was asked."""


class NotAStore(StoreError):
    """The path holds no store, or something that is not one."""


class UnknownFormat(StoreError):
    """The store was written by a version that this one does not know."""


class StoreBusy(StoreError):
    """Another process is the writer of this store."""


class StoreFull(StoreError):
    """The disk under the store is full. Nothing that was refused was kept; what was kept before is intact."""


class StoreFailed(StoreError):
    """An fsync or a write of the store failed: the writer has stopped and must open the store anew."""


class Damaged(StoreError):
    """Stored bytes do not match their checksum or fingerprint. The message names file, offset and what."""


class Unreadable(Damaged):
    """The disk refuses to give the bytes back, so that what they are is not known; another time it may. The message
    names file and offset."""


class OutOfOrder(StoreError):
    """A record does not follow the last one held."""


class UnknownName(StoreError):
    """No such group, volume, snapshot or journal."""


class NameRefused(StoreError):
    """A bookmark's or snapshot's name parses as TIME, has a forbidden form, or exists."""


class MomentRefused(StoreError):
    """The moment is no recovery point: in a gap, before the first, after the last, or ambiguous. Names the nearest."""


class MomentGone(StoreError):
    """What was a recovery point when it was looked up has been thinned out since. Look the moment up again."""


class BadTime(StoreError):
    """The text does not parse as TIME."""


class BadPolicy(StoreError):
    """A retention policy that contradicts itself: tiers that do not ascend, a hard limit below the soft one."""


class BadGranularity(StoreError):
    """A data journal cannot have windows of that width."""


class WouldBlock(Exception):
    """A read would have to wait for the disk, and the caller asked not to wait. Never shown to a person."""


class OnItsWay(WouldBlock):
    """The same, and somebody is at it: in a moment it may be there."""

    def __init__(self, work: Future[Any] | None = None) -> None:
        """`work`: of the thread that is at it; None: the disk was asked."""
        super().__init__()
        self.work = work

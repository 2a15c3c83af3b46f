"""The moments that a reader elsewhere holds, over all its sessions; and which session that is.

A hold ends with the session in which it was asked for, so each new session holds again what is still needed before it
is used.

Invariants:
- a session becomes the one in use (`renew`) only when it holds every moment that is held at that instant, or has said
  that it is gone; and a hold counts only when it was asked for in the session in use (`began`);
- a moment is told from another one of its seq by its time.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass

from dedup.types import Seq, TimeNs


@dataclass(slots=True)
class _Moment:
    time: TimeNs
    uses: int = 0
    gone: bool = False
    """Thinned out while there was no session; those who hold it are told when they read."""


class HeldMoments:
    """Any thread may use it; no method waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generation = 0
        self._moments: dict[Seq, _Moment] = {}

    @property
    def generation(self) -> int:
        """The number of the session in use, or of the last one; 0 before the first."""
        return self._generation

    def __bool__(self) -> bool:
        return bool(self._moments)

    def again(self, seq: Seq) -> bool:
        """One more hold of a moment that is held; False when it is not."""
        with self._lock:
            moment = self._moments.get(seq)
            if moment is None or moment.gone:
                return False
            moment.uses += 1
            return True

    def time_of(self, seq: Seq) -> TimeNs | None:
        """Of the moment of that seq that is held, gone or not; None when there is none."""
        with self._lock:
            moment = self._moments.get(seq)
            return None if moment is None else moment.time

    def began(self, seq: Seq, time: TimeNs, generation: int) -> bool | None:
        """The session of that number holds it now: True when it is the first to. False: it was held already, and this
        hold is one too many there. None: that session is not the one in use; nothing is held."""
        with self._lock:
            if generation != self._generation:
                return None
            moment = self._moments.get(seq)
            if moment is not None and not moment.gone:
                moment.uses += 1
                return False
            self._moments[seq] = _Moment(time, 1 if moment is None else moment.uses + 1)
            return True

    def release(self, seq: Seq) -> bool:
        """Ends one hold; True when the session need not hold the moment any more. Harmless when nothing is held."""
        with self._lock:
            moment = self._moments.get(seq)
            if moment is None:
                return False
            moment.uses -= 1
            if moment.uses:
                return False
            del self._moments[seq]
            return not moment.gone

    def missing(self, held: Collection[Seq]) -> list[Seq]:
        """What a new session that holds these is still to be asked for."""
        with self._lock:
            return [seq for seq, moment in self._moments.items() if not moment.gone and seq not in held]

    def settle(self, seq: Seq, time: TimeNs | None) -> None:
        """A new session holds a moment of that seq and time, or none: another than the one meant is none."""
        with self._lock:
            moment = self._moments.get(seq)
            if moment is not None and moment.time != time:
                moment.gone = True

    def renew(self, held: Collection[Seq]) -> list[Seq] | None:
        """The new session is the one in use from here on; what it holds for nobody, is to be released. None when it
        does not hold all yet."""
        with self._lock:
            if any(not moment.gone and seq not in held for seq, moment in self._moments.items()):
                return None
            self._generation += 1
            return [seq for seq in held if seq not in self._moments or self._moments[seq].gone]

"""Names relative to now stay bound for a while, so that a program which looks one up twice finds one file.

`cp` looks a name up to stat it and again to open it, and gives up when the two are not the same file. So a name keeps
its moment for BOUND_SECONDS from when it was resolved, for everyone; and a process that came upon it late keeps it for
as long from its own first look. After that it is resolved anew even while it is in use: who polls sees progress.

Whoever walks a tree is different: a copy of many files must be of one moment. There a process keeps a name for
WALK_SECONDS from its last use.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from dedup.types import Moment

BOUND_SECONDS: Final = 2.0
WALK_SECONDS: Final = 60.0
BINDINGS_MAX: Final = 1024
"""Bindings kept; the one that was made first goes first."""
_EVERYONE: Final = -1


@dataclass(frozen=True, slots=True)
class _Binding:
    moment: Moment
    until: float


class BoundNames:
    """Which moment a relative TIME stands for. Time is passed in, in seconds of any clock that only goes forward."""

    def __init__(self, *, walks: bool = False) -> None:
        """`walks`: the names are used by who walks a tree."""
        self._walks = walks
        self._own_seconds = WALK_SECONDS if walks else BOUND_SECONDS
        self._bindings: OrderedDict[tuple[int, str], _Binding] = OrderedDict()

    def find(self, text: str, who: int, now: float) -> Moment | None:
        """The moment that `text` is bound to for process `who`; None when it must be resolved."""
        own = self._bindings.get((who, text))
        if own is not None and now < own.until:
            if self._walks:
                self._put((who, text), own.moment, now + self._own_seconds)
            return own.moment
        shared = self._bindings.get((_EVERYONE, text))
        if shared is None or now >= shared.until:
            return None
        self._put((who, text), shared.moment, now + self._own_seconds)
        return shared.moment

    def bind(self, text: str, who: int, moment: Moment, now: float) -> None:
        """`text` has just been resolved for process `who`."""
        self._put((who, text), moment, now + self._own_seconds)
        self._put((_EVERYONE, text), moment, now + BOUND_SECONDS)

    def _put(self, key: tuple[int, str], moment: Moment, until: float) -> None:
        self._bindings[key] = _Binding(moment, until)
        self._bindings.move_to_end(key)
        if len(self._bindings) > BINDINGS_MAX:
            self._bindings.popitem(last=False)

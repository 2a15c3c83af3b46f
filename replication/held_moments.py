"""Moments that stay while a command works with them, however long it takes, and whatever is thinned out meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from dedup.errors import MomentGone
from dedup.history import History
from dedup.types import Moment

ATTEMPTS_MAX: Final = 8
"""How often a TIME is looked up anew because what it named was thinned out before it was held."""


@contextmanager
def held_moments(history: History, *texts: str) -> Iterator[tuple[Moment, ...]]:
    """The recovery points that the TIMEs name, held while the block runs. BadTime, UnknownName, MomentRefused."""
    with ExitStack() as held:
        yield tuple(_held(history, text, held) for text in texts)


def _held(history: History, text: str, held: ExitStack) -> Moment:
    for attempt in range(ATTEMPTS_MAX):
        moment = history.resolve(text)
        try:
            history.hold(moment.seq)
        except MomentGone:
            if attempt + 1 == ATTEMPTS_MAX:
                raise
            continue
        held.callback(history.release, moment.seq)
        return moment
    raise AssertionError("the last attempt returns or raises")

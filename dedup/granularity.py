"""Granularity: how finely a data journal keeps recovery points, as a text and as the width of a window.

A width of 0 is every write. A windowed journal keeps one point of each window, aligned to the clock, once the window
has closed: by its time, by a bookmark or snapshot, or because another data journal is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dedup.errors import BadGranularity
from dedup.moment import duration_ns, duration_text

if TYPE_CHECKING:
    from dedup.ids import JournalId
    from dedup.types import JournalSpec

EVERY_WRITE: Final = "every-write"
SNAPSHOTS: Final = "snapshots"
"""Of history older than all tiers of the retention policy: only what has a name is kept there."""
FOREVER: Final = (1 << 63) - 1
"""The width of the window of that history, whose last point is kept as well, as the new base."""
_SECOND: Final = 1_000_000_000
WINDOW_NS_MAX: Final = 86_400 * _SECOND
"""The widest window of a data journal: a day."""


def granularity_ns(text: str) -> int:
    """`every-write`, or a DURATION from 1s to 1d, in nanoseconds. BadGranularity."""
    width = 0 if text == EVERY_WRITE else duration_ns(text) or -1
    if width < 0:
        raise BadGranularity(f"{text!r} is no granularity: use {EVERY_WRITE}, or a duration from 1s to 1d such as 60s")
    check_granularity(width)
    return width


def check_granularity(width_ns: int) -> None:
    """BadGranularity unless a data journal may have windows of that width: whole seconds up to a day, or none (0)."""
    if width_ns and not (_SECOND <= width_ns <= WINDOW_NS_MAX and width_ns % _SECOND == 0):
        raise BadGranularity(
            f"a data journal cannot keep one point per {width_ns / _SECOND:g} s; use {EVERY_WRITE}, or whole seconds "
            "from 1s to 1d"
        )


def granularity_text(width_ns: int) -> str:
    """The text of a width; `snapshots` of FOREVER."""
    if width_ns == FOREVER:
        return SNAPSHOTS
    return duration_text(width_ns) if width_ns else EVERY_WRITE


def journal_fields(spec: JournalSpec, in_use: JournalId) -> dict[str, object]:
    """A data journal as `journal list` shows it; `in_use` is the one that its group routes to."""
    return {
        "name": spec.name,
        "id": spec.journal,
        "granularity": granularity_text(spec.granularity_ns),
        "in_use": spec.journal == in_use,
    }

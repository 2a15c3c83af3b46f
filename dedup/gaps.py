"""Gaps, found without reading all of them: those in the index by seeks, the few since the last checkpoint from memory.

Invariants:
- gaps in the index share no seq: where corrections of writes overlap, the catalog keeps one gap for them (`joined`);
- within a clock run a gap with higher seqs has later times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from dedup.types import Gap, Seq, TimeNs

if TYPE_CHECKING:
    from dedup.catalog import Catalog, Txn
    from dedup.group_state import GroupState


def inside(gap: Gap, seq: Seq) -> bool:
    """Whether the gap covers the seq; an open one has no end."""
    return gap.first <= seq and (gap.last is None or seq <= gap.last)


def is_closed(gap: Gap) -> bool:
    """Whether it has an end, which every gap has but the last of a group."""
    return gap.last is not None and gap.to_time is not None and gap.first <= gap.last


def joined(one: Gap, other: Gap) -> Gap:
    """One closed gap in the place of two that overlap."""
    first, second = sorted((one, other), key=lambda gap: gap.first)
    assert first.last is not None and second.last is not None
    assert first.to_time is not None and second.to_time is not None
    return replace(
        first,
        last=max(first.last, second.last),
        from_time=min(first.from_time, second.from_time),
        to_time=max(first.to_time, second.to_time),
    )


def merged(gaps: Iterable[Gap]) -> list[Gap]:
    """The same gaps by seq, those that overlap as one; an open one stands last, since nothing follows it."""
    found: list[Gap] = []
    for gap in sorted(gaps, key=lambda gap: gap.first):
        last = found[-1].last if found else None
        if last is not None and gap.last is not None and gap.first <= last:
            found[-1] = joined(found[-1], gap)
        else:
            found.append(gap)
    return found


class Gaps:
    """The gaps of a group as of one transaction and one state that goes on from it."""

    def __init__(self, catalog: Catalog, txn: Txn, state: GroupState) -> None:
        self._catalog = catalog
        self._txn = txn
        self._base = state.base
        is_open = state.base and state.gap is not None
        self._since = [*state.new_gaps, *([state.gap] if is_open and state.gap is not None else [])]

    def all(self) -> list[Gap]:
        """Every one that does not end before the base, by seq; the last may be open."""
        found = merged([*self._catalog.gaps(self._txn), *self._since])
        return [gap for gap in found if gap.last is None or gap.last > self._base]

    def at(self, seq: Seq) -> Gap | None:
        """The gap that the seq is in."""
        indexed = self._catalog.gap_from(self._txn, seq)
        candidates = [gap for gap in (indexed, *self._since) if gap is not None and inside(gap, seq)]
        return merged(candidates)[0] if candidates else None

    def during(self, time: TimeNs, after: Seq, last: Seq) -> Gap | None:
        """The gap that begins in after+1..last, seqs of one clock run, and in which that time is."""
        candidates = [gap for gap in self._since if after < gap.first <= last and gap.from_time < time]
        low, high = int(after), int(last)
        while low < high:
            middle = (low + high + 1) // 2
            gap = self._catalog.gap_from(self._txn, Seq(middle))
            if gap is None or gap.first <= after:
                low = middle
            elif gap.from_time < time:
                candidates.append(gap)
                low = middle
            else:
                high = gap.first - 1
        return next((gap for gap in candidates if gap.to_time is None or time < gap.to_time), None)

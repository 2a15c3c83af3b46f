"""Which recovery point a TIME names.

Invariants:
- a moment in a gap is refused, with the nearest recovery points on both sides (`gap-is-said`), also where the records
  around the gap are consolidated;
- what is looked at does not grow with history: moments and gaps are found by seeks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dedup.errors import MomentRefused, UnknownName
from dedup.metadata_journal import Logged
from dedup.moment import AtSeq, AtTime, Latest, Named, parse_time, rfc3339
from dedup.synthesis import View
from dedup.types import Gap, Moment, RunStart, Seq, TimeNs

if TYPE_CHECKING:
    from dedup.reader import GroupReader

_ADJACENT_GAPS_MAX: Final = 64
"""How many gaps in a row, with nothing between them, the search for a nearest recovery point goes past."""


def resolve(group: GroupReader, text: str, now: TimeNs | None) -> Moment:
    """The recovery point that `text` names, as of the group's last refresh. Errors as `GroupReader.resolve`."""
    return _Resolution(group, text).resolve(now)


class _Resolution:
    """One TIME being resolved."""

    def __init__(self, group: GroupReader, text: str) -> None:
        self._group = group
        self._text = text

    def resolve(self, now: TimeNs | None) -> Moment:
        spec = parse_time(self._text, now=now)
        group = self._group
        gap: Gap | None = None
        match spec.where:
            case Latest():
                view = group.view(group.held)
            case AtSeq(seq):
                if seq > group.held:
                    raise self._outside(before=False)
                view, gap = group.view(seq), group.gap_at(seq)
            case Named(name, bookmark):
                view = group.view(self._named(name, bookmark=bookmark))
            case AtTime(time):
                named = group.snapshot(spec.text)
                if named is not None:
                    view = group.view(named.seq)
                else:
                    view, gap = self._at_time(time)
        if spec.flush:
            view, gap = self._flushed(view), None
        base = group.state.base
        if not base or view.state.held < base:
            raise self._outside(before=True)
        gap = gap or group.gap_at(view.state.held)
        if gap is not None:
            raise self._in_gap(gap)
        return group.moment(view)

    def _named(self, name: str, *, bookmark: bool) -> Seq:
        snapshot = self._group.snapshot(name)
        if snapshot is None or (bookmark and snapshot.kind != "bookmark"):
            kind = "bookmark" if bookmark else "bookmark or snapshot"
            raise UnknownName(
                f"group {self._group.name} has no {kind} {name!r}; `rewindfs snapshot list` shows what it has"
            )
        return snapshot.seq

    def _flushed(self, view: View) -> View:
        """The last flushed point at or before the view that can still be told from others."""
        while view.state.last_flush != view.state.held:
            if not view.state.last_flush:
                raise self._outside(before=True)
            view = self._group.view(view.state.last_flush)
        return view

    # -- by time -----------------------------------------------------------------------------------------------------

    def _at_time(self, time: TimeNs) -> tuple[View, Gap | None]:
        """The last point at or before the time, and the gap that the time itself is in."""
        run, next_run = self._run_at(time)
        stopped = self._group.held

        def stop(logged: Logged) -> bool:
            nonlocal stopped
            stopped = logged.seq
            return logged.run > run.run or (logged.run == run.run and logged.time > time)

        view = self._group.view_before(stop, run, time)
        last = stopped if next_run is None else min(stopped, next_run.first)
        return view, self._group.gap_during(time, view.state.held, last)

    def _run_at(self, time: TimeNs) -> tuple[RunStart, RunStart | None]:
        """The clock run that holds the time, and the one that follows it."""
        runs = self._group.runs()
        ends = [*(run.previous_time for run in runs[1:]), self._group.state.time]
        holding = [index for index, run in enumerate(runs) if run.time <= time <= ends[index]]
        if len(holding) > 1:
            starts = ", ".join(f"seq={runs[index].first}" for index in holding)
            raise MomentRefused(
                f"{self._text}: the agent's clock stepped back, so this time was met {len(holding)} times; "
                f"use seq=N, from one of the clock runs that start at {starts}"
            )
        if not holding:
            raise self._outside(before=bool(runs) and time < min(run.time for run in runs))
        (index,) = holding
        return runs[index], runs[index + 1] if index + 1 < len(runs) else None

    # -- what is refused ---------------------------------------------------------------------------------------------

    def _in_gap(self, gap: Gap) -> MomentRefused:
        sides = [point for point in (self._point_before(gap), self._point_after(gap)) if point is not None]
        nearest = " and ".join(_point_text(view) for view in sides) or "none"
        return MomentRefused(f"{self._text}: in a gap ({gap.reason}), no consistent recovery point; nearest: {nearest}")

    def _point_before(self, gap: Gap) -> View | None:
        for _ in range(_ADJACENT_GAPS_MAX):
            if gap.first <= self._group.state.base:
                return None
            view = self._group.view(Seq(gap.first - 1))
            other = self._group.gap_at(view.state.held)
            if other is None:
                return view if view.state.held >= self._group.state.base else None
            gap = other
        return None

    def _point_after(self, gap: Gap) -> View | None:
        for _ in range(_ADJACENT_GAPS_MAX):
            view = None if gap.last is None else self._group.first_from(Seq(gap.last + 1))
            if view is None:
                return None
            other = self._group.gap_at(view.state.held)
            if other is None:
                return view
            gap = other
        return None

    def _outside(self, *, before: bool) -> MomentRefused:
        group = self._group
        if not group.state.base:
            return MomentRefused(
                f"{self._text}: group {group.name} has no recovery point yet, its base snapshot is being made"
            )
        side = "before the first" if before else "after the last"
        view = group.view(group.state.base if before else group.held)
        return MomentRefused(f"{self._text}: {side} recovery point, {_point_text(view)}")


def _point_text(view: View) -> str:
    return f"seq={view.state.held} at {rfc3339(view.state.time)}"

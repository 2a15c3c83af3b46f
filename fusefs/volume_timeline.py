"""The recovery points at which a volume, or the volumes of a directory, may have been different from before."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import lru_cache

from dedup.errors import MomentGone, MomentRefused
from dedup.history import History
from dedup.types import Moment, Seq, VolumeState
from fusefs.clone_tree import chosen, volumes_of

SeqRange = tuple[Seq, Seq]
"""first..last"""


class VolumeTimeline:
    """A `bisection.Timeline` over a history, whose ends are held. What it tells of is kept until the history is closed.

    Any thread.
    """

    def __init__(
        self,
        history: History,
        turn: threading.Lock,
        path: str,
        within: SeqRange,
        gaps: Iterable[SeqRange],
        *,
        flushed: bool,
    ) -> None:
        """`turn` is for whoever uses the history. `path`: of a volume or directory, empty for all. `flushed`: only
        flushed points are seen. `gaps` are all that there are in `within`."""
        self._history = history
        self._turn = turn
        self._path = path
        self._flush = "~flush" if flushed else ""
        self._runs = _without(within, gaps)
        """Where recovery points may be, in order."""
        self.volumes_at = lru_cache(maxsize=64)(self._volumes_at)

    def point_in(self, after: Seq, before: Seq) -> Moment | None:
        """As `Timeline.point_in`."""
        while (seq := self._middle(after, before)) is not None:
            try:
                moment = self._held(f"seq={seq}{self._flush}")
            except MomentGone:
                continue  # thinned out between two looks
            except MomentRefused:
                # The last one at or before it is in a gap, or there is none: so for all from that gap up to here.
                self._runs = [(Seq(seq + 1), last) if first <= seq <= last else (first, last)
                              for first, last in self._runs]  # fmt: skip
                continue
            if moment.seq > after:
                return moment
            after = seq
        return None

    def _held(self, text: str) -> Moment:
        """A recovery point, which is kept from now on: others will be compared with it."""
        with self._turn:
            moment = self._history.resolve(text)
            self._history.hold(moment.seq)
        return moment

    def _middle(self, after: Seq, before: Seq) -> Seq | None:
        runs = [(max(first, after + 1), min(last, before - 1)) for first, last in self._runs]
        lengths = [max(0, last - first + 1) for first, last in runs]
        index = sum(lengths) // 2
        for (first, _), length in zip(runs, lengths, strict=True):
            if index < length:
                return Seq(first + index)
            index -= length
        return None

    def require(self, moment: Moment) -> bool:
        """UnknownName where the path meant nothing then; returns whether it meant one volume and no directory."""
        with self._turn:
            found = chosen(self._history.group_at(moment.seq), self._path)
        return found[0].path == self._path

    def alike(self, one: Moment, other: Moment) -> bool:
        """As `Timeline.alike`: the same paths, attributes and pointers."""
        before, after = self.volumes_at(one.seq), self.volumes_at(other.seq)
        if before.keys() != after.keys():
            return False
        return all(self._unchanged(before[path], one.seq, after[path], other.seq) for path in before)

    def _unchanged(self, old: VolumeState, old_seq: Seq, new: VolumeState, new_seq: Seq) -> bool:
        if (old.size, old.mode, old.uid, old.gid) != (new.size, new.mode, new.uid, new.gid):
            return False
        with self._turn:
            return next(self._history.differing((old.volume, old_seq), (new.volume, new_seq)), None) is None

    def _volumes_at(self, seq: Seq) -> dict[str, VolumeState]:
        """Those that the path means; none where there were none."""
        with self._turn:
            return volumes_of(self._history.group_at(seq), self._path)


def _without(within: SeqRange, gaps: Iterable[SeqRange]) -> list[SeqRange]:
    """The parts of `within` that no gap covers."""
    first, last = within
    runs: list[SeqRange] = []
    for start, end in sorted(gaps):
        if first < start:
            runs.append((first, min(last, Seq(start - 1))))
        first = max(first, Seq(end + 1))
    runs.append((first, last))
    return [run for run in runs if run[0] <= run[1]]

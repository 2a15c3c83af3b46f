"""Retention: how finely history is kept as it grows older, as a policy in a file and as a pure plan.

A policy has four tiers, each of which reaches from now back to an age: every write, one point a minute, one an hour,
one a day. What is older than all of them is kept at its named points only. It also has the store's caps.

Invariants of the plan, for whatever points and whatever policy:
- a point that is kept is kept again when the plan is made of what was kept (idempotent); what is kept at a later time
  is a subset of what is kept now: time never asks for a point that an earlier thinning has removed;
- buckets are aligned to the clock and nested, and a bucket is thinned only when it has wholly aged: its end counts;
- a named point and the last point of all are always kept.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from dedup import layout
from dedup.errors import BadPolicy, Damaged, UnknownFormat
from dedup.granularity import FOREVER
from dedup.moment import duration_ns, duration_text
from dedup.storage import Storage
from dedup.types import ClockRun, Seq, TimeNs

_SECOND: Final = 1_000_000_000
MINUTE_NS: Final = 60 * _SECOND
HOUR_NS: Final = 3_600 * _SECOND
DAY_NS: Final = 86_400 * _SECOND
REACH_MAX_NS: Final = 36_500 * DAY_NS
"""No tier reaches further back than a hundred years."""
LIMIT_BYTES_MIN: Final = 64 << 20
"""The least hard limit: below it a batch and a checkpoint have no room to work."""
POLICY_VERSION: Final = 1
_FILE_BYTES_MAX: Final = 4096


class AtLimit(Enum):
    """What happens to writes when the store has reached its hard limit. Never silently."""

    BLOCK = "block"
    """They wait until there is room."""
    THIN = "thin"
    """History is thinned faster until it fits; they wait meanwhile."""
    FAIL = "fail"
    """The store is full for them, as when its disk is: the agent's outage policy decides."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How long each tier reaches back from now; 0: there is no such tier. The caps in bytes; None: no cap."""

    every_write_ns: int = 2 * HOUR_NS
    minutes_ns: int = 24 * HOUR_NS
    hours_ns: int = 7 * DAY_NS
    days_ns: int = 30 * DAY_NS
    soft_limit_bytes: int | None = None
    hard_limit_bytes: int | None = None
    at_limit: AtLimit = AtLimit.BLOCK

    @property
    def tiers(self) -> tuple[tuple[int, int], ...]:
        """(window, reach) of the tiers that there are, from fine to coarse."""
        tiers = (
            (0, self.every_write_ns),
            (MINUTE_NS, self.minutes_ns),
            (HOUR_NS, self.hours_ns),
            (DAY_NS, self.days_ns),
        )
        return tuple(tier for tier in tiers if tier[1])


def check_policy(policy: Policy) -> None:
    """BadPolicy unless the tiers ascend, there is one at all, and the caps make sense."""
    reaches = [reach for _, reach in policy.tiers]
    if not reaches:
        raise BadPolicy("a policy without any tier would keep named points only; give at least one more than 0")
    if any(reach % _SECOND or not 0 < reach <= REACH_MAX_NS for reach in reaches):
        raise BadPolicy("a tier reaches back a whole number of seconds, a hundred years at most")
    if any(later <= earlier for earlier, later in pairwise(reaches)):
        raise BadPolicy(
            f"the tiers must ascend, and {_tiers_text(policy)} do not; let each coarser one reach further back, "
            "or give it 0 to go without it"
        )
    soft, hard = policy.soft_limit_bytes, policy.hard_limit_bytes
    if any(limit is not None and not 0 < limit < 1 << 63 for limit in (soft, hard)):
        raise BadPolicy("a limit is a number of bytes above 0, or none")
    if hard is not None and hard < LIMIT_BYTES_MIN:
        raise BadPolicy(f"a hard limit of {hard} bytes leaves no room to work; the least is {LIMIT_BYTES_MIN}")
    if soft is not None and hard is not None and hard < soft:
        raise BadPolicy(
            f"the hard limit of {hard} bytes is below the soft limit of {soft}; raise it or lower the other"
        )


def _tiers_text(policy: Policy) -> str:
    words = (
        ("every-write", policy.every_write_ns),
        ("minutes", policy.minutes_ns),
        ("hours", policy.hours_ns),
        ("days", policy.days_ns),
    )
    return ", ".join(f"{word} {duration_text(reach)}" for word, reach in words if reach)


def changed_policy(policy: Policy, changes: Mapping[str, object]) -> Policy:
    """The policy with some fields changed, by their names; values as JSON has them. BadPolicy."""
    known = {field.name for field in fields(Policy)}
    if unknown := sorted(changes.keys() - known):
        raise BadPolicy(f"a policy has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    try:
        changed = msgspec.convert({**policy_fields(policy), **changes}, Policy)
    except msgspec.ValidationError as error:
        raise BadPolicy(f"the policy cannot be read: {error}") from error
    check_policy(changed)
    return changed


def policy_fields(policy: Policy) -> dict[str, object]:
    """Its fields as `changed_policy` takes them."""
    found: dict[str, object] = msgspec.to_builtins(policy)
    return found


def hastened(policy: Policy, halvings: int, stood_still_ns: int = 0) -> Policy | None:
    """The policy with every tier halved so many times; None when the finest would reach back less than a second.

    History ages by the times of its own records, which stand still while writes wait: `stood_still_ns` is taken from
    each tier, and may leave it less than nothing. Such a policy is for the plan only, never saved.
    """
    if policy.tiers[0][1] >> halvings < _SECOND:
        return None

    def reach(full: int) -> int:
        return (full >> halvings) - stood_still_ns or -1  # 0 means that there is no such tier

    return replace(
        policy,
        every_write_ns=reach(policy.every_write_ns) if policy.every_write_ns or stood_still_ns else 0,
        minutes_ns=reach(policy.minutes_ns) if policy.minutes_ns else 0,
        hours_ns=reach(policy.hours_ns) if policy.hours_ns else 0,
        days_ns=reach(policy.days_ns) if policy.days_ns else 0,
    )


# ---- the file --------------------------------------------------------------------------------------------------------


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    """The first line of the policy's file, JSON. FORMAT.md, "Policy"."""

    version: int
    every_write: str
    minutes: str
    hours: str
    days: str
    soft_limit_bytes: int | None
    hard_limit_bytes: int | None
    at_limit: str


class _Versioned(msgspec.Struct):
    version: int


def load_policy(storage: Storage, store_path: Path) -> Policy:
    """The store's policy; the default one where none was ever set. Damaged, UnknownFormat."""
    path = store_path / layout.POLICY_NAME
    try:
        fd = storage.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return Policy()
    try:
        data = storage.pread(fd, _FILE_BYTES_MAX + 1, 0)
    finally:
        storage.close(fd)
    try:
        return _unpack(data, path)
    except (ValueError, BadPolicy, RecursionError) as error:  # msgspec's errors are ValueErrors too
        raise Damaged(
            f"{path}: the retention policy is damaged ({error}); `rewindfs retention set {store_path}` writes a new one"
        ) from error


def save_policy(storage: Storage, store_path: Path, policy: Policy) -> None:
    """Makes it the store's policy, durably: after a crash the old one or this one is there. BadPolicy, StoreFull, …"""
    check_policy(policy)
    path = store_path / layout.POLICY_NAME
    temporary = path.with_name(layout.POLICY_NAME + layout.TEMPORARY_SUFFIX)
    fd = storage.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        storage.pwritev(fd, [_pack(policy)], 0)
        storage.datasync(fd)
    finally:
        storage.close(fd)
    storage.replace(temporary, path)


def _pack(policy: Policy) -> bytes:
    document = _Document(
        POLICY_VERSION,
        duration_text(policy.every_write_ns),
        duration_text(policy.minutes_ns),
        duration_text(policy.hours_ns),
        duration_text(policy.days_ns),
        policy.soft_limit_bytes,
        policy.hard_limit_bytes,
        policy.at_limit.value,
    )
    line = msgspec.json.encode(document) + b"\n"
    return line + f"{layout.checksum(line):016x}\n".encode()


def _unpack(data: bytes, path: Path) -> Policy:
    line, _, rest = data.partition(b"\n")
    line += b"\n"
    if len(data) > _FILE_BYTES_MAX or rest != f"{layout.checksum(line):016x}\n".encode():
        raise ValueError("its checksum does not match")
    version = msgspec.json.decode(line, type=_Versioned).version
    if version != POLICY_VERSION:
        raise UnknownFormat(f"{path} has version {version}, this rewindfs knows {POLICY_VERSION}; use a newer one")
    document = msgspec.json.decode(line, type=_Document)
    policy = Policy(
        _reach(document.every_write),
        _reach(document.minutes),
        _reach(document.hours),
        _reach(document.days),
        document.soft_limit_bytes,
        document.hard_limit_bytes,
        AtLimit(document.at_limit),
    )
    check_policy(policy)
    return policy


def _reach(text: str) -> int:
    reach = duration_ns(text)
    if reach is None:
        raise ValueError(f"{text!r} is no duration")
    return reach


# ---- the plan --------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A recovery point, as far as the plan needs it."""

    seq: Seq
    time: TimeNs
    run: ClockRun
    flushed: bool
    granularity_ns: int = 0
    """Window of the data journal that its record was routed to; 0: every write."""
    closes: bool = False
    """A bookmark, a snapshot or a switch of the data journal ends the window here."""


def window_ns(policy: Policy, age_ns: int) -> int:
    """At what window a point of that age is kept: 0 (every write), a minute, an hour, a day, FOREVER."""
    for window, reach in policy.tiers:
        if age_ns < reach:
            return window
    return FOREVER


def bucket(time: TimeNs, window: int) -> tuple[int, int]:
    """(begin, end) of the aligned bucket that holds the time; its end is the next one's begin."""
    begin = time // window * window
    return begin, begin + window


class _Bucket(NamedTuple):
    """The points of one run that are thinned to one."""

    window: int
    """The tier's, or the data journal's granularity where that is coarser."""
    span: int
    """Length of the bucket; in FOREVER that of the coarsest tier."""
    end: int
    until: int
    """Times of the same granularity below this lie in the same bucket; not all of them, maybe."""


class _Ages:
    """A policy seen from `now`: which bucket a point is in, and whether that one is thinned yet."""

    def __init__(self, policy: Policy, now: TimeNs) -> None:
        self._now = now
        self._steps: list[tuple[int, int, int]] = []
        """(window, length of its buckets, newest end that a bucket may have), from fine to coarse."""
        begins = 0
        coarsest = 0
        for window, reach in policy.tiers:
            if window:
                self._steps.append((window, window, now - begins))
            begins = reach
            coarsest = window
        self._steps.append((FOREVER, coarsest, now - begins))

    def bucket(self, time: TimeNs, granularity: int) -> _Bucket | None:
        """The bucket that the point is thinned in now; None when it stays whatever is around it.

        A windowed journal's bucket lies as a whole in the tier's bucket that its last instant lies in, so that buckets
        are nested whatever the granularity. For the same reason the first step that is not due ends the search.
        """
        place, end = int(time), int(time)
        found = None
        if granularity:
            _, end = bucket(time, granularity)
            place = end - 1
            if end > self._now:
                return None
            found = _Bucket(granularity, granularity, end, end)
        for window, length, newest_end in self._steps:
            span = max(length, granularity)
            closes = end if span == granularity else place // span * span + span
            if closes > newest_end:
                break
            found = _Bucket(max(window, granularity), span, closes, end if granularity else closes)
        return found


def kept(points: Iterable[Point], policy: Policy, now: TimeNs, named: Collection[Seq]) -> Iterator[Seq]:
    """Which of the points the policy keeps at `now`, in order of seq, as they came. `named` should be a set.

    Of each bucket that has wholly aged, per clock run, the last flushed point, else the last one; what has not, whole.
    Named points and the last of all always, those that close a window unless they are older than all tiers. Of each
    stretch that is older than all tiers only the last bucket has its point. Holds one bucket's points at most.
    """
    ages = _Ages(policy, now)
    here: _Bucket | None = None
    run = granularity = -1
    sure: list[Seq] = []
    chosen: Point | None = None
    last: Point | None = None
    for point in points:
        last = point
        if here is None or point.run != run or point.granularity_ns != granularity or point.time >= here.until:
            found = ages.bucket(point.time, point.granularity_ns)
            if not _same(here, found) or point.run != run:
                outlived = here is not None and found is not None and here.window == found.window == FOREVER
                yield from _of_bucket(sure, None if outlived else chosen)
                sure, chosen = [], None
            here, run, granularity = found, point.run, point.granularity_ns
        if here is None:
            yield point.seq
            continue
        if point.seq in named or (point.closes and here.window != FOREVER):
            sure.append(point.seq)
        if chosen is None or point.flushed or not chosen.flushed:
            chosen = point
    if here is not None:
        yield from _of_bucket(sure if last is None else [*sure, last.seq], chosen)


def _same(one: _Bucket | None, other: _Bucket | None) -> bool:
    return one is not None and other is not None and one[:3] == other[:3]


def _of_bucket(sure: list[Seq], chosen: Point | None) -> list[Seq]:
    return sorted({*sure, chosen.seq} if chosen is not None else {*sure})


def segment_window(policy: Policy, now: TimeNs, newest_time: TimeNs, granularity_ns: int) -> int:
    """At what window a segment whose newest entry has that time is to be consolidated by now; 0: not yet.

    The largest window whose aligned bucket of that time has ended as long ago as the window begins, or FOREVER.
    """
    found = _Ages(policy, now).bucket(newest_time, granularity_ns)
    return 0 if found is None else found.window

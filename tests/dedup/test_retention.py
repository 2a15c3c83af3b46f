"""The retention policy: its file, and what its plan promises of any history."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import layout
from dedup.errors import BadPolicy, Damaged, StoreFailed, StoreFull, UnknownFormat
from dedup.granularity import FOREVER
from dedup.moment import duration_ns, duration_text
from dedup.retention import (
    DAY_NS,
    HOUR_NS,
    LIMIT_BYTES_MIN,
    MINUTE_NS,
    AtLimit,
    Point,
    Policy,
    bucket,
    changed_policy,
    hastened,
    kept,
    load_policy,
    policy_fields,
    save_policy,
    segment_window,
    window_ns,
)
from dedup.storage import Storage
from dedup.types import ClockRun, Seq, TimeNs
from tests.dedup.faults import FaultyStorage

SECOND = 10**9
NOW = TimeNs(1_795_342_530_123_456_789)
DEFAULT = Policy()


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_store_without_a_policy_has_the_default_one(tmp_path: Path) -> None:
    assert load_policy(Storage(), tmp_path) == Policy(
        2 * HOUR_NS, 24 * HOUR_NS, 7 * DAY_NS, 30 * DAY_NS, None, None, AtLimit.BLOCK
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy that is allowed: some tiers, ascending, and caps."""
    reaches = sorted(draw(st.lists(st.integers(1, 90 * 86_400), min_size=4, max_size=4, unique=True)))
    there = draw(st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
    soft, hard = draw(st.none() | st.integers(1, 1 << 50)), draw(st.none() | st.integers(LIMIT_BYTES_MIN, 1 << 50))
    if soft is not None and hard is not None:
        soft = min(soft, hard)
    tiers = [reach * SECOND if one else 0 for reach, one in zip(reaches, there, strict=True)]
    return Policy(*tiers, soft, hard, draw(st.sampled_from(AtLimit)))


@given(policy=policies())
def test_what_is_saved_is_loaded(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "policies"
    path.mkdir(exist_ok=True)
    save_policy(Storage(), path, policy)
    assert load_policy(Storage(), path) == policy


def test_the_file_is_a_line_of_json_and_its_checksum(tmp_path: Path) -> None:
    save_policy(Storage(), tmp_path, replace(DEFAULT, hard_limit_bytes=1 << 30, at_limit=AtLimit.THIN))
    document, checksum, rest = (tmp_path / layout.POLICY_NAME).read_bytes().split(b"\n")
    assert document == (
        b'{"version":1,"every_write":"2h","minutes":"1d","hours":"7d","days":"30d",'
        b'"soft_limit_bytes":null,"hard_limit_bytes":1073741824,"at_limit":"thin"}'
    )
    assert int(checksum, 16) == layout.checksum(document + b"\n")
    assert rest == b""
    assert [file.name for file in tmp_path.iterdir()] == [layout.POLICY_NAME]


def test_a_damaged_policy_is_said_with_the_way_out(tmp_path: Path) -> None:
    """Whichever bit flips, and wherever the file ends."""
    save_policy(Storage(), tmp_path, DEFAULT)
    path = tmp_path / layout.POLICY_NAME
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    for data in [*flipped, *(whole[:end] for end in range(len(whole))), whole + b"\n", whole + b"x" * 5000]:
        path.write_bytes(data)
        with pytest.raises(Damaged, match=f"^{path}: .*rewindfs retention set {tmp_path}") as caught:
            load_policy(Storage(), tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [(b'"2h"', b'"2x"'), (b'"2h"', b'"8d"'), (b'"block"', b'"wait"'), (b"null", b"-1"), (b'"days"', b'"dais"')],
)
def test_a_policy_that_means_nothing_is_damaged(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    """Though its checksum is right."""
    save_policy(Storage(), tmp_path, DEFAULT)
    path = tmp_path / layout.POLICY_NAME
    line = path.read_bytes().split(b"\n")[0].replace(*change, 1) + b"\n"
    path.write_bytes(line + f"{layout.checksum(line):016x}\n".encode())
    with pytest.raises(Damaged, match="retention set"):
        load_policy(Storage(), tmp_path)


def test_a_policy_of_another_version_is_not_guessed_at(tmp_path: Path) -> None:
    line = b'{"version":2,"weeks":"52d"}\n'
    (tmp_path / layout.POLICY_NAME).write_bytes(line + f"{layout.checksum(line):016x}\n".encode())
    with pytest.raises(UnknownFormat, match="version 2"):
        load_policy(Storage(), tmp_path)


def test_a_save_that_fails_leaves_the_old_policy(tmp_path: Path) -> None:
    old, new = replace(DEFAULT, days_ns=31 * DAY_NS), replace(DEFAULT, days_ns=32 * DAY_NS)
    save_policy(Storage(), tmp_path, old)
    full, broken = FaultyStorage(), FaultyStorage()
    full.refuse_write_after = 20
    broken.refuse_sync = True
    with pytest.raises(StoreFull):
        save_policy(full, tmp_path, new)
    assert load_policy(Storage(), tmp_path) == old
    with pytest.raises(StoreFailed):
        save_policy(broken, tmp_path, new)
    assert load_policy(Storage(), tmp_path) == old
    save_policy(Storage(), tmp_path, new)
    assert load_policy(Storage(), tmp_path) == new


def test_the_file_is_synced_before_it_takes_its_name(tmp_path: Path) -> None:
    storage = FaultyStorage()
    save_policy(storage, tmp_path, DEFAULT)
    assert [path.name for path in storage.synced] == [layout.POLICY_NAME + layout.TEMPORARY_SUFFIX]


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (Policy(0, 0, 0, 0), "without any tier"),
        (replace(DEFAULT, minutes_ns=HOUR_NS), "must ascend, and every-write 2h, minutes 1h"),
        (replace(DEFAULT, hours_ns=DAY_NS), "must ascend"),
        (Policy(3 * DAY_NS, 0, 2 * DAY_NS, 0), "must ascend, and every-write 3d, hours 2d do not"),
        (replace(DEFAULT, every_write_ns=-SECOND), "whole number of seconds"),
        (replace(DEFAULT, every_write_ns=SECOND // 2), "whole number of seconds"),
        (replace(DEFAULT, days_ns=40_000 * DAY_NS), "a hundred years"),
        (replace(DEFAULT, soft_limit_bytes=0), "above 0"),
        (replace(DEFAULT, hard_limit_bytes=-5), "above 0"),
        (replace(DEFAULT, hard_limit_bytes=LIMIT_BYTES_MIN - 1), "leaves no room to work"),
        (replace(DEFAULT, soft_limit_bytes=1 << 30, hard_limit_bytes=1 << 29), "is below the soft limit of 1073741824"),
    ],
)
def test_policies_that_are_refused(policy: Policy, why: str, tmp_path: Path) -> None:
    with pytest.raises(BadPolicy, match=why) as caught:
        save_policy(Storage(), tmp_path, policy)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_is_changed_by_the_names_of_its_fields() -> None:
    assert changed_policy(DEFAULT, {}) == DEFAULT
    changed = changed_policy(DEFAULT, {"days_ns": 40 * DAY_NS, "hard_limit_bytes": 1 << 30, "at_limit": "thin"})
    assert changed == replace(DEFAULT, days_ns=40 * DAY_NS, hard_limit_bytes=1 << 30, at_limit=AtLimit.THIN)
    assert changed_policy(changed, {"hard_limit_bytes": None}) == replace(changed, hard_limit_bytes=None)


@given(policies(), policies())
def test_a_policy_is_its_fields(policy: Policy, other: Policy) -> None:
    assert changed_policy(other, policy_fields(policy)) == policy


@pytest.mark.parametrize(
    "change",
    [{"weeks_ns": 1}, {"days_ns": "30d"}, {"days_ns": 1.5}, {"at_limit": "wait"}, {"days_ns": 1}, {"days_ns": None}],
)
def test_changes_that_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadPolicy) as caught:
        changed_policy(DEFAULT, change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("24h", 86400), ("7d", 604800), ("90m", 5400), ("45s", 45), ("1d2h3m4s", 93784)]
)
def test_durations(text: str, seconds: int) -> None:
    assert duration_ns(text) == seconds * SECOND
    assert duration_ns(duration_text(seconds * SECOND)) == seconds * SECOND


@pytest.mark.parametrize("text", ["", "2", "h", "2 h", "-2h", "2h1d", "1.5h", "2w", "9" * 13 + "s"])
def test_what_is_no_duration(text: str) -> None:
    assert duration_ns(text) is None


@given(st.integers(0, 1 << 40))
def test_printed_durations_parse_back(seconds: int) -> None:
    assert duration_ns(duration_text(seconds * SECOND)) == seconds * SECOND


@given(policies(), st.integers(1, 40))
def test_hastened_policies_reach_less_far_back_and_come_to_an_end(policy: Policy, halvings: int) -> None:
    assert hastened(policy, 0) == policy
    assert hastened(policy, 60) is None
    faster = hastened(policy, halvings)
    if faster is not None:
        reaches = [reach for _, reach in faster.tiers]
        assert reaches == sorted(set(reaches))
        assert [window for window, _ in faster.tiers] == [window for window, _ in policy.tiers]
        assert all(less < more for (_, less), (_, more) in zip(faster.tiers, policy.tiers, strict=True))


@given(policies(), st.integers(0, 40), st.integers(1, 10**15))
def test_a_clock_that_stood_still_is_made_up_for(policy: Policy, halvings: int, stood_still: int) -> None:
    """As if the time had passed."""
    faster, later = hastened(policy, halvings), hastened(policy, halvings, stood_still)
    if faster is None or later is None:
        assert faster is later
        return
    assert [window for window, _ in later.tiers if window] == [window for window, _ in faster.tiers if window]
    for age in (0, SECOND, HOUR_NS, 5 * DAY_NS):
        passed = TimeNs(NOW + age + stood_still)
        if stood_still not in {reach for _, reach in faster.tiers}:
            assert segment_window(later, TimeNs(NOW + age), NOW, 0) == segment_window(faster, passed, NOW, 0)


# ---- the plan --------------------------------------------------------------------------------------------------------

TINY = Policy(2 * MINUTE_NS, HOUR_NS, 5 * HOUR_NS, 4 * DAY_NS)
"""Reaches short enough that few points meet all tiers."""
GRANULARITIES = (0, 0, 0, 10 * SECOND, MINUTE_NS, 90 * SECOND, 7 * MINUTE_NS, 2 * HOUR_NS)
HALF = settings(max_examples=settings().max_examples // 2)
"""Histories take a while to make up."""
STEPS = st.sampled_from([0, 1, SECOND, 13 * SECOND, 40 * SECOND, 7 * MINUTE_NS, 50 * MINUTE_NS, 9 * HOUR_NS])


@st.composite
def histories(draw: st.DrawFn) -> list[Point]:
    """Points of a few clock runs, some routed to a windowed journal; time never decreases within a run."""
    points: list[Point] = []
    time, run, granularity = NOW - draw(st.integers(0, 8 * DAY_NS)), 0, 0
    for seq in range(1, draw(st.integers(1, 60)) + 1):
        time += draw(STEPS)
        closes = False
        match draw(st.integers(0, 30)):
            case 0:
                run, time = run + 1, time - draw(st.integers(SECOND, 2 * DAY_NS))
            case 1 | 2:
                granularity, closes = draw(st.sampled_from(GRANULARITIES)), True
            case 3:
                closes = True
        flushed = draw(st.booleans())
        points.append(Point(Seq(seq * 3), TimeNs(time), ClockRun(run), flushed, granularity, closes))
    return points


NAMED = st.sets(st.integers(1, 60).map(lambda number: Seq(number * 3)), max_size=4)
AGES = st.integers(-HOUR_NS, 6 * DAY_NS)


def plan(points: list[Point], policy: Policy, now: int, named: set[Seq]) -> list[Point]:
    seqs = list(kept(points, policy, TimeNs(now), named))
    assert seqs == sorted(set(seqs)), "not in order, or twice"
    return [point for point in points if point.seq in seqs]


@HALF
@given(histories(), policies() | st.just(TINY), NAMED, AGES)
def test_what_was_kept_is_kept_again(points: list[Point], policy: Policy, named: set[Seq], age: int) -> None:
    once = plan(points, policy, NOW + age, named)
    assert plan(once, policy, NOW + age, named) == once


@HALF
@given(histories(), policies() | st.just(TINY), NAMED, AGES, st.integers(0, 3 * DAY_NS))
def test_later_a_subset_is_kept(points: list[Point], policy: Policy, named: set[Seq], age: int, more: int) -> None:
    """And the same one, whether or not a thinning came before."""
    now = plan(points, policy, NOW + age, named)
    later = plan(points, policy, NOW + age + more, named)
    assert {point.seq for point in later} <= {point.seq for point in now}
    assert plan(now, policy, NOW + age + more, named) == later


@HALF
@given(histories(), policies() | st.just(TINY), NAMED, AGES)
def test_named_points_and_the_last_of_all_are_kept(
    points: list[Point], policy: Policy, named: set[Seq], age: int
) -> None:
    found = plan(points, policy, NOW + age, named)
    assert found[-1] == points[-1]
    assert [point for point in points if point.seq in named] == [point for point in found if point.seq in named]


@HALF
@given(histories(), policies() | st.just(TINY), NAMED, AGES)
def test_every_moment_within_the_tiers_has_a_point_within_its_window(
    points: list[Point], policy: Policy, named: set[Seq], age: int
) -> None:
    """Of every run and bucket of the window that the point's age asks for, and never less than promised."""
    now = NOW + age
    found = plan(points, policy, now, named)
    for point in points:
        window = window_ns(policy, now - point.time)
        if window == FOREVER:
            continue
        window = max(window, point.granularity_ns)
        if window == 0:
            assert point in found, "younger than the first tier reaches"
            continue
        if point.granularity_ns and window % point.granularity_ns:
            continue  # such buckets lie across those of the tier; `kept` names the rule, the test below its case
        begin, end = bucket(point.time, window)
        assert any(begin <= one.time < end and one.run == point.run for one in found)


@HALF
@given(histories(), policies() | st.just(TINY), NAMED, AGES)
def test_a_flushed_point_stays_where_its_bucket_had_one(
    points: list[Point], policy: Policy, named: set[Seq], age: int
) -> None:
    found = plan(points, policy, NOW + age, named)
    for point in points:
        if point.flushed and point.granularity_ns == 0:
            window = segment_window(policy, TimeNs(NOW + age), point.time, 0)
            if window == FOREVER:
                continue
            begin, end = bucket(point.time, window) if window else (point.time, point.time + 1)
            assert any(begin <= one.time < end and one.run == point.run and one.flushed for one in found)


@HALF
@given(histories(), policies() | st.just(TINY), AGES)
def test_what_closes_a_window_stays_within_the_tiers(points: list[Point], policy: Policy, age: int) -> None:
    found = plan(points, policy, NOW + age, set())
    for point in points:
        now = TimeNs(NOW + age)
        if point.closes and segment_window(policy, now, point.time, point.granularity_ns) != FOREVER:
            assert point in found


def at(*times: int, flushed: tuple[int, ...] = (), granularity: int = 0, closes: tuple[int, ...] = ()) -> list[Point]:
    """Points at these seconds before NOW's day began, seq 1, 2, 3, …"""
    return [
        Point(Seq(seq), TimeNs(DAY_0 + time * SECOND), ClockRun(0), seq in flushed, granularity, seq in closes)
        for seq, time in enumerate(times, 1)
    ]


DAY_0 = NOW // DAY_NS * DAY_NS


def seqs(points: list[Point], now_seconds: int, named: tuple[int, ...] = (), policy: Policy = DEFAULT) -> list[int]:
    return list(kept(points, policy, TimeNs(DAY_0 + now_seconds * SECOND), {Seq(seq) for seq in named}))


def test_one_point_a_minute() -> None:
    points = at(0, 10, 20, 61, 62, 63, 119, 120, 7200, flushed=(2, 5, 6))
    assert seqs(points, 7200) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert seqs(points, 7259) == [1, 2, 3, 4, 5, 6, 7, 8, 9], "the first minute's end is not 2 h ago yet"
    assert seqs(points, 7260) == [2, 4, 5, 6, 7, 8, 9], "the last flushed one of the first minute"
    assert seqs(points, 7320) == [2, 6, 8, 9]
    assert seqs(points, 7320, named=(1, 7)) == [1, 2, 6, 7, 8, 9]


def test_one_an_hour_one_a_day_then_named_ones_and_the_last() -> None:
    hour, day = 3600, 86400
    points = at(0, 1800, hour, hour + 1, 5 * hour, day, 2 * day, 40 * day)
    assert seqs(points, day + hour - 1) == [1, 2, 4, 5, 6, 7, 8]
    assert seqs(points, day + hour) == [2, 4, 5, 6, 7, 8]
    assert seqs(points, 8 * day) == [5, 6, 7, 8]
    assert seqs(points, 31 * day) == [5, 6, 7, 8], "the first day is the base now"
    assert seqs(points, 32 * day) == [6, 7, 8]
    assert seqs(points, 34 * day, named=(3,)) == [3, 7, 8]


def test_a_windowed_journal_keeps_its_last_point_once_the_window_is_over() -> None:
    points = at(0, 10, 20, 59, 60, 70, granularity=60 * SECOND, flushed=(2,), closes=(3,))
    assert seqs(points, 59) == [1, 2, 3, 4, 5, 6]
    assert seqs(points, 60) == [2, 3, 5, 6]
    assert seqs(points, 120) == [2, 3, 6]


def test_buckets_of_seven_minutes_lie_whole_in_the_hour_of_their_end() -> None:
    """DAY_0 is no multiple of 7 minutes: one of those buckets lies across the first hour's end."""
    begin, end = ((edge - DAY_0) // SECOND for edge in bucket(TimeNs(DAY_0 + HOUR_NS), 7 * MINUTE_NS))
    assert begin < 3600 < end - 1
    points = at(3000, begin, 3599, 3600, end - 1, granularity=7 * MINUTE_NS, flushed=(3,))
    assert seqs(points, end) == [1, 3, 5], "the last is the last of all"
    assert seqs(points, 86400 + 3600) == [1, 3, 5]
    assert seqs(points, 86400 + 7200) == [1, 3, 5], "the flushed one is the second hour's"


def test_what_closes_a_window_goes_with_the_oldest_tier() -> None:
    points = at(0, 10, 20, 3 * 86400, 3 * 86400 + 1, closes=(1,))
    assert seqs(points, 86400 * 9) == [1, 3, 5]
    assert seqs(points, 86400 * 31) == [3, 5]


def test_a_tier_of_zero_is_skipped() -> None:
    policy = Policy(2 * HOUR_NS, 0, DAY_NS, 0)
    points = at(0, 60, 120, 3599, 3600, 90000)
    assert seqs(points, 7200 + 3599, policy=policy) == [1, 2, 3, 4, 5, 6]
    assert seqs(points, 7200 + 3600, policy=policy) == [4, 5, 6]
    assert seqs(points, 86400 + 7200, policy=policy) == [5, 6]
    assert window_ns(policy, 3 * HOUR_NS) == HOUR_NS
    assert window_ns(policy, DAY_NS) == FOREVER


def test_a_clock_that_stepped_back_has_buckets_of_its_own() -> None:
    first = at(0, 30, 59)
    second = [point._replace(seq=Seq(point.seq + 3), run=ClockRun(1)) for point in first]
    assert seqs(first + second, 86000) == [3, 6]


def test_windows_by_age() -> None:
    ages = [0, 2 * HOUR_NS - 1, 2 * HOUR_NS, DAY_NS - 1, DAY_NS, 7 * DAY_NS, 30 * DAY_NS - 1, 30 * DAY_NS]
    found = [window_ns(DEFAULT, age) for age in ages]
    assert found == [0, 0, MINUTE_NS, MINUTE_NS, HOUR_NS, DAY_NS, DAY_NS, FOREVER]


@given(policies(), AGES, st.sampled_from(GRANULARITIES), st.integers(0, 3 * DAY_NS))
def test_the_window_of_a_segment_never_shrinks(policy: Policy, age: int, granularity: int, more: int) -> None:
    window = segment_window(policy, TimeNs(NOW + age), NOW, granularity)
    assert segment_window(policy, TimeNs(NOW + age + more), NOW, granularity) >= window
    if age < 0:
        assert window == 0
    if window:
        assert granularity <= window <= max(granularity, window_ns(policy, age)), "coarser than its age asks for"


def test_the_window_of_a_segment() -> None:
    newest = TimeNs(DAY_0 + 59 * SECOND)
    for after, granularity, window in (
        (0, 0, 0),
        (7259, 0, 0),
        (7260, 0, MINUTE_NS),
        (86400 + 3599, 0, MINUTE_NS),
        (86400 + 3600, 0, HOUR_NS),
        (8 * 86400, 0, DAY_NS),
        (31 * 86400 - 1, 0, DAY_NS),
        (31 * 86400, 0, FOREVER),
        (59, MINUTE_NS, 0),
        (60, MINUTE_NS, MINUTE_NS),
        (86400 + 3600, 2 * HOUR_NS, 2 * HOUR_NS),
        (8 * 86400, 2 * HOUR_NS, DAY_NS),
    ):
        now = TimeNs(DAY_0 + after * SECOND)
        assert segment_window(DEFAULT, now, newest, granularity) == window, (after, granularity)

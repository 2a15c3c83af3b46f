"""The picture of a timeline: what is in it, and that it fits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.moment import rfc3339
from dedup.timeline import grid_over
from dedup.timeline_picture import ASCII, UNICODE, WIDTH_MIN, Charset, Line, buckets_in, picture
from dedup.types import TimeNs

MINUTE = 60 * 10**9
START = 1_700_000_040 * 10**9
"""22:14 UTC."""


@pytest.fixture(autouse=True)
def _zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Etc/GMT-3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def place(minutes: float, seq: int = 1) -> dict[str, Any]:
    return {"seq": seq, "time": rfc3339(TimeNs(START + round(minutes * MINUTE)))}


def document(counts: list[int], width_ns: int = MINUTE, start: int = START) -> dict[str, Any]:
    """Of buckets with so many bytes in each."""
    buckets = [
        {
            "from": rfc3339(TimeNs(start + index * width_ns)),
            "bytes": nbytes,
            "records": 1,
            "flushes": index % 12,
            "resent_bytes": 0,
            "thinned": 0,
        }
        for index, nbytes in enumerate(counts)
    ]
    timeline = {
        "since": buckets[0]["from"],
        "until": rfc3339(TimeNs(start + len(buckets) * width_ns - 1)),
        "bucket_seconds": width_ns / 10**9,
        "buckets": buckets,
    }
    return {"group": "vm", "timeline": timeline, "ranges": [], "gaps": [], "bookmarks": [], "snapshots": []}


def drawn(found: dict[str, Any], width: int = 80, charset: Charset = ASCII) -> list[str]:
    return [text_of(line) for line in picture(found, width, charset)]


def text_of(line: Line) -> str:
    return "".join(piece.text for piece in line).rstrip()


def test_a_picture() -> None:
    found = document([0, 6000, 12000, 0, 0, 0, 0, 0, 6000, 6000])
    found["ranges"] = [
        {"from": place(0), "to": place(3.5), "granularity": "every-write", "journal": "fine"},
        {"from": place(6), "to": place(9.9), "granularity": "60s", "journal": "minutes"},
    ]
    found["gaps"] = [
        {"from": place(4), "to": place(5.5), "reason": "the link was down"},
        {"from": place(9.5), "to": None, "reason": "\x1b[31m"},
        {"from": place(-9), "to": place(-8), "reason": "long ago"},
    ]
    found["bookmarks"] = [{"name": "before", **place(2.2)}, {"name": "elsewhere", **place(70)}]
    found["snapshots"] = [{"name": f"s{n}", "kind": "snapshot", **place(7 + n / 60)} for n in range(12)]
    found["snapshots"] += [{"name": "before", "kind": "bookmark", **place(2.2)}]
    found["timeline"]["buckets"][7]["thinned"] = 3
    found["timeline"]["buckets"][6]["resent_bytes"] = 3
    assert drawn(found, 44) == [
        "group vm",
        "2023-11-15 01:14:00 to 2023-11-15 01:23:59, local time (UTC+03:00), 1m a bar",
        "  write rate",
        "     200 B/s       ###",
        "                   ###",
        "                   ###",
        "                ######               ######",
        "                ######               ######",
        "       0 B/s    ######               ######",
        "     flushes    ...oooooooooooooooooooooooo",
        "   bookmarks       VVV",
        "   snapshots                      +++",
        "        gaps             xxxxxx         xxx",
        "   reconcile                   ===",
        "     thinned                      ~~~",
        " granularity aaaaaaaaaaaa      bbbbbbbbbbbb",
        "             ---+--------------+-----------",
        "                01:15          01:20",
        "",
        "~ thinned: only what is left is counted, at the points that were kept",
        "= sent by a reconcile, not counted in the rate",
        "a every-write, in fine",
        "b 60s, in minutes",
        "bookmark 2023-11-15 01:16:12 before",
        *(f"snapshot 2023-11-15 01:21:{n:02} s{n}" for n in range(2, 12)),
        "and 2 earlier snapshots",
        "gap      2023-11-15 01:18:00 to 2023-11-15 01:19:30: the link was down",
        "gap      2023-11-15 01:23:30 to now: \\x1b[31m",
    ]


def test_far_apart_rates_are_on_a_log_scale() -> None:
    lines = drawn(document([60, 600, 6000, 60_000, 0, 60_000_000]), charset=UNICODE)
    assert lines[2].endswith("log scale")
    assert lines[3].startswith(" 976.6 KiB/s")
    assert lines[8].startswith("       1 B/s")
    heights = [sum(line[13 + 11 * bar : 14 + 11 * bar].strip() != "" for line in lines[3:9]) for bar in range(6)]
    assert heights == [1, 2, 3, 3, 0, 6]


def test_of_the_first_and_the_last_bar_only_the_part_that_was_asked_for() -> None:
    found = document([600, 6000, 600])
    found["timeline"] |= {"since": place(0.9)["time"], "until": place(2.1)["time"]}
    assert {line[13:] for line in drawn(found)[3:9]} == {"#" * 66}


@given(
    since=st.integers(0, 1 << 62),
    length=st.integers(0, 1 << 61),
    width=st.integers(0, 300),
    charset=st.sampled_from([ASCII, UNICODE]),
)
def test_it_fits(since: int, length: int, width: int, charset: Charset) -> None:
    grid = grid_over(TimeNs(since), TimeNs(since + length), buckets_in(width))
    found = document([index * 1000 for index in range(grid.count)], grid.width_ns, grid.start)
    lines = drawn(found, width, charset)
    most = max(width, WIDTH_MIN)
    assert all(len(line) <= most for line in lines[2:]), lines
    assert charset.tick in "".join(lines) or len(lines[-2]) < WIDTH_MIN


def test_nothing_written() -> None:
    lines = drawn(document([0, 0, 0]))
    assert lines[3] == "       0 B/s"

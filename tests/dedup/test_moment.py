"""TIME: each form of the grammar, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.errors import BadTime, NameRefused
from dedup.moment import AtSeq, AtTime, Latest, Named, check_name, default_name, parse_time, rfc3339
from dedup.types import Seq, TimeNs

NOW = TimeNs(1_795_342_530_123_456_789)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("latest", Latest()),
        ("seq=17", AtSeq(Seq(17))),
        ("2026-11-22T10:15:30.123456789Z", AtTime(NOW)),
        ("2026-11-22T10-15-30.123456789Z", AtTime(NOW)),
        ("2026-11-22T11:15:30.123456789+01:00", AtTime(NOW)),
        ("2026-11-22T10:15:30Z", AtTime(TimeNs(NOW // 10**9 * 10**9))),
        ("5m", AtTime(TimeNs(NOW - 300 * 10**9), relative=True)),
        ("2h30m", AtTime(TimeNs(NOW - 9000 * 10**9), relative=True)),
        ("3d", AtTime(TimeNs(NOW - 3 * 86400 * 10**9), relative=True)),
        ("bookmark=before", Named("before", bookmark=True)),
        ("before-the-mistake", Named("before-the-mistake")),
    ],
)
@pytest.mark.parametrize("flush", [False, True])
def test_each_form(text: str, where: object, flush: bool) -> None:
    spec = parse_time(text + "~flush" * flush, now=NOW)
    assert spec.where == where
    assert spec.flush is flush


@pytest.mark.parametrize("text", ["", "~flush", "seq=", "seq=-1", "seq=x", "a/b", ".hidden", "@x", "x~y", "a\nb"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(BadTime, match="is no TIME"):
        parse_time(text, now=NOW)


@pytest.mark.parametrize(
    "name", ["", "5m", "latest", "base", "seq=4", "2026-11-22T10:15:30Z", "a/b", "@a", ".a", "a~flush", "x" * 255]
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(NameRefused):
        check_name(name)


@given(st.integers(min_value=0, max_value=4 * 10**18))
def test_printed_times_parse_back(moment: int) -> None:
    assert parse_time(rfc3339(TimeNs(moment))).where == AtTime(TimeNs(moment))
    assert parse_time(default_name(TimeNs(moment))).where == AtTime(TimeNs(moment // 1000 * 1000))


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        parse_time(text, now=NOW)
    except BadTime:
        return
    assert text

"""TIME: the grammar by which a person names a moment, and the names that snapshots may have.

Pure text; which recovery point a moment is, `catalog` and `reader` decide.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Final

from msgspec import Struct

from dedup.errors import BadTime, NameRefused
from dedup.ids import NAME_BYTES_MAX, Seq, TimeNs

_NS: Final = 1_000_000_000
# Compiled, and kept by `re`, when first asked for: most commands are given no TIME, and are quicker without.
_RFC3339: Final = (
    r"(\d{4})-(\d\d)-(\d\d)[Tt_ ](\d\d)[:-](\d\d)[:-](\d\d)(?:\.(\d{1,9}))?(?:([Zz])|([+-])(\d\d)[:-]?(\d\d))?"
)
_AGO: Final = r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?"
_AGO_UNITS: Final = (86_400, 3_600, 60, 1)
_DIGITS_MAX: Final = 12
"""Digits of an age's number: more than a clock of nanoseconds in a u64 can hold is no age."""


class Latest(Struct, frozen=True):
    """The last recovery point."""


class AtSeq(Struct, frozen=True):
    seq: Seq


class AtTime(Struct, frozen=True):
    """A wall-clock time; `relative` when it was given as an age."""

    time: TimeNs
    relative: bool = False


class Named(Struct, frozen=True):
    """A bookmark's or a snapshot's name; `bookmark` when only a bookmark is meant."""

    name: str
    bookmark: bool = False


class TimeSpec(Struct, frozen=True):
    """A parsed TIME. `flush`: the last flushed point at or before it."""

    text: str
    where: Latest | AtSeq | AtTime | Named
    flush: bool


def parse_time(text: str, *, now: TimeNs | None = None) -> TimeSpec:
    """Parses TIME. `now` is what ages are counted from, the system clock if None. BadTime names the forms."""
    body, flush = (text[: -len("~flush")], True) if text.endswith("~flush") else (text, False)
    where = _parse_where(body, TimeNs(time.time_ns()) if now is None else now)
    if where is None:
        raise BadTime(
            f"{text!r} is no TIME: use 2026-11-22T10:15:30Z, an age such as 5m or 2h30m, latest, seq=N, or a name"
        )
    return TimeSpec(text, where, flush)


def _parse_where(body: str, now: TimeNs) -> Latest | AtSeq | AtTime | Named | None:
    if body == "latest":
        return Latest()
    if body.startswith("seq="):
        digits = body[4:]
        return AtSeq(Seq(int(digits))) if digits.isascii() and digits.isdigit() and len(digits) <= 20 else None
    if body.startswith("bookmark="):
        return Named(body[len("bookmark=") :], bookmark=True)
    clock = _clock_time(body)
    if clock is not None:
        return AtTime(clock)
    age = duration_ns(body)
    if age is not None:
        return AtTime(TimeNs(max(0, now - age)), relative=True)
    return Named(body) if _name_fault(body) is None else None


def _clock_time(body: str) -> TimeNs | None:
    match = re.fullmatch(_RFC3339, body)
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    fraction, utc, sign, zone_hours, zone_minutes = match.groups()[6:]
    try:
        if utc:
            moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
        elif sign:
            offset = timedelta(hours=int(zone_hours), minutes=int(zone_minutes)) * (-1 if sign == "-" else 1)
            moment = datetime(year, month, day, hour, minute, second, tzinfo=timezone(offset))
        else:
            moment = datetime(year, month, day, hour, minute, second).astimezone()
    except (ValueError, OverflowError):
        return None
    whole = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    return TimeNs(whole * _NS + int((fraction or "0").ljust(9, "0"))) if whole >= 0 else None


def duration_ns(text: str) -> int | None:
    """`2h`, `90m`, `1d2h3m4s` in nanoseconds: the grammar of ages and of how long things are kept. None: it is none."""
    match = re.fullmatch(_AGO, text)
    if not text or match is None or any(part and len(part) > _DIGITS_MAX for part in match.groups()):
        return None
    return sum(int(part) * unit for part, unit in zip(match.groups(), _AGO_UNITS, strict=True) if part) * _NS


def duration_text(duration: int) -> str:
    """The shortest text that `duration_ns` takes for it. Whole seconds only."""
    seconds = duration // _NS
    parts = []
    for unit, letter in zip(_AGO_UNITS, "dhms", strict=True):
        count, seconds = divmod(seconds, unit)
        if count:
            parts.append(f"{count}{letter}")
    return "".join(parts) or "0s"


def _name_fault(name: str) -> str | None:
    if not name:
        return "is empty"
    if any("\ud800" <= char <= "\udfff" for char in name):
        return "is not UTF-8"
    if len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES_MAX - 1:
        return f"is longer than {NAME_BYTES_MAX - 1} bytes"
    if "/" in name or "\0" in name or any(ord(char) < 32 for char in name):
        return "contains `/` or a control character"
    if name[0] in "@.":
        return "starts with `@` or `.`"
    if "~" in name:
        return "contains `~`"
    return None


def check_name(name: str) -> None:
    """NameRefused unless `name` may be given to a bookmark or snapshot (whether it exists is the catalog's)."""
    fault = _name_fault(name)
    if fault is None and name in ("latest", "base"):
        fault = "is a word with a meaning of its own"
    if fault is None and (
        name.startswith(("seq=", "bookmark=")) or _clock_time(name) is not None or duration_ns(name) is not None
    ):
        fault = "parses as a TIME"
    if fault is not None:
        raise NameRefused(f"the name {name!r} {fault}; choose another")


def default_name(moment: TimeNs) -> str:
    """The name of a snapshot that was given none, e.g. 2026-11-22T10-15-30.123456Z."""
    seconds, nanos = divmod(moment, _NS)
    stamp = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H-%M-%S")
    return f"{stamp}.{nanos // 1000:06d}Z"


def rfc3339(moment: TimeNs) -> str:
    """RFC 3339 in UTC with 9 digits, as every `--json` prints times."""
    seconds, nanos = divmod(moment, _NS)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{nanos:09d}Z"

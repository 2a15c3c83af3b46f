"""The timeline of a group as a picture of characters: how much was written, and what there is to go back to.

Drawn from the documents of `points` alone, so that it is the same from afar. Knows no terminal: a picture is lines of
`Piece`, and the caller colours them or does not. Times are shown in the local time zone, which the heading names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

from dedup.moment import AtTime, duration_text, parse_time
from dedup.terminal import shown, size_text

GUTTER: Final = 13
"""Columns before the first bucket."""
HEIGHT: Final = 6
"""Lines of the bars."""
WIDTH_MIN: Final = GUTTER + 20
NAMED_MAX: Final = 10
"""Bookmarks, snapshots and gaps that are listed below the picture, of each."""
_LOG_RATIO: Final = 50
"""Where the largest rate is that many times the smallest, the scale is logarithmic."""
_SECOND: Final = 1_000_000_000
_TICKS: Final = (
    *(step * 10**power for power in range(9) for step in (1, 2, 5)),
    *(step * _SECOND for step in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600)),
    *(step * 86_400 * _SECOND // 2 for step in (1, 2, 4, 8, 14, 28, 56, 112, 224, 448, 896)),
)


class Piece(NamedTuple):
    """Text of one style, by rich's name of it; empty: none."""

    text: str
    style: str = ""


Line = list[Piece]


@dataclass(frozen=True, slots=True)
class Charset:
    """`bars` from an eighth to full; `many`: one, a few, ten or more in a column."""

    bars: str
    many: tuple[str, str, str]
    mark: str
    gap: str
    resent: str
    thinned: str
    axis: str
    tick: str


UNICODE: Final = Charset("▁▂▃▄▅▆▇█", ("·", "•", "●"), "▼", "░", "≈", "~", "─", "┬")
ASCII: Final = Charset("#", (".", "o", "O"), "V", "x", "=", "~", "-", "+")


def picture(document: dict[str, Any], width: int, charset: Charset) -> list[Line]:
    """The document of `points --timeline --json` as lines of at most `width` columns, WIDTH_MIN at least."""
    return _Picture(document, max(width, WIDTH_MIN), charset).lines()


def buckets_in(width: int) -> int:
    """How many buckets a picture of so many columns has room for."""
    return max(width, WIDTH_MIN) - GUTTER - 1


def _ns(text: str) -> int:
    where = parse_time(text).where
    assert isinstance(where, AtTime), "documents have absolute times"
    return where.time


class _Picture:
    def __init__(self, document: dict[str, Any], width: int, charset: Charset) -> None:
        self._document = document
        self._timeline = document["timeline"]
        self._charset = charset
        self._since, self._until = _ns(self._timeline["since"]), _ns(self._timeline["until"])
        self._buckets: list[dict[str, Any]] = self._timeline["buckets"]
        self._bucket_ns: int = round(self._timeline["bucket_seconds"] * _SECOND)
        self._start = _ns(self._buckets[0]["from"])
        self._end = self._start + self._bucket_ns * len(self._buckets)
        self._each = max(1, buckets_in(width) // len(self._buckets))
        self._columns = self._each * len(self._buckets)
        self._width = width

    def lines(self) -> list[Line]:
        return [*self._heading(), *self._bars(), *self._rows(), *self._axis(), [], *self._legend()]

    # Text above and below

    def _heading(self) -> Iterator[Line]:
        volume = self._document.get("volume")
        what = f"group {self._document['group']}" + (f", volume {volume}" if volume else "")
        offset = self._local(self._start).strftime("%z")
        yield [Piece(shown(what), "bold")]
        yield [
            Piece(
                f"{self._stamp(self._since)} to {self._stamp(self._until)}, "
                f"local time (UTC{offset[:3]}:{offset[3:5]}), {_width_text(self._bucket_ns)} a bar"
            )
        ]

    def _legend(self) -> Iterator[Line]:
        chars = self._charset
        if any(bucket["thinned"] for bucket in self._buckets):
            yield [Piece(f"{chars.thinned} thinned: only what is left is counted, at the points that were kept", "dim")]
        if any(bucket["resent_bytes"] for bucket in self._buckets):
            yield [Piece(f"{chars.resent} sent by a reconcile, not counted in the rate", "dim")]
        for letter, text in self._granularities().items():
            yield [Piece(f"{letter} ", "cyan"), Piece(shown(text))]
        yield from self._named("bookmark", self._document["bookmarks"], "green")
        yield from self._named("snapshot", self._snapshots(), "blue")
        gaps = [gap for gap in self._document["gaps"] if self._span_of(gap) is not None]
        for gap in gaps[-NAMED_MAX:]:
            to = "now" if gap["to"] is None else self._stamp(_ns(gap["to"]["time"]))
            text = f"{self._stamp(_ns(gap['from']['time']))} to {to}: {gap['reason']}"
            yield [Piece("gap      ", "red"), Piece(shown(text))]
        yield from self._and_more(len(gaps), "gaps")

    def _named(self, kind: str, marks: list[dict[str, Any]], style: str) -> Iterator[Line]:
        within = [mark for mark in marks if self._column(_ns(mark["time"])) is not None]
        for mark in within[-NAMED_MAX:]:
            yield [Piece(f"{kind} ", style), Piece(shown(f"{self._stamp(_ns(mark['time']))} {mark['name']}"))]
        yield from self._and_more(len(within), f"{kind}s")

    def _and_more(self, count: int, what: str) -> Iterator[Line]:
        if count > NAMED_MAX:
            yield [Piece(f"and {count - NAMED_MAX:,} earlier {what}", "dim")]

    def _snapshots(self) -> list[dict[str, Any]]:
        return [one for one in self._document["snapshots"] if one["kind"] != "bookmark"]

    # What was written

    def _bars(self) -> Iterator[Line]:
        rates = [bucket["bytes"] / self._seconds(index) for index, bucket in enumerate(self._buckets)]
        written = [rate for rate in rates if rate]
        top, bottom = max(written, default=0.0), min(written, default=0.0)
        is_log = bool(written) and top / bottom > _LOG_RATIO
        steps = HEIGHT * len(self._charset.bars)
        levels = [_level(rate, bottom, top, steps, is_log=is_log) for rate in rates]
        labels = {HEIGHT - 1: _rate_text(top), 0: _rate_text(bottom) if is_log else "0 B/s"}
        yield [Piece(f"{'write rate':>{GUTTER - 1}} ", "bold"), Piece("log scale" if is_log else "", "dim")]
        for line in reversed(range(HEIGHT)):
            cells = [self._bar(level, line) for level in levels]
            yield self._row(labels.get(line, ""), cells, "yellow")

    def _seconds(self, index: int) -> float:
        """How much of a bucket is within the time that was asked for: of the first and the last one, a part."""
        begin = max(self._start + index * self._bucket_ns, self._since)
        end = min(self._start + (index + 1) * self._bucket_ns, self._until)
        return float(max(end - begin, self._bucket_ns // 100, 1) / _SECOND)

    def _bar(self, level: int, line: int) -> str:
        """One cell of a bar: `line` counts from below."""
        bars = self._charset.bars
        filled = min(max(level - line * len(bars), 0), len(bars))
        return bars[filled - 1] if filled else " "

    # What there is to go back to

    def _rows(self) -> Iterator[Line]:
        chars = self._charset
        letters = {text: letter for letter, text in self._granularities().items()}
        thinned = [chars.thinned if one["thinned"] else " " for one in self._buckets]
        resent = [chars.resent if one["resent_bytes"] else " " for one in self._buckets]
        gaps = self._spans(self._document["gaps"], lambda _: chars.gap)
        yield self._row("flushes", [self._many(one["flushes"]) for one in self._buckets], "green")
        yield self._row("bookmarks", self._counted(self._document["bookmarks"]), "bold green")
        yield self._row("snapshots", self._counted(self._snapshots()), "bold blue")
        for label, cells, style in (
            ("gaps", gaps, "bold red"), ("reconcile", resent, "magenta"), ("thinned", thinned, "dim"),
        ):  # fmt: skip
            if any(cell != " " for cell in cells):
                yield self._row(label, cells, style)
        kept = self._spans(self._document["ranges"], lambda one: letters[_granularity(one)])
        yield self._row("granularity", kept, "cyan")

    def _row(self, label: str, cells: Sequence[str], style: str) -> Line:
        text = "".join(cell * self._each for cell in cells).rstrip()
        return [Piece(f"{label:>{GUTTER - 1}} "), Piece(text, style)]

    def _many(self, count: int) -> str:
        few, some, many = self._charset.many
        return " " if not count else few if count == 1 else some if count < 10 else many

    def _counted(self, marks: list[dict[str, Any]]) -> list[str]:
        """A mark for one, digits for more, + for more than nine."""
        counts = [0] * len(self._buckets)
        for mark in marks:
            column = self._column(_ns(mark["time"]))
            if column is not None:
                counts[column] += 1
        texts = (" ", self._charset.mark, *"23456789")
        return [texts[count] if count < len(texts) else "+" for count in counts]

    def _spans(self, spans: list[dict[str, Any]], sign: Callable[[dict[str, Any]], str]) -> list[str]:
        cells = [" "] * len(self._buckets)
        for one in spans:
            span = self._span_of(one)
            if span is not None:
                first, last = span
                cells[first : last + 1] = [sign(one)] * (last + 1 - first)
        return cells

    def _span_of(self, one: dict[str, Any]) -> tuple[int, int] | None:
        """The first and the last bucket that something with `from` and `to` is in."""
        begun = _ns(one["from"]["time"])
        ended = self._end - 1 if one["to"] is None else _ns(one["to"]["time"])
        if ended < self._start or begun >= self._end:
            return None
        first = (max(begun, self._start) - self._start) // self._bucket_ns
        return first, (min(ended, self._end - 1) - self._start) // self._bucket_ns

    def _granularities(self) -> dict[str, str]:
        """A letter for each that is in the picture."""
        found = dict.fromkeys(_granularity(one) for one in self._document["ranges"] if self._span_of(one) is not None)
        return {chr(ord("a") + index % 26): text for index, text in enumerate(found)}

    def _column(self, time: int) -> int | None:
        return (time - self._start) // self._bucket_ns if self._start <= time < self._end else None

    # Time

    def _axis(self) -> Iterator[Line]:
        """Ticks at round local times, as close as their labels have room."""
        per_column = self._bucket_ns / self._each
        form, step = self._tick(per_column)
        offset = self._local(self._start).utcoffset() or timedelta()
        shift = int(offset / timedelta(microseconds=1)) * 1000
        line, labels = [self._charset.axis] * self._columns, [" "] * (self._columns + 24)
        at = -(-(self._start + shift) // step) * step - shift
        while at < self._end:
            column = int((at - self._start) / per_column)
            text = form(at)
            if column + len(text) <= self._width - GUTTER:
                labels[column : column + len(text)] = text
            line[column] = self._charset.tick
            at += step
        yield [Piece(" " * GUTTER), Piece("".join(line), "dim")]
        yield [Piece(" " * GUTTER), Piece("".join(labels).rstrip())]

    def _tick(self, per_column: float) -> tuple[Callable[[int], str], int]:
        for step in _TICKS:
            form = self._form(step)
            if step / per_column >= len(form(self._start)) + 2:
                return form, step
        return self._form(_TICKS[-1]), _TICKS[-1] * math.ceil(12 * per_column / _TICKS[-1])

    def _form(self, step: int) -> Callable[[int], str]:
        """How a time is written where times are `step` apart."""
        if step >= 86_400 * _SECOND:
            return lambda time: self._local(time).strftime("%Y-%m-%d")
        if step >= 86_400 * _SECOND // 2:
            return lambda time: self._local(time).strftime("%m-%d %H:%M")
        if step >= 60 * _SECOND:
            return lambda time: self._local(time).strftime("%H:%M")
        if step >= _SECOND:
            return lambda time: self._local(time).strftime("%H:%M:%S")
        digits = 9 - int(math.log10(step))
        return lambda time: self._local(time).strftime("%M:%S") + f".{time % _SECOND:09d}"[: digits + 1]

    def _stamp(self, time: int) -> str:
        """With as many digits of the second as tell it from others in the picture."""
        digits = max(0, 9 - int(math.log10(self._bucket_ns)))
        fraction = f".{time % _SECOND:09d}"[: digits + 1] if digits else ""
        return self._local(time).strftime("%Y-%m-%d %H:%M:%S") + fraction

    def _local(self, time: int) -> datetime:
        return datetime.fromtimestamp(time // _SECOND, UTC).astimezone()


def _granularity(one: dict[str, Any]) -> str:
    return f"{one['granularity']}, in {one['journal']}"


def _level(rate: float, bottom: float, top: float, steps: int, *, is_log: bool) -> int:
    """1 to `steps`; 0 for nothing written."""
    if not rate:
        return 0
    if is_log:
        part = math.log(rate / bottom) / math.log(top / bottom)
        return 1 + round(part * (steps - 1))
    return max(1, round(rate / top * steps))


def _rate_text(rate: float) -> str:
    return f"{size_text(int(rate))}/s" if rate >= 1 or not rate else f"{rate:.2g} B/s"


def _width_text(width_ns: int) -> str:
    if width_ns >= _SECOND:
        return duration_text(width_ns)
    for unit, name in ((1_000_000, "ms"), (1000, "µs")):
        if width_ns >= unit:
            return f"{width_ns // unit} {name}"
    return f"{width_ns} ns"

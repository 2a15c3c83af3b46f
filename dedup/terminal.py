"""What the commands print: JSON documents, tables, sizes; how far a long work is, on a terminal only; and the options
that most of them have."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from rich.progress import Progress

group_option: Final = click.option("--group", metavar="G", help="The group, where the store holds several.")
json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def shown(text: str) -> str:
    """`text` with what a terminal must not be sent (bytes of no encoding, control characters) escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def size_text(size: int) -> str:
    """A size in bytes for a person, e.g. `1.5 GiB`."""
    power = min(max(size.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{size / (1 << 10 * power):.{min(power, 1)}f} {_UNITS[power]}"


def print_json(document: object) -> None:
    """One JSON document on stdout."""
    import json  # here and below: most commands are asked for none

    click.echo(json.dumps(document, indent=2))


def print_json_list(items: Iterable[object]) -> None:
    """The same of an array, item by item as they are found: it may be long."""
    import json
    import textwrap

    before = "["
    for item in items:
        click.echo(before + "\n" + textwrap.indent(json.dumps(item, indent=2), "  "), nl=False)
        before = ","
    click.echo("[]" if before == "[" else "\n]")


def print_json_ranges(
    head: Mapping[str, object],
    ranges: Iterable[object],
    tail: Callable[[], Mapping[str, object]] | None = None,
    *,
    name: str = "ranges",
) -> None:
    """One JSON object whose `name` is an array that is printed item by item as they are found: there may be millions.

    Keys of `head` come before it, those of `tail`, which is asked when the last item is out, behind it.
    """
    import json

    # Not click.echo, which flushes each time: for a million items that is most of the time.
    out = sys.stdout
    out.write("{" + "".join(f"{_member(*one)}, " for one in head.items()) + f"{json.dumps(name)}: [")
    separator = "\n"
    for one in ranges:
        out.write(separator + json.dumps(one))
        separator = ",\n"
    rest = {} if tail is None else tail()
    click.echo("]" + "".join(f", {_member(*one)}" for one in rest.items()) + "}", file=out)


def _member(name: str, value: object) -> str:
    import json

    return f"{json.dumps(name)}: {json.dumps(value)}"


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal, aligned columns elsewhere; the last column is cut by neither."""
    cells = [[shown(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    for row in [list(headings), *cells]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


class TerminalProgress:
    """Bytes, rate and time left of each phase on stderr. Use `terminal_progress`."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", visible=False)

    def phase(self, name: str, total_bytes: int) -> None:
        """A part of the work begins."""
        self._bar.update(self._task, visible=False)
        self._task = self._bar.add_task(name, total=total_bytes)

    def advance(self, done_bytes: int) -> None:
        """So much more of the part is done."""
        self._bar.advance(self._task, done_bytes)


@contextmanager
def terminal_progress() -> Iterator[TerminalProgress | None]:
    """A progress display while the block runs; None when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield TerminalProgress(bar)

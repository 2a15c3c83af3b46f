"""`rewindfs diff`: where a volume differs between two moments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import click

from dedup.errors import UnknownName
from dedup.history import ByteRange, History
from dedup.moment import rfc3339
from dedup.pins import Pinning
from dedup.terminal import group_option, json_option, print_json_ranges, shown, size_text
from dedup.types import Moment, VolumeState
from replication.history import held_moments, open_history
from replication.route import Route, route_options

RANGES_SHOWN: Final = 40
"""Ranges that a person is shown without --all."""


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("volume", metavar="VOLUME")
@click.argument("old", metavar="TIME")
@click.argument("new", metavar="TIME")
@click.option("--all", "show_all", is_flag=True, help=f"List every range, not only the first {RANGES_SHOWN}.")
@group_option
@json_option
@route_options
def diff(
    store: str, volume: str, old: str, new: str, show_all: bool, group: str | None, as_json: bool, route: Route
) -> None:
    """Show where VOLUME differs between two moments, in either order.

    From pointers alone: no block is read. VOLUME is at each moment the volume that had this path then; where none had
    it, all that the other one holds differs.
    """
    with (
        open_history(store, group, route, pinning=Pinning.MOMENTS) as history,
        held_moments(history, old, new) as (before, after),
    ):
        found = _compare(history, volume, before, after)
        found.print_json() if as_json else found.print_text(None if show_all else RANGES_SHOWN)


def _compare(history: History, volume: str, before: Moment, after: Moment) -> _Difference:
    old, new = history.group_at(before.seq), history.group_at(after.seq)
    if volume not in old.volumes and volume not in new.volumes:
        known = ", ".join(sorted(old.volumes.keys() | new.volumes.keys())) or "none"
        raise UnknownName(
            f"group {history.name} had no volume {volume!r} at seq={before.seq} or seq={after.seq}; it had: {known}"
        )
    return _Difference(history, volume, (before, old.volumes.get(volume)), (after, new.volumes.get(volume)))


_Side = tuple[Moment, VolumeState | None]


class _Difference:
    """One volume at two moments. `bytes` and `count` are of the ranges that were told so far."""

    def __init__(self, history: History, volume: str, old: _Side, new: _Side) -> None:
        self._history = history
        self._volume = volume
        self._sides = old, new
        self.bytes = 0
        self.count = 0

    def ranges(self) -> Iterator[ByteRange]:
        old, new = (None if state is None else (state.volume, moment.seq) for moment, state in self._sides)
        for one in self._history.differing(old, new):
            self.bytes += one.length
            self.count += 1
            yield one

    def print_json(self) -> None:
        """As CLI.md has it, with the size at both moments: null where the path had no volume."""
        old, new = ({"seq": moment.seq, "time": rfc3339(moment.time), "size": None if state is None else state.size}
                    for moment, state in self._sides)  # fmt: skip
        rows = ({"offset": one.offset, "length": one.length} for one in self.ranges())
        head = {"volume": self._volume, "from": old, "to": new}
        print_json_ranges(head, rows, lambda: {"bytes": self.bytes})

    def print_text(self, most: int | None) -> None:
        """For a person; `most` ranges at most."""
        for word, (moment, state) in zip(("from", "to"), self._sides, strict=True):
            size = "not there" if state is None else size_text(state.size)
            click.echo(f"{word:<4}  {shown(self._volume)}  seq={moment.seq}  {rfc3339(moment.time)}  {size}")
        for one in self.ranges():
            if most is None or self.count <= most:
                click.echo(f"{one.offset:>16}  {one.length:>14}")
        if most is not None and self.count > most:
            click.echo(f"and {self.count - most} ranges more; --all lists them")
        old, new = (0 if state is None else state.size for _, state in self._sides)
        grown = "" if old == new else f"; its size went from {old} to {new} bytes"
        click.echo(f"{self.bytes} bytes ({size_text(self.bytes)}) differ, in {self.count} ranges{grown}")

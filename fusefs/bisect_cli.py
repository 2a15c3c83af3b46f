"""The command `bisect`: finds the first bad recovery point by running a command on clones."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO

import click
import trio

from dedup.moment import rfc3339
from dedup.terminal import group_option, json_option, print_json, shown
from dedup.types import Moment
from fusefs.bisect_search import BisectFailed, BisectSettings, Found, place_text, search
from fusefs.bisection import Verdict
from fusefs.clone_cli import checked_place, default_limit, overlay_options
from fusefs.clone_tree import normal
from fusefs.trial import PLACEHOLDER, Outcome
from replication.address import absolute_address
from replication.background import configure_logging
from replication.cache_options import CachePlace, cache_options
from replication.route import Route, route_options

_NAMES: Final = {Verdict.GOOD: "good", Verdict.BAD: "bad", Verdict.SKIPPED: "skipped"}
SUSPECTS_MAX: Final = 20
"""How many moments that may be the first bad one are printed for a person."""


@dataclass(slots=True)
class Steps:
    """What was tried, as it goes on: lines for a person, and in a file if there is one; and rows of the document."""

    log: TextIO | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def say(self, line: str, *, result: bool = False) -> None:
        """On stderr, but for the `result`."""
        click.echo(line, err=not result)
        if self.log is not None:
            self.log.write(line + "\n")
            self.log.flush()

    def add(self, moment: Moment, outcome: Outcome, left: int | None, what: str) -> None:
        status = "" if outcome.status is None else f"  exit {outcome.status}"
        why = f" ({outcome.why})" if outcome.why else ""
        more = "" if left is None else f"; about {_steps_for(left)} steps left"
        self.say(f"{what}{place_text(moment)}{status}: {_NAMES[outcome.verdict]}{why}{more}")
        self.rows.append(
            {**_document(moment), "exit": outcome.status, "verdict": outcome.verdict.value, "why": outcome.why or None}
        )


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("volume", metavar="VOLUME")
@click.argument("command", metavar="-- COMMAND {}", nargs=-1, type=click.UNPROCESSED)
@click.option("--good", required=True, metavar="TIME", help="A moment at which COMMAND exits with 0.")
@click.option("--bad", required=True, metavar="TIME", help="A later one at which it does not.")
@click.option("--mount", "loop", is_flag=True, help="Loop-mount the volume; {} is where. Needs root.")
@click.option("--mount-options", metavar="OPTS", help="For --mount: options of mount(8), such as ro,noload.")
@click.option("--flushed", is_flag=True, help="Try only moments that an application had flushed.")
@click.option("--trust-ends", is_flag=True, help="Do not run COMMAND at the two ends first.")
@click.option("--log", "log_file", type=click.Path(path_type=Path, dir_okay=False), help="Keep the steps in a file.")
@click.option("--allow-other", is_flag=True, help="COMMAND may look at the volume as another user.")
@overlay_options[0]
@overlay_options[1]
@group_option
@json_option
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@route_options
@cache_options
@click.pass_context
def bisect(
    context: click.Context,
    store: str,
    volume: str,
    command: tuple[str, ...],
    good: str,
    bad: str,
    loop: bool,
    mount_options: str | None,
    flushed: bool,
    trust_ends: bool,
    log_file: Path | None,
    allow_other: bool,
    place: Path | None,
    overlay_limit: int | None,
    group: str | None,
    as_json: bool,
    debug: bool,
    route: Route,
    cache: CachePlace,
) -> None:
    """Find the first recovery point of VOLUME that COMMAND finds bad, between two that are known.

    COMMAND is run with {} replaced, in every word, by the path of a file: the volume at the moment that is tried, a
    fresh clone that it may write to. VOLUME may be a directory of the source, or `.`: {} is a directory then. Exit
    status 0: good; 125: this moment cannot be tested, skip it; any other up to 127: bad; from 128 on, or killed by a
    signal: stop. What COMMAND prints goes to stderr.

    \b
    rewindfs bisect /backup/vm.store app.db --good 2d --bad latest -- sh -c 'sqlite3 {} "SELECT …" | grep -q …'
    """
    _check_command(command, loop=loop, mount_options=mount_options)
    where = checked_place(place, store, None)
    settings = BisectSettings(
        absolute_address(store),
        group,
        route,
        cache,
        normal(volume),
        good,
        bad,
        command,
        (mount_options or "") if loop else None,
        trust_ends,
        flushed,
        where,
        default_limit(where) if overlay_limit is None else overlay_limit,
        allow_other,
    )
    configure_logging(foreground=False, log_file=None, debug=debug or bool((context.obj or {}).get("debug")))
    with ExitStack() as stack:
        log = None if log_file is None else stack.enter_context(closing(log_file.open("a")))
        steps = Steps(log)
        steps.say(f"bisect {shown(volume)} of {shown(store)}: good {good}, bad {bad}: {shown(' '.join(command))}")
        found = trio.run(search, settings, steps.add)
        _report(settings, volume, found, steps, as_json=as_json)


def _check_command(command: tuple[str, ...], *, loop: bool, mount_options: str | None) -> None:
    if not any(PLACEHOLDER in word for word in command):
        raise click.UsageError(
            "write {} in COMMAND where the path of the volume is to go, as in: -- fsck.ext4 -fn {}"
            if command
            else "no COMMAND; write it behind --, with {} for the path of the volume, as in: -- fsck.ext4 -fn {}"
        )
    if mount_options is not None and not loop:
        raise click.UsageError("--mount-options goes with --mount")
    if loop and os.geteuid() != 0:
        raise BisectFailed("--mount needs root, for the loop device; run it as root, or give COMMAND the file itself")
    if PLACEHOLDER not in command[0] and shutil.which(command[0]) is None:
        raise BisectFailed(f"{command[0]}: no such program")


def _report(settings: BisectSettings, volume: str, found: Found, steps: Steps, *, as_json: bool) -> None:
    """The result; BisectFailed when what was skipped leaves several."""
    bisection = found.bisection
    last_good, first_bad = place_text(bisection.last_good), place_text(bisection.first_bad)
    decided = not bisection.skipped
    if as_json:
        suspects = [stretch.first for stretch in bisection.skipped]
        print_json(
            {
                "volume": settings.path or ".",
                "first_bad": _document(bisection.first_bad) if decided else None,
                "last_good": _document(bisection.last_good),
                "suspects": [_document(moment) for moment in ([] if decided else [*suspects, bisection.first_bad])],
                "steps": steps.rows,
                "skipped": [row for row in steps.rows if row["verdict"] == Verdict.SKIPPED.value],
            }
        )
    say = partial(steps.say, result=not as_json)
    if not decided:
        moments = [*(stretch.first for stretch in bisection.skipped), bisection.first_bad]
        for moment in moments[:SUSPECTS_MAX]:
            say(f"  {place_text(moment)}")
        if len(moments) > SUSPECTS_MAX:
            say(f"  … and {len(moments) - SUSPECTS_MAX} more, up to {first_bad}")
        raise BisectFailed(
            f"only skipped moments are left: any of {len(moments)} may be the first bad one, from "
            f"{place_text(moments[0])}, to {first_bad}; the last good one is {last_good}"
        )
    seq, options = bisection.last_good.seq, _options(settings)
    say(
        f"to look at it:   rewindfs browse {shown(settings.store)} DIR{options}, then "
        f"DIR/points/@seq={seq}/{shown(volume)}"
    )
    if found.is_volume:
        say(
            f"to have it back: rewindfs restore {shown(settings.store)} {shown(volume)} --at seq={seq} --to FILE"
            f"{options}"
        )
    say(
        f"first bad recovery point: {place_text(bisection.first_bad)}; last good one: {place_text(bisection.last_good)}"
    )


def _options(settings: BisectSettings) -> str:
    """By which another command finds the same history."""
    group = [] if settings.group is None else ["--group", settings.group]
    words = [*group, *settings.route.words]
    return f" {shlex.join(words)}" if words else ""


def _document(moment: Moment) -> dict[str, Any]:
    return {"seq": moment.seq, "time": rfc3339(moment.time), "kind": moment.kind.value}


def _steps_for(left: int) -> int:
    return math.ceil(math.log2(left + 1))

"""`rewindfs retention`: show and set the policy of a store: its tiers and its caps.

Goes through the store's second appliance where one runs, so that it is in force at once, and takes the store's lock
itself otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from dedup import layout
from dedup.errors import Damaged, StoreBusy
from dedup.marker import read_marker
from dedup.moment import duration_ns, duration_text
from dedup.retention import AtLimit, Policy, changed_policy, load_policy, policy_fields, save_policy
from dedup.storage import Storage
from dedup.terminal import json_option, print_json, size_text
from replication.address import store_path
from replication.control_messages import Role
from replication.exchange import NoAppliance
from replication.route import Route, route_options
from replication.store_command import ask

_NS: Final = 1_000_000_000
_SIZE: Final = re.compile(r"(\d{1,19})(?:\.(\d{1,9}))?([KMGTP]?)(?:iB|B)?", re.IGNORECASE)
_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_AT_LIMIT: Final = {
    AtLimit.BLOCK: "wait for room (block)",
    AtLimit.THIN: "wait while history is thinned faster (thin)",
    AtLimit.FAIL: "are refused (fail)",
}
_TIERS: Final = ("every_write_ns", "minutes_ns", "hours_ns", "days_ns")


class Reach(click.ParamType[int]):
    """`2h`, `30d`, `1d12h`: nanoseconds. 0 for a tier that there is not."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = 0 if value == "0" else duration_ns(value)
        if found is None:
            self.fail(f"{value!r} is no duration; write 2h, 7d or 1d12h, or 0 to go without this tier", param, ctx)
        return found


class Limit(click.ParamType[int]):
    """`500G`, `1.5TiB`, plain bytes: bytes, units of 1024; 0 for `none`, which no cap is."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "none":
            return 0
        match = _SIZE.fullmatch(value)
        if match is None:
            self.fail(f"{value!r} is no size; write 500G, 1.5T, a number of bytes, or none", param, ctx)
        whole, fraction, unit = match.groups()
        scale = 1 << 10 * _POWERS[unit.upper()]
        size: int = int(whole) * scale + int(fraction or 0) * scale // 10 ** len(fraction or "")
        if not 0 < size < 1 << 63:
            self.fail(f"{value!r} is no limit; write a size above 0, or none to go without", param, ctx)
        return size


@click.group()
def retention() -> None:
    """Show and set how finely history is kept as it grows older, and how large the store may grow."""


@retention.command()
@click.argument("store", metavar="STORE")
@json_option
@route_options
def show(store: str, as_json: bool, route: Route) -> None:
    """Show the policy of STORE."""
    path = store_path(store)
    if path is None:
        shown = ask(store, None, "retention.show", {}, route, role=Role.READER)
        policy = changed_policy(Policy(), shown)
    else:
        storage = Storage()
        read_marker(storage, path)
        policy = load_policy(storage, path)
    _print(policy, as_json)


@retention.command("set")
@click.argument("store", metavar="STORE")
@click.option("--every-write", "every_write_ns", type=Reach(), help="Every write is kept so long.")
@click.option("--minutes", "minutes_ns", type=Reach(), help="Then one point a minute, to this age.")
@click.option("--hours", "hours_ns", type=Reach(), help="Then one an hour, to this age.")
@click.option("--days", "days_ns", type=Reach(), help="Then one a day, to this age; older, named points only.")
@click.option("--soft-limit", "soft_limit_bytes", type=Limit(), metavar="SIZE|none", help="Above it: a warning.")
@click.option("--hard-limit", "hard_limit_bytes", type=Limit(), metavar="SIZE|none", help="Never above it.")
@click.option(
    "--at-limit", type=click.Choice([one.value for one in AtLimit]), help="What writes meet at the hard limit."
)
@json_option
@route_options
def set_(store: str, as_json: bool, route: Route, **options: Any) -> None:
    """Change the policy of STORE; what is not given stays as it is. In force when it returns."""
    changes = {name: value for name, value in options.items() if value is not None}
    for name in ("soft_limit_bytes", "hard_limit_bytes"):
        if changes.get(name) == 0:
            changes[name] = None
    if not changes:
        raise click.UsageError("nothing to set: give a tier, a limit or --at-limit")
    _print(_set(store, changes, route), as_json)


def _set(address: str, changes: dict[str, object], route: Route) -> Policy:
    """Asks the appliance; with none running, writes the file under the store's lock."""
    try:
        return changed_policy(Policy(), ask(address, None, "retention.set", changes, route))
    except NoAppliance:
        path = store_path(address)
        if path is None:
            raise
    storage = Storage()
    read_marker(storage, path)
    with _locked(storage, path):
        try:
            before = load_policy(storage, path)
        except Damaged as damage:
            click.echo(f"rewindfs: warning: {damage}; what is not given is as by default now", err=True)
            before = Policy()
        policy = changed_policy(before, changes)
        save_policy(storage, path, policy)
    return policy


@contextmanager
def _locked(storage: Storage, path: Path) -> Iterator[None]:
    """The writer's lock, without recovering the store as `Store.open` does: not even a damaged one minds a policy."""
    fd = storage.open(path / layout.LOCK_NAME, os.O_RDWR | os.O_CREAT)
    try:
        if not storage.lock(fd):
            raise StoreBusy(f"{path} is being written by another process, and it does not answer: an appliance that "
                            "starts or ends? try again")  # fmt: skip
        yield
    finally:
        storage.close(fd)


def _print(policy: Policy, as_json: bool) -> None:
    if as_json:
        tiers = {name.replace("_ns", "_seconds"): getattr(policy, name) // _NS for name in _TIERS}
        print_json({**tiers, **{key: value for key, value in policy_fields(policy).items() if key not in _TIERS}})
        return
    words = ("every write", "one point a minute", "one point an hour", "one point a day")
    for word, name in zip(words, _TIERS, strict=True):
        reach = getattr(policy, name)
        click.echo(f"{word:<20}{f'for {duration_text(reach)}' if reach else 'no such tier'}")
    click.echo(f"{'older':<20}named points only")
    click.echo(f"{'soft limit':<20}{_limit_text(policy.soft_limit_bytes)}")
    there = "" if policy.hard_limit_bytes is None else f"; there, writes {_AT_LIMIT[policy.at_limit]}"
    click.echo(f"{'hard limit':<20}{_limit_text(policy.hard_limit_bytes)}{there}")


def _limit_text(limit: int | None) -> str:
    return "none" if limit is None else f"{size_text(limit)} ({limit} bytes)"

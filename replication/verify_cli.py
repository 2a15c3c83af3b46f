"""`rewindfs verify`: checks a store, and repairs it.

A repair takes the store's lock. While an appliance runs, which has it, the damaged blocks are named to that: it asks
its agents for their bytes, and heals them in place. All else needs the appliance stopped.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import click
import trio

from dedup.damage import Repair, Report
from dedup.errors import StoreBusy
from dedup.repair import repair
from dedup.storage import Storage
from dedup.terminal import json_option, terminal_progress
from dedup.verify import Progress, inspect
from dedup.verify import verify as verify_store
from dedup.verify_report import show_report
from replication.control import NoAppliance, request
from replication.errors import ProtocolError
from replication.store_command import local_store

ADDRESSES_MAX: Final = 16_384
"""Damaged blocks named to the appliance at a time."""
QUIET_SECONDS: Final = 15.0
"""When nothing was healed for so long, nothing more will be: an agent asks every few seconds."""
_LOOK_SECONDS: Final = 0.5


@click.command()
@click.argument("store", metavar="STORE")
@click.option("--read-data", is_flag=True, help="Also read every block and hold it against its fingerprint.")
@click.option("--repair", "repairing", is_flag=True, help="First repair what can be repaired.")
@click.option(
    "--accept-loss", is_flag=True, help="With --repair: cut a broken history off where nothing behind it is of use."
)
@json_option
@click.pass_context
def verify(
    context: click.Context, store: str, read_data: bool, repairing: bool, accept_loss: bool, as_json: bool
) -> None:
    """Check STORE, in use or not. Exits 1 when it is damaged, and says which snapshots and volumes that concerns."""
    if accept_loss and not repairing:
        raise click.UsageError("--accept-loss is a part of --repair")
    path = local_store(store)
    with terminal_progress() as progress:
        if repairing:
            report = _repair(path, read_data, accept_loss, progress)
        else:
            report = verify_store(path, read_data=read_data, progress=progress)
    show_report(context, report, path, as_json=as_json)


def _repair(path: Path, read_data: bool, accept_loss: bool, progress: Progress | None) -> Report:
    try:
        return repair(path, read_data=read_data, accept_loss=accept_loss, progress=progress)
    except StoreBusy as busy:
        try:
            report = heal_beside(path, read_data, progress)
        except NoAppliance:
            raise busy from None
    if not report.ok:
        click.echo(
            "rewindfs: an appliance is running: only blocks were healed; stop it (unmount) to repair the rest", err=True
        )
    return report


def heal_beside(path: Path, read_data: bool, progress: Progress | None) -> Report:
    """Names the damaged blocks to the running appliance, waits for what its agents can heal, and verifies again.

    NoAppliance.
    """
    found = inspect(path, Storage(), read_data=read_data, progress=progress)
    bad = sorted(found.slots.bad)
    before, agents = _note(path, [])
    if not bad or not agents:
        return found.report
    for start in range(0, len(bad), ADDRESSES_MAX):
        _note(path, bad[start : start + ADDRESSES_MAX])
    healed, since = 0, time.monotonic()
    while healed < len(bad) and time.monotonic() - since < QUIET_SECONDS:
        time.sleep(_LOOK_SECONDS)
        now = _note(path, [])[0] - before
        if now != healed:
            healed, since = now, time.monotonic()
    report = inspect(path, Storage(), read_data=read_data, progress=progress).report
    repairs = [Repair(f"{healed} damaged blocks were healed from the source")] if healed else []
    return replace(report, repairs=tuple(repairs))


def _note(path: Path, addresses: list[int]) -> tuple[int, int]:
    """(blocks healed since the appliance began, its agents); the addresses are noted as damaged."""
    reply = trio.run(partial(request, path, None, "heal.note", {"addresses": addresses}))
    healed, agents = reply.get("healed"), reply.get("agents")
    if not isinstance(healed, int) or not isinstance(agents, int):
        raise ProtocolError(f"the appliance's reply to heal.note is none: {reply}")
    return healed, agents

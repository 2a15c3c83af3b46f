"""`rewindfs mode`: how a running mount's writes are acknowledged from now on."""

from __future__ import annotations

from pathlib import Path

import click

from fusefs.command_values import DIRECTORY
from fusefs.mount_control import tell
from replication.control_messages import Mode


@click.command()
@click.argument("mountpoint", type=DIRECTORY)
@click.argument("mode", type=click.Choice([mode.value for mode in Mode]))
def mode(mountpoint: Path, mode: str) -> None:
    """Change the MODE of a running mount; nothing is lost or reordered."""
    tell(mountpoint, "mode", {"mode": mode})

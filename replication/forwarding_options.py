"""The options of a command that has records forwarded."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from replication.forwarding import Forwarding
from replication.group_spools import GroupSpools
from replication.retention_cli import Limit

F = TypeVar("F", bound=Callable[..., Any])
_OFFERS: Final = {"auto": None, "always": True, "never": False}


def forwarding_options(command: F) -> Callable[..., Any]:
    """Adds `--spool`, `--spool-limit`, `--bandwidth` and `--digests` to a click command, which gets `forwarding`."""

    @click.option(
        "--spool",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Where records go that memory cannot hold in an outage; without, their regions are reconciled afterwards.",
    )
    @click.option(
        "--spool-limit", type=Limit(), default="4G", show_default=True, metavar="SIZE", help="For each group."
    )
    @click.option(
        "--bandwidth", type=Limit(), default="none", metavar="RATE", help="Bytes a second: 10M. For each group."
    )
    @click.option(
        "--digests",
        type=click.Choice(list(_OFFERS)),
        default="auto",
        show_default=True,
        help="In batch mode, ask first which blocks the second appliance has: by default over a network.",
    )
    @wraps(command)
    def wrapped(*args: Any, spool: Path | None, spool_limit: int, bandwidth: int, digests: str, **kwargs: Any) -> Any:
        if spool_limit <= 0:
            raise click.UsageError("--spool-limit: a spool has a limit; name one, as 4G")
        spools = None if spool is None else GroupSpools(spool.absolute(), spool_limit)
        return command(*args, forwarding=Forwarding(spools, bandwidth, _OFFERS[digests]), **kwargs)

    return wrapped

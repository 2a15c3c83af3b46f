"""The commands that run an appliance: `appliance second`; `appliance first` is in first_cli.py."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import trio

from dedup.store import Store
from replication.address import Address, NetworkAddress, UnixAddress
from replication.background import Ready, run
from replication.control import SOCKET_NAME
from replication.explanation import cause, explain
from replication.first_cli import first
from replication.listening import listen_addresses, open_listeners
from replication.metrics import metrics_at, parse_metrics, second_figures
from replication.route import Route, route_options
from replication.second_appliance import SecondAppliance
from replication.supervisor import Guardian

log = logging.getLogger("rewindfs.appliance")


@click.group()
def appliance() -> None:
    """Run an appliance as a process of its own."""


appliance.add_command(first)


@appliance.command()
@click.option("--store", required=True, type=click.Path(path_type=Path, file_okay=False), help="Made if absent.")
@click.option("--listen", "listen", multiple=True, metavar="ADDR", help="Besides the store's own socket.")
@route_options
@click.option("--metrics", metavar="ADDR", help="HOST:PORT for Prometheus; :PORT for this machine alone.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Log there instead of to stderr.")
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--debug", is_flag=True, help="Log more, and show the traceback of an error.")
@click.pass_context
def second(
    context: click.Context,
    store: Path,
    listen: tuple[str, ...],
    route: Route,
    metrics: str | None,
    foreground: bool,
    log_file: Path | None,
    ready_fd: int | None,
    debug: bool,
) -> None:
    """Write STORE: receive, journal, deduplicate. Leaves with a last checkpoint at SIGTERM."""
    if ready_fd is not None and not foreground:
        raise click.UsageError("--ready-fd needs -f")
    debug = debug or bool((context.obj or {}).get("debug"))
    store = store.absolute()
    own = UnixAddress(store / SOCKET_NAME)
    addresses = [own, *(place for place in listen_addresses(listen, route) if place != own)]
    scraped = None if metrics is None else parse_metrics(metrics)
    guardian = Guardian(ready_fd)

    async def main(ready: Ready) -> None:
        try:
            await _serve(store, addresses, route, scraped, ready, guardian)
        except BaseException as error:
            guardian.failed(explain(cause(error)))
            if ready_fd is not None:
                # Nobody sees this process's stderr: the parent that started it has only its log.
                log.critical("ended by an error: %s", explain(cause(error)), exc_info=error)
            raise

    run(main, foreground=foreground, log_file=log_file, debug=debug)


async def _serve(
    path: Path,
    addresses: Sequence[Address],
    route: Route,
    scraped: NetworkAddress | None,
    ready: Ready,
    guardian: Guardian,
) -> None:
    """The second appliance's process: opens the store, serves it, closes it."""
    store = await trio.to_thread.run_sync(_open_or_make, path)
    failed = True
    try:
        appliance = SecondAppliance(store, maintain=True)
        # The store's lock says that nobody else listens within it.
        listeners = await open_listeners(addresses, route, own=path / SOCKET_NAME)
        async with trio.open_nursery() as nursery:
            await nursery.start(_watch_signals, appliance, ready)
            nursery.start_soon(guardian.watch, appliance.stop)
            async with metrics_at(scraped, partial(second_figures, appliance)), trio.open_nursery() as serving:
                await serving.start(appliance.serve, listeners)
                ready.ready(f"serving {path}")
                guardian.ready()
            nursery.cancel_scope.cancel()
        failed = False
    finally:
        # After a failure the store gives up its lock without another write; otherwise it makes a last checkpoint.
        close = store.abandon if failed else store.close
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(close)


def _open_or_make(path: Path) -> Store:
    if not path.exists() or not any(path.iterdir()):
        Store.create(path)
    return Store.open(path)


async def _watch_signals(
    appliance: SecondAppliance, ready: Ready, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            ready.stopping("making everything durable")
            appliance.stop()

"""`rewindfs appliance first`: takes records near the agents and forwards them to a second appliance."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import trio

from replication.address import Address, UnixAddress, parse_address
from replication.background import Ready, run
from replication.endpoint import connect
from replication.errors import LinkDown
from replication.first_service import FirstService
from replication.forwarding import Forwarding
from replication.forwarding_options import forwarding_options
from replication.listening import listen_addresses, open_listeners
from replication.metrics import first_figures, metrics_at, parse_metrics
from replication.modes import Mode
from replication.relay import Connect
from replication.route import Route, route_options

log = logging.getLogger("rewindfs.first_service")


@click.command()
@click.option("--listen", "listen", multiple=True, required=True, metavar="ADDR", help="unix:, tls:// or tcp://.")
@click.option("--forward", required=True, metavar="ADDR", help="The second appliance.")
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in Mode]),
    default=Mode.ASYNC.value,
    show_default=True,
    help="For mounts that do not ask for one.",
)
@forwarding_options
@route_options
@click.option("--metrics", metavar="ADDR", help="HOST:PORT for Prometheus; :PORT for this machine alone.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Log there instead of to stderr.")
@click.option("--debug", is_flag=True, help="Log more, and show the traceback of an error.")
@click.pass_context
def first(
    context: click.Context,
    listen: tuple[str, ...],
    forward: str,
    mode: str,
    forwarding: Forwarding,
    route: Route,
    metrics: str | None,
    foreground: bool,
    log_file: Path | None,
    debug: bool,
) -> None:
    """Take the records of mounts and forward them to a second appliance. At SIGTERM what it has goes out first."""
    debug = debug or bool((context.obj or {}).get("debug"))
    addresses = listen_addresses(listen, route)
    there = forward_address(forward, route)
    service = FirstService(
        partial(connect, there, identity=route.identity, insecure_tcp=route.insecure_tcp),
        mode=Mode(mode),
        forwarding=forwarding,
    )
    scraped = None if metrics is None else parse_metrics(metrics)

    async def main(ready: Ready) -> None:
        async with metrics_at(scraped, partial(first_figures, service)):
            await serve(service, addresses, there, route, ready)

    run(main, foreground=foreground, log_file=log_file, debug=debug)


def forward_address(text: str, route: Route) -> Address:
    """Where the second appliance is; a path absolute. Raises AddressError."""
    place = parse_address(text)
    if isinstance(place, UnixAddress):
        return UnixAddress(place.path.absolute(), None if place.store is None else place.store.absolute())
    place.allow(insecure_tcp=route.insecure_tcp)
    return place


async def serve(
    service: FirstService, addresses: Sequence[Address], there: Address, route: Route, ready: Ready
) -> None:
    """The process: listens, says that it is ready, serves until it is told to leave."""
    listeners = await open_listeners(addresses, route)
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, service, ready)
        async with trio.open_nursery() as serving:
            await serving.start(service.serve, listeners)
            where = ", ".join(str(listener.address) for listener in listeners)
            log.info("listening at %s, forwarding to %s", where, there)
            ready.ready(f"forwarding to {there}")
            await _look(service.connect, there)
        nursery.cancel_scope.cancel()


async def _look(connect: Connect, there: Address) -> None:
    """Says now whether the second appliance is there: else nobody would know before the first agent comes."""
    try:
        connection = await connect()
    except LinkDown as error:
        log.warning(
            "the second appliance at %s cannot be reached now; agents are refused until it can: %s", there, error
        )
    else:
        await connection.aclose()


async def _watch_signals(
    service: FirstService, ready: Ready, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            ready.stopping("forwarding what it has")
            service.stop()

"""An appliance's figures for Prometheus: `--metrics HOST:PORT`, text over HTTP.

Invariant: a scrape takes a picture of one instant on the trio loop, from what is in memory; nothing there waits for
the disk or for another process. HTTP itself is served by threads of prometheus-client.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from replication.address import LOOPBACK_NAME, AddressError, NetworkAddress, parse_address
from replication.errors import ReplicationError
from replication.first_service import FirstService
from replication.second_appliance import SecondAppliance
from replication.status import LinkState

PREFIX: Final = "rewindfs_"


@dataclass(frozen=True, slots=True)
class Figure:
    """One value. A name ending in `_total` counts up for as long as the process lives; any other may go down."""

    name: str
    help: str
    value: float
    group: str | None = None


Picture = Callable[[], Iterable[Figure]]
"""Called on the trio loop; may not wait."""


def parse_metrics(text: str) -> NetworkAddress:
    """`HOST:PORT`, `:PORT` for this machine alone, or `tcp://HOST:PORT`. Raises AddressError."""
    text = text.removeprefix("tcp://")
    if text.startswith(":"):
        text = LOOPBACK_NAME + text
    try:
        place = parse_address(f"tcp://{text}")
    except AddressError as error:
        raise AddressError(f"--metrics {text}: write HOST:PORT, or :PORT for this machine alone") from error
    assert isinstance(place, NetworkAddress)
    return place


@asynccontextmanager
async def metrics_at(address: NetworkAddress | None, picture: Picture) -> AsyncIterator[int]:
    """Serves the figures while the block runs, on a port that it gives; with no address it does nothing and gives 0.

    Raises ReplicationError when nobody can listen there.
    """
    if address is None:
        yield 0
        return
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(picture, trio.lowlevel.current_trio_token()))
    try:
        server, thread = start_http_server(address.port, address.host, registry)
    except OSError as error:
        raise ReplicationError(f"cannot serve metrics at {address.host}:{address.port}: {error.strerror}") from error
    try:
        yield server.server_port
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(server.shutdown)
            server.server_close()
            await trio.to_thread.run_sync(thread.join)


class _Figures(Collector):
    def __init__(self, picture: Picture, token: trio.lowlevel.TrioToken) -> None:
        self._picture = picture
        self._token = token

    def collect(self) -> Iterable[Metric]:
        """In a thread of the HTTP server."""
        found = trio.from_thread.run_sync(lambda: list(self._picture()), trio_token=self._token)
        families: dict[str, Metric] = {}
        for figure in found:
            labels = [] if figure.group is None else ["group"]
            family = families.get(figure.name)
            if family is None:
                counts = figure.name.endswith("_total")
                made = CounterMetricFamily if counts else GaugeMetricFamily
                family = families[figure.name] = made(PREFIX + figure.name, figure.help, labels=labels)
            assert isinstance(family, (CounterMetricFamily, GaugeMetricFamily))
            family.add_metric([] if figure.group is None else [figure.group], figure.value)
        return families.values()


def second_figures(appliance: SecondAppliance) -> Iterable[Figure]:
    """What a second appliance has to tell."""
    writer = appliance.writer
    live = appliance.live()
    yield Figure("sessions", "Open sessions, of agents and of commands.", live[""])
    yield Figure("received_bytes_total", "Payload journalled.", writer.received_bytes)
    yield Figure("syncs_total", "Syncs of the store.", writer.syncs)
    yield Figure("store_failed", "1 when the store has stopped.", writer.error is not None)
    for group in writer.store.groups:
        name = group.name
        yield Figure("agents", "Agents that feed the group now.", live[name], name)
        yield Figure("epoch", "Of the group's agent.", group.epoch, name)
        yield Figure("received_seq", "The last record journalled.", group.held, name)
        yield Figure("durable_seq", "The last record synced.", group.durable, name)
        yield Figure("received_time_seconds", "Time of the last record, by its agent's clock.", group.time / 1e9, name)
        yield Figure("reconciling", "1 while the history is in a gap.", group.reconciling, name)


def first_figures(service: FirstService) -> Iterable[Figure]:
    """What a first appliance has to tell, of each agent's queue."""
    now = time.time_ns()
    for relay in service.relays():
        status, group = relay.first.status(), relay.group
        behind = 0.0 if status.oldest_queued is None else max(0.0, (now - status.oldest_queued) / 1e9)
        yield Figure("link_up", "1 when the second appliance is connected.", status.link is LinkState.CONNECTED, group)
        yield Figure("outage", "1 when it has made no progress for too long.", status.outage, group)
        yield Figure("agent_connected", "1 when the group's agent is connected.", relay.feeder is not None, group)
        yield Figure("taken_seq", "The last record taken from the agent.", status.last_seq, group)
        yield Figure(
            "received_seq", "The last record that the second appliance has journalled.", status.received, group
        )
        yield Figure("durable_seq", "The last record that it has synced.", status.durable, group)
        yield Figure("lag_seconds", "Age of the oldest record that is not durable there.", behind, group)
        yield Figure("queued_bytes", "Memory of the queue.", status.queued_bytes, group)
        yield Figure(
            "queued_records", "Records that are not durable at the second appliance.", status.queued_records, group
        )
        yield Figure("spool_bytes", "What the spool takes on disk.", status.spool_bytes, group)
        yield Figure("spool_failed", "1 when the spool takes nothing more.", bool(status.spool_error), group)
        yield Figure("sent_bytes_total", "Frames put on the wire.", status.sent_bytes, group)
        yield Figure("saved_bytes", "What offers kept off the wire, less what they cost.", status.saved_bytes, group)

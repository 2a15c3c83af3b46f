"""Metrics: scraped over HTTP, as Prometheus does."""

from __future__ import annotations

import urllib.request
from functools import partial
from pathlib import Path

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from dedup.store import Store
from dedup.types import Epoch
from replication.address import AddressError, NetworkAddress
from replication.errors import ReplicationError
from replication.first_service import FirstService
from replication.messages import PROTOCOL_VERSION, Hello, Role
from replication.metrics import Figure, first_figures, metrics_at, parse_metrics, second_figures
from replication.modes import Mode
from replication.relay import Relay
from replication.second_appliance import SecondAppliance
from tests.dedup.model import Model
from tests.replication.scripted_second import ScriptedSecond

HERE = NetworkAddress("127.0.0.1", 0, tls=False)


async def scraped(port: int) -> dict[tuple[str, str | None], float]:
    def get() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    text = await trio.to_thread.run_sync(get)
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation for family in families)
    return {(one.name, one.labels.get("group")): one.value for family in families for one in family.samples}


async def test_a_second_appliance(tmp_path: Path) -> None:
    Store.create(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    appliance = SecondAppliance(store)
    model = Model()
    store.group("g").ingest(model.begin())
    async with metrics_at(HERE, partial(second_figures, appliance)) as port:
        found = await scraped(port)
        assert found["rewindfs_received_seq", "g"] == 2
        assert found["rewindfs_durable_seq", "g"] == 0 == found["rewindfs_agents", "g"]
        assert found["rewindfs_sessions", None] == 0 == found["rewindfs_store_failed", None]
        store.group("g").ingest([model.create("disk.img")])
        store.group("other")
        store.sync()
        again = await scraped(port)
        assert (again["rewindfs_received_seq", "g"], again["rewindfs_durable_seq", "g"]) == (3, 3)
        assert ("rewindfs_received_seq", "other") in again
        assert again["rewindfs_received_bytes_total", None] == 0
    store.close()


async def test_a_first_appliance(monkeypatch: pytest.MonkeyPatch) -> None:
    async with trio.open_nursery() as nursery:
        second = ScriptedSecond(nursery)
        service = FirstService(second.connect)
        hello = Hello(PROTOCOL_VERSION, Role.AGENT, "g", Epoch(1), "a")
        relay = Relay(second.connect, hello, Mode.ASYNC)
        await relay.start()
        monkeypatch.setattr(service, "relays", lambda: [relay])
        async with metrics_at(HERE, partial(first_figures, service)) as port:
            found = await scraped(port)
        assert found["rewindfs_link_up", "g"] == 1
        assert found["rewindfs_agent_connected", "g"] == 0 == found["rewindfs_lag_seconds", "g"]
        nursery.cancel_scope.cancel()


async def test_where_nothing_is_asked_for_nothing_listens() -> None:
    async with metrics_at(None, lambda: [Figure("x", "y", 1)]) as port:
        assert port == 0


async def test_a_port_that_is_taken() -> None:
    async with metrics_at(HERE, list) as port:
        with pytest.raises(ReplicationError, match=f"cannot serve metrics at 127.0.0.1:{port}"):
            async with metrics_at(NetworkAddress("127.0.0.1", port, tls=False), list):
                raise AssertionError("two cannot listen at one port")


def test_addresses() -> None:
    assert parse_metrics("0.0.0.0:9100") == NetworkAddress("0.0.0.0", 9100, tls=False)
    assert parse_metrics(":9100") == NetworkAddress("localhost", 9100, tls=False)
    assert parse_metrics("tcp://[::1]:9100") == NetworkAddress("::1", 9100, tls=False)
    for bad in ("9100", "host", "unix:/x", "host:port", "https://x:1"):
        with pytest.raises(AddressError, match="HOST:PORT"):
            parse_metrics(bad)

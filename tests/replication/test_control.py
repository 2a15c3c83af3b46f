"""Asking a running appliance over its socket, and finding that none runs."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from replication.address import AddressError, UnixAddress, parse_address
from replication.control import NoAppliance, request, socket_path
from replication.endpoint import listen
from replication.errors import HandshakeRefused, LinkDown, LinkReset, RequestRefused
from replication.exchange import ask_here
from replication.messages import ErrorCode, Role
from replication.second_appliance import SecondAppliance
from replication.tls import Untrusted
from replication.transport import listen_unix
from tests.replication.fake_store import FakeStore
from tests.replication.links import make_friends, make_identity

Ask = Callable[..., Awaitable[dict[str, object]]]


in_a_task: Ask = request


async def in_a_thread(address: str | Path, *args: object, **options: object) -> dict[str, object]:
    """`ask_here`, as `request` is called."""
    place = parse_address(address)
    assert isinstance(place, UnixAddress)
    return await trio.to_thread.run_sync(partial(ask_here, place, *args, **options), abandon_on_cancel=True)  # type: ignore[arg-type]


@pytest.fixture(params=["trio", "blocking"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Both ways to ask an appliance of this machine."""
    return in_a_task if request.param == "trio" else in_a_thread


@pytest.fixture
def store() -> FakeStore:
    fake = FakeStore()
    fake.group("g")
    return fake


@pytest.fixture
async def place(store: FakeStore, tmp_path: Path) -> AsyncIterator[Path]:
    """A store's path with an appliance behind its socket."""
    appliance = SecondAppliance(store)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(appliance.serve, [listen_unix(tmp_path / "socket")])
        yield tmp_path
        appliance.stop()


def test_where_an_appliance_listens() -> None:
    assert socket_path(Path("/s")) == Path("/s/socket")
    assert socket_path("/s") == Path("/s/socket")
    assert socket_path("unix:/run/x") == Path("/run/x")
    for address in ("unix:", "tls://host:1", "tcp://host:1"):
        with pytest.raises(AddressError):
            socket_path(address)


async def test_a_request_is_answered(place: Path, ask: Ask) -> None:
    made = await ask(place, "g", "snapshot.create", {"name": "n"})
    assert made["name"] == "n"
    assert (await ask(f"unix:{place}/socket", None, "name.check", {"name": "m"})) == {}
    with pytest.raises(RequestRefused, match="already has"):
        await ask(f"unix:{place}/socket", None, "name.check", {"name": "n"})
    status = await ask(str(place), None, "status", {}, role=Role.READER)
    assert status["sessions"] == 1


async def test_a_refusal_is_the_appliances_own_line(place: Path, ask: Ask) -> None:
    with pytest.raises(RequestRefused, match="^no snapshot 'x'$"):
        await ask(place, "g", "snapshot.delete", {"name": "x"})
    with pytest.raises(RequestRefused, match="no group 'other'"):
        await ask(place, "other", "snapshot.delete", {"name": "x"})
    with pytest.raises(RequestRefused, match="not for the role reader"):
        await ask(place, "g", "snapshot.delete", {"name": "x"}, role=Role.READER)


async def test_no_appliance_is_an_error_of_its_own(tmp_path: Path, ask: Ask) -> None:
    with pytest.raises(NoAppliance, match="no appliance runs"):
        await ask(tmp_path, None, "status", {})
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "socket"))
    stale.close()
    with pytest.raises(NoAppliance):
        await ask(tmp_path, None, "status", {})
    with pytest.raises(NoAppliance):
        await ask(tmp_path / "socket", None, "status", {})


async def test_an_appliance_that_has_left_is_none(store: FakeStore, tmp_path: Path, ask: Ask) -> None:
    appliance = SecondAppliance(store)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(appliance.serve, [listen_unix(tmp_path / "socket")])
        appliance.stop()
    with pytest.raises(NoAppliance):
        await ask(tmp_path, None, "status", {})


async def test_too_many_sessions_is_said(store: FakeStore, tmp_path: Path, ask: Ask) -> None:
    appliance = SecondAppliance(store, sessions_max=0)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(appliance.serve, [listen_unix(tmp_path / "socket")])
        with pytest.raises(HandshakeRefused) as refused:
            await ask(tmp_path, None, "status", {})
        assert refused.value.code is ErrorCode.REFUSED
        appliance.stop()


async def test_an_appliance_that_breaks_off_or_says_nothing_is_no_refusal(tmp_path: Path, ask: Ask) -> None:
    listener = listen_unix(tmp_path / "socket")

    async def accept_and(close: bool) -> None:
        async with await listener.accept() as connection:
            await connection.receive()
            if not close:
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_and, True)
        with pytest.raises(LinkReset, match="whether it was done"):
            await ask(tmp_path, None, "sync", {})
        nursery.start_soon(accept_and, False)
        with pytest.raises(LinkReset, match="whether it was done"):
            await ask(tmp_path, None, "sync", {}, timeout=0.05)
        nursery.cancel_scope.cancel()
    await listener.aclose()


@pytest.mark.parametrize("kind", ["tcp", "tls"])
async def test_a_request_over_a_network(store: FakeStore, tmp_path: Path, kind: str) -> None:
    client, server = make_friends(tmp_path, role=Role.ADMIN)
    listener = await listen(f"{kind}://127.0.0.1:0", identity=server)
    appliance = SecondAppliance(store)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(appliance.serve, [listener])
        address = str(listener.address)
        status = await request(address, None, "status", identity=client)
        assert status["sessions"] == 1
        made = await request(address, "g", "snapshot.create", {"name": "n"}, identity=client)
        assert made["name"] == "n"
        with pytest.raises(RequestRefused, match="already has"):
            await request(address, None, "name.check", {"name": "n"}, identity=client)
        if kind == "tls":
            stranger = make_identity(tmp_path / "stranger")
            stranger.trust(server.certificate(), role=None, server=True)
            with pytest.raises(Untrusted, match="does not trust this machine's key"):
                await request(address, None, "status", identity=stranger)
        appliance.stop()
    # Nobody knows from here whether an appliance runs: a command must not take the store's lock instead.
    with pytest.raises(LinkDown, match="Connection refused"):
        await request(address, None, "status", identity=client)


async def test_plain_tcp_to_elsewhere_is_not_even_tried() -> None:
    with pytest.raises(AddressError, match="--insecure-tcp"):
        await request("tcp://192.0.2.1:1", None, "status")


async def test_the_default_identity_serves_commands_without_an_option(
    store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = make_friends(tmp_path, role=Role.ADMIN)
    monkeypatch.setenv("REWINDFS_IDENTITY", str(server.directory))
    listener = await listen("tls://127.0.0.1:0")
    monkeypatch.setenv("REWINDFS_IDENTITY", str(client.directory))
    appliance = SecondAppliance(store)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(appliance.serve, [listener])
        assert (await request(str(listener.address), None, "status"))["sessions"] == 1
        appliance.stop()

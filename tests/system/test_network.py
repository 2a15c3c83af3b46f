"""The links of the system tests themselves: a fault that does not happen would prove nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.harness import World
from tests.system.network import Host, Relay, TwoHosts, two_hosts, why_no_hosts

WAIT_SECONDS = 30
PORT = 7000
SERVE = f"""
import socket
with socket.create_server(("", {PORT})) as listener:
    print(flush=True)
    sock, _ = listener.accept()
    while data := sock.recv(100):
        sock.sendall(data)
"""


@contextmanager
def relayed(tmp_path: Path) -> Iterator[tuple[Relay, socket.socket, socket.socket]]:
    """A relay between a TCP socket and a Unix socket, and both ends of a connection through it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "far"))
        listener.listen()
        with (
            Relay("tcp:127.0.0.1:0", f"unix:{tmp_path}/far", os.environ) as relay,
            socket.create_connection(("127.0.0.1", int(relay.address.split(":")[2]))) as near,
        ):
            far, _ = listener.accept()
            with far:
                for sock in (near, far):
                    sock.settimeout(WAIT_SECONDS)
                yield relay, near, far


def received(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length and (some := sock.recv(length - len(data))):
        data += some
    return bytes(data)


def nothing_comes(sock: socket.socket) -> bool:
    sock.settimeout(0.1)
    try:
        return not sock.recv(1)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(WAIT_SECONDS)


def test_relay_delays_counts_and_keeps_the_order(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    with relayed(tmp_path) as (relay, near, far):
        assert relay.tell("delay", 0.05)["connections"] == 1
        began = time.monotonic()
        near.sendall(content[:1])
        assert far.recv(1) == content[:1]
        far.sendall(b"yes")
        assert near.recv(3) == b"yes"
        assert time.monotonic() - began >= 0.1
        near.sendall(content[1:])
        near.shutdown(socket.SHUT_WR)
        assert received(far, len(content)) == content[1:]
        assert relay.tell("count") == {"address": relay.address, "up": len(content), "down": 3, "connections": 1}


def test_relay_limits_the_rate(tmp_path: Path) -> None:
    with relayed(tmp_path) as (relay, near, far):
        relay.tell("rate", 1 << 20)
        began = time.monotonic()
        near.sendall(bytes(256 << 10))
        assert received(far, 256 << 10) == bytes(256 << 10)
        assert time.monotonic() - began >= 0.2


def test_relay_stalls_one_way_and_loses_nothing(tmp_path: Path) -> None:
    with relayed(tmp_path) as (relay, near, far):
        relay.tell("stall", "up")
        near.sendall(b"held back")
        far.sendall(b"down")
        assert near.recv(4) == b"down"
        assert nothing_comes(far)
        relay.tell("heal")
        assert received(far, 9) == b"held back"


def use_to_its_end(sock: socket.socket) -> None:
    """Asserts that the connection is gone. That it is may be told a moment after it was used first."""
    sock.settimeout(10)
    with pytest.raises(ConnectionError):
        while True:
            assert sock.recv(1) == b""
            sock.sendall(b"x")


def test_relay_cuts_and_heals(tmp_path: Path) -> None:
    with relayed(tmp_path) as (relay, near, far):
        relay.tell("cut")
        for sock in (near, far):
            use_to_its_end(sock)
        host, port = "127.0.0.1", int(relay.address.split(":")[2])
        with socket.create_connection((host, port)) as refused:
            use_to_its_end(refused)
        relay.tell("heal")
        with socket.create_connection((host, port)):
            end = time.monotonic() + WAIT_SECONDS
            while (count := relay.tell("count")["connections"]) < 3 and time.monotonic() < end:
                pass  # the kernel has accepted it, the relay may not have
            assert count == 3


@pytest.fixture
def hosts(world: World) -> Iterator[TwoHosts]:
    if reason := why_no_hosts():
        pytest.skip(reason)
    with two_hosts(world) as hosts:
        yield hosts


def connects(host: Host) -> bool:
    """Whether `host` reaches the other one; waits a second for an answer."""
    code = f"import socket; socket.create_connection(({host.other!r}, {PORT}), 1).close()"
    command = [*host.enter, sys.executable, "-c", code]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def test_cable_between_two_hosts(world: World, hosts: TwoHosts) -> None:
    """What is on its way when the network is lost comes when it is healed; a new connection fails meanwhile."""
    talk = f"""
import socket, sys
with socket.create_connection(({hosts.one.other!r}, {PORT})) as sock:
    for line in sys.stdin:
        sock.sendall(line.encode())
        print(sock.recv(100).decode(), end="", flush=True)
"""

    def start(host: Host, code: str) -> subprocess.Popen[str]:
        command = [*host.enter, sys.executable, "-c", code]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=world.environment, stdin=pipe, stdout=pipe, text=True)

    with start(hosts.other, SERVE) as server:
        assert server.stdout is not None and server.stdout.readline()
        with start(hosts.one, talk) as client:
            assert client.stdin is not None and client.stdout is not None

            def say(text: str) -> None:
                assert client.stdin is not None
                print(text, file=client.stdin, flush=True)

            say("before")
            assert client.stdout.readline() == "before\n"
            for fault in (
                hosts.pull,
                lambda: hosts.lose(hosts.one, hosts.other),
                lambda: hosts.lose(hosts.one),
                lambda: hosts.lose(hosts.other),
            ):
                fault()
                say("during")
                assert not connects(hosts.one)
                hosts.heal()
                assert client.stdout.readline() == "during\n"
            client.stdin.close()
            client.wait(WAIT_SECONDS)
        assert server.wait(WAIT_SECONDS) == 0


def test_hosts_leave_nothing_behind(world: World) -> None:
    if reason := why_no_hosts():
        pytest.skip(reason)
    with two_hosts(world):
        assert len(world.processes()) == 2
    assert world.processes() == []
    with pytest.raises(RuntimeError, match="of the test"), two_hosts(world):
        raise RuntimeError("of the test")
    assert world.processes() == []

"""What a service manager is told: by messages to a socket of either kind, and by the real appliance as a service."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from replication.background import Ready
from replication.notify import SOCKET_NAME, ServiceManager

ROOT = Path(__file__).resolve().parent.parent.parent
WAIT_SECONDS = 60


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """The service manager's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if address.startswith("@") else address)
        sock.settimeout(WAIT_SECONDS)
        yield sock


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"@rewindfs-test-{uuid4().hex}" if request.param == "abstract" else str(tmp_path / "notify")


def test_messages(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SOCKET_NAME, address)
    told = ServiceManager.from_environment()
    assert SOCKET_NAME not in os.environ, "a child would speak for this process"
    with manager(address) as sock:
        told.ready("serving\nREADY=0")
        told.status("")
        told.status("x" * 2000)
        told.stopping()
        assert sock.recv(4096) == b"READY=1\nSTATUS=serving READY=0"
        assert sock.recv(4096) == b"STATUS=" + b"x" * 500
        assert sock.recv(4096) == b"STOPPING=1"


def test_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SOCKET_NAME, raising=False)
    ServiceManager.from_environment().ready("serving")
    Ready(None, None).stopping()


@pytest.mark.parametrize("name", ["vsock:2:1", "relative/path"])
def test_address_that_is_no_socket(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(SOCKET_NAME, name)
    ServiceManager.from_environment().ready()
    assert name in caplog.text


def test_manager_that_is_gone_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = ServiceManager(str(tmp_path / "nobody"))
    told.ready()
    told.stopping()
    assert len(caplog.records) == 1


def test_manager_that_does_not_listen_holds_nothing_up(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its queue is full: the message is given up after a bounded wait."""
    with manager(address), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        other.connect("\0" + address[1:] if address.startswith("@") else address)
        with pytest.raises(BlockingIOError):
            while True:
                other.send(b"x")
        ServiceManager(address).ready()
    assert "cannot be told" in caplog.text


def test_second_appliance_as_a_service(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    environment = {**os.environ, SOCKET_NAME: address, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fusefs", "appliance", "second", "--store", str(tmp_path / "store"), "-f"]
    with manager(address) as sock, subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        try:
            ready = sock.recv(4096)
            assert ready.startswith(b"READY=1\nSTATUS=serving ")
            assert (tmp_path / "store" / "socket").is_socket()
            process.send_signal(signal.SIGTERM)
            assert sock.recv(4096).startswith(b"STOPPING=1\n")
            assert process.wait(WAIT_SECONDS) == 0
        finally:
            process.kill()

"""A second appliance on "another host": a relay with a delay and a count lies between it and the mount."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.mounts import ENVIRONMENT, ROOT, new_source, rewindfs
from tests.system.network import Relay

START_SECONDS_MAX = 60


@contextmanager
def second_appliance(store: Path) -> Iterator[Path]:
    """Serves a new store until the block ends; gives its socket."""
    command = [sys.executable, "-m", "fusefs", "appliance", "second", "--store", str(store), "-f"]
    with open(f"{store}.log", "w") as log, subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=log) as process:
        socket = store / "socket"
        end = time.monotonic() + START_SECONDS_MAX
        while not socket.is_socket():
            assert process.poll() is None and time.monotonic() < end, Path(f"{store}.log").read_text()
            time.sleep(0.05)
        try:
            yield socket
        finally:
            process.terminate()
            process.wait()


@contextmanager
def remote_mount(directory: Path, size: int, mode: str, *options: str) -> Iterator[tuple[Path, Relay]]:
    """A mount over TCP with its base snapshot made; gives its mountpoint and the link."""
    source, mountpoint = new_source(directory, size)
    with (
        second_appliance(directory / "store") as socket,
        Relay("tcp:127.0.0.1:0", f"unix:{socket}", ENVIRONMENT) as relay,
    ):
        store = relay.address.replace("tcp:", "tcp://")
        rewindfs("mount", source, mountpoint, "--store", store, "--mode", mode, "--wait-base", *options)
        try:
            yield mountpoint, relay
        finally:
            relay.tell("delay", 0)
            rewindfs("unmount", mountpoint)


def drained(mountpoint: Path) -> None:
    """Waits until all that was written is durable at the store, but for a heartbeat or two."""
    while json.loads(rewindfs("status", mountpoint, "--json"))["lag"]["records"] > 3:
        time.sleep(0.1)

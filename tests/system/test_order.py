"""The order of each mode, seen from outside: on the wire, in the source, and by the application that waits.

The second appliance is stopped with SIGSTOP: what returns then did not wait for it, and what does not return did.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dedup.types import Seq, Write
from replication.messages import Ack
from replication.wire import Decoder
from tests.system.harness import SEARCH_PATH, World

BLOCK = 4096
VOLUME_BYTES = 4 << 20
STILL_SECONDS = 1.0
"""How long a call is watched not to return. It can only make a wrong program pass, never a right one fail."""


@pytest.fixture
def volume(world: World) -> Path:
    """A volume, as the source holds it."""
    path = world.source / "data.img"
    path.write_bytes(bytes(VOLUME_BYTES))
    return path


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def still_waits(future: Future[Any]) -> bool:
    return not wait([future], STILL_SECONDS).done


def test_sync_write_waits_and_the_source_sees_nothing(world: World, volume: Path) -> None:
    pids = world.mount("sync", "--outage-after", "60s")
    before = volume.read_bytes()
    block = os.urandom(BLOCK)
    with opened(world.mnt / "data.img") as fd, ThreadPoolExecutor(1) as pool:
        with stopped(pids.second):
            seq = world.ask("status")["seq"]
            write = pool.submit(os.pwrite, fd, block, 8 * BLOCK)
            world.wait_for_status(lambda status: status["seq"] > seq, "the record of the write")
            assert still_waits(write)
            assert volume.read_bytes() == before
        assert write.result(30) == BLOCK
    assert volume.read_bytes() == before[: 8 * BLOCK] + block + before[9 * BLOCK :]
    world.check_equal()


def test_sync_changes_of_size_wait_too(world: World, volume: Path) -> None:
    pids = world.mount("sync", "--outage-after", "60s")
    with ThreadPoolExecutor(1) as pool:
        with stopped(pids.second):
            seq = world.ask("status")["seq"]
            cut = pool.submit(os.truncate, world.mnt / "data.img", 5000)
            world.wait_for_status(lambda status: status["seq"] > seq, "the record of the resize")
            assert still_waits(cut)
            assert volume.stat().st_size == VOLUME_BYTES
        cut.result(30)
    assert volume.stat().st_size == 5000
    world.check_equal()


@pytest.mark.parametrize("mode", ["async", "batch"])
def test_async_and_batch_return_while_the_second_appliance_is_stopped(world: World, volume: Path, mode: str) -> None:
    pids = world.mount(mode, "--outage-after", "60s")
    blocks = [os.urandom(BLOCK) for _ in range(100)]
    with opened(world.mnt / "data.img") as fd, stopped(pids.second):
        for index, block in enumerate(blocks):
            assert os.pwrite(fd, block, index * 2 * BLOCK) == BLOCK
        os.fsync(fd)
        os.truncate(world.mnt / "data.img", VOLUME_BYTES // 2)
        (world.mnt / "new.img").write_bytes(blocks[0])
        os.rename(world.mnt / "new.img", world.mnt / "renamed.img")
        content = volume.read_bytes()
        assert all(content[2 * i * BLOCK :][:BLOCK] == block for i, block in enumerate(blocks))
        assert world.ask("status")["lag"]["bytes"] > 100 * BLOCK
    world.check_equal()
    assert world.gaps() == []


def test_sync_fsync_waits_for_durable_and_async_does_not(world: World, volume: Path) -> None:
    world.mount("sync")
    with opened(world.mnt / "data.img") as fd:
        for mode, waits in (("sync", True), ("async", False), ("batch", False)):
            world.ask("mode", mode=mode)
            os.pwrite(fd, mode.encode(), 0)
            os.fsync(fd)
            status = world.ask("status")
            if waits:
                assert status["durable_seq"] >= status["seq"] - 1  # a heartbeat may have followed
    world.check_equal()


# -- the tap: what the mount's process says to the second appliance, hears from it, and does to the source -----------

CALL = re.compile(r"^(\d+) +(pwrite64|recvfrom|sendmsg|sendto)\((\d+), *(.*)\) += (\d+)$")
STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


def tapped_calls(log: Path) -> list[re.Match[str]]:
    """The calls that did something, as they ended. Calls of one thread stay in their order, and one thread does all."""
    calls, begun = [], {}
    for line in log.read_text().splitlines():
        pid = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>").rstrip(" ")
            continue
        if "resumed>" in line:
            line = begun.pop(pid) + line.split("resumed>", 1)[1].lstrip(" ")
        if call := CALL.match(line):
            calls.append(call)
    return calls


def received_bytes(arguments: str, count: int) -> bytes:
    text = "".join(match[1] for match in STRING.finditer(arguments))
    return bytes.fromhex(text.replace("\\x", ""))[:count]


@contextmanager
def tapped(pid: int, log: Path) -> Iterator[None]:
    """All that process `pid` sends, receives and writes, call by call in their order, while the context lasts."""
    command = ["strace", "-f", "-p", str(pid), "-e", "trace=pwrite64,recvfrom,sendmsg,sendto", "-e", "signal=none"]
    with subprocess.Popen([*command, "-xx", "-s", "1048576", "-o", log], stderr=subprocess.PIPE) as strace:
        assert strace.stderr is not None
        line = strace.stderr.readline().decode()
        if "attached" not in line:
            pytest.skip(f"no process can be watched here: {line}")
        yield
        strace.send_signal(signal.SIGINT)
        strace.communicate(timeout=30)


def test_in_sync_no_byte_reaches_the_source_before_its_acknowledgement(world: World, volume: Path) -> None:
    if shutil.which("strace", path=SEARCH_PATH) is None:
        pytest.skip("no strace here to watch the wire with")
    pids = world.mount("sync")
    tap = world.directory / "tap.txt"
    rounds = 50
    with ThreadPoolExecutor(4) as pool, tapped(pids.mount, tap):

        def writer(lane: int) -> None:
            with opened(world.mnt / "data.img") as fd:
                for turn in range(rounds):
                    assert os.pwrite(fd, os.urandom(BLOCK), (4 * turn + lane) * BLOCK) == BLOCK

        for done in [pool.submit(writer, lane) for lane in range(4)]:
            done.result(60)

    calls = tapped_calls(tap)
    (link,) = {call[3] for call in calls if call[2] == "sendmsg"}
    sent: dict[int, Seq] = {}
    acknowledged = Seq(0)
    to_second, from_second = Decoder(), Decoder()
    written = 0
    for call in calls:
        name, data = call[2], received_bytes(call[4], int(call[5]))
        if name == "pwrite64" and len(data) == BLOCK:
            offset = int(call[4].rpartition(", ")[2])
            assert sent[offset] <= acknowledged, f"offset {offset} was written to the source before its acknowledgement"
            written += 1
        if name == "pwrite64" or call[3] != link:
            continue  # the intent log, and what wakes the loop
        decoder = from_second if name == "recvfrom" else to_second
        decoder.receive_data(data)
        while (message := decoder.next_message()) is not None:
            if isinstance(message, Write):
                sent[message.extent.offset] = message.seq
            elif isinstance(message, Ack):
                acknowledged = max(acknowledged, message.received)
    assert written == 4 * rounds
    world.check_equal()

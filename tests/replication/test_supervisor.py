"""The embedded second appliance as a real process: started, killed, orphaned, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random

import pytest
import trio

from dedup.store import Store
from dedup.types import (
    BLOCK_BYTES,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Record,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)
from replication.background import StartFailed
from replication.control import NoAppliance, request
from replication.errors import LinkDown
from replication.messages import PROTOCOL_VERSION, Ack, Hello, Role, SyncRequest, VolumePage, Welcome
from replication.session import Session, Side
from replication.supervisor import Guardian, Supervisor, child_environment, python_module
from replication.transport import Connection, connect_unix

PATIENCE_SECONDS = 60
RUN = ClockRun(0)
BLOCKS = 512

STUBBORN = """
import sys, time, socket, signal
from replication.supervisor import Guardian
guardian = Guardian(int(sys.argv[sys.argv.index('--ready-fd') + 1]))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
guardian.ready()
while True: time.sleep(1000)
"""

PARENT = """
import sys, trio, pathlib
from replication.supervisor import Supervisor
async def main():
    supervisor = Supervisor(pathlib.Path(sys.argv[1]))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.serve)
        print(supervisor.process.pid, flush=True)
trio.run(main)
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    Store.create(path)
    return path


class Agent:
    """Sends records of one volume and remembers what was acknowledged."""

    def __init__(self, store: Path) -> None:
        self._socket = store / "socket"
        self.received = 0
        self.durable = 0
        self.on_ack: Callable[[int], None] = lambda received: None

    async def feed(self, last: int) -> bool:
        """Send records up to `last` from where the store is; whether all became durable before the link broke."""
        try:
            connection = await connect_unix(self._socket)
        except LinkDown:
            return False
        async with connection, trio.open_nursery() as nursery:
            try:
                await self._converse(connection, nursery, last)
            except LinkDown:
                nursery.cancel_scope.cancel()
        return self.durable == last

    async def _converse(self, connection: Connection, nursery: trio.Nursery, last: int) -> None:
        session = Session(Side.CLIENT)
        await connection.send(session.send(Hello(PROTOCOL_VERSION, Role.AGENT, "g", Epoch(1), "a")))
        while self.durable < last:
            while (message := session.next_event()) is None:
                data = await connection.receive()
                if not data:
                    raise LinkDown("closed")
                session.receive_data(data)
            if isinstance(message, Welcome):
                assert self.received <= message.held and self.durable <= message.durable
            elif isinstance(message, Ack):
                self.received, self.durable = message.received, message.durable
                self.on_ack(message.received)
            else:
                assert isinstance(message, VolumePage), message
                if message.last:
                    nursery.start_soon(self._send, connection, session, last)

    async def _send(self, connection: Connection, session: Session, last: int) -> None:
        try:
            for seq in range(session.last_seq + 1, last + 1):
                await connection.send(session.send(record(seq)))
                await trio.lowlevel.checkpoint()
            await connection.send(session.send(SyncRequest()))
        except LinkDown:
            return  # the receiving side says it


def record(seq: int) -> Record:
    if seq == 1:
        return EpochStart(Seq(1), TimeNs(1), RUN, Epoch(1), True)
    if seq == 2:
        return Create(Seq(2), TimeNs(2), RUN, VolumeId(1), "disk", BLOCKS * BLOCK_BYTES, 0o600, 0, 0)
    return Write(Seq(seq), TimeNs(seq), RUN, Extent(VolumeId(1), seq % BLOCKS * BLOCK_BYTES, content(seq)))


def content(seq: int) -> bytes:
    return seq.to_bytes(8, "big") * (BLOCK_BYTES // 8)


async def send_two_records(store: Path) -> None:
    """As an agent: returns when they are durable."""
    assert await Agent(store).feed(2)


async def held(store: Path) -> object:
    (group,) = (await request(store, None, "status"))["groups"]  # type: ignore[misc]
    return group["held"]


async def end_of(pid: int) -> None:
    """Wait for a process that is not our child."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with trio.fail_after(PATIENCE_SECONDS):
            await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)


def start_parent(store: Path) -> subprocess.Popen[bytes]:
    """A process that supervises an appliance and prints its pid."""
    return subprocess.Popen([sys.executable, "-c", PARENT, str(store)], stdout=subprocess.PIPE)


def open_again(store: Path) -> int:
    """Takes the lock, so that nobody else has it; what the group holds."""
    opened = Store.open(store)
    try:
        return opened.group("g").held
    finally:
        opened.close()


async def test_it_serves_when_started_and_leaves_when_cancelled(store: Path) -> None:
    supervisor = Supervisor(store)
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.serve)
            await send_two_records(store)
            assert await held(store) == 2
            nursery.cancel_scope.cancel()
    assert supervisor.process is None
    with pytest.raises(NoAppliance):
        await request(store, None, "status")
    assert not (store / "socket").exists()
    assert open_again(store) == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_child_that_ends_is_started_again_and_nothing_is_lost(store: Path, number: signal.Signals) -> None:
    supervisor = Supervisor(store)
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.serve)
            await send_two_records(store)
            assert supervisor.process is not None
            first = supervisor.process
            first.send_signal(number)
            await first.wait()
            while True:
                try:
                    assert await held(store) == 2
                    break
                except NoAppliance:
                    await trio.sleep(0.02)
            assert supervisor.starts == 2 and supervisor.process is not first
            nursery.cancel_scope.cancel()
    assert open_again(store) == 2


async def test_nothing_acknowledged_is_lost_by_kills_under_load(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """acknowledged-is-kept, order: `Agent.feed` checks what each Welcome says against the Acks before it."""
    monkeypatch.setattr("replication.supervisor.BACKOFF_SECONDS_MIN", 0.001)
    monkeypatch.setattr("replication.supervisor.BACKOFF_SECONDS_MAX", 0.001)
    supervisor, agent, last = Supervisor(store), Agent(store), 3000
    random = Random(5)
    goals = [random.randrange(500) + at for at in (2, 700, 1400, 2100)]

    def kill_sometimes(received: int) -> None:
        if goals and received >= goals[0]:
            goals.pop(0)
            assert supervisor.process is not None
            supervisor.process.kill()

    agent.on_ack = kill_sometimes
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.serve)
            for _ in count():
                if await agent.feed(last):
                    break
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert supervisor.starts >= 3
    opened = Store.open(store)
    try:
        group = opened.group("g")
        assert group.held == last
        newest = {seq % BLOCKS: seq for seq in range(3, last + 1)}
        assert all(group.head_block(VolumeId(1), block) == content(seq) for block, seq in newest.items())
    finally:
        opened.close()


async def test_a_first_start_that_fails_is_the_callers_error(store: Path, tmp_path: Path) -> None:
    writer = Store.open(store)
    try:
        with trio.fail_after(PATIENCE_SECONDS), pytest.raises(BaseExceptionGroup) as caught:
            async with trio.open_nursery() as nursery:
                await nursery.start(Supervisor(store).serve)
        assert caught.group_contains(StartFailed, match="one writer at a time")
    finally:
        writer.close()


async def test_a_child_that_dies_before_it_is_ready_is_an_error(store: Path) -> None:
    supervisor = Supervisor(store, command=(sys.executable, "-c", "raise SystemExit(7)"))
    with trio.fail_after(PATIENCE_SECONDS), pytest.raises(StartFailed, match="status 7 before it was ready"):
        await supervisor.serve()


async def test_a_stopped_child_goes_on_and_can_be_ended(store: Path) -> None:
    supervisor = Supervisor(store)
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.serve)
            process = supervisor.process
            assert process is not None
            process.send_signal(signal.SIGSTOP)
            done = trio.Event()

            async def ask() -> None:
                await send_two_records(store)
                done.set()

            nursery.start_soon(ask)
            process.send_signal(signal.SIGCONT)
            await done.wait()
            process.send_signal(signal.SIGSTOP)
            nursery.cancel_scope.cancel()
    assert process.returncode == 0
    assert open_again(store) == 2


async def test_a_child_that_does_not_leave_is_killed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replication.supervisor.LEAVE_SECONDS", 0.1)
    supervisor = Supervisor(store, command=(sys.executable, "-c", STUBBORN))
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.serve)
            process = supervisor.process
            assert process is not None
            nursery.cancel_scope.cancel()
    assert process.returncode == -signal.SIGKILL


async def test_a_killed_parent_leaves_no_orphan(store: Path) -> None:
    parent = start_parent(store)
    assert parent.stdout is not None
    child = None
    try:
        child = int(await trio.to_thread.run_sync(parent.stdout.readline))
        await send_two_records(store)
        parent.kill()
        await end_of(child)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        if child is not None:
            await end_of(child)
    assert not (store / "socket").exists(), "it left in order"
    assert open_again(store) == 2


@pytest.mark.parametrize(
    "module",
    ["fusefs", "fusefs.inside.worker", "dedup.worker", "replication.report_process", "replication.history_process"],
)
def test_children_take_no_module_from_the_working_directory(tmp_path: Path, module: str) -> None:
    for name in ("msgspec", "numpy", "click", "fusefs", "struct"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')")
    # None of them can do anything with these arguments: they have come as far as their own code all the same.
    done = subprocess.run(
        [*python_module(module), "x"], cwd=tmp_path, env=child_environment(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert "not ours" not in done.stderr and "No module named" not in done.stderr


async def test_without_a_parent_the_guardian_does_nothing() -> None:
    guardian = Guardian(None)
    guardian.ready()
    guardian.failed("nothing")
    await guardian.watch(lambda: pytest.fail("nobody is gone"))


def test_the_command_makes_a_store_and_leaves_at_sigterm(tmp_path: Path) -> None:
    store, elsewhere = tmp_path / "new", tmp_path / "other.socket"
    command = [sys.executable, "-m", "fusefs", "appliance", "second", "--store", store, "--listen", f"unix:{elsewhere}"]
    started = subprocess.run([*command, "--log-file", tmp_path / "log"], capture_output=True, text=True, timeout=60)
    assert started.returncode == 0, started.stderr

    async def look() -> int:
        (here, there) = [await request(address, None, "status") for address in (str(store), f"unix:{elsewhere}")]
        assert here["groups"] == [] and here["pid"] == there["pid"]
        return int(here["pid"])  # type: ignore[call-overload]

    pid = trio.run(look)
    try:
        again = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert again.returncode == 1 and "one writer at a time" in again.stderr
        assert again.stderr.startswith("rewindfs: error: ") and again.stderr.count("\n") == 1
    finally:
        os.kill(pid, signal.SIGTERM)
        trio.run(end_of, pid)
    assert not elsewhere.exists() and not (store / "socket").exists()
    refused = subprocess.run([*command[:-1], "tcp://h:1", "-f"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "--insecure-tcp" in refused.stderr

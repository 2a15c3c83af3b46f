"""Waiting on the spot: the loop is spared its turns, and nobody who could go on waits for that."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from replication import linger, patient_poll
from replication.linger import Linger
from replication.patient_poll import REST_MAX, REST_MIN, PatientPoll


class Turns(trio.abc.Instrument):
    """Counts how often the loop waited. As a fixture, pytest-trio puts it into the loop."""

    count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


def open_pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    yield reading, writing
    os.close(reading)
    os.close(writing)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """To read from, and to write to."""
    yield from open_pipe()


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's regular turn does not come within a test."""
    monkeypatch.setattr(linger, "TURN_SECONDS", 1e9)


async def test_what_is_there_is_taken_without_a_turn_of_the_loop(
    pipe: tuple[int, int], turns: Turns, unhurried: None
) -> None:
    reading, writing = pipe
    lingers = Linger()
    os.write(writing, b"1")
    await trio.testing.wait_all_tasks_blocked()
    before = turns.count
    for _ in range(50):
        await lingers.readable(reading)
    assert turns.count == before


async def set_soon(event: trio.Event) -> None:
    await trio.sleep(0.005)
    event.set()


async def test_the_loop_has_its_turns(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"1")
    lingers = Linger()
    async with trio.open_nursery() as nursery:
        ended = trio.Event()
        nursery.start_soon(set_soon, ended)
        while not ended.is_set():
            await lingers.readable(reading)


async def test_who_could_run_runs_first(pipe: tuple[int, int], unhurried: None) -> None:
    reading, writing = pipe
    os.write(writing, b"1")
    lingers = Linger()
    await lingers.readable(reading)
    event = trio.Event()
    ran = []

    async def other() -> None:
        await event.wait()
        ran.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await trio.testing.wait_all_tasks_blocked()
        event.set()
        # What is there already; a turn of the loop, in which the other may come second; what is there already.
        for _ in range(4):
            await lingers.readable(reading)
        assert ran


async def test_while_others_are_ready_it_takes_what_is_there_once_a_step(
    pipe: tuple[int, int], turns: Turns, unhurried: None
) -> None:
    reading, writing = pipe
    os.write(writing, b"1")
    lingers = Linger()
    event = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(event.wait)
        await trio.testing.wait_all_tasks_blocked()
        before = turns.count
        event.set()
        await lingers.readable(reading)
        assert turns.count == before
        await lingers.readable(reading)
        assert turns.count > before


@pytest.fixture
def another() -> Iterator[tuple[int, int]]:
    """A second pipe."""
    yield from open_pipe()


class Woken:
    """A task that is woken by `to_wait`, waits for its descriptor then, and takes what is there."""

    def __init__(self, lingers: Linger, fd: int) -> None:
        self.got = b""
        self._lingers = lingers
        self._fd = fd
        self._task: trio.lowlevel.Task | None = None

    async def __call__(self) -> None:
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)
        self._lingers.waits()
        await self._lingers.readable(self._fd)
        self.got = os.read(self._fd, 10)

    def wake(self) -> None:
        assert self._task is not None
        self._lingers.to_wait(self._task)


async def test_who_is_ready_only_to_wait_is_not_waited_for(
    pipe: tuple[int, int], another: tuple[int, int], turns: Turns, unhurried: None
) -> None:
    reading, writing = pipe
    requests, lingers = Linger(), Linger()
    os.write(writing, b"1")
    await requests.readable(reading)
    os.read(reading, 1)
    woken = Woken(requests, reading)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(woken)
        await trio.testing.wait_all_tasks_blocked()
        before = turns.count
        os.write(another[1], b"2")
        woken.wake()
        for _ in range(10):
            await lingers.readable(another[0])
        assert turns.count == before
        # What comes for the task that is to wait ends that: it has its turn.
        os.write(writing, b"3")
        with trio.fail_after(30):
            while not woken.got:
                await lingers.readable(another[0])
    assert woken.got == b"3"


async def test_once_it_waits_others_are_waited_for_again(
    pipe: tuple[int, int], another: tuple[int, int], unhurried: None
) -> None:
    requests, lingers = Linger(), Linger()
    os.write(pipe[1], b"1")
    await requests.readable(pipe[0])
    os.read(pipe[0], 1)
    woken, event, ran = Woken(requests, pipe[0]), trio.Event(), False

    async def other() -> None:
        nonlocal ran
        await event.wait()
        ran = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(woken)
        nursery.start_soon(other)
        await trio.testing.wait_all_tasks_blocked()
        woken.wake()
        await trio.testing.wait_all_tasks_blocked()
        os.write(another[1], b"2")
        event.set()
        # As above: the loop has had two turns by then.
        for _ in range(4):
            await lingers.readable(another[0])
        assert ran
        nursery.cancel_scope.cancel()


class Ear:
    """Takes what comes through a pipe, one byte at a time, whoever asks."""

    def __init__(self, fd: int) -> None:
        self.heard = b""
        self._fd = fd

    def hear(self) -> bool:
        try:
            data = os.read(self._fd, 1)
        except BlockingIOError:
            return False
        self.heard += data
        return bool(data)

    async def listen(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            self.hear()


async def test_what_comes_is_heard_by_who_lingers(pipe: tuple[int, int], turns: Turns, unhurried: None) -> None:
    reading, writing = pipe
    ear, lingers = Ear(reading), Linger()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ear.listen)
        with linger.heard(reading, ear.hear):
            await trio.testing.wait_all_tasks_blocked()
            before = turns.count
            for number in range(100):
                os.write(writing, bytes([number]))
                assert lingers.until(lambda number=number: len(ear.heard) > number)  # type: ignore[misc]
            assert turns.count == before
        os.write(writing, b"x")
        assert not lingers.until(lambda: ear.heard[-1:] == b"x"), "nobody is heard any more"
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert ear.heard == bytes(range(100)) + b"x"


async def test_who_waits_for_one_descriptor_hears_another(
    pipe: tuple[int, int], another: tuple[int, int], turns: Turns, unhurried: None
) -> None:
    ear, lingers = Ear(another[0]), Linger()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ear.listen)
        with linger.heard(another[0], ear.hear):
            await trio.testing.wait_all_tasks_blocked()
            before = turns.count
            os.write(another[1], b"abc")
            os.write(pipe[1], b"1")
            await lingers.readable(pipe[0])
            assert (ear.heard, turns.count) == (b"abc", before)
        nursery.cancel_scope.cancel()


async def test_an_end_that_cannot_be_heard_is_the_loops(another: tuple[int, int], unhurried: None) -> None:
    """The descriptor stays readable, and there is nothing to take."""
    there, back = os.pipe()
    os.close(back)
    ear, lingers = Ear(there), Linger()
    try:
        with linger.heard(there, ear.hear):
            assert not lingers.until(lambda: False)
            with trio.move_on_after(0.01) as scope:
                await lingers.readable(another[0])
            assert scope.cancelled_caught
    finally:
        os.close(there)


async def test_a_peer_that_never_pauses_leaves_the_loop_its_turns(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"1")
    lingers = Linger()
    async with trio.open_nursery() as nursery:
        ended = trio.Event()
        nursery.start_soon(set_soon, ended)
        with linger.heard(reading, lambda: True), trio.fail_after(30):
            while not ended.is_set():
                assert not lingers.until(ended.is_set)
                await trio.lowlevel.checkpoint()


async def test_until_asks_first_and_waits_for_nobody_where_nobody_speaks(
    unhurried: None, another: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    polled: list[int] = []

    def poll(self: PatientPoll, milliseconds: int) -> list[tuple[int, int]]:
        polled.append(milliseconds)
        return []

    monkeypatch.setattr(PatientPoll, "poll", poll)
    lingers = Linger()
    assert lingers.until(lambda: True)
    assert not lingers.until(lambda: False)
    assert not polled
    with linger.heard(another[0], lambda: True):
        assert lingers.until(lambda: True)
        assert not polled
        assert not lingers.until(lambda: False)
        assert polled == [linger.LINGER_MILLISECONDS]


async def test_another_descriptor_ends_the_lingering(pipe: tuple[int, int], unhurried: None) -> None:
    """Two ends of one connection, each of which lingers for the other: neither may keep the other from running."""
    reading, writing = pipe
    there, back = os.pipe()
    os.set_blocking(there, False)

    async def answer() -> None:
        lingers = Linger()
        for _ in range(200):
            await lingers.readable(there)
            os.write(writing, os.read(there, 1))

    try:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                lingers = Linger()
                for number in range(200):
                    os.write(back, bytes([number]))
                    await lingers.readable(reading)
                    assert os.read(reading, 1) == bytes([number])
    finally:
        os.close(there)
        os.close(back)


async def test_what_a_thread_writes_is_read(pipe: tuple[int, int], unhurried: None) -> None:
    reading, writing = pipe
    lingers = Linger()
    thread = threading.Thread(target=lambda: [os.write(writing, b"x") for _ in range(100)])
    thread.start()
    got = b""
    with trio.fail_after(30):
        while len(got) < 100:
            await lingers.readable(reading)
            got += os.read(reading, 7)
    await trio.to_thread.run_sync(thread.join)


async def test_it_is_cancelled_in_the_loop(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"1")
    lingers = Linger()
    with trio.CancelScope() as scope:
        scope.cancel()
        while True:
            await lingers.readable(reading)
    assert scope.cancelled_caught


async def test_a_closed_descriptor_is_told_as_trio_does(pipe: tuple[int, int], unhurried: None) -> None:
    reading, _writing = pipe
    lingers = Linger()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.testing.wait_all_tasks_blocked)

        async def close() -> None:
            await trio.testing.wait_all_tasks_blocked()
            trio.lowlevel.notify_closing(reading)

        nursery.start_soon(close)
        with pytest.raises(trio.ClosedResourceError):
            await lingers.readable(reading)


async def test_who_is_alone(pipe: tuple[int, int], unhurried: None) -> None:
    reading, writing = pipe
    lingers = Linger()
    assert not lingers.is_alone()  # it has not waited for anything yet, and cannot tell
    os.write(writing, b"1")
    await lingers.readable(reading)
    assert not lingers.is_alone()
    os.read(reading, 1)
    assert lingers.is_alone()
    event = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(event.wait)
        await trio.testing.wait_all_tasks_blocked()
        assert lingers.is_alone()
        event.set()
        assert not lingers.is_alone()
    woken = Woken(lingers, reading)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(woken)
        await trio.testing.wait_all_tasks_blocked()
        woken.wake()
        assert lingers.is_alone()  # but for one that is ready only to wait
        os.write(writing, b"2")
        assert not lingers.is_alone()
    assert woken.got == b"2"


async def test_who_waits_for_another_descriptor_is_not_left_alone(
    pipe: tuple[int, int], another: tuple[int, int], unhurried: None
) -> None:
    reading, writing = pipe
    lingers = Linger()
    os.write(writing, b"1")
    await lingers.readable(reading)
    os.read(reading, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.wait_readable, another[0])
        await trio.testing.wait_all_tasks_blocked()
        assert lingers.is_alone()
        os.write(another[1], b"1")
        assert not lingers.is_alone()


def test_where_the_loop_cannot_be_told_nobody_lingers(pipe: tuple[int, int], turns: Turns) -> None:
    reading, writing = pipe
    os.write(writing, b"1")

    async def main() -> None:
        lingers = Linger()
        trio.lowlevel.add_instrument(turns)
        for _ in range(5):
            await lingers.readable(reading)
        os.read(reading, 1)
        assert not lingers.is_alone()

    with select.epoll():
        trio.run(main)
    assert turns.count >= 5


class Asked:
    """A poll object that is never ready, or at the asks given, and counts those that would not sleep."""

    def __init__(self) -> None:
        self.at_once = 0
        self.slept = 0
        self.ready_at = -1

    def register(self, descriptor: int, events: int) -> None:
        pass

    def poll(self, milliseconds: int) -> list[tuple[int, int]]:
        if milliseconds:
            self.slept += 1
            return []
        self.at_once += 1
        return [(3, select.POLLIN)] if self.at_once == self.ready_at else []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(select, "poll", lambda: asked)
    monkeypatch.setattr(patient_poll, "SPIN_SECONDS", 0.0)  # one ask is all there is time for
    return asked


def test_after_asking_in_vain_it_sleeps_at_once_ever_longer(asked: Asked) -> None:
    poll = PatientPoll(3)
    rest, rests = REST_MIN, []
    while rest < 8 * REST_MAX:
        before = asked.at_once
        count = 0
        while asked.at_once == before:
            assert poll.poll(1) == []
            count += 1
        rests.append(count - 1)
        rest *= 2
    assert rests[0] == 0
    assert rests[1:5] == [REST_MIN, 2 * REST_MIN, 4 * REST_MIN, 8 * REST_MIN]
    assert rests[-1] == rests[-2] == REST_MAX


def test_an_answer_makes_it_ask_again(asked: Asked) -> None:
    poll = PatientPoll(3)
    assert poll.poll(1) == []
    for _ in range(REST_MIN):
        poll.poll(1)
    assert asked.at_once == 1
    asked.ready_at = 2
    assert poll.poll(1) == [(3, select.POLLIN)]
    slept = asked.slept
    poll.poll(1)
    assert (asked.at_once, asked.slept) == (3, slept + 1)

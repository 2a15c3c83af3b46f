"""Calls in a thread that is waited for on the spot."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time

import pytest
import trio

from replication.near_thread import NearThread

NAME = "a thread near by"


def where() -> str:
    return threading.current_thread().name


def wait_until_none_is_left() -> None:
    gc.collect()
    until = time.monotonic() + 10
    while any(one.name == NAME for one in threading.enumerate()):
        assert time.monotonic() < until, "the thread does not end"
        time.sleep(0.01)


async def test_a_call_returns_what_it_returns_and_raises_what_it_raises() -> None:
    thread = NearThread(NAME)
    assert await thread.run(where) == NAME
    assert await thread.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await thread.run(divmod, 1, 0)
    with pytest.raises(FileNotFoundError):
        await thread.run(os.open, "/nowhere/at/all", os.O_RDONLY)
    assert await thread.run(where) == NAME


async def test_who_asks_meanwhile_gets_another_thread_and_its_own_answer() -> None:
    thread = NearThread(NAME)
    go = threading.Event()
    answers: dict[int, str] = {}

    def wait() -> str:
        assert go.wait(10)
        return where()

    async def ask(number: int) -> None:
        answers[number] = await thread.run(wait)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(ask, number)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert answers == {}, "the loop goes on while they wait"
        go.set()
    assert sorted(answers) == [0, 1, 2]
    assert list(answers.values()).count(NAME) == 1
    assert await thread.run(where) == NAME, "it is free again"


async def test_a_call_that_was_begun_is_waited_for_by_who_is_cancelled() -> None:
    thread = NearThread(NAME)
    ended = threading.Event()

    def work() -> None:
        time.sleep(0.1)
        ended.set()

    with trio.move_on_after(0.02):
        await thread.run(work)
    assert ended.is_set()
    with trio.CancelScope() as scope:
        scope.cancel()
        await thread.run(pytest.fail, "it was cancelled before it began")
    assert scope.cancelled_caught
    assert await thread.run(where) == NAME


async def test_each_answer_is_the_one_of_its_question() -> None:
    thread = NearThread(NAME)

    async def ask(task: int) -> None:
        for turn in range(50):
            assert await thread.run(divmod, 1000 * task + turn, 1000) == (task, turn)
            if turn % 7 == task:
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for task in range(4):
            nursery.start_soon(ask, task)


async def test_the_thread_ends_with_who_had_it() -> None:
    wait_until_none_is_left()
    before = len(os.listdir("/proc/self/fd"))
    thread = NearThread(NAME)
    assert await thread.run(where) == NAME
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del thread
    wait_until_none_is_left()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_where_no_thread_can_be_had_one_of_trios_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until_none_is_left()
    thread = NearThread(NAME)
    assert await trio.to_thread.run_sync(where) != NAME  # trio's is there by now
    descriptors = len(os.listdir("/proc/self/fd"))
    start = threading.Thread.start

    def refuse_thread(begun: threading.Thread) -> None:
        if begun.name == NAME:
            raise RuntimeError("can't start new thread")
        start(begun)

    def refuse_descriptor(*_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for place, name, refuse in ((threading.Thread, "start", refuse_thread), (os, "eventfd", refuse_descriptor)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, refuse)
            assert await thread.run(where) != NAME
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert await thread.run(where) == NAME, "it is tried again"

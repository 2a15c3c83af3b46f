"""The lock and the waiting of pyfuse3's main loop: every request is taken once, whoever is cancelled meanwhile."""

from __future__ import annotations

import random
import socket
import threading

import pyfuse3
import pytest
import trio
import trio.testing

from fusefs.request_wait import ReadLock, let_others, lingering_for_requests
from replication.linger import Linger

REQUESTS = 1000
WORKERS = 12


class Kernel:
    """Sends numbers, as packets, in a thread and at its own pace."""

    def __init__(self, dice: random.Random) -> None:
        self.near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.near.setblocking(False)
        self._dice = dice
        self._thread = threading.Thread(target=self._send)

    def start(self) -> None:
        self._thread.start()

    def _send(self) -> None:
        for number in range(REQUESTS):
            self._far.send(b"%d" % number)
            if self._dice.random() < 0.1:
                threading.Event().wait(self._dice.random() * 0.002)

    def close(self) -> None:
        self._thread.join()
        self.near.close()
        self._far.close()


@pytest.mark.parametrize("seed", range(3))
async def test_each_request_is_taken_once(seed: int) -> None:
    dice = random.Random(seed)
    kernel = Kernel(random.Random(seed + 1))
    linger = Linger()
    lock = ReadLock(linger)
    taken: list[int] = []
    holders = 0
    scopes: set[trio.CancelScope] = set()
    all_taken = trio.Event()

    async def serve(nursery: trio.Nursery) -> None:
        nonlocal holders
        with trio.CancelScope() as scope:
            scopes.add(scope)
            while True:
                async with lock:
                    holders += 1
                    assert holders == 1
                    try:
                        await linger.readable(kernel.near.fileno())
                    finally:
                        holders -= 1
                taken.append(int(kernel.near.recv(16)))
                if len(taken) == REQUESTS:
                    all_taken.set()
                with trio.CancelScope(shield=True):
                    await _handle(dice.random())
        scopes.remove(scope)
        nursery.start_soon(serve, nursery)

    async def cancel_some() -> None:
        while True:
            await trio.sleep(dice.random() * 0.003)
            dice.choice(sorted(scopes, key=id)).cancel()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(serve, nursery)
            nursery.start_soon(cancel_some)
            kernel.start()
            await all_taken.wait()
            nursery.cancel_scope.cancel()
    kernel.close()
    assert sorted(taken) == list(range(REQUESTS))


async def _handle(kind: float) -> None:
    if kind < 0.5:
        return
    if kind < 0.7:
        await trio.lowlevel.checkpoint()
    elif kind < 0.9:
        await trio.sleep(0.001)
    else:
        await trio.to_thread.run_sync(int)


async def test_a_free_lock_costs_no_checkpoint() -> None:
    lock = ReadLock(Linger())
    with trio.testing.assert_no_checkpoints():
        for _ in range(3):
            async with lock:
                pass


async def test_others_are_let_where_there_are_any() -> None:
    with trio.testing.assert_checkpoints():
        await let_others()  # no mount is served
    near, far = socket.socketpair()
    with near, far, lingering_for_requests():
        with trio.testing.assert_checkpoints():
            await let_others()  # it has waited for no request yet
        far.send(b"1")
        await pyfuse3.trio.lowlevel.wait_readable(near.fileno())
        with trio.testing.assert_checkpoints():
            await let_others()
        near.recv(1)
        with trio.testing.assert_no_checkpoints():
            await let_others()
    with trio.testing.assert_checkpoints():
        await let_others()


async def test_pyfuse3_has_trio_back_afterwards() -> None:
    with pytest.raises(ValueError), lingering_for_requests():
        assert pyfuse3.trio is not trio
        assert pyfuse3.trio.open_nursery is trio.open_nursery
        assert pyfuse3.trio.ClosedResourceError is trio.ClosedResourceError
        raise ValueError
    assert pyfuse3.trio is trio

"""The child process that computes for the second appliance (`dedup.worker`): started, asked, ended.

Invariants:
- the child has a request or none: one question at a time, each answered or the child is gone;
- when the block that started it ends, however it ends, the child has ended too.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from dedup.worker import Refused, Reply, ReplyStream, Request, Work, error_of, frame
from replication.errors import ReplicationError
from replication.supervisor import child_environment, python_module

LEAVE_SECONDS: Final = 5.0
"""How long the child may take to notice that its input has ended, before it is killed; both are as safe."""
_RECEIVE_BYTES: Final = 1 << 16


class WorkerLost(ReplicationError):
    """The child ended before it answered. What it was asked may be done, or a part of it: it can be asked again."""


class WorkerProcess:
    """A running child. Use `working`."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._replies = ReplyStream()
        self._sending = trio.Lock()
        self._asking = trio.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, request: Request) -> Reply:
        """Its reply. Raises WorkerLost, or the error that the worker met: Damaged, StoreFull, StoreFailed, StoreError.

        Cancelled: the child goes on with it, and must not be asked any more.
        """
        async with self._asking:
            await self._send(request)
            while (reply := self._replies.next_reply()) is None:
                assert self._process.stdout is not None
                data = await self._process.stdout.receive_some(_RECEIVE_BYTES)
                if not data:
                    raise WorkerLost("the worker process ended before it answered; its line is in the log")
                self._replies.receive_data(bytes(data))
        if isinstance(reply, Refused):
            raise error_of(reply)
        return reply

    async def take_share(self, share: float) -> None:
        """From now on it works at most this share of the time. WorkerLost."""
        await self._send(Work(share))

    async def _send(self, request: Request) -> None:
        async with self._sending:
            assert self._process.stdin is not None
            try:
                await self._process.stdin.send_all(frame(request))
            except trio.BrokenResourceError as error:
                raise WorkerLost("the worker process has ended; its line is in the log") from error

    async def _end(self) -> None:
        with trio.CancelScope(shield=True):
            assert self._process.stdin is not None and self._process.stdout is not None
            await self._process.stdin.aclose()
            with trio.move_on_after(LEAVE_SECONDS):
                await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
            await self._process.stdout.aclose()


@asynccontextmanager
async def working(store: Path) -> AsyncIterator[WorkerProcess]:
    """A child for the store at `store`, while the block runs."""
    # A session of its own: Ctrl-C on the terminal is for the appliance, at whose end the child ends too.
    process: trio.Process = await trio.lowlevel.open_process(
        [*python_module("dedup.worker"), str(store)],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    worker = WorkerProcess(process)
    try:
        yield worker
    finally:
        await worker._end()

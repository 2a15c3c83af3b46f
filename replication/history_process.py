"""Reads the past for one reader's session: a process of its own beside the second appliance.

A process that writes a store cannot open it again to read; and what a reader asks must not take the writer's time. The
child (`python -m replication.history_process STORE GROUP`) reads as any reader does, pins included; what it is asked
and what it answers passes through the appliance as it is, in the protocol's own frames.

Invariants:
- at most CHILDREN_MAX of them run at a time, PEER_CHILDREN_MAX of one key;
- a child, and with it its pins, ends with its session, however that ends: when its socket ends, it does;
- nothing of an answer is understood here, and only a bounded part of it is on its way: who reads slowly is answered
  slowly.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import trio

from dedup.errors import RewindError
from dedup.pins import Pinning
from dedup.reader import StoreReader
from replication.errors import LinkDown, ProtocolError
from replication.explanation import explain
from replication.history_answers import HistoryAnswers
from replication.history_queries import answer_bytes, question_of
from replication.identity import Peer
from replication.messages import ErrorCode, Failure, Query, Result
from replication.refused import Refused
from replication.supervisor import child_environment, python_module
from replication.transport import RECEIVE_BYTES_MAX, SocketConnection
from replication.wire import Decoder, encode

log = logging.getLogger("rewindfs.second_appliance")

CHILDREN_MAX: Final = 16
PEER_CHILDREN_MAX: Final = 12
"""Of one key, so that nobody can take all of them."""
NICE: Final = 5
"""Who reads the past waits a little; who writes has many to serve."""
THREADS: Final = 4
"""Questions of one reader that are answered at a time."""
LEAVE_SECONDS: Final = 2.0
"""How long a child may take to notice that its session is over, before it is killed; both are as safe."""


class HistoryReader:
    """A running child, for one session."""

    def __init__(self, connection: SocketConnection) -> None:
        self._connection = connection
        self._decoder = Decoder()

    async def ask(self, query: Query) -> None:
        """Passes it on; waits while the child has enough to do. Refused when it has ended."""
        try:
            await self._connection.send(encode(query))
        except LinkDown as error:
            raise _ended() from error

    async def next_result(self) -> Result:
        """The next answer. Refused when it has ended, ProtocolError for what the peer asked against the rules."""
        while (message := self._decoder.next_message()) is None:
            try:
                data = await self._connection.receive()
            except LinkDown as error:
                raise _ended() from error
            if not data:
                raise _ended()
            self._decoder.receive_data(data)
        if isinstance(message, Failure):
            if message.code is ErrorCode.PROTOCOL:
                raise ProtocolError(message.text)
            raise Refused(message.text, message.code)
        assert isinstance(message, Result), "a child says nothing else"
        return message


def _ended() -> Refused:
    return Refused("the process that reads for this session has ended; connect again", ErrorCode.UNAVAILABLE)


class HistoryProcesses:
    """The children of one appliance."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._running: Counter[str] = Counter()

    @asynccontextmanager
    async def reading(self, group: str, peer: Peer | None, *, local: bool) -> AsyncIterator[HistoryReader]:
        """A child that reads that group, while the block runs. `local`: answers are not worth compressing. Refused when
        there are too many, or the system has no room for one more."""
        who = "" if peer is None else str(peer.fingerprint)
        if self._running.total() >= CHILDREN_MAX or (who and self._running[who] >= PEER_CHILDREN_MAX):
            raise Refused(
                f"{self._running.total()} readers go back in this store already; try again later", ErrorCode.UNAVAILABLE
            )
        self._running[who] += 1
        try:
            async with self._child(group, local=local) as reader:
                yield reader
        finally:
            self._running[who] -= 1

    @asynccontextmanager
    async def _child(self, group: str, *, local: bool) -> AsyncIterator[HistoryReader]:
        with _within_limits():
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        connection = SocketConnection(ours)
        async with connection:
            with theirs, _within_limits():
                # A session of its own: Ctrl-C on the terminal is for the appliance, at whose end the child ends too.
                process: trio.Process = await trio.lowlevel.open_process(
                    [*python_module("replication.history_process"), str(self._store), group]
                    + (["plain"] if local else []),
                    env=child_environment(),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            try:
                yield HistoryReader(connection)
            finally:
                with trio.CancelScope(shield=True):
                    connection.close()
                    with trio.move_on_after(LEAVE_SECONDS):
                        await process.wait()
                    if process.returncode is None:
                        process.kill()
                        await process.wait()


@contextmanager
def _within_limits() -> Iterator[None]:
    """Refused where the system gives no process or descriptor more: the writer goes on without this reader."""
    try:
        yield
    except OSError as error:
        log.error("no process can be started for a reader: %s", error)
        raise Refused(f"the appliance cannot start a process for a reader: {error}", ErrorCode.UNAVAILABLE) from error


class _Child:
    """The child's side: blocking, with a few threads."""

    def __init__(self, sock: socket.socket, answers: HistoryAnswers, *, compress: bool) -> None:
        self._sock = sock
        self._answers = answers
        self._compress = compress
        self._sending = threading.Lock()
        self._threads = ThreadPoolExecutor(THREADS)

    def serve(self) -> None:
        """Until the session ends. What still runs then is cut off with the process."""
        decoder = Decoder()
        while data := self._sock.recv(RECEIVE_BYTES_MAX):
            decoder.receive_data(data)
            while (message := decoder.next_message()) is not None:
                assert isinstance(message, Query), "the appliance passes on nothing else"
                self._threads.submit(self._answer, message)

    def _answer(self, query: Query) -> None:
        try:
            question = question_of(query.body)
            body = answer_bytes(self._answers.answer(question), compress=self._compress)
            self._say(Result(query.id, body))
        except ProtocolError as error:
            self._say(Failure(ErrorCode.PROTOCOL, str(error)[:1000]))
        except OSError:
            return  # nobody listens any more, as the main thread hears
        except Exception as error:
            logging.getLogger("rewindfs.history").error("a question is not answered", exc_info=error)
            self._say(Failure(ErrorCode.STORE_FAILED, f"the reader's process failed: {explain(error)}"[:1000]))

    def _say(self, message: Result | Failure) -> None:
        with self._sending:
            for buffer in encode(message):
                self._sock.sendall(buffer)


def _leave(status: int) -> None:
    """Ends the process with its threads, wherever they are."""
    logging.shutdown()
    os._exit(status)


def _serve(path: Path, group: str, sock: socket.socket, *, compress: bool) -> None:
    store = StoreReader.open(path, pinning=Pinning.MOMENTS)
    try:
        _Child(sock, HistoryAnswers(store, group), compress=compress).serve()
    finally:
        if store.pins is not None:
            store.pins.close()


def main() -> None:
    """The child."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    os.nice(NICE)
    sock = socket.socket(fileno=os.dup(0))
    sock.setblocking(True)
    try:
        _serve(Path(sys.argv[1]), sys.argv[2], sock, compress=sys.argv[3:] != ["plain"])
    except (RewindError, OSError) as error:
        _say_last(sock.sendall, explain(error))
    _leave(0)


def _say_last(send: Callable[[bytes], None], text: str) -> None:
    try:
        for buffer in encode(Failure(ErrorCode.REFUSED, text[:1000])):
            send(bytes(buffer))
    except OSError:
        pass  # nobody listens any more


if __name__ == "__main__":
    main()

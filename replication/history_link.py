"""The link over which a reader asks a second appliance about the past: one session after the other, from a thread.

Invariants:
- one thread with its own trio loop has the connection; any other thread asks, and waits for its own answer;
- a question goes out as soon as it is asked, QUERIES_OPEN_MAX of them side by side; when a session ends before they are
  answered, those bound to it fail with SessionChanged, the others are asked again in the next one, SESSIONS_MAX times;
- a new session is used once it holds what is held (`held_moments`), and only of the same store;
- bounded: nobody waits longer than `patience` and one attempt to connect while there is no link, nor than
  ANSWER_SECONDS in all.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

import trio

from dedup.errors import MomentGone, RewindError, StoreError
from dedup.types import Epoch, Seq, TimeNs
from replication.errors import HandshakeRefused, LinkDown, ProtocolError
from replication.held_moments import HeldMoments
from replication.history_queries import (
    Answer,
    Held,
    Hold,
    Question,
    Refresh,
    Refused,
    Release,
    answer_of,
    error_of,
    question_bytes,
)
from replication.link import HANDSHAKE_SECONDS, next_message
from replication.messages import PROTOCOL_VERSION, Failure, Hello, Message, Query, Result, Role, Welcome
from replication.session import QUERIES_OPEN_MAX, Session, Side
from replication.transport import Connection

log = logging.getLogger("rewindfs.history")

PATIENCE_SECONDS: Final = 30.0
"""How long a question waits for a link that is down."""
ANSWER_SECONDS: Final = 120.0
"""How long a question may take in all: a hold waits up to a minute for the writer."""
SESSIONS_MAX: Final = 8
"""How often a question is asked anew because its session ended."""
RETRY_SECONDS_MIN: Final = 0.05
RETRY_SECONDS_MAX: Final = 2.0
STEADY_SECONDS: Final = 5.0
"""A session of so long did not fail: the next one is tried at once."""
REST_SECONDS: Final = 120.0
"""A session that nobody used for so long is kept by a question where something is held, and else ended until it is
needed: at the other end it is a process."""
_OPEN_SECONDS: Final = 30.0
"""How long the first question of a session may take: the process that answers must start."""

A = TypeVar("A")


class SessionChanged(Exception):
    """The question was bound to a session that has ended. Never shown to a person."""


class OtherStore(StoreError):
    """At the address is another store now than the one that was opened."""


class _Asked:
    """A question that somebody waits for."""

    __slots__ = ("body", "forgotten", "future", "generation", "sessions")

    def __init__(self, question: Question, generation: int | None) -> None:
        self.body = question_bytes(question)
        self.generation = generation
        self.future: Future[bytes | memoryview] = Future()
        self.sessions = 0
        """That ended before they answered it."""
        self.forgotten = False
        """Nobody waits any more."""


class _Resting(Exception):
    """Nobody has asked anything for a while, and nothing is held."""


class HistoryLink:
    """The link to one store, for one group. `open`, then `ask` from any thread, then `close`."""

    def __init__(
        self,
        address: str,
        connect: Callable[[], Awaitable[Connection]],
        group: str | None,
        *,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """`address` is for messages; `patience` in seconds."""
        self.address = address
        self.held = HeldMoments()
        self._connect = connect
        self._hello = Hello(PROTOCOL_VERSION, Role.READER, group or "", Epoch(0))
        self._patience = patience
        self._thread = threading.Thread(target=self._run, name="history link", daemon=True)
        self._opened: Future[None] = Future()
        self._token: trio.lowlevel.TrioToken | None = None
        self._closed = False
        """For a loop that has not begun when it is closed."""
        self._scope = trio.CancelScope()
        self._session_scope = trio.CancelScope()
        self._waiting: deque[_Asked] = deque()
        self._sent: dict[int, _Asked] = {}
        self._wake = trio.Event()
        self._number = 0
        self._busy = False
        """Whether anything was asked since it was last looked at."""
        self.store_uuid = ""
        """Of the store that answers; known once the link is open, and the same for good."""
        self._down_since: float | None = None
        self._dead: RewindError | None = None

    @property
    def generation(self) -> int:
        """The number of the session in use, or of the last one."""
        return self.held.generation

    def open(self) -> None:
        """Connects. LinkDown, HandshakeRefused, ProtocolError and their like say why there is no link."""
        self._thread.start()
        try:
            self._opened.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the link; who still waits gets LinkDown."""
        self._closed = True
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()

    def ask(self, question: Question, kind: type[A], generation: int | None = None) -> A:
        """The answer, of that kind; with a generation only of that session. Not for the thread of a trio loop.

        The error that the store met; LinkDown, SessionChanged, OtherStore; ProtocolError for an answer that is none.
        """
        asked = _Asked(question, generation)
        self._put(asked)
        try:
            body = asked.future.result(ANSWER_SECONDS)
        except TimeoutError:
            asked.forgotten = True
            reason = f"{self.address} has not answered within {ANSWER_SECONDS:g} s"
            self._call(self._break, reason)
            raise LinkDown(reason) from None
        try:
            answer: Answer = answer_of(body)
            if isinstance(answer, Refused):
                raise error_of(answer)
            if not isinstance(answer, kind):
                raise _other_kind(answer, kind)
        except ProtocolError as error:
            self._call(self._break, str(error))
            raise ProtocolError(f"{self.address}: {error}") from error
        return answer

    def unsettled(self) -> LinkDown:
        """SESSIONS_MAX sessions ended before they answered a question. The error to be raised."""
        return LinkDown(f"{self.address}: {SESSIONS_MAX} sessions in a row ended before they answered")

    def broken(self, error: str) -> ProtocolError:
        """What the peer said cannot be: the session ends. The error to be raised."""
        self._call(self._break, error)
        return ProtocolError(f"{self.address}: {error}")

    def tell(self, question: Question) -> None:
        """Asks in the session that there is now, if there is one, and does not wait. Any thread."""
        asked = _Asked(question, self.generation)
        asked.forgotten = True
        with suppress(LinkDown, OtherStore):  # then what there was to be told of has ended, too
            self._put(asked)

    def _put(self, asked: _Asked) -> None:
        self._call(self._enqueue, asked)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        assert self._token is not None, "not open"
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            raise self._dead or LinkDown(f"{self.address}: the link was closed") from None

    # -- in the link's own thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            if self._opened.done():
                log.critical("the link's thread has failed", exc_info=error)
            else:
                self._opened.set_exception(error)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        try:
            with self._scope:
                if not self._closed:
                    await self._serve()
        finally:
            # Whoever asks from here on, too: until the loop has ended, questions still come in.
            self._dead = self._dead or LinkDown(f"{self.address}: the link was closed")
            self._fail_all(self._dead)

    async def _serve(self) -> None:
        pause = 0.0
        while True:
            began = trio.current_time()
            try:
                with trio.CancelScope() as self._session_scope:
                    await self._one_session()
                reason = "the session ended"
            except _Resting:
                self._down_since = None
                await self._wait_until_needed()
                continue
            except RewindError as error:
                if not self._opened.done():
                    self._opened.set_exception(error)
                    return
                if isinstance(error, OtherStore):
                    self._dead = error
                    log.critical("%s", error)
                    self._fail_all(error)
                    return
                reason = str(error)
            if trio.current_time() - began >= STEADY_SECONDS:
                pause = 0.0
            self._is_down(reason)
            await trio.sleep(pause)
            pause = min(max(2 * pause, RETRY_SECONDS_MIN), RETRY_SECONDS_MAX)

    def _is_down(self, reason: str) -> None:
        """There is no link: says so, and after a while to those who wait for one."""
        now = trio.current_time()
        if self._down_since is None:
            self._down_since = now
            log.warning("%s: %s; connecting again", self.address, reason)
        elif now - self._down_since >= self._patience:
            if self._waiting:
                log.error("%s: no link for %.0f s: %s", self.address, now - self._down_since, reason)
            self._fail_all(LinkDown(f"{self.address}: no link for {self._patience:g} s or more: {reason}"))

    async def _wait_until_needed(self) -> None:
        while not self._waiting:
            self._wake = trio.Event()
            await self._wake.wait()

    async def _one_session(self) -> None:
        """From the connection to its end, which raises why."""
        connection = await self._connect()
        async with connection:
            session = Session(Side.CLIENT)
            try:
                await self._greet(connection, session)
                if self._down_since is not None:
                    log.info("%s: connected again", self.address)
                self._down_since = None
                if not self._opened.done():
                    self._opened.set_result(None)
                await self._until_one_ends(
                    partial(self._send, connection, session),
                    partial(self._receive, connection, session),
                    self._watch_idle,
                )
            finally:
                self._session_over()

    async def _until_one_ends(self, *tasks: Callable[[], Awaitable[None]]) -> None:
        """Raises why the first of them did."""
        reasons: list[Exception] = []

        async def run(task: Callable[[], Awaitable[None]]) -> None:
            try:
                await task()
            except (RewindError, _Resting) as error:
                reasons.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(run, task)
        if reasons:
            raise reasons[0]

    async def _greet(self, connection: Connection, session: Session) -> None:
        with trio.move_on_after(HANDSHAKE_SECONDS + _OPEN_SECONDS):
            await connection.send(session.send(self._hello))
            welcome = await _next(connection, session)
            if not isinstance(welcome, Welcome):
                raise ProtocolError(f"{self.address}: {type(welcome).__name__} instead of a welcome")
            if self.store_uuid not in ("", welcome.store):
                raise OtherStore(f"{self.address} has another store now; what was opened is gone: begin anew")
            # Answered once its process has the store open.
            (first,) = await self._exchange(connection, session, [Refresh()])
            if isinstance(first, Refused):
                raise error_of(first)
            held: set[Seq] = set()
            while (surplus := self.held.renew(held)) is None:
                await self._hold(connection, session, held)
            self.store_uuid = welcome.store
            for seq in surplus:
                self.tell(Release(seq))
            return
        raise LinkDown(f"{self.address} does not open its history within {HANDSHAKE_SECONDS + _OPEN_SECONDS:g} s")

    async def _hold(self, connection: Connection, session: Session, held: set[Seq]) -> None:
        """Has the new session hold what is missing, or learn that it is gone."""
        seqs = self.held.missing(held)
        answers = await self._exchange(connection, session, [Hold(seq) for seq in seqs])
        for seq, answer in zip(seqs, answers, strict=True):
            if isinstance(answer, Held):
                held.add(seq)
                self.held.settle(seq, TimeNs(answer.time))
            elif isinstance(answer, Refused) and isinstance(error := error_of(answer), MomentGone):
                log.warning("%s: %s", self.address, error)
                self.held.settle(seq, None)
            else:  # not held, and not gone either
                raise error_of(answer) if isinstance(answer, Refused) else _other_kind(answer, Held)

    async def _exchange(self, connection: Connection, session: Session, questions: list[Question]) -> list[Answer]:
        """The answers to a few questions, before anybody else's are asked in the session."""
        answers: dict[int, Answer] = {}
        numbers = []
        for start in range(0, len(questions), QUERIES_OPEN_MAX):
            some = questions[start : start + QUERIES_OPEN_MAX]
            for question in some:
                self._number += 1
                numbers.append(self._number)
                await connection.send(session.send(Query(self._number, question_bytes(question))))
            for _ in some:
                result = await _next(connection, session)
                assert isinstance(result, Result), "the session's table lets a server say nothing else"
                answers[result.id] = answer_of(result.body)
        return [answers[number] for number in numbers]

    async def _send(self, connection: Connection, session: Session) -> None:
        while True:
            buffers = []
            while self._waiting and session.queries_open < QUERIES_OPEN_MAX:
                asked = self._waiting.popleft()
                if asked.generation not in (None, self.generation):
                    asked.future.set_exception(SessionChanged())
                    continue
                self._number += 1
                self._sent[self._number] = asked
                buffers += session.send(Query(self._number, asked.body))
            if buffers:
                await connection.send(buffers)
                continue
            self._wake = trio.Event()
            await self._wake.wait()

    async def _receive(self, connection: Connection, session: Session) -> None:
        while True:
            result = await _next(connection, session)
            assert isinstance(result, Result), "the session's table lets a server say nothing else"
            self._sent.pop(result.id).future.set_result(result.body)
            if self._waiting:
                self._wake.set()

    async def _watch_idle(self) -> None:
        while True:
            self._busy = False
            await trio.sleep(REST_SECONDS)
            if self._busy or self._sent:
                continue
            if not self.held:
                raise _Resting
            self.tell(Refresh())

    def _enqueue(self, asked: _Asked) -> None:
        if self._dead is not None:
            asked.future.set_exception(self._dead)
            return
        self._busy = True
        self._waiting.append(asked)
        self._wake.set()

    def _break(self, reason: str) -> None:
        log.warning("%s: the session is given up: %s", self.address, reason)
        self._session_scope.cancel()

    def _session_over(self) -> None:
        """What was asked and not answered is asked again, or fails."""
        sent, self._sent = self._sent, {}
        again = []
        for asked in sent.values():
            if asked.forgotten:
                continue
            asked.sessions += 1
            if asked.generation is not None:
                asked.future.set_exception(SessionChanged())
            elif asked.sessions < SESSIONS_MAX:
                again.append(asked)
            else:  # it may be what ends them
                asked.future.set_exception(self.unsettled())
        self._waiting.extendleft(reversed(again))

    def _fail_all(self, error: RewindError) -> None:
        waiting, self._waiting = self._waiting, deque()
        for asked in waiting:
            asked.future.set_exception(error)


def _other_kind(answer: Answer, kind: type) -> ProtocolError:
    return ProtocolError(f"{type(answer).__name__} instead of {kind.__name__}")


async def _next(connection: Connection, session: Session) -> Message:
    message = await next_message(connection, session)
    if isinstance(message, Failure):
        raise HandshakeRefused(message.code, message.text)
    return message

"""Sessions that go back, at a real second appliance with its children: what is served, what is refused, what ends."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from dedup.errors import MomentGone, RewindError, UnknownName
from dedup.history import History
from dedup.pins import Pinned, pinned
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import ClockRun, Epoch, Seq, TimeNs, VolumeId
from replication import history_link, history_process
from replication import history_queries as said
from replication.cache_options import CachePlace
from replication.endpoint import listen
from replication.errors import HandshakeRefused, LinkDown, ProtocolError
from replication.first_service import FirstService
from replication.frame_layout import QUERY, MessageType
from replication.history import open_history
from replication.history_link import HistoryLink, OtherStore
from replication.identity import Identity
from replication.messages import (
    PROTOCOL_VERSION,
    QUERY_BYTES_MAX,
    ErrorCode,
    Failure,
    Hello,
    Message,
    Query,
    Result,
    Role,
    Welcome,
)
from replication.route import Route
from replication.second_appliance import SecondAppliance
from replication.session import QUERIES_OPEN_MAX, Session, Side
from replication.transport import Connection, connect_unix
from replication.wire import encode
from tests.fusefs.snapshot_history import GROUP
from tests.fusefs.snapshot_history import History as SmallHistory
from tests.replication.links import make_friends
from tests.replication.test_relay import Stranger

SECONDS = 60.0


@pytest.fixture
def store_path(tmp_path: Path) -> tuple[Path, dict[int, bytes | None]]:
    """A store that nobody has open, and what disk.img held at some seqs."""
    made = SmallHistory(tmp_path / "store")
    made.store.group("other")
    contents = {seq: made.content(seq, "disk.img") for seq in made.moments.values()}
    made.close()
    return made.path, contents


@asynccontextmanager
async def served(path: Path, *addresses: str, identity: Identity | None = None) -> AsyncIterator[list[str]]:
    """Where its appliance listens."""
    store = Store.open(path)
    appliance = SecondAppliance(store)
    listeners = [await listen(address, identity=identity, replace_stale=True) for address in addresses]
    async with trio.open_nursery() as nursery:
        await nursery.start(appliance.serve, listeners)
        yield [str(listener.address) for listener in listeners]
        appliance.stop()
    store.close()


class Reader(Stranger):
    """A client that goes back, and says what a test tells it to."""

    async def answer(self, number: int, question: said.Question) -> said.Answer:
        await self.say(Query(number, said.question_bytes(question)))
        result = await self.hear()
        assert isinstance(result, Result) and result.id == number, result
        return said.answer_of(result.body)

    async def failure(self) -> Failure:
        with trio.fail_after(SECONDS):
            message = await self.hear()
        assert isinstance(message, Failure), message
        assert await self.hear() is None
        return message


@asynccontextmanager
async def reader(address: str, group: str = GROUP, role: Role = Role.READER) -> AsyncIterator[Reader]:
    async with await connect_unix(Path(address.removeprefix("unix:"))) as connection:
        one = Reader(connection)
        await one.say(Hello(PROTOCOL_VERSION, role, group, Epoch(0)))
        assert isinstance(await one.hear(), Welcome)
        yield one


def children() -> list[int]:
    """Processes that read for a session of this process."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"PPid:\t{os.getpid()}\n" in status and b"replication.history_process" in command:
            found.append(pid)
    return found


async def none_left(store: Path) -> None:
    """Who looks for pins clears those of the dead. A killed process has its lock until the kernel is done with it."""
    with trio.fail_after(SECONDS):
        while children() or pinned(Storage(), store) != Pinned() or list((store / "readers").glob("*.pins")):  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_a_session_ends_alone_for_what_is_no_query(store_path: tuple[Path, object]) -> None:
    path, _ = store_path
    question = said.question_bytes(said.Refresh())
    async with served(path, f"unix:{path}/s") as (address,):
        async with reader(address) as sound:
            assert isinstance(await sound.answer(1, said.Refresh()), said.Refreshed)
            for body in (b"\xff" * 20, said.question_bytes(said.Blocks(1, 5, ((0, 200), (300, 57))))):
                async with reader(address) as one:
                    await one.say(Query(1, body))
                    failure = await one.failure()
                    assert failure.code is ErrorCode.PROTOCOL and "query" in failure.text
            async with reader(address) as one:
                length = QUERY.size + QUERY_BYTES_MAX + 1
                await one.connection.send([QUERY.pack(length, MessageType.QUERY, 0, 0, 1)])
                assert (await one.failure()).code is ErrorCode.PROTOCOL
            async with reader(address) as one:
                frames = [
                    part for number in range(QUERIES_OPEN_MAX + 1) for part in encode(Query(number + 1, question))
                ]
                await one.connection.send(frames)
                heard = [await one.hear()]
                one.session._queries.update(range(1, QUERIES_OPEN_MAX + 2))
                assert isinstance(heard[0], Failure) and heard[0].code is ErrorCode.PROTOCOL
            async with reader(address, role=Role.ADMIN) as one:
                await one.connection.send(encode(Query(1, question)))
                assert (await one.failure()).code is ErrorCode.PROTOCOL
            for seq in (1, 1 << 40):
                answer = await sound.answer(2, said.Require(seq))
                assert isinstance(answer, said.Done if seq == 1 else said.Refused)
            answer = await sound.answer(3, said.Pointers(999, 1, 0, 1))
            assert isinstance(answer, said.Refused) and answer.kind == UnknownName.__name__
            answer = await sound.answer(4, said.Blocks(1, 1 << 40, ((0, 1),)))
            assert isinstance(answer, said.Refused) and answer.kind == MomentGone.__name__
            answer = await sound.answer(5, said.Release(12345))
            assert isinstance(answer, said.Done)
        await none_left(path)


async def test_groups_that_are_not_there_and_too_many_readers(
    store_path: tuple[Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = store_path
    monkeypatch.setattr(history_process, "CHILDREN_MAX", 1)
    query = Query(1, said.question_bytes(said.Refresh()))
    async with served(path, f"unix:{path}/s") as (address,):
        for group, expected in (("nothing", "no group 'nothing'"), ("", "name a group")):
            async with reader(address, group) as one:
                await one.say(query)
                failure = await one.failure()
                assert failure.code is ErrorCode.REFUSED and expected in failure.text
        async with reader(address) as one:
            await one.say(query)
            assert isinstance(await one.hear(), Result)
            async with reader(address) as other:
                await other.say(query)
                failure = await other.failure()
                assert failure.code is ErrorCode.UNAVAILABLE and "1 readers go back" in failure.text
            # Its process ends: the session does, in words, and there is room for another.
            (child,) = children()
            os.kill(child, signal.SIGKILL)
            failure = await one.failure()
            assert failure.code is ErrorCode.UNAVAILABLE and "has ended" in failure.text
        await none_left(path)
        async with reader(address) as one:
            await one.say(query)
            assert isinstance(await one.hear(), Result)
            (child,) = children()
            os.kill(child, signal.SIGSTOP)  # one that cannot leave is killed
        await none_left(path)


async def test_no_room_for_a_process(store_path: tuple[Path, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that session's end, and not the appliance's."""
    path, _ = store_path
    query = Query(1, said.question_bytes(said.Refresh()))

    def full(*_arguments: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with served(path, f"unix:{path}/s") as (address,):
        for place, name, fault in ((sys, "executable", str(path / "none")), (socket, "socketpair", full)):
            async with reader(address) as one:
                with monkeypatch.context() as patched:
                    patched.setattr(place, name, fault)
                    await one.say(query)
                    failure = await one.failure()
                assert failure.code is ErrorCode.UNAVAILABLE and "cannot start a process" in failure.text
        async with reader(address) as one:
            assert isinstance(await one.answer(1, said.Refresh()), said.Refreshed)
        await none_left(path)


async def test_what_a_key_may_go_back_in(store_path: tuple[Path, dict[int, bytes]], tmp_path: Path) -> None:
    path, contents = store_path
    cache = CachePlace(tmp_path)
    client, server = make_friends(tmp_path, role=Role.READER, groups=(GROUP,))
    stranger, _ = make_friends(tmp_path / "others")
    stranger.trust(server.certificate(), role=None, server=True, name="second")

    def go_back(address: str, identity: Identity, group: str | None) -> None:
        with open_history(address, group, Route(identity), cache=cache) as history:
            for seq, content in contents.items():
                image = history.image(history.group_at(Seq(seq)).volume("disk.img").volume, Seq(seq))
                assert image.read(0, image.size) == content

    in_thread = trio.to_thread.run_sync
    async with served(path, "tls://127.0.0.1:0", identity=server) as (address,):
        for group in (None, GROUP):
            await in_thread(go_back, address, client, group)
        with pytest.raises(HandshakeRefused, match="not trusted with group 'other'"):
            await in_thread(go_back, address, client, "other")
        with pytest.raises(LinkDown, match="does not trust this machine's key"):
            await in_thread(go_back, address, stranger, GROUP)
        await none_left(path)


async def test_a_first_appliance_passes_it_on(store_path: tuple[Path, dict[int, bytes]], tmp_path: Path) -> None:
    """Of the groups that its own peer may touch, not of those that it may itself."""
    path, contents = store_path
    client, server = make_friends(tmp_path, role=Role.READER, groups=(GROUP,))
    seq = max(contents)

    def go_back(address: str, group: str | None) -> bytes:
        with open_history(address, group, Route(client), cache=CachePlace(tmp_path)) as history:
            return history.image(history.group_at(Seq(seq)).volume("disk.img").volume, Seq(seq)).read(0, 1 << 30)

    in_thread = trio.to_thread.run_sync
    async with served(path, f"unix:{path}/s"):
        first = FirstService(partial(connect_unix, path / "s"))
        listener = await listen("tls://127.0.0.1:0", identity=server)
        async with trio.open_nursery() as nursery:
            await nursery.start(first.serve, [listener])
            address = str(listener.address)
            assert await in_thread(go_back, address, GROUP) == contents[seq]
            with pytest.raises(HandshakeRefused, match="reads one of them through a first appliance: name it"):
                await in_thread(go_back, address, None)
            with pytest.raises(HandshakeRefused, match="not trusted with group 'other'"):
                await in_thread(go_back, address, "other")
            first.stop()
        await none_left(path)


async def test_a_history_outlives_its_appliance(store_path: tuple[Path, dict[int, bytes]], tmp_path: Path) -> None:
    path, contents = store_path
    socket = f"unix:{path}/s"
    early, late = sorted(contents)[0], sorted(contents)[-1]
    opened: list[History] = []
    remote = open_history(socket, GROUP, cache=CachePlace(tmp_path))
    in_thread = trio.to_thread.run_sync
    async with served(path, socket):
        history = await in_thread(remote.__enter__)
        opened.append(history)
        volume = (await in_thread(history.group_at, Seq(late))).volume("disk.img").volume
        images = {seq: await in_thread(history.image, volume, Seq(seq)) for seq in (early, late)}
        await in_thread(history.hold, Seq(early))
        assert await in_thread(images[early].read, 0, 10_000) == contents[early][:10_000]
        pinned = list((path / "readers").glob("*.pins"))
        assert len(pinned) == 1
    # Nobody answers: what is cached is read, the rest waits.
    assert await in_thread(images[early].read, 0, 5000) == contents[early][:5000]
    found: dict[int, bytes] = {}
    all_found = trio.Event()

    async def read(seq: int) -> None:
        found[seq] = await in_thread(images[seq].read, 0, len(contents[seq]))
        if len(found) == len(images):
            all_found.set()

    async with trio.open_nursery() as nursery:
        for seq in images:
            nursery.start_soon(read, seq)
        await trio.lowlevel.checkpoint()
        assert not found
        async with served(path, socket):
            with trio.fail_after(SECONDS):
                await all_found.wait()
            assert found == {seq: contents[seq] for seq in images}
            assert history.hold_again(Seq(early))
            answers = list((path / "readers").glob("*.pins"))
            assert len(answers) == 1 and answers != pinned
            await in_thread(remote.__exit__, None, None, None)
    await none_left(path)


async def test_a_bounded_wait_and_another_store(
    store_path: tuple[Path, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = store_path
    socket = path / "s"
    link = HistoryLink("there", partial(connect_unix, socket), GROUP, patience=0.3)
    in_thread = trio.to_thread.run_sync
    async with served(path, f"unix:{socket}"):
        await in_thread(link.open)
        assert (await in_thread(link.ask, said.Refresh(), said.Refreshed)).group == GROUP
    with pytest.raises(LinkDown, match=r"there: no link for 0.3 s or more: cannot connect to .*No such file"):
        await in_thread(link.ask, said.Refresh(), said.Refreshed)
    assert "no link for" in caplog.text
    async with served(path, f"unix:{socket}"):
        with trio.fail_after(SECONDS):
            while True:
                try:
                    await in_thread(link.ask, said.Refresh(), said.Refreshed)
                    break
                except LinkDown:
                    continue  # the wait was over before the appliance was there
        assert link.generation == 2
    other = SmallHistory(tmp_path / "another")
    other.close()
    async with served(other.path, f"unix:{socket}"):
        with trio.fail_after(SECONDS):
            with pytest.raises(OtherStore, match="another store"):
                while True:
                    try:
                        await in_thread(link.ask, said.Refresh(), said.Refreshed)
                    except LinkDown:
                        continue
        with pytest.raises(OtherStore):
            await in_thread(link.ask, said.Refresh(), said.Refreshed)
    await in_thread(link.close)


async def test_who_is_silent_leaves_and_comes_back(
    store_path: tuple[Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that nobody uses ends; with something held it is kept."""
    path, _ = store_path
    monkeypatch.setattr(history_link, "REST_SECONDS", 0.05)
    link = HistoryLink("there", partial(connect_unix, path / "s"), GROUP)
    in_thread = trio.to_thread.run_sync
    async with served(path, f"unix:{path}/s"):
        await in_thread(link.open)
        await none_left(path)
        assert (await in_thread(link.ask, said.Refresh(), said.Refreshed)).group == GROUP
        assert link.generation == 2
        held = None
        while held is None:  # until a hold was answered in the session that was still there
            session = link.generation
            try:
                time = (await in_thread(link.ask, said.Hold(5), said.Held, session)).time
            except history_link.SessionChanged:
                continue
            held = link.held.began(Seq(5), time, session)  # type: ignore[arg-type]
        session = link.generation
        await trio.sleep(0.3)
        assert link.generation == session and len(children()) == 1
        await in_thread(link.close)
    await none_left(path)


async def test_who_asks_as_the_link_is_closed_is_told(
    store_path: tuple[Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = store_path
    link = HistoryLink("there", partial(connect_unix, path / "s"), GROUP)
    late = history_link._Asked(said.Refresh(), None)
    fail_all = link._fail_all

    def fail_all_but_one(error: RewindError) -> None:
        fail_all(error)
        link._enqueue(late)  # as a thread does between that and the loop's end

    monkeypatch.setattr(link, "_fail_all", fail_all_but_one)
    in_thread = trio.to_thread.run_sync
    async with served(path, f"unix:{path}/s"):
        await in_thread(link.open)
        await in_thread(link.close)
        with pytest.raises(LinkDown, match="there: the link was closed"):
            late.future.result(0)
        with pytest.raises(LinkDown, match="there: the link was closed"):
            await in_thread(link.ask, said.Refresh(), said.Refreshed)


async def test_a_link_that_is_closed_before_it_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C may: `close` has nobody to tell yet, and waits for the thread."""
    begin = threading.Event()
    run = trio.run

    def run_later(*arguments: Any) -> None:
        begin.wait(SECONDS)
        run(*arguments)

    async def connect() -> Connection:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(trio, "run", run_later)
    link = HistoryLink("there", connect, GROUP)
    link._thread.start()
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, link.close)
            while not link._closed:  # noqa: ASYNC110 - nobody says so
                await trio.sleep(0.001)
            begin.set()
    assert not link._thread.is_alive()


async def test_nobody_there_and_an_older_appliance(tmp_path: Path) -> None:
    in_thread = trio.to_thread.run_sync

    def go_back(address: str) -> None:
        with open_history(address, None, cache=CachePlace(tmp_path)):
            raise AssertionError("there is nobody")

    with pytest.raises(LinkDown, match="cannot connect to .*No such file"):
        await in_thread(go_back, f"unix:{tmp_path}/s")
    listener = await listen(f"unix:{tmp_path}/s")

    async def answer(*messages: Message) -> None:
        async with await listener.accept() as connection:
            await connection.receive()
            await connection.send([part for message in messages for part in encode(message)])
            await connection.receive()

    async with trio.open_nursery() as nursery:
        text = "protocol version 3 is not spoken here, 2 is; use equal versions"
        nursery.start_soon(answer, Failure(ErrorCode.VERSION, text))
        with pytest.raises(HandshakeRefused, match=text):
            await in_thread(go_back, f"unix:{tmp_path}/s")
        nursery.start_soon(answer, Result(1, b"r"))
        with pytest.raises(ProtocolError):
            await in_thread(go_back, f"unix:{tmp_path}/s")
    await listener.aclose()


@asynccontextmanager
async def scripted(
    socket: Path, answer: Callable[[int, int, said.Question], said.Answer | bytes]
) -> AsyncIterator[None]:
    """Answers Queries there with what is made of the session's number, the question's number in it, and the question;
    no bytes end the session."""

    async def received(connection: Connection) -> bytes:
        try:
            return await connection.receive()
        except LinkDown:
            return b""

    async def converse(connection: Connection, number: int) -> None:
        session = Session(Side.SERVER)
        asked = 0
        while data := await received(connection):
            session.receive_data(data)
            while (message := session.next_event()) is not None:
                if isinstance(message, Hello):
                    await connection.send(session.send(WELCOME))
                elif isinstance(message, Query):
                    asked += 1
                    found = answer(number, asked, said.question_of(message.body))
                    body = found if isinstance(found, bytes) else said.answer_bytes(found, compress=False)
                    if not body:
                        return
                    await connection.send(session.send(Result(message.id, body)))

    async def serve() -> None:
        number = 0
        while True:
            async with await listener.accept() as connection:
                number += 1
                await converse(connection, number)

    listener = await listen(f"unix:{socket}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield
        nursery.cancel_scope.cancel()
    await listener.aclose()


WELCOME = Welcome(
    PROTOCOL_VERSION, "s", Epoch(0), Seq(0), Seq(0), TimeNs(0), ClockRun(0), False, False, VolumeId(0), b""
)
REFRESHED = said.Refreshed("g", 7, (1, 1))


async def test_a_peer_that_lies_is_left_and_tried_again(tmp_path: Path) -> None:
    """What it said is not used: who asked is told, the session ends, and the next one is as good as any."""
    fine = said.answer_bytes(REFRESHED, compress=False)
    lies: list[bytes] = [b"x" * 40, bytes(fine[:-1]), bytes(said.answer_bytes(said.Done(), compress=False))]
    link = HistoryLink("there", partial(connect_unix, tmp_path / "s"), None)

    def answer(_session: int, asked: int, _question: said.Question) -> said.Answer | bytes:
        # The first one of a session is the link's own.
        return lies.pop() if asked > 1 and lies else REFRESHED

    in_thread = trio.to_thread.run_sync
    async with scripted(tmp_path / "s", answer):
        await in_thread(link.open)
        for _ in range(3):
            with pytest.raises(ProtocolError, match="there: "):
                await in_thread(link.ask, said.Refresh(), said.Refreshed)
        assert (await in_thread(link.ask, said.Refresh(), said.Refreshed)).covered_until == 7
        assert link.generation == 4
        await in_thread(link.close)


async def test_a_moment_that_cannot_be_held_anew_just_now_is_not_given_up(tmp_path: Path) -> None:
    """The next session holds it, or there is none: a store that is busy has not thinned it out."""
    link = HistoryLink("there", partial(connect_unix, tmp_path / "s"), None)
    busy: list[said.Answer] = [said.Refused("StoreBusy", "later"), said.Refused("Damaged", "a file"), said.Done()]

    def answer(session: int, asked: int, question: said.Question) -> said.Answer | bytes:
        if isinstance(question, said.Hold):
            return busy.pop() if session > 1 and busy else said.Held(70)
        return b"" if session == 1 and asked > 2 else REFRESHED

    in_thread = trio.to_thread.run_sync
    async with scripted(tmp_path / "s", answer):
        await in_thread(link.open)
        assert (await in_thread(link.ask, said.Hold(5), said.Held)).time == 70
        assert link.held.began(Seq(5), TimeNs(70), 1)
        assert await in_thread(link.ask, said.Refresh(), said.Refreshed) == REFRESHED
        assert not busy and link.generation == 2
        assert link.held.again(Seq(5))
        await in_thread(link.close)


async def test_a_question_that_ends_each_session_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_link, "RETRY_SECONDS_MAX", 0.0)
    link = HistoryLink("there", partial(connect_unix, tmp_path / "s"), None)
    asked: list[said.Question] = []

    def answer(_session: int, _asked: int, question: said.Question) -> said.Answer | bytes:
        asked.append(question)
        return b"" if isinstance(question, said.Names) else REFRESHED

    in_thread = trio.to_thread.run_sync
    async with scripted(tmp_path / "s", answer):
        await in_thread(link.open)
        with pytest.raises(LinkDown, match="there: 8 sessions in a row ended before they answered"):
            await in_thread(link.ask, said.Names(0), said.NamesPage)
        assert asked.count(said.Names(0)) == 8
        assert await in_thread(link.ask, said.Refresh(), said.Refreshed) == REFRESHED
        await in_thread(link.close)

"""What an identity may do is enforced: an agent's cannot delete history nor read another group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import trio.testing

from dedup.store import Store
from dedup.types import Seq
from replication import open_sessions
from replication.commands import _COMMANDS, without_others
from replication.identity import Fingerprint
from replication.identity import Peer as Identity
from replication.messages import ErrorCode, Failure, Role, Welcome
from replication.permissions import Caller, NotAllowed, check_peer
from replication.transport import memory_pair
from tests.dedup.model import Model
from tests.replication.fake_store import FakeStore
from tests.replication.test_second_appliance import Peer, World, beat, quick_syncs, running

__all__ = ["quick_syncs"]

SECRET = "payroll"
OWN = "web"


def identity(role: Role | None, *groups: str, name: str = "host") -> Identity:
    return Identity(name, role, frozenset(groups), Fingerprint(f"SHA256:{name}"))


async def connect(world: World, who: Identity | None) -> Peer:
    ours, theirs = memory_pair()
    theirs.peer = who
    await world.channel.send(theirs)
    return Peer(ours)


async def session(world: World, who: Identity | None, role: Role, group: str = "") -> Peer:
    peer = await connect(world, who)
    answer = await peer.greet(role, group, epoch=1 if role is Role.AGENT else 0)
    assert isinstance(answer, Welcome), answer
    return peer


@pytest.fixture
def store() -> FakeStore:
    made = FakeStore()
    for name in (SECRET, OWN):
        group = made.group(name)
        group.held = group.durable = Seq(9)
        group.has_base = True
        group.names.add(f"{name}-snapshot")
    return made


@pytest.mark.parametrize("trusted", [None, *Role])
@pytest.mark.parametrize("wanted", list(Role))
@pytest.mark.parametrize("group", ["", OWN, SECRET])
async def test_which_sessions_an_identity_may_have(
    store: FakeStore, trusted: Role | None, wanted: Role, group: str
) -> None:
    if wanted is Role.AGENT and not group:
        return  # the codec refuses it
    takes: dict[Role | None, Sequence[Role]] = {
        None: (),
        Role.AGENT: (Role.AGENT, Role.READER),
        Role.READER: (Role.READER,),
        Role.ADMIN: tuple(Role),
    }
    async with running(store) as world:
        peer = await connect(world, identity(trusted, OWN))
        answer = await peer.greet(wanted, group, epoch=1 if wanted is Role.AGENT else 0)
        if wanted in takes[trusted] and group != SECRET:
            assert isinstance(answer, Welcome)
        else:
            assert isinstance(answer, Failure)
            assert answer.code is ErrorCode.REFUSED
            assert await peer.hear() is None


async def test_a_group_that_is_not_one_s_own_is_refused_alike_whether_there_is_one(store: FakeStore) -> None:
    async with running(store) as world:
        answers = []
        for group in (SECRET, "no-such-group"):
            peer = await connect(world, identity(Role.AGENT, OWN))
            answer = await peer.greet(Role.AGENT, group)
            assert isinstance(answer, Failure)
            answers.append((answer.code, answer.text.replace(group, "GROUP")))
        assert answers[0] == answers[1]
    assert [group.name for group in store.groups] == [SECRET, OWN], "no group was made by asking"


@pytest.mark.parametrize("role", [Role.AGENT, Role.READER])
@pytest.mark.parametrize("command", sorted(_COMMANDS))
@pytest.mark.parametrize("group", [None, OWN, SECRET])
async def test_no_command_reads_or_changes_another_group(
    store: FakeStore, role: Role, command: str, group: str | None
) -> None:
    """Whatever is asked, by an agent's identity in either of its sessions."""
    if command in ("report", "journal.list", "heal.wanted"):
        return  # of a store that there is: below
    before = [(one.names.copy(), one.held) for one in store.groups]
    body: dict[str, object] = {"name": f"{SECRET}-snapshot", "addresses": [7], "kind": "store"}
    if group is not None:
        body["group"] = group
    async with running(store) as world:
        peer = await session(world, identity(Role.AGENT, OWN), role, OWN if role is Role.AGENT else "")
        reply = await peer.ask(command, **body)
        said = repr(reply.body) + reply.error
        assert SECRET not in said.replace(f"'{SECRET}-snapshot'", "").replace(f"no group '{SECRET}'", ""), said
        if reply.error == "":
            assert command in {"name.check", "status", "sync", "retention.show"}
    assert [(one.names, one.held) for one in store.groups] == before


@pytest.mark.parametrize("role", [Role.AGENT, Role.READER])
async def test_no_report_tells_of_another_group(tmp_path: Path, role: Role) -> None:
    Store.create(tmp_path / "store")
    real = Store.open(tmp_path / "store")
    for name in (SECRET, OWN):
        real.group(name).ingest(Model().begin())
        real.group(name).create_journal(f"{name}-journal", 0)
    real.checkpoint()
    try:
        async with running(cast(FakeStore, real)) as world:
            peer = await session(world, identity(Role.AGENT, OWN), role, OWN if role is Role.AGENT else "")
            for kind, body in (
                ("store", {}),
                ("snapshots", {}),
                ("map", {"group": OWN}),
                ("points", {"group": SECRET}),
            ):
                reply = await peer.ask("report", kind=kind, **body)
                assert SECRET not in (repr(reply.body) + reply.error).replace(f"no group '{SECRET}'", "")
            for command in ("journal.list", *(["heal.wanted"] if role is Role.AGENT else [])):
                reply = await peer.ask(command, group=OWN)
                assert not reply.error
                assert SECRET not in repr(reply.body)
    finally:
        real.close()


def test_a_map_names_no_other_group() -> None:
    rows = [["ranges", {"offset": 0, "journal": f"{SECRET}/fine"}], ["ranges", {"offset": 1, "journal": "fine"}]]
    assert SECRET not in repr(without_others({"head": {}, "rows": rows, "next": None}))


async def test_deleting_is_for_admins_and_for_their_groups(store: FakeStore) -> None:
    async with running(store) as world:
        agent = await session(world, identity(Role.AGENT, OWN), Role.AGENT, OWN)
        assert "not for the role" in (await agent.ask("snapshot.delete", name=f"{OWN}-snapshot")).error
        admin = await session(world, identity(Role.ADMIN, OWN), Role.ADMIN)
        assert "no group" in (await admin.ask("snapshot.delete", group=SECRET, name=f"{SECRET}-snapshot")).error
        assert "all groups" in (await admin.ask("gc")).error
        assert not (await admin.ask("snapshot.delete", group=OWN, name=f"{OWN}-snapshot")).error
        whole = await session(world, identity(Role.ADMIN), Role.ADMIN)
        assert not (await whole.ask("snapshot.delete", group=SECRET, name=f"{SECRET}-snapshot")).error
    assert [group.names for group in store.groups] == [set(), set()]


async def test_status_tells_of_one_s_own_groups(store: FakeStore) -> None:
    async with running(store) as world:
        await world.agent(SECRET)
        for who, role, expected in (
            (identity(Role.READER, OWN), Role.READER, [OWN]),
            (identity(Role.READER), Role.READER, [SECRET, OWN]),
            (None, Role.READER, [SECRET, OWN]),
        ):
            peer = await session(world, who, role)
            status = (await peer.ask("status")).body
            groups = status["groups"]
            assert isinstance(groups, list)
            assert [group["group"] for group in groups] == expected
            await peer.connection.aclose()
        peer = await session(world, identity(Role.READER, OWN), Role.READER)
        assert (await peer.ask("status")).body["sessions"] == 0


async def test_one_key_cannot_take_all_sessions(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_sessions, "PEER_SESSIONS_MAX", 2)
    async with running(store) as world:
        greedy = identity(Role.READER, name="greedy")
        first = await session(world, greedy, Role.READER)
        await session(world, greedy, Role.READER)
        third = await connect(world, greedy)
        answer = await third.greet(Role.READER, epoch=0)
        assert isinstance(answer, Failure)
        assert "2 sessions" in answer.text
        await session(world, identity(Role.READER, name="other"), Role.READER)
        await first.connection.aclose()
        await trio.testing.wait_all_tasks_blocked()
        await session(world, greedy, Role.READER)


async def test_connections_without_a_hello_keep_nobody_out(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_sessions, "UNGREETED_MAX", 3)
    async with running(store, sessions_max=2) as world:
        silent = [await world.connect() for _ in range(9)]
        await trio.testing.wait_all_tasks_blocked()
        assert world.appliance.live()[""] == 3
        peer = await world.agent(OWN)
        await peer.say(beat(10))
        await peer.hear_ack(10)
        answer = await silent[0].hear()
        assert isinstance(answer, Failure)
        assert answer.code is ErrorCode.REFUSED


@pytest.mark.parametrize(("trusted", "wanted"), list(itertools.product(Role, Role)))
def test_an_identity_without_groups_may_touch_all(trusted: Role, wanted: Role) -> None:
    try:
        check_peer(identity(trusted), wanted, "any")
        allowed = True
    except NotAllowed:
        allowed = False
    check_peer(None, wanted, "any")
    assert allowed == (trusted is Role.ADMIN or wanted is Role.READER or trusted is wanted)


def test_a_reader_that_names_a_group_is_of_that_group() -> None:
    """As one that a first appliance passes on is: the key it comes with may more."""
    assert Caller(Role.READER, "g").limited and Caller(Role.READER, "g").may_touch("g")
    assert not Caller(Role.READER, "g").may_touch("other")
    assert not Caller(Role.READER, "").limited and Caller(Role.READER, "").may_touch("other")
    assert not Caller(Role.ADMIN, "g").limited and Caller(Role.ADMIN, "g").may_touch("other")

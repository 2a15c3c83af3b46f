"""`rewindfs journal`: what it prints, what it refuses, and both ways to the store."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

from dedup.errors import BadGranularity, NameRefused, UnknownName
from dedup.store import Store
from replication.control import NoAppliance, request
from replication.errors import LinkDown, RequestRefused
from replication.journal_cli import journal
from replication.messages import Role
from replication.second_appliance import SecondAppliance
from replication.transport import listen_unix
from tests.dedup.model import Model

FINE = {"group": "g", "name": "fine", "id": 1, "granularity": "every-write", "in_use": True}
MINUTES = {"group": "g", "name": "minutes", "id": 2, "granularity": "1m", "in_use": False}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    Store.create(path)
    opened = Store.open(path)
    opened.group("g").ingest(Model().begin())
    opened.close()
    return path


def run(*args: object, status: int = 0) -> str:
    """What it prints; its RewindError is raised, as fusefs/cli.py's main would see it."""
    result = CliRunner().invoke(journal, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def listed(*args: object) -> object:
    return json.loads(run("list", *args, "--json"))


def test_created_used_and_listed(store: Path) -> None:
    assert listed(store) == [FINE]
    assert json.loads(run("create", store, "minutes", "--granularity", "60s", "--json")) == MINUTES
    assert listed(store) == [FINE, MINUTES]
    assert json.loads(run("use", store, "minutes", "--json")) == {**MINUTES, "in_use": True}
    assert run("create", store, "second") == "second  every-write\n"
    assert run("use", store, "fine") == "fine  every-write  in use\n"
    assert [line.split() for line in run("list", store).splitlines()] == [
        ["group", "journal", "granularity"],
        ["g", "fine", "every-write", "in", "use"],
        ["g", "minutes", "1m"],
        ["g", "second", "every-write"],
    ]


def test_several_groups(store: Path) -> None:
    opened = Store.open(store)
    opened.group("h").ingest(Model().begin())
    opened.close()
    with pytest.raises(UnknownName, match="--group"):
        run("create", store, "minutes")
    run("create", store, "minutes", "--granularity", "1m", "--group", "h")
    theirs = [{**FINE, "group": "h"}, {**MINUTES, "group": "h"}]
    assert listed(store) == [FINE, *theirs]
    assert listed(store, "--group", "h") == theirs


def test_what_is_refused(store: Path) -> None:
    for name in ("base", "fine", "5m", "a/b"):
        with pytest.raises(NameRefused):
            run("create", store, name)
    for granularity in ("0s", "2d", "60", "never"):
        with pytest.raises(BadGranularity, match=r"from 1s to 1d"):
            run("create", store, "n", "--granularity", granularity)
    with pytest.raises(UnknownName, match="it has: fine"):
        run("use", store, "n")
    with pytest.raises(NoAppliance):
        run("list", f"unix:{store}/socket")
    with pytest.raises(LinkDown, match="cannot connect"):
        run("list", "tcp://127.0.0.1:1")
    assert listed(store) == [FINE]


@pytest.fixture
async def served(store: Path) -> AsyncIterator[Store]:
    """The store, with an appliance behind its socket."""
    opened = Store.open(store)
    appliance = SecondAppliance(opened)
    async with trio.open_nursery() as nursery:
        await nursery.start(appliance.serve, [listen_unix(store / "socket")])
        yield opened
        appliance.stop()
    opened.close()


async def test_through_a_running_appliance(store: Path, served: Store) -> None:
    in_thread = trio.to_thread.run_sync
    assert (
        json.loads(await in_thread(partial(run, "create", store, "minutes", "--granularity", "60s", "--json")))
        == MINUTES
    )
    used = {**MINUTES, "in_use": True}
    assert json.loads(await in_thread(partial(run, "use", store, "minutes", "--json"))) == used
    assert served.group("g").state.journal == 2
    rows = [{**FINE, "in_use": False}, used]
    assert await in_thread(listed, f"unix:{store}/socket") == rows
    with pytest.raises(RequestRefused, match="already has a data journal 'minutes'"):
        await in_thread(partial(run, "create", store, "minutes"))
    with pytest.raises(RequestRefused, match="has no data journal 'n'; it has: fine, minutes"):
        await in_thread(partial(run, "use", store, "n"))


async def test_who_may_ask_for_what(store: Path, served: Store) -> None:
    reply = await request(store, None, "journal.list", role=Role.READER)
    assert reply == {"group": "g", "journals": [{key: FINE[key] for key in ("name", "id", "granularity", "in_use")}]}
    for command in ("journal.create", "journal.use"):
        with pytest.raises(RequestRefused, match="not for the role reader"):
            await request(store, None, command, {"name": "fine"}, role=Role.READER)
    with pytest.raises(RequestRefused, match="no number"):
        await request(store, None, "journal.create", {"name": "n", "granularity_ns": "60s"})
    with pytest.raises(RequestRefused, match="cannot keep one point per 1e-09 s"):
        await request(store, None, "journal.create", {"name": "n", "granularity_ns": 1})
    with pytest.raises(RequestRefused, match="lacks 'name'"):
        await request(store, None, "journal.use", {})

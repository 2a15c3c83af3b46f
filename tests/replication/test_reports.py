"""Reports: the same document from a store's files and from its appliance, however many pages it takes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from click.testing import CliRunner

from dedup.errors import MomentRefused, UnknownName
from dedup.store import Store
from dedup.types import Bookmark
from fusefs.status_cli import status
from replication import reports
from replication.control import request
from replication.endpoint import listen
from replication.errors import RequestRefused
from replication.messages import CONTROL_BYTES_MAX, Role
from replication.points_cli import points
from replication.reports import Subject, make_page, open_report, paged
from replication.retention_cli import retention
from replication.second_appliance import SecondAppliance
from replication.snapshot_cli import snapshot
from tests.dedup.model import Model

VOLUMES = 6
COMMANDS: list[tuple[Any, ...]] = [
    (points, "STORE", "--group", "g"),
    (points, "STORE", "d2/disk.img", "--group", "g"),
    (points, "STORE", "d2/disk.img", "--group", "g", "--timeline", "--since", "mark1", "--buckets", "7"),
    (snapshot, "list", "STORE"),
    (snapshot, "list", "STORE", "--group", "other"),
    (snapshot, "map", "STORE", "d3/disk.img", "--at", "mark3", "--group", "g"),
    (retention, "show", "STORE"),
    (status, "STORE"),
]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A group `g` of a few volumes, with bookmarks; and an empty group `other`."""
    path = tmp_path / "store"
    Store.create(path)
    opened = Store.open(path)
    model = Model()
    group = opened.group("g")
    group.ingest(model.begin())
    for number in range(1, VOLUMES + 1):
        made = model.create(f"d{number}/disk.img", 1 << 20)
        group.ingest([made, model.write(made.volume, 8192 * number, b"x" * 5000), model.flush(made.volume)])
        group.ingest([Bookmark(*model._next(), f"mark{number}")])
    opened.group("other").ingest(Model().begin())
    opened.close()
    return path


@asynccontextmanager
async def served(store: Path) -> AsyncIterator[str]:
    """Where its appliance listens: TCP on the loopback."""
    opened = Store.open(store)
    appliance = SecondAppliance(opened)
    listener = await listen("tcp://127.0.0.1:0")
    async with trio.open_nursery() as nursery:
        await nursery.start(appliance.serve, [listener])
        yield str(listener.address)
        appliance.stop()
    opened.close()


def run(command: Any, *args: str) -> str:
    result = CliRunner().invoke(command, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


async def test_an_address_tells_what_the_path_tells(store: Path) -> None:
    def all_said(place: str, *more: str) -> list[str]:
        lines = [[place if word == "STORE" else word for word in words] for _, *words in COMMANDS]
        return [run(command, *line, *more) for (command, *_), line in zip(COMMANDS, lines, strict=True)]

    near = all_said(str(store), "--json"), all_said(str(store))
    async with served(store) as address:
        in_thread = trio.to_thread.run_sync
        far = await in_thread(all_said, address, "--json"), await in_thread(all_said, address)
    assert far == near
    assert all(json.loads(document) for document in near[0])


def test_pages_go_through_all_rows_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = (
        Subject("snapshots"),
        Subject("points", "g"),
        Subject("timeline", "g"),
        Subject("map", "g", "d1/disk.img"),
    )
    for subject in subjects:
        with open_report(str(store), subject) as whole:
            document = whole.document()
        for page_rows in (1, 2, 5):
            monkeypatch.setattr(reports, "PAGE_ROWS", page_rows)
            assert paged(partial(make_page, store, subject)).document() == document


def test_a_page_fits_a_reply(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "PAGE_BYTES", 1000)
    page = make_page(store, Subject("snapshots"), 0)
    assert page["next"] is not None
    assert len(msgspec.msgpack.encode(page)) < 2000 < CONTROL_BYTES_MAX


async def test_what_is_refused(store: Path) -> None:
    async with served(store) as address:
        await refused(address)
    with pytest.raises(UnknownName):
        run(points, str(store), "nothing", "--group", "g")
    with pytest.raises(MomentRefused):
        run(snapshot, "map", str(store), "d1/disk.img", "--at", "seq=999", "--group", "g")


async def refused(address: str) -> None:
    ask = partial(request, address, None, "report", role=Role.READER)
    for body, why in (
        ({}, "lacks 'kind'"),
        ({"kind": "secrets"}, "there is no report 'secrets'"),
        ({"kind": "points", "group": "none"}, "no group 'none'"),
        ({"kind": "map", "group": "g", "volume": "nothing"}, "had no volume 'nothing'"),
        ({"kind": "map", "group": "g", "volume": "d1/disk.img", "at": "seq=999"}, "seq=999"),
        ({"kind": "points", "group": "g", "start": -1}, "no such number"),
        ({"kind": "timeline", "group": "g", "buckets": "many"}, "no such number"),
        ({"kind": "timeline", "group": "g", "since": "never was"}, "no TIME|has no bookmark"),
        ({"kind": "timeline", "group": "g", "since": "latest", "until": "mark1"}, "exchange the two"),
    ):
        with pytest.raises(RequestRefused, match=why):
            await ask(body)  # type: ignore[arg-type]

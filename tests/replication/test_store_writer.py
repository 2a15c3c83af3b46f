"""The store's one writer among tasks: what comes between a point that is kept and the checkpoint behind it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from dedup.errors import StoreFull
from dedup.types import Record
from replication.store_writer import THREAD_BYTES, StoreWriter
from tests.replication.fake_store import FakeStore
from tests.replication.test_second_appliance import beat


class ToldStore(FakeStore):
    """Tells what is done to it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        self.gate = threading.Event()
        self.cannot_checkpoint = False

    def keep(self) -> None:
        self.gate.wait()
        self.done.append("kept")

    def ingest(self, records: Sequence[Record]) -> None:
        self.done.append("ingested")

    def checkpoint(self) -> None:
        self.done.append("checkpoint")
        if self.cannot_checkpoint:
            raise StoreFull("made to be full")
        super().checkpoint()


async def ingested(writer: StoreWriter, store: ToldStore, nbytes: int) -> None:
    await writer.ingest(store, [beat(1)], nbytes)  # type: ignore[arg-type]  # no more of a group is asked for


@pytest.mark.parametrize("nbytes", [10, THREAD_BYTES])
@pytest.mark.parametrize("is_full", [False, True])
async def test_what_waits_for_a_kept_point_waits_for_its_checkpoint_too(nbytes: int, is_full: bool) -> None:
    """On a full disk, too; then it goes on without."""
    store = ToldStore()
    store.cannot_checkpoint = is_full
    writer = StoreWriter(store)  # type: ignore[arg-type]
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.keep, store.keep)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ingested, writer, store, nbytes)
            await trio.testing.wait_all_tasks_blocked()
            store.gate.set()
    assert store.done == ["kept", "checkpoint", "ingested"]


@pytest.mark.parametrize("nbytes", [10, THREAD_BYTES])
async def test_one_that_gives_up_leaves_the_checkpoint_to_the_next(nbytes: int) -> None:
    store = ToldStore()
    writer = StoreWriter(store)  # type: ignore[arg-type]
    store.gate.set()
    await writer.keep(store.keep)
    with trio.fail_after(5):
        with trio.CancelScope() as scope:
            scope.cancel()
            await ingested(writer, store, nbytes)
        await ingested(writer, store, nbytes)
        await ingested(writer, store, nbytes)
    assert store.done == ["kept", "checkpoint", "ingested", "ingested"]

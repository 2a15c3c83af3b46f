"""A reconcile whose link or source fails in the middle."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from dedup.types import BLOCK_BYTES, Reconcile, Seq, VolumeId
from replication.messages import Compare, Level
from replication.reconcile import Reconciler, Work, all_regions, digest
from tests.replication.test_agent_link import ScriptedFirst, a_link

VOLUME = VolumeId(1)


class File:
    """Implements `reconcile.SourceFiles` for one file, which nobody else uses."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @asynccontextmanager
    async def opened(self, volume: VolumeId) -> AsyncIterator[int | None]:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    @asynccontextmanager
    async def claimed(self, volume: VolumeId, offset: int, length: int) -> AsyncIterator[bool]:
        yield True


class Reconnecting(ScriptedFirst):
    """Its sessions have one key after the other, and the next one begins while a first record waits for room."""

    def __init__(self) -> None:
        super().__init__()
        self.digest_key = b"first session"

    async def room(self, nbytes: int) -> bool:
        if not self.records:
            self.digest_key = b"second session"
        return True

    async def compared(self, seq: Seq) -> bytes:
        (compare,) = (record for record in self.records if isinstance(record, Compare))
        content = bytes(BLOCK_BYTES) + b"x" * BLOCK_BYTES
        blocks = (content[at : at + BLOCK_BYTES] for at in (0, BLOCK_BYTES))
        digests = b"".join(digest(self.digest_key, block) for block in blocks)
        size = len(digests) // 2
        return bytes(compare.digests[at : at + size] != digests[at : at + size] for at in (0, size))

    async def reached(self, seq: Seq, level: Level) -> None:
        """At once."""


@pytest.fixture
def file(tmp_path: Path) -> File:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(BLOCK_BYTES) + b"x" * BLOCK_BYTES)
    return File(path)


async def test_digests_are_of_the_session_that_they_are_sent_in(
    file: File, autojump_clock: trio.testing.MockClock
) -> None:
    first = Reconnecting()
    run = Reconciler(a_link(first), file)
    await run.run([Work(VOLUME, all_regions(2 * BLOCK_BYTES))])
    assert (run.progress.differing_blocks, run.progress.sent) == (0, 0)


@pytest.mark.parametrize("fresh", [True, False])
async def test_unreadable_source_is_tried_again(
    file: File, fresh: bool, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    failures = [OSError(errno.EIO, "bad sector")] * 3
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if failures:
            raise failures.pop()
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    first = Reconnecting()
    run = Reconciler(a_link(first), file)
    await run.run([Work(VOLUME, all_regions(2 * BLOCK_BYTES), fresh=fresh)])
    assert not failures
    assert any(isinstance(record, Reconcile) for record in first.records) is fresh

"""The note of a restore goes once what it wrote is on the source's disk, and stays where that failed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusefs.mount_restore import MountRestore
from fusefs.restore_claim import RestoreClaims
from fusefs.unfinished_restores import UnfinishedRestores


class FailingDisk:
    """An agent whose source has a disk that takes nothing, for as long as it `fails`."""

    def __init__(self) -> None:
        self.fails = True
        self.link = SimpleNamespace(require_equal=lambda: None)

    async def sync(self) -> None:
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


async def test_note_stays_until_the_source_is_synced(tmp_path: Path) -> None:
    disk: Any = FailingDisk()
    notes = UnfinishedRestores(tmp_path / "restores.json", "store")
    answers = MountRestore(disk, RestoreClaims(), set, notes).handlers()
    number = (await answers["restore.start"]({"place": "db", "pid": os.getpid()}))["id"]
    await answers["restore.begin"]({"id": number, "place": "db", "seq": 7, "bookmark": "before"})
    ended = {"id": number, "place": "db", "done": True}
    with pytest.raises(OSError, match="Input/output"):
        await answers["restore.end"](ended)
    assert [note.place for note in UnfinishedRestores(tmp_path / "restores.json", "store").all] == ["db"]
    disk.fails = False
    await answers["restore.end"](ended)
    assert UnfinishedRestores(tmp_path / "restores.json", "store").all == ()

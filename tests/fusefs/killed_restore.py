"""A restore that kills itself: `python -m tests.fusefs.killed_restore STORE FILE SEQ NOTES`, in the middle of the write
that follows so many notes of how far it has come."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from dedup.reader import StoreReader
from dedup.types import Moment
from fusefs import restored_file
from fusefs.restored_file import RestoredFile
from tests.fusefs.test_restored_file import small_pieces


def main(store: str, path: str, seq: str, notes: str) -> None:
    small_pieces()
    group = StoreReader.open(Path(store)).group()
    moment: Moment = group.resolve(f"seq={seq}")
    left = int(notes)
    kept, written = restored_file.replace_file, restored_file.write_all

    def replace_file(note: Path, content: bytes) -> None:
        nonlocal left
        kept(note, content)
        left -= 1

    def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
        if left <= 0:
            written(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        written(fd, data, offset)

    restored_file.replace_file = replace_file  # type: ignore[assignment]
    restored_file.write_all = write_all  # type: ignore[assignment]
    (volume,) = group.group_at(moment.seq).volumes.values()
    RestoredFile(group, moment, volume, Path(path)).restore()


if __name__ == "__main__":
    main(*sys.argv[1:])

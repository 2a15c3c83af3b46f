"""Who has a file open: open, only mapped, and nobody. Loop devices are a system test's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusefs.open_files import holders

OPENS = "import sys; file = open(sys.argv[1]); print('there', flush=True); sys.stdin.read()"
MAPS = (
    "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR); held = mmap.mmap(fd, 0); os.close(fd);"
    "print('there', flush=True); sys.stdin.read()"
)


@contextmanager
def holding(program: str, file: Path) -> Iterator[int]:
    command = [sys.executable, "-c", program, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        yield process.pid
        process.communicate()


@pytest.mark.parametrize("program", [OPENS, MAPS], ids=["open", "mapped"])
def test_a_process_is_named_by_what_it_holds(tmp_path: Path, program: str) -> None:
    file, other = tmp_path / "disk.img", tmp_path / "d" / "disk.img"
    other.parent.mkdir()
    for path in (file, other):
        path.write_bytes(b"content")
    with holding(program, file) as pid:
        (told,) = holders(file)
        assert told.startswith(f"process {pid} (") and "python" in told
        assert holders(other) == []
    assert holders(file) == []

"""`points --timeline` as a person sees it: on a terminal, on one that can do little, and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dedup.store import Store
from dedup.timeline_picture import UNICODE
from replication.points_cli import points
from tests.dedup.model import Model


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    Store.create(path)
    opened = Store.open(path)
    model = Model()
    made = [*model.begin(), model.create("disk.img", 1 << 20)]
    volume = made[-1].volume  # type: ignore[union-attr]
    writes = [model.write(volume, 4096 * index, b"x" * 5000) for index in range(50)]
    opened.group("g").ingest([*made, *writes, model.flush(volume)])
    opened.close()
    return path


def on_a_terminal(store: Path, **environment: str) -> str:
    """What the command writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fusefs", "points", str(store), "--timeline"]
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(command, env=own | environment, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 1 << 16):
            written += part
    except OSError:  # what Linux says at the end of a terminal
        pass
    finally:
        os.close(ours)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return written.decode()


def test_on_a_terminal(store: Path) -> None:
    picture = on_a_terminal(store, TERM="xterm-256color")
    assert "\x1b[" in picture
    assert UNICODE.bars[-1] in picture
    assert "every-write, in fine" in picture
    dumb = on_a_terminal(store, TERM="dumb")
    assert dumb.isascii()
    assert "\x1b" not in dumb
    assert "#" in dumb


def test_in_a_pipe(store: Path) -> None:
    done = CliRunner(env={"COLUMNS": "60"}).invoke(points, [str(store), "--timeline"])
    assert done.exit_code == 0, done.output
    assert done.stdout.isascii()
    assert all(len(line) <= 60 for line in done.stdout.splitlines()[2:])
    assert done.stdout.startswith("group g\n")


def test_as_data(store: Path) -> None:
    def document(*words: str) -> dict[str, object]:
        done = CliRunner().invoke(points, [str(store), *words, "--json"])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert isinstance(found, dict)
        return found

    plain, more = document(), document("--timeline", "--buckets", "5")
    timeline = more.pop("timeline")
    assert [one["name"] for one in more.pop("snapshots")] == ["base"]  # type: ignore[attr-defined]
    assert more == plain
    assert isinstance(timeline, dict)
    assert len(timeline["buckets"]) <= 5
    assert sum(bucket["bytes"] for bucket in timeline["buckets"]) == 50 * 5000
    assert sum(bucket["records"] for bucket in timeline["buckets"]) == 50
    assert sum(bucket["flushes"] for bucket in timeline["buckets"]) == 1


def test_what_is_no_timeline_s(store: Path) -> None:
    for option in (("--since", "latest"), ("--until", "latest"), ("--buckets", "7")):
        done = CliRunner().invoke(points, [str(store), *option])
        assert done.exit_code == 2
        assert "for --timeline" in done.output

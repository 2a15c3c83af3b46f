"""Bisecting a real history with a command: gaps, skips, loop mounts, exit statuses, and an end without leftovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dedup.group_writer import GroupWriter
from dedup.store import Store
from dedup.types import Record, VolumeId
from fusefs.mountpoint import mounts
from tests.dedup.model import Model
from tests.system.harness import World, wait_for_end

FIRST_BAD = 23
"""From this version on, what is written is bad."""
BAD_FROM = f'test "$(head -c 3 "$1" | tr -d x)" -lt {FIRST_BAD}'


@dataclass
class Versions:
    """A store whose volume `disk` begins with the number of its version, and `other`, which changes in between."""

    world: World
    model: Model = field(default_factory=Model)
    versions: dict[int, int] = field(default_factory=dict)
    """seq → version, of each recovery point at which there is one."""

    def __post_init__(self) -> None:
        Store.create(self.world.store)
        self._store = Store.open(self.world.store)
        self.group: GroupWriter = self._store.group("versions")
        self.group.ingest(self.model.begin())
        made = self.model.create("disk", 3 * 4096), self.model.create("deep/other", 4096)
        self.disk, self.other = made[0].volume, made[1].volume
        self.group.ingest(list(made))
        self.place = self.world.directory / "overlay"
        self.place.mkdir()

    def write(self, version: int) -> None:
        self._add(self.model.write(self.disk, 0, b"%03d" % version), version)
        for number in range(version % 4):
            self._add(self.model.write(self.other, number, b"other"), version)

    def gap(self, version: int) -> None:
        """A write that the source refused, and what was true instead: the moments between are a gap."""
        refused = self.model.write(self.disk, 0, b"999")
        truth = self.model.correct(self.disk, refused.seq, 3 * 4096, 0, b"%03d" % version)
        self.group.ingest([refused, truth])
        self.versions[truth.seq] = version

    def flush(self, volume: VolumeId, version: int) -> None:
        self._add(self.model.flush(volume), version)

    def _add(self, record: Record, version: int) -> None:
        self.group.ingest([record])
        assert self.model.seq == record.seq
        self.versions[record.seq] = version

    def close(self) -> None:
        self._store.close()

    def seqs(self, version: int) -> list[int]:
        return [seq for seq, found in self.versions.items() if found == version]

    def bisect(self, *args: str | Path, good: int = 0, bad: int = 0) -> subprocess.CompletedProcess[str]:
        ends = ("--good", f"seq={good or min(self.versions)}", "--bad", f"seq={bad or max(self.versions)}")
        world = self.world
        return world.rewindfs("bisect", world.store, "disk", *ends, "--overlay", self.place, *args, check=False)

    def left(self) -> list[str]:
        """What was left behind."""
        inside = [str(mount.path) for mount in mounts() if mount.path.is_relative_to(self.place)]
        return [*os.listdir(self.place), *inside]


@pytest.fixture
def history(world: World) -> Versions:
    history = Versions(world)
    for version in range(40):
        history.gap(version) if version % 5 == 3 else history.write(version)
        if version % 6 == 0:
            history.flush(history.disk, version)
    history.close()
    return history


def test_the_first_bad_write(history: Versions) -> None:
    """Each try writes to its clone, and the next one does not see it; moments in gaps are never tried."""
    log = history.world.directory / "steps"
    words = ("--", "sh", "-c", f'echo tried; printf zzz > "$1.new"; {BAD_FROM}; s=$?; printf 777 > "$1"; exit $s', "x")
    done = history.bisect("--json", "--log", log, *words, "{}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (last_good, first_bad) = max(history.seqs(FIRST_BAD - 1)), min(history.seqs(FIRST_BAD))
    assert (found["first_bad"]["seq"], found["last_good"]["seq"]) == (first_bad, last_good)
    assert found["volume"] == "disk" and found["skipped"] == []
    assert all(step["seq"] in history.versions for step in found["steps"])
    assert [step["verdict"] for step in found["steps"][:2]] == ["good", "bad"]
    # No version is tried twice, but at the ends.
    tried = [history.versions[step["seq"]] for step in found["steps"]]
    assert len(set(tried)) == len(tried) <= 2 + 6
    assert done.stderr.count("tried\n") == len(tried)
    last = log.read_text().splitlines()[-1]
    assert (
        last.startswith(f"first bad recovery point: seq={first_bad} at ") and f"last good one: seq={last_good}" in last
    )
    assert history.left() == []

    done = history.bisect("--flushed", "--trust-ends", "--", "sh", "-c", BAD_FROM, "x", "{}")
    assert done.returncode == 0, done.stderr
    assert f"first bad recovery point: seq={max(history.seqs(24))} at " in done.stdout.splitlines()[-1]
    assert f"last good one: seq={max(history.seqs(18))} at " in done.stdout.splitlines()[-1]


def test_skipped_moments_leave_a_range(history: Versions) -> None:
    """As git has it: what is only skipped is listed, and that is a failure."""
    version = f'v=$(head -c 3 "$1"); case $v in 02[0-2]) exit 125;; esac; {BAD_FROM}'
    done = history.bisect("--json", "--", "sh", "-c", version, "x", "{}")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["first_bad"] is None
    assert found["last_good"]["seq"] == max(history.seqs(19))
    assert [history.versions[point["seq"]] for point in found["suspects"]] == [20, 21, 22, 23]
    assert {history.versions[step["seq"]] for step in found["skipped"]} == {20, 21, 22}
    assert "rewindfs: error: only skipped moments are left" in done.stderr
    assert history.left() == []


def test_what_cannot_be_read_is_no_answer(history: Versions) -> None:
    """A damaged block is an error to the command, and its moments are skipped, whatever it makes of them."""
    for container in (history.world.store / "containers").iterdir():
        content = container.read_bytes()
        if (at := content.find(b"020")) >= 0:
            container.write_bytes(content[:at] + b"!" + content[at + 1 :])
    done = history.bisect("--json", "--", "sh", "-c", BAD_FROM.replace(f"{FIRST_BAD}", "20"), "x", "{}")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert [history.versions[step["seq"]] for step in found["skipped"]] == [20]
    assert "does not match" in found["skipped"][0]["why"], found["skipped"]
    assert history.left() == []


@pytest.mark.slow
def test_what_stops_it(history: Versions) -> None:
    def stops(line: str, *words: str, status: int = 1, **ends: int) -> None:
        done = history.bisect(*words, **ends)
        assert (done.returncode, done.stdout) == (status, "")
        assert line in done.stderr.splitlines()[-1], done.stderr
        assert history.left() == []

    first, last = min(history.versions), max(history.versions)
    stops("write {} in COMMAND", "--", "true", status=2)
    stops("no COMMAND", status=2)
    stops("no such program", "--", "no-such-program", "{}")
    stops("--mount-options goes with --mount", "--mount-options", "ro", "--", "true", "{}", status=2)
    stops("must be a moment before --bad", "--", "true", "{}", good=last, bad=first)
    stops("must be a moment before --bad", "--", "true", "{}", good=first, bad=first)
    stops("it cannot be good at the one and bad at the other", "--", "true", "{}", bad=max(history.seqs(0)))
    stops("the bad end, seq=", "--", "true", "{}")
    stops("the good end, seq=", "--", "false", "{}")
    stops("exited with status 128", "--", "sh", "-c", "exit 128", "{}")
    stops("was ended by signal 15", "--", "sh", "-c", "kill $$", "{}")
    stops("cannot be tested: not mounted", "--mount", "--", "true", "{}")
    fills = ("sh", "-c", 'head -c 1M /dev/zero > "$1"', "x", "{}")
    stops("cannot be tested: the overlay: No space left on device", "--overlay-limit", "64K", "--", *fills)
    stops("in a gap", "--", "true", "{}", bad=history.seqs(38)[0] - 1)


def test_a_file_system_is_mounted_for_the_command(world: World) -> None:
    """The volume is an ext4 image, to which a file came at a known version; what does not mount is skipped."""
    history = Versions(world)
    image = world.directory / "image"
    history.group.ingest([history.model.resize(history.disk, 1 << 20)])
    image.write_bytes(bytes(1 << 20))
    world.run("mkfs.ext4", "-q", "-F", image)
    for version in range(8):
        content = image.read_bytes()
        if version == 4:
            content = bytes(4096) + content[4096:]
        history._add(history.model.write(history.disk, 0, content), version)
        world.run("debugfs", "-w", "-R", f"write /etc/hostname file-{version}", image)
    history.close()
    words = ("sh", "-c", 'touch "$1/mine" && test ! -e "$1/file-5"', "x", "{}")
    done = history.bisect("--mount", "--json", "--", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert history.versions[found["first_bad"]["seq"]] == 6
    assert [history.versions[step["seq"]] for step in found["skipped"]] == [4]
    assert "not mounted" in found["skipped"][0]["why"]
    assert history.left() == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(history: Versions, stop: signal.Signals) -> None:
    world = history.world
    ends = ("--good", f"seq={min(history.versions)}", "--bad", "latest")
    command = ("bisect", world.store, "disk", *ends, "--overlay", history.place)
    # The shell has a child, which holds the file open.
    words = ("--", "sh", "-c", '(echo "$1"; exec sleep 600) < "$1"; exit 1', "x", "{}")
    with subprocess.Popen(
        [sys.executable, "-m", "fusefs", *command, *words],
        env=world.environment,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as running:
        assert running.stderr is not None
        lines = iter(running.stderr)
        path = next(line for line in lines if line.startswith(str(history.place)))
        assert Path(path.strip()).read_bytes()[:3] == b"000"
        if stop is signal.SIGINT:
            os.killpg(running.pid, stop)  # as a terminal does
        else:
            running.send_signal(stop)
        assert running.wait(60) == 130
        assert "rewindfs: error: interrupted" in list(lines)[-1]
    assert history.left() == []
    assert world.processes() == []


@pytest.mark.slow
def test_what_the_command_leaves_behind_costs_no_result(history: Versions) -> None:
    """A process that goes on in each clone keeps the mount busy, and is cut off at the end."""
    tokens = history.world.directory / "left"
    leave = f'sleep 600 < "$1" > /dev/null 2>&1 & echo $! >> {tokens}; head -c 3 "$1" | grep -q "^00"'
    try:
        done = history.bisect("--", "sh", "-c", leave, "x", "{}")
        assert done.returncode == 0, done.stderr
        assert "first bad recovery point" in done.stdout.splitlines()[-1]
        assert "they get errors from now on" in done.stderr
        assert history.left() == []
    finally:
        for pid in tokens.read_text().split():
            os.kill(int(pid), signal.SIGTERM)


@pytest.mark.slow
def test_from_afar(history: Versions) -> None:
    """Both commands through an appliance's address: nothing of the store itself is looked at here."""
    world, socket = history.world, history.world.directory / "socket"
    world.rewindfs("appliance", "second", "--store", world.store, "--listen", f"unix:{socket}")
    ends = ("--good", f"seq={min(history.versions)}", "--bad", f"seq={max(history.versions)}")
    words = ("--", "sh", "-c", BAD_FROM, "x", "{}")
    where = ("--overlay", history.place, "--cache", world.directory)
    found = json.loads(
        world.rewindfs("bisect", f"unix:{socket}", "disk", "--json", *ends, *where, *words, check=True).stdout
    )
    assert found["first_bad"]["seq"] == min(history.seqs(FIRST_BAD))
    place = world.snap
    world.rewindfs("clone", f"unix:{socket}", ".", "--at", f"seq={found['last_good']['seq']}", place, *where)
    assert (place / "disk").read_bytes()[:3] == b"%03d" % (FIRST_BAD - 1)
    (place / "disk").write_bytes(b"mine")
    assert (place / "disk").read_bytes() == b"mine"
    world.rewindfs("unmount", place)
    assert history.left() == []
    for pid in world.processes():
        os.kill(pid, signal.SIGTERM)
        wait_for_end(pid)

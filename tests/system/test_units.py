"""The systemd units of examples/: systemd takes them, and their commands are services that say when they are ready."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.harness import ROOT, World

UNITS = ROOT / "examples" / "systemd"
INSTALLED = "/opt/rewindfs/bin/rewindfs"
WAIT_SECONDS = 60


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in UNITS.iterdir():
        # The command is not installed here, and a template is checked as one of its instances.
        text = unit.read_text()
        assert INSTALLED in text
        (tmp_path / unit.name.replace("@.", "@vm.")).write_text(text.replace(INSTALLED, "/bin/true"))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    command = ["systemd-analyze", "verify", "--man=no", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if any(file.name in line for file in files)]
    assert done.returncode == 0 and said == []


def command_line(unit: str, **settings: str) -> list[str]:
    """ExecStart with `settings` instead of the unit's own, put together as systemd does."""
    text = (UNITS / unit).read_text()
    own = dict(word.split("=", 1) for word in re.findall(r"^Environment=(.+)$", text, re.MULTILINE))
    names = {**own, **settings}
    (line,) = re.findall(r"^ExecStart=(.+)$", text, re.MULTILINE)
    words = []
    for word in shlex.split(line):
        if word.startswith("$") and not word.startswith("${"):
            words.extend(names[word[1:]].split())
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda found: names[found[1]], word))
    assert words[0] == INSTALLED
    return [sys.executable, "-m", "fusefs", *words[1:]]


@contextmanager
def service(world: World, unit: str, **settings: str) -> Iterator[None]:
    """Runs a unit's command as Type=notify does: ready when the block begins, told to leave at its end."""
    place = world.directory / f"{unit}.notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, open(world.directory / f"{unit}.log", "w") as log:
        told.bind(str(place))
        told.settimeout(WAIT_SECONDS)
        environment = {**world.environment, "NOTIFY_SOCKET": str(place)}
        command = command_line(unit, **settings)
        with subprocess.Popen(command, env=environment, cwd="/", stdin=subprocess.DEVNULL, stderr=log) as process:
            try:
                ready = told.recv(4096)
                assert ready.startswith(b"READY=1\nSTATUS="), ready
                yield
                process.send_signal(signal.SIGTERM)
                messages = [told.recv(4096)]
                while not messages[-1].startswith(b"STOPPING=1"):
                    messages.append(told.recv(4096))
                assert process.wait(WAIT_SECONDS) == 0, world.logs()
            finally:
                process.kill()


def test_embedded_mount_as_a_service(world: World) -> None:
    (world.source / "a.img").write_bytes(b"a" * 8192)
    to = f"--store {world.store}"
    settings = {"SOURCE": str(world.source), "MOUNTPOINT": str(world.mnt), "TO": to, "OPTIONS": "--mode sync"}
    with service(world, "rewindfs-mount@.service", **settings):
        (world.mnt / "b.img").write_bytes(b"b" * 8192)
        world.wait_for_state("protected")
    world.check_equal()
    assert world.gaps() == []


def test_mount_and_both_appliances_as_services(world: World) -> None:
    (world.source / "a.img").write_bytes(b"a" * 8192)
    near, far = world.directory / "first.sock", world.directory / "second.sock"
    second = {"STORE": str(world.store), "LISTEN": f"unix:{far}"}
    first = {"LISTEN": f"unix:{near}", "FORWARD": f"unix:{far}", "SPOOL": str(world.directory / "spool")}
    to = f"--appliance unix:{near}"
    settings = {"SOURCE": str(world.source), "MOUNTPOINT": str(world.mnt), "TO": to, "OPTIONS": ""}
    with (
        service(world, "rewindfs-second.service", **second),
        service(world, "rewindfs-first.service", **first),
        service(world, "rewindfs-mount@.service", **settings),
    ):
        (world.mnt / "b.img").write_bytes(b"b" * 8192)
        world.wait_for_state("protected")
        world.check_equal()
    assert world.gaps() == []

"""The command line as scripts see it: exit statuses, error lines, what is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from dedup.store import Store
from fusefs.agent_control import Body, serve_control
from fusefs.command_group import COMMANDS
from fusefs.mountpoint import CONTROL_XATTR
from replication.second_appliance import SecondAppliance
from replication.transport import listen_unix
from tests.replication.fake_store import FakeStore

ROOT = Path(__file__).resolve().parent.parent.parent


def rewindfs(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fusefs", *args], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_names_every_command() -> None:
    done = rewindfs("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_help_costs_no_heavy_import() -> None:
    code = "import sys; sys.argv = ['rewindfs', '--help']\ntry:\n    import fusefs.__main__\nexcept SystemExit: pass\n"
    code += "print([name for name in ('numpy', 'pyfuse3', 'trio', 'lmdb', 'rich') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


HEAVY = {
    *("trio", "numpy", "lmdb", "pyfuse3", "ssl", "rich", "zstandard", "xxhash", "cryptography", "prometheus_client"),
    "logging",
    *("dedup.types", "dedup.layout", "dedup.store"),
    *("replication.wire", "replication.session", "replication.transport"),
}
"""What takes long to import, and what a command that only asks a running process has no use for."""
AND_WHAT_WAS_IMPORTED = """
import atexit, gc, sys
from fusefs.cli import main

collecting = []

def look(event, args):
    if event == "socket.connect":
        collecting.append(gc.isenabled())

sys.addaudithook(look)
atexit.register(lambda: print(*collecting, gc.get_freeze_count() > 10_000, *sys.modules, sep="\\n", file=sys.stderr))
main()
"""


def imported_by(*args: str) -> tuple[str, set[str]]:
    """What the command prints, and what it has imported when it ends. The collector is on again when it connects, and
    has been told to leave alone what was imported."""
    done = subprocess.run(
        [sys.executable, "-c", AND_WHAT_WAS_IMPORTED, *args], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    collecting, frozen, *modules = done.stderr.splitlines()
    assert (collecting, frozen) == ("True", "True")
    return done.stdout, set(modules)


async def test_who_asks_an_appliance_waits_for_no_heavy_import(tmp_path: Path) -> None:
    """Of a user's wait for a short command, imports are most."""
    store = FakeStore()
    store.group("g")
    appliance = SecondAppliance(store)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(appliance.serve, [listen_unix(tmp_path / "socket")])
        for args, said in ((["create", "--name", "n"], "n  seq="), (["delete", "n"], "")):
            command, *rest = args
            words = ["snapshot", command, str(tmp_path), *rest]
            out, modules = await trio.to_thread.run_sync(partial(imported_by, *words))
            assert out.startswith(said)
            assert not modules & HEAVY
        appliance.stop()


async def test_who_has_an_appliance_do_it_waits_for_no_heavy_import(tmp_path: Path) -> None:
    """What the work itself needs, that one has imported."""
    path = tmp_path / "store"
    Store.create(path)
    store = Store.open(path)
    store.group("g")
    appliance = SecondAppliance(store)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(appliance.serve, [listen_unix(path / "socket")])
            for words in ("gc STORE", "consolidate STORE --dry-run", "journal create STORE j", "journal use STORE j"):
                args = [str(path) if word == "STORE" else word for word in words.split()]
                _, modules = await trio.to_thread.run_sync(partial(imported_by, *args))
                assert not modules & HEAVY, words
            appliance.stop()
    finally:
        store.close()


@pytest.mark.parametrize(
    ("command", "words", "asked", "answer"),
    [
        ("mode", ["sync"], {"mode": {"mode": "sync"}}, {}),
        ("bookmark", ["b"], {"bookmark": {"name": "b"}}, {"name": "b", "seq": 1}),
        ("status", ["--json"], {"status": {"store": True}}, {"oldest_queued": None, "lag": {}, "store_path": None}),
        ("unmount", ["--drain-timeout", "9s"], {"unmount": {"drain_timeout": 9.0}, "durable": {}}, {"pid": None}),
        (
            "reconcile",
            [],
            {"reconcile.start": {"verify_only": False}, "reconcile.poll": {"id": 1}},
            {"id": 1, "finished": True, "report": {"compared_bytes": 1, "differing_bytes": 0}},
        ),
    ],
)
async def test_who_asks_a_mount_waits_for_no_heavy_import(
    tmp_path: Path, command: str, words: list[str], asked: dict[str, Body], answer: Body
) -> None:
    """As above; what stands for the mount is a socket, and a directory that names it. Its store is elsewhere."""
    heard = []

    async def hear(body: Body) -> Body:
        heard.append(body)
        return answer

    try:
        os.setxattr(tmp_path, CONTROL_XATTR, os.fsencode(tmp_path / "control"))
    except OSError as error:
        pytest.skip(f"{tmp_path} takes no extended attributes: {error}")
    listener = listen_unix(tmp_path / "control")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_control, listener, dict.fromkeys(asked, hear))
        _, modules = await trio.to_thread.run_sync(partial(imported_by, command, str(tmp_path), *words))
        nursery.cancel_scope.cancel()
    await listener.aclose()
    assert heard == [*asked.values()]
    assert not modules & HEAVY


@pytest.mark.parametrize("args", [["nonsense"], ["--nonsense"]])
def test_wrong_usage_is_2(args: list[str]) -> None:
    done = rewindfs(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("rewindfs: error: ")


def test_failure_is_1_and_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import click

    from dedup.errors import NotAStore
    from fusefs import cli, command_group

    @click.command()
    def status() -> None:
        raise ExceptionGroup("nursery", [ExceptionGroup("inner", [NotAStore("/x: holds no store,\nmake one")])])

    monkeypatch.setattr(command_group.LazyGroup, "get_command", lambda self, ctx, name: status)
    monkeypatch.setattr(sys, "argv", ["rewindfs", "status"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "rewindfs: error: /x: holds no store, make one\n"
    monkeypatch.setattr(sys, "argv", ["rewindfs", "status", "--debug"])
    with pytest.raises(ExceptionGroup):
        cli.main()

"""Hooks around a bookmark, with real shells: the thaw is run whatever happens in between."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from dedup.errors import RewindError
from fusefs import bookmark_hooks
from fusefs.bookmark_cli import bookmark
from fusefs.bookmark_hooks import Frozen, Hooks, bookmark_frozen

ENDLESS = "exec sleep 1000"


def play(
    hooks: Hooks, take: Callable[[float], Any] | None = None, environment: dict[str, str] | None = None
) -> tuple[Frozen, list[float]]:
    """What became of it, and the seconds that each bookmark was given."""
    given: list[float] = []

    async def taken(seconds: float) -> dict[str, Any]:
        given.append(seconds)
        if take is not None:
            await take(seconds)
        return {"seq": 7}

    return trio.run(bookmark_frozen, hooks, environment or {}, taken), given


@pytest.fixture
def thawed(tmp_path: Path) -> Path:
    return tmp_path / "thawed"


def test_between_the_two(tmp_path: Path, thawed: Path) -> None:
    order = tmp_path / "order"

    async def take(seconds: float) -> None:
        await trio.to_thread.run_sync(subprocess.run, ["sh", "-c", f"echo bookmark >> {order}"])

    hooks = Hooks(f'echo "freeze $WHAT" >> {order}', f"echo thaw >> {order}", 50.0)
    frozen, given = play(hooks, take, {"WHAT": "it"})
    assert order.read_text().split("\n") == ["freeze it", "bookmark", "thaw", ""]
    assert frozen.errors == []
    assert frozen.answer == {"seq": 7}
    assert 0 < given[0] <= 50.0
    told: Any = frozen.document()
    assert (told["freeze"]["command"], told["freeze"]["exit"], told["thaw"]["exit"]) == (hooks.freeze, 0, 0)
    assert told["frozen_seconds"] >= told["freeze"]["seconds"] + told["thaw"]["seconds"]


@pytest.mark.parametrize(
    ("freeze", "thaw", "limit", "bookmarks", "errors"),
    [
        ("exit 3", "touch", 50.0, 0, ["freeze command failed with exit status 3, no bookmark was made"]),
        ("kill -9 $$", "touch", 50.0, 0, ["freeze command was ended by SIGKILL"]),
        (ENDLESS, "touch", 0.3, 0, ["freeze command had not ended after 0."]),
        (f"trap '' TERM; {ENDLESS}", "touch", 0.3, 0, ["freeze command had not ended after "]),
        (f"sleep 1000 & {ENDLESS}", "touch", 0.3, 0, ["freeze command had not ended after 0."]),
        ("true", "touch; exit 4", 50.0, 1, ["thaw command failed with exit status 4: THE APPLICATION MAY STILL BE"]),
        ("exit 3", "touch; exit 4", 50.0, 0, ["freeze command failed with exit status 3", "run it by hand: touch"]),
    ],
)
def test_what_fails_is_told(
    monkeypatch: pytest.MonkeyPatch,
    freeze: str,
    thaw: str,
    limit: float,
    bookmarks: int,
    errors: list[str],
    thawed: Path,
) -> None:
    monkeypatch.setattr(bookmark_hooks, "STOP_SECONDS", 0.2)
    frozen, given = play(Hooks(freeze, thaw.replace("touch", f"touch {thawed}"), limit))
    assert thawed.exists()
    assert len(given) == bookmarks
    assert len(frozen.errors) == len(errors)
    assert all(error in line for error, line in zip(errors, frozen.errors, strict=True)), frozen.errors


def test_a_thaw_that_does_not_end(thawed: Path) -> None:
    async def take(seconds: float) -> None:
        pass

    frozen, _ = play(Hooks("true", f"touch {thawed}; {ENDLESS}", 0.5), take)
    assert frozen.answer == {"seq": 7}
    (error,) = frozen.errors
    assert "MAY STILL BE FROZEN" in error


def test_a_bookmark_that_is_refused(thawed: Path) -> None:
    async def take(seconds: float) -> None:
        raise RewindError("the link is down")

    frozen, _ = play(Hooks("true", f"touch {thawed}", 50.0), take)
    assert thawed.exists()
    assert frozen.answer is None
    assert frozen.errors == ["the link is down"]


def test_a_fault_of_this_program_thaws_too(thawed: Path) -> None:
    async def take(seconds: float) -> None:
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError):
        play(Hooks("true", f"touch {thawed}", 50.0), take)
    assert thawed.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_bookmark_is_made(number: signal.Signals, thawed: Path) -> None:
    async def take(seconds: float) -> None:
        os.kill(os.getpid(), number)
        await trio.sleep_forever()

    frozen, _ = play(Hooks("true", f"touch {thawed}", 50.0), take)
    assert thawed.exists()
    (error,) = frozen.errors
    assert f"interrupted by {number.name}" in error
    assert "snapshot list" in error


def test_a_signal_while_it_freezes(thawed: Path) -> None:
    frozen, given = play(Hooks(f"kill -INT {os.getpid()}; {ENDLESS}", f"touch {thawed}", 50.0))
    assert thawed.exists()
    assert given == []
    (error,) = frozen.errors
    assert "interrupted by SIGINT" in error
    assert "no bookmark was made" in error


def test_a_signal_while_it_thaws(thawed: Path) -> None:
    frozen, _ = play(Hooks("true", f"kill -TERM {os.getpid()}; sleep 0.1; touch {thawed}", 50.0))
    assert thawed.exists()
    assert frozen.answer == {"seq": 7}
    assert frozen.errors == []


def test_both_or_none(tmp_path: Path) -> None:
    for alone in ("--freeze", "--thaw"):
        done = CliRunner().invoke(bookmark, [str(tmp_path), "x", alone, "true"])
        assert done.exit_code == 2
        assert "go together" in done.output

"""The command line as scripts see it: exit statuses, error lines, what is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fusefs.command_group import COMMANDS

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

"""Commands that run in the test's own process: a start of Python for each would be most of a test's time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from dedup.errors import RewindError


def invoke(command: click.Command, *words: str | Path) -> Result:
    """What it printed, and its exit status; what it raises is raised, as `fusefs.cli.main` would see it."""
    result = CliRunner().invoke(command, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def document(command: click.Command, *words: str | Path) -> dict[str, Any]:
    """What it says with --json; it must succeed."""
    result = invoke(command, *words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refusal(command: click.Command, *words: str | Path) -> str:
    """The message of the error that it must end with."""
    with pytest.raises(RewindError) as refused:
        invoke(command, *words)
    return str(refused.value)

"""Two network namespaces as two hosts: the example as a person runs it, and what a mount says of the network it has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.system.harness import ROOT, World, missing_tools
from tests.system.network import why_no_hosts

EXAMPLE_SECONDS_MAX = 180


@pytest.fixture(autouse=True)
def _hosts(world: World) -> None:
    if reason := why_no_hosts():
        pytest.skip(reason)


def test_example(world: World) -> None:
    if missing := missing_tools(("ip", "nsenter")):
        pytest.skip(f"not installed: {', '.join(missing)}")
    programs = world.directory / "bin"
    programs.mkdir()
    (programs / "rewindfs").write_text(f'#!/bin/sh\nexec {sys.executable} -m fusefs "$@"\n')
    (programs / "rewindfs").chmod(0o755)
    world.environment["PATH"] = f"{programs}:{world.environment['PATH']}"
    world.environment["TMPDIR"] = str(world.directory)
    before = set(Path("/run").glob("netns/*"))
    said = world.run(ROOT / "examples" / "two-hosts.sh", timeout=EXAMPLE_SECONDS_MAX).stdout
    assert "\nDone: " in said
    assert set(Path("/run").glob("netns/*")) == before
    assert not list(world.directory.glob("rewindfs-two-hosts.*"))

"""Histories of the simulation: as many as fit the time of a default run, from seeds that are always the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.history import Outcome, run_history

HISTORIES = 24
MANY_HISTORIES = 1500
REPOSITORY = Path(__file__).parents[2]


def _failed(outcomes: list[Outcome]) -> list[str]:
    return [
        f"python -m tests.simulation --seed {outcome.seed} --steps: {outcome.violation}"
        for outcome in outcomes
        if outcome.violation is not None
    ]


def test_histories_hold_every_invariant() -> None:
    outcomes = [run_history(seed) for seed in range(HISTORIES)]
    assert not _failed(outcomes)
    # What was to happen did happen: a simulation in which nothing goes wrong proves nothing.
    happened = {kind for outcome in outcomes for kind in outcome.counts}
    assert {"fault", "agent", "second", "sync", "source", "lost", "refused", "behind", "old_copy"} <= happened
    assert sum(outcome.points for outcome in outcomes) > 50 * HISTORIES


@pytest.mark.slow
def test_many_histories_hold_every_invariant() -> None:
    assert not _failed([run_history(seed) for seed in range(10_000, 10_000 + MANY_HISTORIES)])


def test_a_seed_gives_the_same_steps_again() -> None:
    for seed in range(3):
        first, second = run_history(seed), run_history(seed)
        assert (first.steps, first.digest) == (second.steps, second.digest)


def test_a_seed_gives_the_same_steps_in_another_process() -> None:
    """Where strings hash to other numbers, and objects lie at other addresses."""
    code = "import sys; from tests.simulation.history import run_history; print(run_history(5).digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hashes, "PYTHONPATH": str(REPOSITORY)},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hashes in ("1", "2")
    }
    assert digests == {run_history(5).digest + "\n"}

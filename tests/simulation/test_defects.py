"""The simulation can fail: each defect that is put into the program is found within a modest number of histories."""

from __future__ import annotations

import pytest

from tests.simulation.defects import DEFECTS
from tests.simulation.history import run_history

HISTORIES_MAX = 60
"""More than any of them needs."""


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name: str) -> None:
    with DEFECTS[name]():
        assert any(run_history(seed).violation is not None for seed in range(HISTORIES_MAX))

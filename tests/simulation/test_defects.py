"""The simulation can fail: each defect that is put into the program is found within a modest number of histories."""

from __future__ import annotations

import pytest

from tests.simulation.defects import DEFECTS
from tests.simulation.history import run_history

HISTORIES_MAX = 150
"""More than any of them needs."""
RARE = {
    "marks go before the record is durable",
    "the first write of a byte wins",
    "a gap is not said",
    "a reconcile reads without the lock",
    "the last record of a batch is lost",
}
"""What takes some dozens of histories."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in DEFECTS]
)
def test_defect_is_found(name: str) -> None:
    with DEFECTS[name]():
        assert any(run_history(seed).violation is not None for seed in range(HISTORIES_MAX))

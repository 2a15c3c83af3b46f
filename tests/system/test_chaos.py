"""Faults at random under load: what `chaos` makes and checks. A failure names its seed and the command to replay it."""

from __future__ import annotations

import random
import sqlite3
import time
from pathlib import Path

import pytest

from tests.system.chaos import MIXED, MODES, PROFILES, SITES, Fault, schedule, strike
from tests.system.harness import World
from tests.system.loads import Orders, orders_in
from tests.system.network import why_no_hosts

LONG_SECONDS = 60


def test_schedule_is_made_again_by_its_seed() -> None:
    faults = [Fault(kind, part) for kind in ("kill", "stop", "restart") for part in ("mount", "second")]
    profile = PROFILES["all"]
    one, same, other = (schedule(random.Random(seed), 60, faults, profile) for seed in (1, 1, 2))
    assert one == same != other
    assert sum(step.pause + step.seconds for step in one) >= 60


def test_orders_are_checked(tmp_path: Path) -> None:
    """A database that lost or tore something is noticed, or chaos would prove nothing."""
    file = tmp_path / "shop.db"
    orders = Orders(file, "delete")
    orders.start()
    while orders.returned() < 20:
        time.sleep(0.01)
    orders.stop()
    assert orders.error is None
    assert orders_in(file) == orders.returned()
    for damage in (
        "DELETE FROM orders WHERE id = 7",
        "UPDATE orders SET total = total + 1 WHERE id = 9",
        "UPDATE orders SET item = x'00' WHERE id = 9",
    ):
        copy = tmp_path / "copy.db"
        copy.write_bytes(file.read_bytes())
        with sqlite3.connect(copy) as database:
            database.execute(damage)
        database.close()
        with pytest.raises(AssertionError, match="order"):
            orders_in(copy)


def run(world: World, site: str, mode: str, faults: str, seconds: float, *, quick: bool = False) -> None:
    if site != "embedded" and (reason := why_no_hosts()):
        pytest.skip(reason)
    seed = random.randrange(1 << 32)
    print(strike(world, site, mode, faults, seconds, seed, with_fio=not quick, with_disk=not quick))


@pytest.mark.parametrize(("site", "mode", "faults"), [("first", "async", "all")])
def test_a_few_faults(world: World, site: str, mode: str, faults: str) -> None:
    run(world, site, mode, faults, 3, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "mode", "faults"),
    [
        *((site, mode, "all") for site in SITES for mode in (*MODES, MIXED)),
        *((site, MIXED, "short") for site in SITES),
        *(("first", mode, "long") for mode in (*MODES, MIXED)),
        *(("remote", mode, "long") for mode in ("sync", "async")),
    ],
)
def test_many_faults(world: World, site: str, mode: str, faults: str) -> None:
    run(world, site, mode, faults, LONG_SECONDS)

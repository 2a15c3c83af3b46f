"""Runs histories: `python -m tests.simulation --seed N [--steps]`, or many: `--count N [--from SEED]`."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext

from tests.simulation.defects import DEFECTS
from tests.simulation.history import Outcome, run_history


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this history and say how it went")
    parser.add_argument("--steps", action="store_true", help="print every step and every log line of it")
    parser.add_argument("--count", type=int, default=1000, help="how many histories to run")
    parser.add_argument("--from", dest="first", type=int, default=0, help="seed of the first of them")
    parser.add_argument("--defect", choices=DEFECTS, help="put this defect into the program first")
    options = parser.parse_args()
    with DEFECTS[options.defect]() if options.defect else nullcontext():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    if options.seed is not None:
        if options.steps:
            _log_to_stdout()
        outcome = run_history(options.seed, echo=options.steps)
        print(_line(outcome), outcome.settings, outcome.counts, sep="\n")
        return outcome.violation is not None
    return _many(range(options.first, options.first + options.count))


def _many(seeds: range) -> int:
    begun = time.perf_counter()
    failed = steps = points = 0
    for seed in seeds:
        outcome = run_history(seed)
        steps += outcome.steps
        points += outcome.points
        if outcome.violation is not None:
            failed += 1
            print(_line(outcome), flush=True)
    took = time.perf_counter() - begun
    print(
        f"{len(seeds)} histories from seed {seeds.start}: {failed} violations, {steps} steps, {points} recovery points "
        f"compared, {took:.0f} s, {1000 * took / len(seeds):.0f} ms each"
    )
    return failed > 0


def _line(outcome: Outcome) -> str:
    settings = outcome.settings
    how = outcome.violation or "every invariant held"
    return f"seed {outcome.seed} ({settings.profile.value}, {settings.topology.value}, {settings.mode.value}): {how}"


def _log_to_stdout() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="          %(name)s: %(message)s")


if __name__ == "__main__":
    sys.exit(main())

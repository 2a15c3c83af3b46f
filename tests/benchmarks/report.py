"""What every benchmark gives: tables of interleaved runs, each target beside what was measured, and the same as JSON.

A subject is a module with `measure(report, quick)` and `main()`, which is `run_subject(measure, __doc__)`: it runs
alone (`python -m tests.benchmarks.NAME [--quick] [--json FILE]`) and as part of `make bench`, which joins them. One
with several tables may let them be chosen: `--tables NAME,NAME`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.table import Table

WIDTH = 120


class Bound(StrEnum):
    """Which side of its bound a figure must be on."""

    AT_LEAST = "≥"
    AT_MOST = "≤"


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and the bound it must keep: a ratio of medians taken in one run (unit ×), or an amount with its unit."""

    subject: str
    against: str
    measured: float
    bound: Bound
    value: float
    unit: str = "×"
    floor: float | None = None
    """What the least that could be done for this reaches; None where that was not measured."""

    @property
    def met(self) -> bool:
        return self.measured >= self.value if self.bound is Bound.AT_LEAST else self.measured <= self.value

    @property
    def wanted_text(self) -> str:
        return f"{self.bound} {amount(self.value, self.unit)}"

    @property
    def measured_text(self) -> str:
        return amount(self.measured, self.unit)

    @property
    def floor_text(self) -> str:
        return "" if self.floor is None else amount(self.floor, self.unit)


def amount(value: float, unit: str) -> str:
    """For people: three digits, and the unit."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


@dataclass(frozen=True, slots=True)
class Series:
    """One table: for each name the value of each run, in the order in which they were taken."""

    title: str
    unit: str
    against: str
    runs: dict[str, list[float]]


@dataclass(slots=True)
class Report:
    """Prints as it is told, and keeps all of it for `save`."""

    tables: list[Series] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def table(self, title: str, unit: str, runs: Mapping[str, Sequence[float]], against: str) -> None:
        """Median, spread, and the ratio of medians to `against`, which is one of the names."""
        self.tables.append(Series(title, unit, against, {name: list(values) for name, values in runs.items()}))
        table = Table(title=title)
        for column in ("subject", f"median {unit}", "min–max", "runs", f"of {against}"):
            table.add_column(column, justify="left" if column == "subject" else "right")
        floor = statistics.median(runs[against])
        for name, values in runs.items():
            median = statistics.median(values)
            spread = f"{_short(min(values))}–{_short(max(values))}"
            table.add_row(name, _short(median), spread, str(len(values)), f"{median / floor:,.3g}")
        Console(width=WIDTH).print(table)

    def at_least(
        self, subject: str, against: str, measured: float, value: float, unit: str = "×", floor: float | None = None
    ) -> None:
        self._target(Target(subject, against, measured, Bound.AT_LEAST, value, unit, floor))

    def at_most(
        self, subject: str, against: str, measured: float, value: float, unit: str = "×", floor: float | None = None
    ) -> None:
        self._target(Target(subject, against, measured, Bound.AT_MOST, value, unit, floor))

    def _target(self, target: Target) -> None:
        self.targets.append(target)
        met = "met" if target.met else "NOT met"
        against = f" against {target.against}" if target.against else ""
        floor = f" (the least that could be done: {target.floor_text})" if target.floor_text else ""
        print(
            f"  {target.subject}{against}: {target.measured_text}, wanted {target.wanted_text}: {met}{floor}",
            flush=True,
        )

    def note(self, text: str) -> None:
        """A line that belongs to the figures."""
        self.notes.append(text)
        print(f"  {text}", flush=True)

    def save(self, file: Path) -> None:
        kept = {
            "tables": [asdict(table) for table in self.tables],
            "targets": [asdict(target) | {"met": target.met} for target in self.targets],
            "notes": self.notes,
        }
        file.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"


def ratio(runs: Mapping[str, Sequence[float]], name: str, against: str) -> float:
    """Of the medians of two names of one table."""
    return statistics.median(runs[name]) / statistics.median(runs[against])


def floor_ratio(runs: Mapping[str, Sequence[float]], name: str, against: str) -> float | None:
    """`ratio` of a floor, of the rounds that it took part in: the first ones, perhaps not all. None where the table has
    no such name."""
    if name not in runs:
        return None
    return ratio({name: runs[name], against: runs[against][: len(runs[name])]}, name, against)


def machine() -> dict[str, str | int]:
    """What the figures were taken on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "?")
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return {
        "cores": os.cpu_count() or 0,
        "processor": model,
        "memory_gib": round(int(meminfo["MemTotal"].split()[0]) / (1 << 20)),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def run_subject(measure: Callable[..., None], doc: str | None, tables: Sequence[str] = ()) -> None:
    """The command line of one subject. With `tables` it has parts that can be chosen, and `measure` takes their names
    as a third argument."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, smaller volumes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    if tables:
        parser.add_argument("--tables", default=",".join(tables), metavar="NAME,NAME", help=f"of {', '.join(tables)}")
    options = parser.parse_args()
    report = Report()
    if tables:
        chosen = options.tables.split(",")
        if unknown := set(chosen) - set(tables):
            parser.error(f"no such table: {', '.join(sorted(unknown))}; there are {', '.join(tables)}")
        measure(report, options.quick, chosen)
    else:
        measure(report, options.quick)
    if options.json:
        report.save(options.json)

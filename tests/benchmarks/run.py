"""All subjects, one after the other: `make bench`, `make bench-quick`.

    python -m tests.benchmarks.run [--quick] [--only NAME,NAME] [--readme]

Each prints its tables; at the end stands one table of every target beside what was measured. `bench-results/` keeps all
figures as JSON; with --only the others' are those of the last run on this machine. --readme also writes the short table
into README.md, between its marks. The exit status is 1 when a subject could not be measured: a target that is missed is
a figure, not a failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.mounts import ROOT
from tests.benchmarks.report import WIDTH, Bound, Target, machine

SUBJECTS = ("write_rates", "stacked", "snapshots", "read_rates", "moments", "ingest_floor", "daily_states", "footprint")
RESULTS = ROOT / "bench-results"
README = ROOT / "README.md"
SHORT = (
    "4 KiB random writes",
    "1 MiB sequential writes",
    "SQLite",
    "pgbench",
    "rewindfs snapshot create",
    "store growth",
    "sequential read of a snapshot, raw containers, linux",
    "sequential read of a snapshot, sealed containers, linux",
    "random 4 KiB reads of a snapshot, raw containers, linux",
    "random 4 KiB reads of a snapshot, sealed containers, linux",
    "@TIME",
    "ingest, new blocks",
    "ingest with 100 GiB of history, new blocks",
    "size of",
    "peak RssAnon of the mount process",
    "peak RssAnon of the second appliance,",
    "peak RssAnon of the snapshot mount",
)
"""Of which targets README.md tells, by how their subjects begin."""
BEGIN, END = "<!-- figures of make bench: begin -->", "<!-- figures of make bench: end -->"


def _measured(subject: str, quick: bool) -> dict[str, Any] | None:
    """One subject in a process of its own; None when it failed, which it has then said itself."""
    file = RESULTS / f"{subject}.json"
    file.unlink(missing_ok=True)
    print(f"\n=== {subject}", flush=True)
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        f"tests.benchmarks.{subject}",
        "--json",
        str(file),
        *(["--quick"] if quick else []),
    ]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False)
    seconds = time.monotonic() - began
    print(f"  {subject}: {seconds:.0f} s", flush=True)
    if done.returncode:
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found | {"seconds": round(seconds, 1)}


def _kept(file: Path, on: dict[str, str | int]) -> dict[str, dict[str, Any]]:
    """What the last run found, where it was on this machine."""
    if not file.exists():
        return {}
    last = json.loads(file.read_text())
    found: dict[str, dict[str, Any]] = last["subjects"] if last["machine"] == on else {}
    return found


def _targets(results: dict[str, dict[str, Any]]) -> list[Target]:
    found = []
    for result in results.values():
        for fields in result["targets"]:
            plain = {name: value for name, value in fields.items() if name != "met"}
            found.append(Target(**(plain | {"bound": Bound(plain["bound"])})))
    return found


def _described(on: dict[str, str | int]) -> str:
    return (
        f"{on['cores']} cores ({on['processor']}), {on['memory_gib']} GiB, Linux {on['kernel']}, Python {on['python']}"
    )


def _print_summary(targets: list[Target], on: str) -> None:
    table = Table(title=f"Targets, on {on}")
    for column in ("subject", "against", "target", "measured", "met", "floor"):
        table.add_column(column, justify="right" if column in ("target", "measured", "floor") else "left")
    for target in targets:
        met = "yes" if target.met else "NO"
        table.add_row(target.subject, target.against, target.wanted_text, target.measured_text, met, target.floor_text)
    Console(width=WIDTH + 20).print(table)


def _write_readme(targets: list[Target], on: str) -> None:
    lines = [BEGIN, "", "| what | against | target | measured | floor |", "|---|---|---|---|---|"]
    chosen = [one for one in targets if one.subject.startswith(SHORT)]
    lines += [
        f"| {one.subject} | {one.against} | {one.wanted_text} | {one.measured_text} | {one.floor_text} |"
        for one in chosen
    ]
    lines += ["", f"Medians of interleaved runs, on {on}.", "", END]
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"run: README.md has no place for the figures: put these two lines there: {BEGIN} {END}")
    README.write_text(before + "\n".join(lines) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, smaller volumes")
    parser.add_argument("--only", default=",".join(SUBJECTS), metavar="NAME,NAME", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--readme", action="store_true", help="write the short table into README.md")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SUBJECTS):
        parser.error(f"no such subject: {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    RESULTS.mkdir(exist_ok=True)
    on = machine()
    print(_described(on), flush=True)
    kept = RESULTS / ("bench-quick.json" if options.quick else "bench.json")
    before = _kept(kept, on)
    measured = {name: found for name in chosen if (found := _measured(name, options.quick)) is not None}
    results = {name: (before | measured)[name] for name in SUBJECTS if name in before | measured}
    targets = _targets(results)
    kept.write_text(json.dumps({"machine": on, "subjects": results}, indent=1, ensure_ascii=False) + "\n")
    _print_summary(targets, _described(on))
    print(
        f"{sum(target.met for target in targets)} of {len(targets)} targets met; all figures: {kept.relative_to(ROOT)}"
    )
    if options.readme:
        _write_readme(targets, _described(on))
    if failed := [name for name in chosen if name not in measured]:
        sys.exit(f"run: could not be measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()

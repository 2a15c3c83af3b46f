"""What `verify` found, as a document and for a person."""

from __future__ import annotations

from pathlib import Path

import click

from dedup.damage import Check, Damage, Report
from dedup.terminal import print_json, print_table, shown

SHOWN_MAX = 50
"""Damage that `verify` prints for a person, per check; --json has more."""


def show_report(context: click.Context, report: Report, path: Path, *, as_json: bool) -> None:
    """Prints what a verification found; ends the command with status 1 when that is damage."""
    if as_json:
        print_json(report_json(report))
    else:
        _print_report(report, path)
    if not report.ok:
        context.exit(1)


def report_json(report: Report) -> dict[str, object]:
    """The contract's shape, and `group` with each damage, `omitted` with each check, `repairs` with what was done."""
    checks = [
        {
            "name": check.name,
            "ok": check.ok,
            "items": check.items,
            "damage": [_damage_json(damage) for damage in check.damage],
            "omitted": check.omitted,
        }
        for check in report.checks
    ]
    repairs = [{"what": one.what, "file": one.file} for one in report.repairs]
    return {"ok": report.ok, "checks": checks, "repaired": report.repaired, "repairs": repairs}


def _damage_json(damage: Damage) -> dict[str, object]:
    return {
        "snapshot": damage.snapshot,
        "volume": damage.volume,
        "offset": damage.offset,
        "length": damage.length,
        "file": damage.file,
        "what": damage.what,
        "group": damage.group,
    }


def _print_report(report: Report, path: Path) -> None:
    for repair in report.repairs:
        where = "" if repair.file is None else f"{repair.file}: "
        click.echo(f"repaired: {shown(where)}{shown(repair.what)}")
    rows = [[check.name, _verdict(check), str(check.items)] for check in report.checks]
    print_table(["check", "", "items"], rows)
    for check in report.checks:
        for damage in check.damage[:SHOWN_MAX]:
            click.echo(f"{check.name}: {shown(_where(damage))}{shown(damage.what)}")
        more = len(check.damage) - SHOWN_MAX
        if more > 0 or check.omitted:
            click.echo(f"{check.name}: {max(0, more) + check.omitted} more; --json names up to {len(check.damage)}")
    click.echo(f"{shown(str(path))} is {'sound' if report.ok else 'damaged'}")


def _verdict(check: Check) -> str:
    return "ok" if check.ok else f"{len(check.damage) + check.omitted} damaged"


def _where(damage: Damage) -> str:
    parts = []
    if damage.volume is not None:
        parts.append(damage.volume if damage.group is None else f"{damage.group}: {damage.volume}")
    if damage.snapshot is not None:
        parts.append(f"in {damage.snapshot}")
    if damage.offset is not None and damage.length is not None:
        parts.append(f"bytes {damage.offset}..{damage.offset + damage.length}")
    return f"{' '.join(parts)}: " if parts else ""

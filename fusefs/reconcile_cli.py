"""The command `reconcile`: compares a mounted source with its store, and repairs what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dedup.errors import RewindError
from dedup.terminal import json_option, print_json, print_table, size_text, terminal_progress
from fusefs.mount_control import ask_mount
from fusefs.mountpoint import absolute, control_socket


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--verify-only", is_flag=True, help="Send nothing; exit 1 when something differs.")
@json_option
@click.pass_context
def reconcile(context: click.Context, mountpoint: Path, verify_only: bool, as_json: bool) -> None:
    """Compare everything under MOUNTPOINT with the store, beside the applications, and send what differs.

    Where something differed, the moments during the repair are a gap. Interrupted, it stops; the mount itself ends a
    repair that has begun.
    """
    socket = control_socket(absolute(mountpoint))
    number = ask_mount(socket, "reconcile.start", {"verify_only": verify_only})["id"]
    try:
        report = _wait(socket, number)
    except KeyboardInterrupt:
        ask_mount(socket, "reconcile.cancel", {"id": number})
        raise
    print_json(report) if as_json else _describe(report, verify_only)
    if verify_only and report["differing_bytes"]:
        context.exit(1)


def _wait(socket: Path, number: object) -> dict[str, Any]:
    """The report, once it is there."""
    done = 0
    with terminal_progress() as progress:
        while True:
            news: dict[str, Any] = ask_mount(socket, "reconcile.poll", {"id": number})
            if news["finished"]:
                report = news["report"]
                if not isinstance(report, dict):
                    raise RewindError("the mount's process sent no report")
                return report
            if progress is not None and news["total"]:
                if not done:
                    progress.phase("compare", news["total"])
                progress.advance(news["done"] - done)
                done = news["done"]


def _describe(report: dict[str, Any], verify_only: bool) -> None:
    """For a person."""
    compared = size_text(report["compared_bytes"])
    if not report["differing_bytes"]:
        click.echo(f"{compared} compared: the store equals the source")
        return
    rows = [[one["volume"], str(one["offset"]), str(one["length"])] for one in report["ranges"]]
    print_table(["VOLUME", "OFFSET", "LENGTH"], rows)
    if report["ranges_omitted"]:
        click.echo(f"and {report['ranges_omitted']} ranges more")
    what = "nothing was sent" if verify_only else f"{size_text(report['sent_bytes'])} were sent, they are equal now"
    click.echo(
        f"{compared} compared, {size_text(report['differing_bytes'])} differed: {what}; moments before this one may be "
        "wrong in these ranges"
    )

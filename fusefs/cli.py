"""The command `rewindfs`: runs one of the commands that command_group.py joins, and reports errors."""

from __future__ import annotations

import gc
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Runs one command and exits: 0 success, 1 a failure, 2 wrong usage, 130 interrupted."""
    # A user waits for these imports each time, and the collector would walk through them again and again to find
    # nothing (measured: 7 of 46 ms for the libraries alone, the walk at the end included).
    gc.disable()
    try:
        sys.exit(_run(sys.argv[1:]))
    finally:
        gc.enable()


def _run(args: list[str]) -> int:
    """The exit status."""
    import click

    from fusefs.command_group import rewindfs

    # --debug counts wherever it stands: who needs it repeats the command with it at the end.
    own = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in own
    args = [*["--debug"][:debug], *[arg for arg in own if arg != "--debug"], *args[len(own) :]]
    try:
        status = rewindfs.main(args, prog_name="rewindfs", standalone_mode=False)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "rewindfs"
        fail(f"{error.format_message().rstrip('.')}; {command} --help says more", 2)
    except click.ClickException as error:
        fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except Exception as error:
        from replication.explanation import cause, explain, is_expected

        if debug:
            raise
        reason = cause(error)
        hint = "" if is_expected(reason) else " (a bug: run it with --debug to see where)"
        fail(explain(reason) + hint, 1)
    return status if isinstance(status, int) else 0


def fail(text: str, status: int) -> NoReturn:
    """The one form of an error message, then exit."""
    import click

    click.echo(f"rewindfs: error: {' '.join(text.split())}", err=True)
    sys.exit(status)

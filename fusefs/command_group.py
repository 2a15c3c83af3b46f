"""The commands of the three packages, joined into `rewindfs`.

They are loaded when they are used, so that help and completion cost no import of numpy or pyfuse3.
"""

from __future__ import annotations

import gc
import importlib
from typing import Final

import click

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "mount": ("fusefs.mount_cli:mount", "Mount SOURCE at MOUNTPOINT and protect it."),
    "unmount": ("fusefs.unmount_cli:unmount", "Drain to durable, then unmount."),
    "mode": ("fusefs.mode_cli:mode", "Change the mode of a running mount."),
    "bookmark": ("fusefs.bookmark_cli:bookmark", "Name this moment, across all volumes, after a flush."),
    "reconcile": ("fusefs.reconcile_cli:reconcile", "Compare the source with the store, and send what differs."),
    "browse": ("fusefs.browse_cli:browse", "Mount the snapshots of STORE, read-only."),
    "restore": ("fusefs.restore_cli:restore", "Bring a past moment back: into a file, or in place."),
    "diff": ("replication.diff_cli:diff", "Where a volume differs between two moments."),
    "bisect": ("fusefs.bisect_cli:bisect", "Find the first bad recovery point of a volume with a command."),
    "clone": ("fusefs.clone_cli:clone", "Mount a past moment, writable, for a test."),
    "status": ("fusefs.status_cli:status", "How a mount or a store is doing."),
    "snapshot": ("replication.snapshot_cli:snapshot", "Create, list and delete snapshots."),
    "journal": ("replication.journal_cli:journal", "Create, list and use data journals of different granularity."),
    "retention": ("replication.retention_cli:retention", "How finely history is kept, and how large a store may grow."),
    "consolidate": ("replication.keep_cli:consolidate", "Thin history as the retention policy says."),
    "gc": ("replication.keep_cli:gc", "Free what no recovery point needs any more."),
    "points": ("replication.points_cli:points", "What can be restored: ranges, gaps, flushes; a timeline."),
    "verify": ("replication.verify_cli:verify", "Check a store, or repair it."),
    "appliance": ("replication.cli:appliance", "Run an appliance as a process of its own."),
    "identity": ("replication.identity_cli:identity", "Keys for tls:// addresses, and whose are trusted."),
}
"""Each command's `module:attribute` and its line in the help."""


class LazyGroup(click.Group):
    """A group whose commands are modules' attributes, imported when they are invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not gc.isenabled():  # as `cli.main` left it
            # What was imported is no garbage, not at the end either: nobody need walk through it again.
            gc.freeze()
            gc.enable()
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}:{attribute} is no click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command: {args[0]}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Log more, and show the traceback of an error.")
@click.version_option(package_name="rewindfs", prog_name="rewindfs", message="%(prog)s %(version)s")
@click.pass_context
def rewindfs(ctx: click.Context, debug: bool) -> None:
    """Continuous data protection for volumes that are plain files.

    Mount a directory of disk images through rewindfs and work on the mount: any past moment is a file.
    """
    ctx.obj = {"debug": debug}

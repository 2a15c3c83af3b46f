"""`rewindfs bookmark`: names this moment, with an application at rest if it is told how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from dedup.errors import RewindError
from dedup.moment import check_name
from dedup.terminal import json_option
from fusefs.command_values import DIRECTORY, Duration, print_json
from fusefs.mount_control import tell
from fusefs.mountpoint import absolute, control_socket

if TYPE_CHECKING:
    from fusefs.bookmark_hooks import Frozen, Hooks

_TAKE_PART: Final = 0.9
"""Of the time that is left: within which the bookmark is recorded; the rest is for the answer."""


@click.command()
@click.argument("mountpoint", type=DIRECTORY)
@click.argument("name")
@click.option("--freeze", metavar="COMMAND", help="Brings an application to rest first, e.g. 'fsfreeze -f /data'.")
@click.option("--thaw", metavar="COMMAND", help="Lets it go on, e.g. 'fsfreeze -u /data'. Run whatever happened.")
@click.option(
    "--hook-timeout",
    type=Duration(),
    default="60s",
    show_default=True,
    help="How long freeze and bookmark may take, and the thaw.",
)
@json_option
def bookmark(
    mountpoint: Path, name: str, freeze: str | None, thaw: str | None, hook_timeout: float, as_json: bool
) -> None:
    """Give this moment a NAME, across all volumes of the mount, after a flush.

    --freeze and --thaw are command lines for /bin/sh, with REWINDFS_MOUNTPOINT, REWINDFS_SOURCE and REWINDFS_BOOKMARK
    in their environment and no input; what they print goes to standard error. The bookmark is made between the two,
    only if the freeze exits with 0. Once the freeze was begun the thaw is run, also when it fails, when there is no
    bookmark, or on Ctrl-C and SIGTERM; a thaw that fails is an error that says so. With --json both are in `hooks`, and
    what went wrong in `errors`.
    """
    check_name(name)
    if (freeze is None) != (thaw is None):
        raise click.UsageError("--freeze and --thaw go together; where there is nothing to thaw, say --thaw true")
    if freeze is None or thaw is None:
        answer = tell(mountpoint, "bookmark", {"name": name})
        print_json(answer) if as_json else _say(answer)
        return
    if hook_timeout <= 0:
        raise click.UsageError("--hook-timeout must be longer than nothing")
    mountpoint = absolute(mountpoint)
    # Imported here: most bookmarks are made without, and are quicker for it.
    import trio

    from fusefs.bookmark_hooks import Hooks

    frozen = trio.run(_between, mountpoint, name, Hooks(freeze, thaw, hook_timeout))
    if as_json:
        seq = None if frozen.answer is None else frozen.answer["seq"]
        print_json({"name": name, "seq": seq, "hooks": frozen.document(), "errors": frozen.errors})
    elif frozen.answer is not None:
        _say(frozen.answer)
    if frozen.errors:
        raise RewindError("; ".join(frozen.errors))


def _say(answer: dict[str, Any]) -> None:
    click.echo(f"bookmark {answer['name']} at seq={answer['seq']}")


async def _between(mountpoint: Path, name: str, hooks: Hooks) -> Frozen:
    """Nothing is frozen where the mount says beforehand that there can be no such bookmark. RewindError."""
    from fusefs.agent_control import Body, ask
    from fusefs.bookmark_hooks import bookmark_frozen

    socket = control_socket(mountpoint)
    checked = await ask(socket, "bookmark.check", {"name": name})
    environment = {
        "REWINDFS_MOUNTPOINT": str(mountpoint),
        "REWINDFS_SOURCE": str(checked["source"]),
        "REWINDFS_BOOKMARK": name,
    }

    async def take(seconds: float) -> Body:
        body: Body = {"name": name, "within": seconds * _TAKE_PART}
        return await ask(socket, "bookmark", body, timeout=max(seconds, 0.0))

    frozen = await bookmark_frozen(hooks, environment, take)
    if frozen.answer is not None and not frozen.answer["durable"]:
        frozen.errors.insert(
            0,
            f"bookmark {name} is recorded at seq={frozen.answer['seq']}, but not durable at the store yet: "
            "it will be once the store takes it; see `rewindfs status`",
        )
    return frozen

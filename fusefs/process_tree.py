"""The end of a process together with all that it started: a shell that is ended alone leaves its programs running."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import trio

END_SECONDS: Final = 5.0
"""How long they may take to end when they are asked to, and again when they are killed."""


async def end_tree(process: trio.Process) -> None:
    """Asks a process that was not waited for, and those that it started, to end; kills what does not.

    What has cut itself loose (its parent has ended) is not found, nor what belongs to another user.
    """
    with ExitStack() as stack:
        members: list[int] = []
        for pid in [process.pid, *_descendants(process.pid)]:
            with suppress(ProcessLookupError):
                # Names the process also when it has ended and its number is another's.
                members.append(os.pidfd_open(pid))
                stack.callback(os.close, members[-1])
        for number in (signal.SIGTERM, signal.SIGKILL):
            for member in members:
                with suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(member, number)
            with trio.move_on_after(END_SECONDS):
                for member in members:
                    await trio.lowlevel.wait_readable(member)
                return


def _descendants(pid: int) -> Iterator[int]:
    """Children before theirs."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                yield int(child)
                yield from _descendants(int(child))

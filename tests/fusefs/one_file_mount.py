"""A process for the tests of `fusefs.daemon`: mounts a directory with one empty file, says when it drained.

Arguments: mountpoint, log file, what to do: `serve`, `refuse` (fail before ready), `die` (before ready), `wait` (never
be ready), `crash` (a bug in a handler), `stop` (leave by itself once somebody has looked).
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import sys
from pathlib import Path

import pyfuse3
import trio

from dedup.errors import RewindError
from fusefs.daemon import serve
from fusefs.mounting import check_mountpoint, mount_options
from replication.background import Ready, run

FILE = pyfuse3.InodeT(2)


class OneFile(pyfuse3.Operations):
    def __init__(self, behaviour: str) -> None:
        super().__init__()
        self.behaviour = behaviour
        self.stop = trio.Event()

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o644 if inode == FILE else stat.S_IFDIR | 0o755)
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if self.behaviour == "crash":
            raise ZeroDivisionError("a bug in a handler")
        if self.behaviour == "stop":
            self.stop.set()
        if name != b"file":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE, ctx)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode))


def main() -> None:
    mountpoint, log_file, behaviour = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    log = logging.getLogger("test")
    # Ignored where the tests were started in the background of a shell without job control.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    async def body(ready: Ready) -> None:
        if behaviour == "refuse":
            raise RewindError("refused,\nas the test wants")
        if behaviour == "die":
            os._exit(7)
        if behaviour == "wait":
            log.info("pid %d", os.getpid())
            await trio.sleep_forever()
        check_mountpoint(mountpoint)

        async def drain() -> None:
            log.info("drained")

        operations = OneFile(behaviour)
        async with trio.open_nursery() as nursery:

            async def mounted(task_status: trio.TaskStatus[None]) -> None:
                options = mount_options("a source, with \\ and ü")
                await serve(operations, mountpoint, options, drain=drain, stop=operations.stop, task_status=task_status)
                nursery.cancel_scope.cancel()

            await nursery.start(mounted)
            log.info("pid %d", os.getpid())
            ready.ready()
            await trio.sleep_forever()

    run(body, foreground=False, log_file=log_file)


if __name__ == "__main__":
    main()

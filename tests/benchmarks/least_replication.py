"""The floor under the write rates: a bare passthrough that also sends each write to another process.

    python -m tests.benchmarks.least_replication SOURCE MOUNTPOINT LOG [--sync] [--writeback]

What is left of replication when everything that can be left out is: one blocking send of each write to a process of its
own, which takes xxh3_128 of each block and appends the bytes to LOG, synced each 64 MiB and each second; what is little
is synced by a sync log, as a store has it. `--sync` waits for its answer before the source has the write, and an fsync
for its sync. An fsync of the source is in a thread: this one may block its loop with a disk, a mount that people use
may not. No order, no lock, no mark, no deduplication, no journal, nothing to recover by: not for data that matters.

It waits for each answer where it stands, which is the quickest for one write after the other. Of many at a time, each a
file's own, a mount could overlap the waiting; here it is what the calls cost, one write after the other.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio
import xxhash

from dedup.errors import StoreError
from dedup.types import BLOCK_BYTES, WRITE_BYTES_MAX
from replication.store_writer import SYNC_BYTES, SYNC_SECONDS
from replication.transport import enlarge_buffers
from tests.benchmarks.bare_passthrough import BarePassthrough, serve
from tests.benchmarks.plain_log import PlainLog

HEADER: Final = struct.Struct("<?I")
"""Whether it is a flush, and the bytes of the write that follow."""
ANSWER: Final = b"\x01"


class LeastReplication(BarePassthrough):
    """Not cancellable, not concurrent: while it waits for the peer, nothing else is served."""

    def __init__(self, source: str, writeback: bool, peer: socket.socket, waits: bool) -> None:
        super().__init__(source, writeback)
        self._peer = peer
        self._waits = waits

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self._tell(False, buf)
        self._hear()
        return os.pwrite(fh, buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._tell(True, b"")
        await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, fh)
        self._hear()

    def _tell(self, is_flush: bool, data: bytes) -> None:
        header = HEADER.pack(is_flush, len(data))
        sent = self._peer.sendmsg([header, data]) - len(header)
        if sent < len(data):
            self._peer.sendall(memoryview(data)[sent:])

    def _hear(self) -> None:
        if self._waits and not self._peer.recv(len(ANSWER)):
            raise RuntimeError("the other process has ended")


def take(peer: socket.socket, log: str, waits: bool) -> None:
    """The other process, until the mount closes the connection."""
    header = bytearray(HEADER.size)
    buffer = memoryview(bytearray(WRITE_BYTES_MAX))
    digest = xxhash.xxh3_128_digest
    synced = 0
    due = time.monotonic() + SYNC_SECONDS
    with PlainLog(Path(log)) as file:
        while peer.recv_into(header, HEADER.size, socket.MSG_WAITALL):
            is_flush, length = HEADER.unpack(header)
            data = buffer[:length]
            if length:
                peer.recv_into(data, length, socket.MSG_WAITALL)
                for at in range(0, length, BLOCK_BYTES):
                    digest(data[at : at + BLOCK_BYTES])
                file.append(data)
            if file.bytes - synced >= SYNC_BYTES or time.monotonic() >= due or (is_flush and waits):
                file.sync()
                synced, due = file.bytes, time.monotonic() + SYNC_SECONDS
            if waits:
                peer.send(ANSWER)


def in_a_process(work: Callable[[], None]) -> int:
    """Its pid. To be called before there is any thread."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except (OSError, StoreError) as error:
        print(f"least replication: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("mountpoint")
    parser.add_argument("log")
    parser.add_argument("--sync", action="store_true", help="wait for the other process")
    parser.add_argument("--writeback", action="store_true", help="let the kernel collect writes in its page cache")
    options = parser.parse_args()
    here, there = socket.socketpair()
    for end in (here, there):
        enlarge_buffers(end)

    def other() -> None:
        here.close()
        take(there, options.log, options.sync)

    pid = in_a_process(other)
    there.close()
    trio.run(serve, LeastReplication(options.source, options.writeback, here, options.sync), options.mountpoint)
    here.close()
    _, status = os.waitpid(pid, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()

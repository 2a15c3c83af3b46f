"""Batch mode with and without offers: bytes on the wire, time, and processor time of both ends.

    python -m tests.benchmarks.offers [MEBIBYTES [DELAY_MILLISECONDS]]

The second appliance is another process with a real store, behind a relay that delays each way. `journal`: each page is
written twice, first in a journal, then in its place, as file systems and databases do; `fresh`: nothing is written
twice. Pages are random in one half, zeros in the other, so that half of each compresses away.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Final

import trio

from dedup.layout import ZERO_BLOCK
from dedup.store import Store
from dedup.types import (
    BLOCK_BYTES,
    ClockRun,
    Create,
    Epoch,
    EpochStart,
    Extent,
    Flush,
    Record,
    Seq,
    TimeNs,
    VolumeId,
    Write,
)
from replication.address import NetworkAddress
from replication.first_appliance import FirstAppliance
from replication.messages import Mode
from replication.second_appliance import SecondAppliance
from replication.tcp import connect_tcp
from replication.transport import listen_unix

PR_SET_PDEATHSIG: Final = 1
VOLUME: Final = VolumeId(1)
RUN: Final = ClockRun(0)
PAGES_PER_COMMIT: Final = 200
TAIL: Final = ZERO_BLOCK[: BLOCK_BYTES // 2]


def second_appliance(path: Path, socket: Path) -> None:
    """Serves in a child until it is ended; its process id is what `os.fork` gave."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    Store.create(path)
    store = Store.open(path)
    listener = listen_unix(socket)

    async def serve() -> None:
        await SecondAppliance(store).serve([listener])

    trio.run(serve)


def history(kind: str, pages: int) -> list[tuple[int, bytes] | None]:
    """(block, page) for each write, None for a flush."""
    random = Random(7)
    contents = [random.randbytes(BLOCK_BYTES // 2) + TAIL for _ in range(pages)]
    order = list(range(pages))
    random.shuffle(order)
    if kind == "fresh":
        contents += [random.randbytes(BLOCK_BYTES // 2) + TAIL for _ in range(pages)]
    steps: list[tuple[int, bytes] | None] = []
    for start in range(0, pages, PAGES_PER_COMMIT):
        chosen = range(start, min(start + PAGES_PER_COMMIT, pages))
        steps += [(number, contents[number]) for number in chosen]
        steps.append(None)
    again = pages if kind == "fresh" else 0
    for start in range(0, pages, PAGES_PER_COMMIT):
        chosen = range(start, min(start + PAGES_PER_COMMIT, pages))
        steps += [(pages + order[number], contents[again + order[number]]) for number in chosen]
        steps.append(None)
    return steps


async def feed(port: int, offers: bool, steps: list[tuple[int, bytes] | None]) -> tuple[float, float, object]:
    first = FirstAppliance(
        lambda: connect_tcp(NetworkAddress("127.0.0.1", port, False)),
        group="g",
        epoch=Epoch(1),
        agent="a",
        mode=Mode.BATCH,
        offers=offers,
    )
    await first.start()

    async def put(record: Record) -> None:
        await first.room(BLOCK_BYTES)
        first.append(record)
        await trio.lowlevel.checkpoint()

    def next_seq() -> Seq:
        return Seq(first.last_seq + 1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first.run)
        await put(EpochStart(next_seq(), TimeNs(1), RUN, Epoch(1), True))
        await put(Create(next_seq(), TimeNs(1), RUN, VOLUME, "disk", len(steps) * BLOCK_BYTES, 0o600, 0, 0))
        began, used = time.perf_counter(), time.process_time()
        for step in steps:
            if step is None:
                await put(Flush(next_seq(), TimeNs(1), RUN, VOLUME))
            else:
                await put(Write(next_seq(), TimeNs(1), RUN, Extent(VOLUME, step[0] * BLOCK_BYTES, step[1])))
        await first.drain()
        result = time.perf_counter() - began, time.process_time() - used, first.status()
        nursery.cancel_scope.cancel()
    return result


def measure(kind: str, offers: bool, mebibytes: int, delay: float) -> None:
    steps = history(kind, (mebibytes << 20) // BLOCK_BYTES // 2)
    with TemporaryDirectory() as directory:
        socket = Path(directory) / "socket"
        child = os.fork()
        if child == 0:
            second_appliance(Path(directory) / "store", socket)
        while not socket.exists():
            time.sleep(0.05)
        relay = subprocess.Popen(
            [sys.executable, "-m", "tests.system.delaying_relay", "tcp:127.0.0.1:0", f"unix:{socket}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert relay.stdin is not None and relay.stdout is not None
        port = int(json.loads(relay.stdout.readline()).rsplit(":", 1)[1])
        print(f"delay {delay}", file=relay.stdin, flush=True)
        relay.stdout.readline()
        seconds, ours, status = trio.run(feed, port, offers, steps)
        print("count", file=relay.stdin, flush=True)
        counted = json.loads(relay.stdout.readline())
        relay.stdin.close()
        relay.wait()
        os.kill(child, signal.SIGKILL)
        _, _, usage = os.wait4(child, 0)
    written = status.written_bytes  # type: ignore[attr-defined]
    theirs = usage.ru_utime + usage.ru_stime
    blocks = written // BLOCK_BYTES
    print(
        f"{kind:8} offers {'yes' if offers else 'no ':3} delay {delay * 2e3:3.0f} ms: written {written / 1e6:6.1f} MB, "
        f"wire up {counted['up'] / 1e6:6.2f} down {counted['down'] / 1e6:5.2f} MB "
        f"({(counted['up'] + counted['down']) / written:5.1%}), {seconds:6.2f} s, "
        f"processor {ours / blocks * 1e6:5.1f} µs a block here, {theirs / blocks * 1e6:5.1f} there"
    )


def main() -> None:
    mebibytes = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    delays = [float(sys.argv[2]) / 2e3] if len(sys.argv) > 2 else [0.0, 0.025]
    for delay in delays:
        for kind in ("journal", "fresh"):
            for offers in (False, True):
                measure(kind, offers, mebibytes, delay)


if __name__ == "__main__":
    main()

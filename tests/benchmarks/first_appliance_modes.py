"""Time per record from `append` to `acknowledged` and to RECEIVED, in each mode, over a Unix socket to another process.

    python tests/benchmarks/first_appliance_modes.py [RECORDS]

The peer is another process that takes frames and acknowledges each batch of them at once: no store. So this is the cost
of the protocol and of the first appliance alone.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2]))

import trio
import trio.testing

from dedup.types import ClockRun, Epoch, Extent, Seq, TimeNs, VolumeId, Write
from replication.first_appliance import FirstAppliance
from replication.messages import PROTOCOL_VERSION, Ack, Hello, Level, SyncRequest, VolumePage, Welcome
from replication.modes import Mode
from replication.session import Session, Side
from replication.transport import Listener, connect_unix, listen_unix


async def serve(listener: Listener) -> None:
    connection = await listener.accept()
    session = Session(Side.SERVER)
    while data := await connection.receive():
        session.receive_data(data)
        seen = session.last_seq
        while (message := session.next_event()) is not None:
            match message:
                case Hello():
                    zero = Seq(0)
                    welcome = Welcome(
                        PROTOCOL_VERSION, "s", Epoch(0), zero, zero, TimeNs(0), ClockRun(0), False, False,
                        VolumeId(1), b"",
                    )  # fmt: skip
                    await connection.send(session.send(welcome))
                    await connection.send(session.send(VolumePage((), True)))
                case SyncRequest():
                    seen = Seq(0)
        if session.last_seq > seen:
            last = session.last_seq
            await connection.send(session.send(Ack(last, last, last, last)))


async def measure(path: Path, mode: Mode, records: int, payload: bytes, writers: int) -> None:
    first = FirstAppliance(lambda: connect_unix(path), group="g", epoch=Epoch(1), agent="a", mode=mode)
    welcome, _volumes = await first.start()
    last = int(welcome.held)

    async def writer(count: int) -> None:
        nonlocal last
        for _ in range(count):
            await first.room(len(payload))
            last += 1
            seq = Seq(last)
            extent = Extent(VolumeId(1), seq * 4096, payload)
            first.append(Write(seq, TimeNs(seq), ClockRun(0), extent))
            await first.acknowledged(seq)
            await trio.lowlevel.checkpoint()  # where the agent would take its next request

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first.run)
        await trio.testing.wait_all_tasks_blocked()
        began = time.perf_counter()
        async with trio.open_nursery() as writing:
            for _ in range(writers):
                writing.start_soon(writer, records // writers)
        acknowledged = time.perf_counter() - began
        await first.reached(Seq(last), Level.RECEIVED)
        received = time.perf_counter() - began
        nursery.cancel_scope.cancel()
    done = records // writers * writers
    print(
        f"{mode.value:6} {len(payload) >> 10:5} KiB depth {writers:3}: "
        f"acknowledged {acknowledged / done * 1e6:7.1f} µs, received {received / done * 1e6:7.1f} µs per record, "
        f"{done * len(payload) / received / 1e6:6.0f} MB/s"
    )


def main() -> None:
    records = int(sys.argv[1]) if len(sys.argv) > 1 else 20000
    for mode in Mode:
        for payload, writers, count in (
            (os.urandom(4096), 1, records),
            (os.urandom(4096), 16, records),
            (os.urandom(1 << 20), 1, records // 50),
        ):
            with TemporaryDirectory() as directory:
                path = Path(directory) / "socket"
                listener = listen_unix(path)
                child = os.fork()
                if child == 0:
                    trio.run(serve, listener)
                    os._exit(0)
                trio.run(measure, path, mode, count, payload, writers)
                os.waitpid(child, 0)


if __name__ == "__main__":
    main()

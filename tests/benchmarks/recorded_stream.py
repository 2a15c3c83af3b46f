"""A recorded session: the bytes that an agent sends, played to a second appliance, and no socket between.

The appliance does with them what it does with a socket's: decodes, ingests, journals, syncs, answers. What it answers
is read, and each byte is played once it is asked for, so the appliance never waits for anyone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from dedup.store import Store
from dedup.types import ClockRun, Create, Epoch, EpochStart, Extent, Record, Seq, TimeNs, VolumeId, Write
from replication.messages import PROTOCOL_VERSION, Ack, Failure, Hello, Role, SyncRequest
from replication.second_appliance import SecondAppliance
from replication.transport import Connection
from replication.wire import Buffer, Decoder, encode

GROUP: Final = "group"
AGENT: Final = "agent"
VOLUME: Final = VolumeId(1)
EPOCH: Final = Epoch(1)
RUN: Final = ClockRun(0)
FIRST_TIME: Final = TimeNs(1_700_000_000 * 10**9)
RECEIVED_BYTES: Final = 1 << 20
"""What a busy socket gives at once (`transport.RECEIVE_BYTES_MAX`)."""


@dataclass(frozen=True, slots=True)
class Recording:
    """The stream from its first record on, as it is received piece by piece, and the seq of its last record."""

    pieces: list[bytes]
    last: Seq


@dataclass(frozen=True, slots=True)
class Played:
    """From the first byte of the records until the last one is durable, and in a checkpoint."""

    seconds: float
    processor_seconds: float


def stamp(seq: int) -> tuple[Seq, TimeNs, ClockRun]:
    return Seq(seq), TimeNs(FIRST_TIME + seq * 1000), RUN


def beginning(volume_bytes: int) -> list[Record]:
    """What precedes the writes of a new group: seqs 1 and 2."""
    return [
        EpochStart(*stamp(1), EPOCH, clean=False),
        Create(*stamp(2), VOLUME, "data", volume_bytes, 0o644, 0, 0),
    ]


def writes(after: Seq, extents: Iterable[tuple[int, Buffer]]) -> list[Record]:
    """A write at each (offset, data)."""
    return [Write(*stamp(seq), Extent(VOLUME, offset, data)) for seq, (offset, data) in enumerate(extents, after + 1)]


def record(records: Sequence[Record], run: int | None = None) -> Recording:
    """The records as they are received: RECEIVED_BYTES at a time, or `run` records at a time."""
    frames = [b"".join(encode(one)) for one in records]
    if run is None:
        stream = b"".join(frames)
        pieces = [stream[at : at + RECEIVED_BYTES] for at in range(0, len(stream), RECEIVED_BYTES)]
    else:
        pieces = [b"".join(frames[at : at + run]) for at in range(0, len(frames), run)]
    return Recording(pieces, records[-1].seq)


class _Player(Connection):
    """The appliance's end of a connection whose other end is a recording."""

    def __init__(self, recording: Recording) -> None:
        self._heard = Decoder()
        self._pieces = iter(recording.pieces)
        self._last = recording.last
        self._opening = [b"".join(encode(Hello(PROTOCOL_VERSION, Role.AGENT, GROUP, EPOCH, AGENT)))]
        self._ending = [b"".join(encode(SyncRequest()))]
        self._durable = trio.Event()
        self._began: tuple[float, float] | None = None

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if self._opening:
            return self._opening.pop()
        return self._next() or await self._end()

    def receive_soon(self, milliseconds: int) -> bytes:
        return self._next()

    def _next(self) -> bytes:
        if self._began is None:
            self._began = time.perf_counter(), time.process_time()
        return next(self._pieces, b"")

    async def _end(self) -> bytes:
        if self._ending:
            return self._ending.pop()
        await self._durable.wait()
        return b""

    async def send(self, buffers: Sequence[Buffer]) -> None:
        self.send_nowait(buffers)

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        if self._opening or (self._began is not None and self._ending):
            return sum(map(len, buffers))  # only the last Ack matters: hearing the others is not the appliance's work
        sent = b"".join(buffers)
        self._heard.receive_data(sent)
        while (message := self._heard.next_message()) is not None:
            if isinstance(message, Failure):
                raise RuntimeError(f"the appliance refused the recording: {message.text}")
            if isinstance(message, Ack) and message.durable >= self._last:
                self._durable.set()
        return len(sent)

    def played(self) -> Played:
        """What it has taken so far, once the last record is durable."""
        if self._began is None or not self._durable.is_set():
            raise RuntimeError("the session ended before the last record was durable")
        wall, processor = self._began
        return Played(time.perf_counter() - wall, time.process_time() - processor)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def play(store: Store, recording: Recording) -> Played:
    """The recording as a session of a second appliance that writes `store`."""
    return trio.run(_play, store, recording)


async def _play(store: Store, recording: Recording) -> Played:
    appliance = SecondAppliance(store)
    player = _Player(recording)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(appliance.writer.serve)
        await appliance.serve_connection(player)
        await appliance.writer.checkpoint()
        played = player.played()
        nursery.cancel_scope.cancel()
    return played

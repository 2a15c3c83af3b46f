"""The retention queue of the first appliance: every frame stays until a peer has it on its disk.

Invariants:
- Frames follow each other in seq without a hole, through the three parts: held (by the peer), sent, waiting.
- A frame leaves only when it is on a disk of the peer's (`acknowledge`): durable at the second appliance, or spooled.
- `bytes` counts every frame with what it costs in memory beyond its payload, so many small ones are bounded too.
- No frame with a Compare is ever sent in a second session: its digests were keyed for the first. A heartbeat takes its
  place, which says the same about the volumes: nothing changed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final

from dedup.types import Aggregate, Heartbeat, Record, Seq, TimeNs
from replication.errors import HistoryLost, LocalProtocolError
from replication.messages import Compare
from replication.wire import Buffer, encode

QUEUE_BYTES_MAX: Final = 32 << 20
"""Most that the queue keeps unless told otherwise."""
FRAME_OVERHEAD_BYTES: Final = 512
"""What a frame costs in memory beside its payload: its objects and its head."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One encoded record, or aggregate of records, first_seq..seq. The buffers must not change while it is kept."""

    kind: type
    first_seq: Seq
    seq: Seq
    time: TimeNs
    buffers: list[Buffer]
    bytes: int
    """Memory it is counted with."""
    compare: Compare | None = None


def frame_of(record: Record | Compare, buffers: list[Buffer] | None = None) -> Frame:
    """The record's frame; `buffers` if it was encoded already. Raises LocalProtocolError for a bad record."""
    if buffers is None:
        buffers = encode(record)
    kind = type(record)
    length = FRAME_OVERHEAD_BYTES
    for buffer in buffers:
        length += len(buffer)
    seq = record.seq
    first_seq = record.first_seq if kind is Aggregate else seq  # type: ignore[union-attr]
    return Frame(kind, first_seq, seq, record.time, buffers, length, record if kind is Compare else None)  # type: ignore[arg-type]


class Outbox:
    """The frames between `held` and the present. Holds no lock and never waits."""

    def __init__(self, held: Seq, *, bytes_max: int = QUEUE_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self.held_bytes = 0
        """Of the frames that the peer holds, and not on a disk."""
        self.last_seq = held
        """Of the newest frame ever appended."""
        self.sent_seq = held
        """Of the newest frame ever sent, on whatever connection."""
        self._held: deque[Frame] = deque()
        self._sent: deque[Frame] = deque()
        self._waiting: deque[Frame] = deque()

    def __len__(self) -> int:
        return len(self._held) + len(self._sent) + len(self._waiting)

    @property
    def unsent(self) -> bool:
        return bool(self._waiting)

    @property
    def unheld(self) -> bool:
        return bool(self._sent or self._waiting)

    @property
    def unsent_frames(self) -> int:
        return len(self._waiting)

    @property
    def lone(self) -> bool:
        """Whether one frame, and no more, was sent and is not held by the peer."""
        return len(self._sent) == 1 and not self._waiting

    @property
    def oldest(self) -> Frame | None:
        return next(chain(self._held, self._sent, self._waiting), None)

    @property
    def records(self) -> int:
        """Records kept; an aggregate counts as many as it combines."""
        oldest = self.oldest
        return 0 if oldest is None else self.last_seq - oldest.first_seq + 1

    def append(self, frame: Frame) -> None:
        """Takes the next frame. Bounding `bytes` is the caller's part: it asks for room first."""
        if frame.first_seq != self.last_seq + 1:
            raise LocalProtocolError(f"record {frame.first_seq} does not follow {self.last_seq}")
        self.last_seq = frame.seq
        self.bytes += frame.bytes
        self._waiting.append(frame)

    def ahead(self, count: int) -> list[Frame]:
        """The frames that are to be sent next, at most so many."""
        return list(islice(self._waiting, count))

    def take(self, bytes_max: int) -> list[Frame]:
        """The next frames to send, in order, at least one if any waits, and no more than about `bytes_max`. They count
        as sent from now on."""
        taken: list[Frame] = []
        total = 0
        waiting = self._waiting
        while waiting and (not taken or total + waiting[0].bytes <= bytes_max):
            frame = waiting.popleft()
            taken.append(frame)
            total += frame.bytes
        if taken:
            self._sent.extend(taken)
            self.sent_seq = max(self.sent_seq, taken[-1].seq)
        return taken

    def take_one(self) -> Frame:
        """The next frame to send, alone; it counts as sent from now on. To be called when one waits."""
        frame = self._waiting.popleft()
        self._sent.append(frame)
        if frame.seq > self.sent_seq:
            self.sent_seq = frame.seq
        return frame

    def acknowledge(self, queued: Seq, kept: Seq) -> bool:
        """Notes what the peer holds; drops what it keeps on a disk. Says whether room was made."""
        sent, held = self._sent, self._held
        while sent and sent[0].seq <= queued:
            frame = sent.popleft()
            held.append(frame)
            self.held_bytes += frame.bytes
        dropped = 0
        while held and held[0].seq <= kept:
            dropped += held.popleft().bytes
        self.held_bytes -= dropped
        self.bytes -= dropped
        return dropped > 0

    def rewind(self, held: Seq) -> None:
        """A new session begins, whose peer holds everything up to `held`: the frames past it wait again, in order; the
        others count as held by it. Raises HistoryLost, and changes nothing, when the queue does not meet the store."""
        oldest = self.oldest
        first_kept = Seq(self.last_seq + 1) if oldest is None else oldest.first_seq
        if held + 1 < first_kept:
            text = f"the store holds records up to {held}, but those before {first_kept} are kept nowhere any more"
            raise HistoryLost(held, first_kept, text)
        if held > self.sent_seq:
            text = f"the store holds records up to {held}, but only {self.sent_seq} was ever sent"
            raise HistoryLost(held, first_kept, text)
        frames = [*self._held, *self._sent, *self._waiting]
        for frame in frames:
            if frame.first_seq <= held < frame.seq:
                text = f"the store holds records up to {held}, a part of the aggregate {frame.first_seq}..{frame.seq}"
                raise HistoryLost(held, first_kept, text)
        frames = [_for_another_session(frame) for frame in frames]
        self._held = deque(frame for frame in frames if frame.seq <= held)
        self._sent = deque()
        self._waiting = deque(frame for frame in frames if frame.seq > held)
        self.bytes = sum(frame.bytes for frame in frames)
        self.held_bytes = sum(frame.bytes for frame in self._held)


def _for_another_session(frame: Frame) -> Frame:
    if frame.compare is None:
        return frame
    return frame_of(Heartbeat(frame.seq, frame.compare.time, frame.compare.run))

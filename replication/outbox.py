"""The retention queue of the first appliance: every frame stays until a peer has it on its disk.

In memory, and where there is a spool, also on this side's disk: what is oldest is `spooled` and leaves memory; to be
sent it is `load`ed again. This module does neither, it keeps the order.

Invariants:
- Frames follow each other in seq without a hole, through four parts: held (by the peer), sent, loaded, waiting. What is
  missing between loaded and waiting is `unloaded`, on disk; nothing behind it is sent before it.
- A frame leaves only when it is on a disk: of the peer's (`acknowledge`: durable at the second appliance, or spooled at
  a first one), or of this side's (`spooled`).
- `bytes` counts every frame with what it costs in memory beyond its payload, so many small ones are bounded too.
- No frame with a Compare is ever sent in a second session: its digests were keyed for the first. A heartbeat takes its
  place, which says the same about the volumes: nothing changed.
"""

from __future__ import annotations

from collections import deque
from itertools import chain, islice
from typing import Final

import msgspec

from dedup.types import Aggregate, Heartbeat, Record, Seq, TimeNs
from replication.errors import HistoryLost, LocalProtocolError
from replication.messages import Compare
from replication.wire import Buffer, encode

QUEUE_BYTES_MAX: Final = 32 << 20
"""Most that the queue keeps unless told otherwise."""
FRAME_OVERHEAD_BYTES: Final = 512
"""What a frame costs in memory beside its payload: its objects and its head."""


class Frame(msgspec.Struct, frozen=True, gc=False):
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

    def __init__(self, held: Seq, *, durable: Seq | None = None, bytes_max: int = QUEUE_BYTES_MAX) -> None:
        """The peer holds everything up to `held`, and has it on a disk up to `durable`; None: all of it."""
        self.bytes_max = bytes_max
        self.bytes = 0
        """In memory."""
        self.held_bytes = 0
        """Of the frames that the peer holds, and not on a disk."""
        self.last_seq = held
        """Of the newest frame ever appended."""
        self.sent_seq = held
        """Of the newest frame ever sent, on whatever connection."""
        self.kept_seq = held if durable is None else min(durable, held)
        """Everything up to here is on a disk of the peer's."""
        self._never_here = held
        """What came up to here was neither appended nor found on this side's disk: it cannot be sent from here."""
        self.spooled_seq = Seq(0)
        """Everything up to here is on this side's disk, or needed no more."""
        self.next_to_load = Seq(1)
        """The next record to be sent that is on this side's disk only; past `spooled_seq`: there is none."""
        self.rewinds = 0
        """How often `next_to_load` was set anew, so that what was read for another place is not taken."""
        self._loaded_bytes = 0
        self._unanswered = Seq(0)
        """The newest frame that was sent, is not held by the peer, and has left memory for the disk; 0 when none."""
        self._disk_time: TimeNs | None = None
        """Time of about the oldest frame on disk."""
        self._held: deque[Frame] = deque()
        self._sent: deque[Frame] = deque()
        self._loaded: deque[Frame] = deque()
        self._waiting: deque[Frame] = deque()

    def __len__(self) -> int:
        """Frames in memory."""
        return len(self._held) + len(self._sent) + len(self._loaded) + len(self._waiting)

    @property
    def unsent(self) -> bool:
        return bool(self._waiting or self._loaded) or self.unloaded

    @property
    def unheld(self) -> bool:
        return bool(self._sent or self._waiting or self._loaded or self._unanswered) or self.unloaded

    @property
    def unsent_frames(self) -> int:
        """Of those in memory."""
        return len(self._waiting) + len(self._loaded)

    @property
    def unloaded(self) -> bool:
        """Whether frames that are to be sent next, or after the loaded ones, are on disk only."""
        return self.next_to_load <= self.spooled_seq

    @property
    def lone(self) -> bool:
        """Whether one frame, and no more, was sent and is not held by the peer."""
        return len(self._sent) == 1 and not self._waiting and not self._loaded and not self.unloaded

    @property
    def on_disk(self) -> bool:
        """Whether this side's disk has frames that are still needed."""
        return self.spooled_seq > self.kept_seq

    @property
    def oldest(self) -> Frame | None:
        """In memory."""
        return next(chain(self._held, self._sent, self._loaded, self._waiting), None)

    @property
    def oldest_time(self) -> TimeNs | None:
        """Time of the oldest frame; of those on disk, about."""
        if self.on_disk and self._disk_time is not None:
            return self._disk_time
        oldest = self.oldest
        return None if oldest is None else oldest.time

    @property
    def records(self) -> int:
        """Records kept; an aggregate counts as many as it combines."""
        if self.on_disk:
            return self.last_seq - self.kept_seq
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
        """The frames that are to be sent next, at most so many, and only those in memory."""
        return list(islice(chain(self._loaded, () if self.unloaded else self._waiting), count))

    def take(self, bytes_max: int) -> list[Frame]:
        """The next frames to send, in order, at least one if any can be, and no more than about `bytes_max`. They count
        as sent from now on. [] also while the next one is on disk only."""
        taken: list[Frame] = []
        total = 0
        for source in (self._loaded, self._waiting):
            if source is self._waiting and self.unloaded:
                break
            while source and (not taken or total + source[0].bytes <= bytes_max):
                frame = source.popleft()
                taken.append(frame)
                total += frame.bytes
            if source is self._loaded:
                self._loaded_bytes -= total
            if source:
                break
        if taken:
            self._sent.extend(taken)
            self.sent_seq = max(self.sent_seq, taken[-1].seq)
        return taken

    def take_one(self) -> Frame:
        """The next frame to send, alone; it counts as sent from now on. To be called when one waits, and only one."""
        frame = self._waiting.popleft()
        self._sent.append(frame)
        if frame.seq > self.sent_seq:
            self.sent_seq = frame.seq
        return frame

    def acknowledge(self, queued: Seq, kept: Seq) -> bool:
        """Notes what the peer holds; drops what it keeps on a disk. Says whether room was made."""
        sent, held = self._sent, self._held
        dropped = 0
        while sent and sent[0].seq <= queued:
            frame = sent.popleft()
            if frame.seq <= self.spooled_seq:
                dropped += frame.bytes  # it came from the disk, and is there until it is kept
                self._disk_time = frame.time
            else:
                held.append(frame)
                self.held_bytes += frame.bytes
        if queued >= self._unanswered:
            self._unanswered = Seq(0)
        if kept > self.kept_seq:
            self.kept_seq = kept
        released = 0
        while held and held[0].seq <= kept:
            released += held.popleft().bytes
        self.held_bytes -= released
        self.bytes -= released + dropped
        return released + dropped > 0

    def rewind(self, held: Seq) -> None:
        """A new session begins, whose peer holds everything up to `held`: the frames past it wait again, in order; the
        others count as held by it. Raises HistoryLost, and changes nothing, when the queue does not meet the store."""
        oldest = self.oldest
        first_kept = Seq(self.last_seq + 1) if oldest is None else oldest.first_seq
        if self.on_disk:
            first_kept = Seq(max(self.kept_seq, self._never_here) + 1)
        if held + 1 < first_kept:
            text = f"the store holds records up to {held}, but those before {first_kept} are kept nowhere any more"
            raise HistoryLost(held, first_kept, text)
        if held > self.sent_seq:
            text = f"the store holds records up to {held}, but only {self.sent_seq} was ever sent"
            raise HistoryLost(held, first_kept, text)
        frames = [*self._held, *self._sent, *self._loaded, *self._waiting]
        for frame in frames:
            if frame.first_seq <= held < frame.seq:
                text = f"the store holds records up to {held}, a part of the aggregate {frame.first_seq}..{frame.seq}"
                raise HistoryLost(held, first_kept, text)
        frames = [for_another_session(frame) for frame in frames if frame.seq > self.spooled_seq]
        self._held = deque(frame for frame in frames if frame.seq <= held)
        self._sent = deque()
        self._loaded = deque()
        self._waiting = deque(frame for frame in frames if frame.seq > held)
        self.bytes = sum(frame.bytes for frame in frames)
        self.held_bytes = sum(frame.bytes for frame in self._held)
        self._loaded_bytes, self._unanswered = 0, Seq(0)
        self.next_to_load = Seq(held + 1)
        self.rewinds += 1

    # --- this side's disk ---

    def found_on_disk(self, last_seq: Seq, durable: Seq) -> None:
        """Right after it was made: the spool of this epoch holds what follows `durable`, up to `last_seq`. `rewind`
        says then what of it is to be sent. Where the peer holds more than that, the rest is nowhere on this side."""
        if last_seq >= self.last_seq:
            self._never_here = durable
        self.spooled_seq = last_seq
        self.last_seq = self.sent_seq = max(self.last_seq, last_seq)
        self.kept_seq = durable

    def unspooled(self, bytes_max: int) -> list[Frame]:
        """The oldest frames that are not on this side's disk, in order, about `bytes_max` of them, as they are for
        another session."""
        frames: list[Frame] = []
        total = 0
        for frame in chain(self._held, self._sent, self._waiting):
            if frame.seq <= self.spooled_seq:
                continue
            if frames and total + frame.bytes > bytes_max:
                break
            frames.append(for_another_session(frame))
            total += frame.bytes
        return frames

    def spooled(self, seq: Seq) -> list[Frame]:
        """Everything up to `seq` is on this side's disk: it leaves memory, and is to be loaded before it is sent. The
        frames that had not been sent."""
        self._disk_time = self.oldest_time
        self._drop_spooled(self._held, seq)
        if sent := self._drop_spooled(self._sent, seq):
            self._unanswered = sent[-1].seq
        unsent = self._drop_spooled(self._waiting, seq)
        self.held_bytes = sum(frame.bytes for frame in self._held)
        if not self.unloaded:
            self.next_to_load = unsent[0].first_seq if unsent else Seq(seq + 1)
        self.spooled_seq = seq
        return unsent

    def _drop_spooled(self, frames: deque[Frame], seq: Seq) -> list[Frame]:
        dropped = []
        while frames and frames[0].seq <= seq:
            dropped.append(frames.popleft())
            self.bytes -= dropped[-1].bytes
        return dropped

    def wants(self, bytes_max: int) -> bool:
        """Whether frames should be loaded, so that about `bytes_max` of them are at hand."""
        return self.unloaded and 2 * self._loaded_bytes < bytes_max

    def load(self, frames: list[Frame]) -> None:
        """Frames from the disk, of which the first one begins with record `next_to_load`."""
        if frames[0].first_seq != self.next_to_load:
            raise LocalProtocolError(f"record {frames[0].first_seq} was loaded, {self.next_to_load} comes next")
        total = sum(frame.bytes for frame in frames)
        self._loaded.extend(frames)
        self._loaded_bytes += total
        self.bytes += total
        self.next_to_load = Seq(frames[-1].seq + 1)


def for_another_session(frame: Frame) -> Frame:
    """The frame, or what takes its place where its session is over."""
    if frame.compare is None:
        return frame
    return frame_of(Heartbeat(frame.seq, frame.compare.time, frame.compare.run))

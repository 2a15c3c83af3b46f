"""What a link offers before it sends it: which aggregates, how far ahead, and what goes out once the answer is there.

Invariants:
- Frames keep their order: an aggregate that was not looked at yet, or whose offer has no answer, is `held_back`, and so
  is everything behind it. Only an offer that is made to learn by (at most one is open) holds nothing back.
- At most OFFERS_OPEN_MAX aggregates are kept beside the queue, each of 4 MiB at most, and as many offers are open.
- An Offering belongs to one session, whose key its digests have. `Habit` and `Traffic` last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import trio

from dedup.types import BLOCK_BYTES, Aggregate, Seq
from replication import offers
from replication.errors import LocalProtocolError
from replication.frame_head import HEADER
from replication.frame_layout import Flag
from replication.messages import Offer, Wanted
from replication.modes import BATCH_ZSTD_LEVEL
from replication.outbox import FRAME_OVERHEAD_BYTES, Frame
from replication.session import OFFERS_OPEN_MAX, Session
from replication.wire import Buffer, compressed, decode_all

OFFER_BLOCKS_MIN: Final = 8
"""Whole blocks that an aggregate must have to be offered: fewer are not worth a round trip."""
AHEAD_FRAMES: Final = 64
"""Frames that are looked through for what can be offered ahead."""
THREAD_BYTES: Final = 256 << 10
"""Frames from this size on are hashed in a thread: a smaller one costs less than the way there and back."""
PAYS_SHARE: Final = 0.05
"""Offers that save less than this part of what they offer are not worth making."""
WINDOW: Final = 8
"""So many offers in a row decide about the next."""
REST_EVERY: Final = 4
"""While they do not pay, one aggregate in so many is offered, and goes out whole without waiting for the answer."""


@dataclass(slots=True)
class Traffic:
    """What one first appliance has sent over its links, and of how much, in bytes, since it was made."""

    written: int = 0
    """Data of writes that was to be forwarded."""
    sent: int = 0
    """Frames, given to the connection."""
    saved: int = 0
    """By how much offers made that less, themselves and their answers counted against it; below 0 where they cost more
    than they save."""
    withheld: int = 0
    """Data of blocks that were not sent, as written: before compression."""
    offered: int = 0
    """Offers and their answers."""


class Habit:
    """Whether the next aggregate is worth an offer, as the last ones have shown."""

    def __init__(self) -> None:
        self._last: deque[tuple[int, int]] = deque(maxlen=WINDOW)
        self._resting = False
        self._passed = 0

    @property
    def resting(self) -> bool:
        """Whether only one aggregate in REST_EVERY is offered, to learn by."""
        return self._resting

    def asks(self) -> bool:
        """Whether to offer the next one; to be called once for each that could be."""
        if not self._resting:
            return True
        self._passed += 1
        return self._passed % REST_EVERY == 0

    def learn(self, whole: int, saved: int) -> None:
        """An aggregate of `whole` bytes on the wire was offered, which saved so many of them, all costs deducted."""
        if self._resting and saved >= PAYS_SHARE * whole:
            self._resting = False
            self._last.clear()
        self._last.append((whole, saved))
        if len(self._last) == WINDOW:
            wholes, saveds = (sum(column) for column in zip(*self._last, strict=True))
            if not self._resting and saveds < PAYS_SHARE * wholes:
                self._resting, self._passed = True, 0


@dataclass(slots=True)
class _Open:
    aggregate: Aggregate
    offer: Offer
    cost: int
    """Bytes of the offer and its answer."""
    missing: bytes | None = None
    """The answer."""


@dataclass(frozen=True, slots=True)
class _Probe:
    seq: Seq
    whole: int
    """Bytes of the aggregate on the wire."""
    cost: int


class Offering:
    """The offers of one session. Called by the task that sends, but `answered`, which never waits."""

    def __init__(self, key: bytes, habit: Habit, traffic: Traffic) -> None:
        self._key = key
        self._habit = habit
        self._traffic = traffic
        self._open: dict[Seq, _Open] = {}
        self._seen = Seq(0)
        """Aggregates up to this one were looked at."""

        self._probe: _Probe | None = None
        """An offer that was made to learn by; its aggregate does not wait."""

    def held_back(self, frame: Frame) -> bool:
        """Whether the frame must not be sent now."""
        if frame.kind is not Aggregate:
            return False
        found = self._open.get(frame.seq)
        return frame.seq > self._seen if found is None else found.missing is None

    async def prepare(self, ahead: Iterable[Frame]) -> Offer | None:
        """An offer to be said now, for the next aggregate of those to be sent that is worth one, if another may be
        open."""
        for frame in ahead:
            if frame.kind is not Aggregate or frame.seq <= self._seen:
                continue
            if len(self._open) >= OFFERS_OPEN_MAX:
                return None
            opened = await self._opened(frame)
            self._seen = frame.seq
            if opened is not None:
                if self._habit.resting:
                    self._probe = _Probe(frame.seq, _bytes_of(frame), opened.cost)
                else:
                    self._open[frame.seq] = opened
                self._traffic.offered += opened.cost
                return opened.offer
        return None

    async def _opened(self, frame: Frame) -> _Open | None:
        if _bytes_of(frame) < BLOCK_BYTES or self._probe is not None or not self._habit.asks():
            return None
        if frame.bytes < THREAD_BYTES:
            return _open(frame, self._key)
        return await trio.to_thread.run_sync(_open, frame, self._key)

    def answered(self, answer: Wanted) -> bool:
        """Takes the answer to an open offer, whose length the session has checked. Says whether that sets free what was
        held back."""
        found = self._open.get(answer.seq)
        probe = self._probe
        if probe is not None and answer.seq == probe.seq:
            self._probe = None
            self._traffic.saved -= probe.cost
            held = probe.whole * answer.missing.count(0) // len(answer.missing)
            self._habit.learn(probe.whole, held - probe.cost)
        if found is None:
            return False
        found.missing = answer.missing
        return True

    def say(self, frame: Frame, session: Session) -> list[Buffer]:
        """The frame, which is next and not held back, or what remains of it: counted as said by the session."""
        found = self._open.pop(frame.seq, None)
        if found is None:
            session.sending(frame.kind, frame.first_seq, frame.seq)
            return frame.buffers
        if found.missing is None:
            raise LocalProtocolError(f"the aggregate {frame.seq} was to be sent before its offer was answered")
        whole = _bytes_of(frame)
        if 0 in found.missing:
            buffers = session.send(offers.remainder(found.aggregate, found.missing))
            if HEADER.unpack_from(frame.buffers[0])[2] & Flag.COMPRESSED:
                buffers = compressed(buffers, level=BATCH_ZSTD_LEVEL)
        else:
            session.sending(frame.kind, frame.first_seq, frame.seq)
            buffers = frame.buffers
        saved = whole - sum(map(len, buffers)) - found.cost
        self._traffic.withheld += found.missing.count(0) * BLOCK_BYTES
        self._traffic.saved += saved
        self._habit.learn(whole, saved)
        return buffers


def _open(frame: Frame, key: bytes) -> _Open | None:
    """The frame's offer; None when it has too few whole blocks, or costs less to send than to ask about."""
    (aggregate,) = decode_all(b"".join(frame.buffers))
    if not isinstance(aggregate, Aggregate):
        raise LocalProtocolError(f"the frame {frame.seq} is no aggregate")
    blocks = offers.whole_blocks(aggregate)
    cost = offers.offer_bytes(len(blocks))
    if len(blocks) < OFFER_BLOCKS_MIN or cost >= _bytes_of(frame):
        return None
    return _Open(aggregate, offers.offer_of(aggregate, blocks, key), cost)


def _bytes_of(frame: Frame) -> int:
    """On the wire."""
    return frame.bytes - FRAME_OVERHEAD_BYTES

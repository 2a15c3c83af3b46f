"""Moves frames between the queue in memory and the spool on disk, so that an outage longer than memory leaves no gap.

While the link is down, or an outage lasts, what the queue has goes to the disk, the oldest first; synced, it leaves
memory. Once there is a link again it comes back in bounded pieces, and goes from the disk when it is kept at the peer.

Invariants:
- One task touches the spool, one call at a time, each in a thread: the loop never waits for the disk.
- A frame leaves memory only after the sync that covers it has succeeded.
- Frames are on disk in their order, without a hole: where the spool ends, the next frame written begins.
- What is damaged is discarded, and with it the history: nothing of it counts as held from then on.
- A spool that cannot be written is said once, loudly; the queue is then as if there were none, and what it already
  holds is still sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from dedup.types import Seq
from replication.errors import HandshakeRefused, HistoryLost, SpoolDamaged, SpoolError, SpoolFailed
from replication.messages import Compare, ErrorCode, Hello, Welcome
from replication.outbox import Frame, Outbox
from replication.spool import Spool
from replication.spool_file import Origin

if TYPE_CHECKING:
    from replication.first_appliance import FirstAppliance

SPOOL_AFTER_SECONDS: Final = 1.0
"""How long the link is down before the disk is used: a short break costs no disk."""
SPOOL_ROUND_BYTES: Final = 4 << 20
"""About what is written, or read back, in one call; no more than an eighth of the queue."""
SPOOL_GATHER_SECONDS: Final = 0.1
"""How long frames gather for the next call while memory is nearly empty."""
SPOOL_RETRY_SECONDS: Final = 5.0
"""How long a full disk is left alone."""

_STORED: Final = "the store has them"

log = logging.getLogger("rewindfs.spool")


class Spooler:
    """One first appliance's spool. `run` does the work; the other methods only say what has changed."""

    def __init__(
        self,
        spool: Spool,
        *,
        on_kept: Callable[[], None],
        on_unsent: Callable[[Compare], None],
        on_lost: Callable[[HistoryLost], None],
    ) -> None:
        """`on_kept`: frames have left memory for the disk. `on_unsent`: a Compare did so before it was sent, so that it
        never will be. `on_lost`: the disk does not give back what it was given. None may wait or raise."""
        self.spool = spool
        self._on_kept = on_kept
        self._on_unsent = on_unsent
        self._on_lost = on_lost
        self._outbox = Outbox(Seq(0))
        self._origin: Origin | None = None
        self._linked: Callable[[], None] | None = None
        """Has the link send; None while there is none."""
        self._down_since = trio.current_time()
        self._outage = False
        self._news = trio.Event()
        self._full_until = 0.0
        self._said_full = False
        self._writing = False
        self._forced = False
        """Whether everything is to go to the disk, whatever the link does."""
        self._written = trio.Event()
        """Set after each call that was to write."""
        self._drops = True

    @property
    def takes_more(self) -> bool:
        """Whether what waits for room will get it from the disk: it is being used, and neither full nor broken."""
        return self._spooling and not self.spool.failed and not self._said_full

    async def begin(self, outbox: Outbox, origin: Origin, welcome: Welcome) -> None:
        """From now on it serves this new queue, of records of this origin. What the spool holds becomes part of it, or
        is discarded where it does not meet what the peer holds. Raises SpoolFailed, HistoryLost."""
        spool = self.spool
        if not spool.empty and (why := _useless(spool, origin, welcome)):
            await discard(spool, why)
        if not spool.empty:
            outbox.found_on_disk(spool.last_seq, max(welcome.durable, Seq(spool.first_seq - 1)))
            outbox.rewind(welcome.held)
        self._outbox, self._origin = outbox, origin

    def link_up(self, wake: Callable[[], None]) -> None:
        """There is a session, and the queue was rewound for it. `wake` has it send what was loaded."""
        self._linked = wake
        self.look()

    def link_down(self) -> None:
        if self._linked is not None:
            self._down_since = trio.current_time()
        self._linked = None
        self.look()

    def outage(self, lasts: bool) -> None:
        """An outage began, or is over."""
        self._outage = lasts
        self.look()

    async def keep_all(self) -> bool:
        """Waits until nothing is in memory only: True; False when it cannot be. `run` is at work meanwhile."""
        self._forced = True
        try:
            while self._outbox.unspooled(1):
                if self.spool.failed or self._said_full or self._origin is None:
                    return False
                self._written = trio.Event()
                self.look()
                with trio.move_on_after(SPOOL_AFTER_SECONDS):  # or the peer keeps them, and there is nothing to write
                    await self._written.wait()
            return True
        finally:
            self._forced = False

    def appended(self) -> None:
        """A frame entered the queue."""
        if self._linked is None or self._outage or self._outbox.unloaded:
            self._news.set()

    def acknowledged(self) -> None:
        """The peer holds or keeps more: frames may be loaded, segments removed."""
        if not self.spool.empty:
            self._news.set()

    def look(self) -> None:
        """Something changed that may give it work."""
        self._news.set()

    async def run(self) -> None:
        """Works until cancelled; a call that is under way is finished first."""
        while True:
            self._news = trio.Event()
            if not await self._step():
                await self._rest()

    async def _rest(self) -> None:
        """Waits for news, or until it is time to use the disk."""
        deadline = self._full_until
        if not self._spooling and self._linked is None:
            deadline = self._down_since + SPOOL_AFTER_SECONDS
        if deadline <= trio.current_time():
            deadline = float("inf")
        with trio.move_on_at(deadline):
            await self._news.wait()

    async def _step(self) -> bool:
        """One piece of work. False: there was none."""
        outbox, spool = self._outbox, self.spool
        if self._drops and spool.can_drop(outbox.kept_seq):
            return await self._drop(outbox.kept_seq)
        if self._linked is not None and outbox.wants(self._round_bytes):
            return await self._load()
        if self._spooling and not spool.failed and trio.current_time() >= self._full_until:
            frames = outbox.unspooled(self._round_bytes)
            if frames and (spool.empty or frames[0].first_seq == spool.last_seq + 1):
                return await self._write(frames)
        return False

    @property
    def _spooling(self) -> bool:
        """Whether what is in memory is to go to the disk."""
        if self._origin is None:
            return False
        if self._linked is None and trio.current_time() >= self._down_since + SPOOL_AFTER_SECONDS:
            return True
        # While what is on the disk is being sent, nothing behind it can be: writers are not to wait for all of that.
        outbox = self._outbox
        return self._outage or self._forced or (outbox.unloaded and 2 * outbox.bytes > outbox.bytes_max)

    @property
    def _round_bytes(self) -> int:
        return min(SPOOL_ROUND_BYTES, self._outbox.bytes_max // 8)

    async def _drop(self, kept: Seq) -> bool:
        try:
            await trio.to_thread.run_sync(self.spool.drop_through, kept)
        except SpoolFailed:
            self._drops = False  # it has said so; what it holds is still read
            return True
        if self.spool.empty:
            log.info("spool %s: everything in it has reached the second appliance", self.spool.directory)
            self._writing = False
        self._said_full, self._full_until = False, 0.0
        return True

    async def _load(self) -> bool:
        outbox, rewinds = self._outbox, self._outbox.rewinds
        wanted = outbox.next_to_load
        try:
            frames = await trio.to_thread.run_sync(self.spool.read, wanted, self._round_bytes)
            if not frames or frames[0].first_seq != wanted:
                at = frames[0].first_seq if frames else self.spool.last_seq
                raise SpoolDamaged(f"{self.spool.directory}: record {wanted} begins nowhere, but {at}")
        except SpoolDamaged as error:
            if outbox.rewinds == rewinds:
                text = f"{error}; the spooled records from {wanted} on cannot be sent"
                lost = HistoryLost(Seq(wanted - 1), Seq(self.spool.last_seq + 1), text)
                self._origin = None
                self._linked = None
                self._on_lost(lost)
                await self._give_up(str(error))
            return True
        # A session that began meanwhile may want others; while one lasts only this task moves that place.
        if outbox.rewinds == rewinds and outbox.next_to_load == wanted and self._linked is not None:
            outbox.load(frames)
            self._linked()
        return True

    async def _give_up(self, why: str) -> None:
        """Empties the spool, so that nobody who begins with it counts as held what it cannot give back: whoever lost it
        would be told so again and again, and never that it has to reconcile."""
        with trio.CancelScope(shield=True):
            try:
                await discard(self.spool, why)
            except SpoolFailed:
                return  # it has said so

    async def _write(self, frames: list[Frame]) -> bool:
        assert self._origin is not None
        if not self._writing:
            self._writing = True
            log.warning("spool %s: records go to the disk until the second appliance is back", self.spool.directory)
        try:
            taken = await trio.to_thread.run_sync(self._append, frames, self._origin)
        except SpoolFailed:
            taken = 0  # it has said so; nobody is to wait for it any more
        else:
            self._note_full(taken < len(frames))
        if taken:
            for frame in self._outbox.spooled(frames[taken - 1].seq):
                if frame.compare is not None:
                    self._on_unsent(frame.compare)
        self._written.set()
        self._on_kept()
        if 8 * self._outbox.bytes < self._outbox.bytes_max and not self._forced:
            await trio.sleep(SPOOL_GATHER_SECONDS)
        return True

    def _note_full(self, full: bool) -> None:
        if full:
            self._full_until = trio.current_time() + SPOOL_RETRY_SECONDS
        if full and not self._said_full:
            spool = self.spool
            log.error(
                "spool %s is full (%d bytes, limit %d): what memory cannot take either meets the outage policy",
                *(spool.directory, spool.bytes, spool.limit),
            )
        self._said_full = full

    def _append(self, frames: list[Frame], origin: Origin) -> int:
        taken = self.spool.append(frames, origin)
        self.spool.sync()
        return taken


def _useless(spool: Spool, origin: Origin, welcome: Welcome) -> str:
    """Why what the spool holds cannot be sent in this session, or need not be; empty when it can."""
    if spool.origin != origin:
        return f"they are for {spool.origin}, not for {origin}"
    if welcome.held + 1 < spool.first_seq:
        return f"the store holds records up to {welcome.held} only"
    if welcome.durable >= spool.last_seq:
        return _STORED
    return ""


async def discard(spool: Spool, why: str) -> None:
    """Removes what the spool holds, and says so. SpoolFailed."""
    what = f"spool {spool.directory}: records {spool.first_seq}..{spool.last_seq} are discarded: {why}"
    log.log(logging.INFO if why == _STORED else logging.WARNING, "%s", what)
    await trio.to_thread.run_sync(spool.discard)


async def drain_older(spool: Spool, hello: Hello, first_of: Callable[[Origin], FirstAppliance]) -> None:
    """Brings what the spool holds of an older epoch to the second appliance, as that epoch, before the one of `hello`
    begins there; or discards it where it does not meet what is there. The spool is empty then. Nothing is done where it
    holds records of `hello`'s own epoch. `first_of` makes a first appliance with this spool.

    Takes as long as it takes, links that break included. Raises what FirstAppliance.start does when there is no link to
    begin with, SpoolFailed, and SpoolError when the records are another group's.
    """
    origin = spool.origin
    if origin is None or (origin.group, origin.agent, origin.epoch) == (hello.group, hello.agent, hello.epoch):
        return
    if origin.group != hello.group:
        raise SpoolError(
            f"{spool.directory}: the spool holds records of group {origin.group!r}, not of {hello.group!r}; "
            "name another directory"
        )
    log.warning(
        "spool %s: records %d..%d of epoch %d go to the second appliance first",
        *(spool.directory, spool.first_seq, spool.last_seq, origin.epoch),
    )
    first = first_of(origin)
    try:
        await first.start()
    except HandshakeRefused as error:
        if error.code not in (ErrorCode.REFUSED, ErrorCode.FENCED):
            raise
        await discard(spool, f"the second appliance refuses them: {error}")
        return
    why = _STORED
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first.run)
        try:
            await first.drain()
        except HistoryLost as error:
            why = str(error)
        nursery.cancel_scope.cancel()
    if not spool.empty:
        await discard(spool, why)

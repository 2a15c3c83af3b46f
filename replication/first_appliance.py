"""The first appliance: takes records from the agent, answers by its mode, forwards them, loses none.

Invariants:
- Records enter in seq order, without a hole, and leave in that order, over any number of connections and modes.
- A record stays in the queue until it is on a disk of the peer's: durable at the second appliance, or spooled at the
  first one in between (`acknowledged-is-kept`). The queue and the open aggregate together never pass `queue_bytes_max`
  by more than one record (`bounded`): whoever appends asked for room, and between `room` returning and `append` there
  is no await.
- What the mode says is said by its policy alone.
- With a spool, what an outage leaves in the queue goes to its disk and comes back from there (see `spooler`). Reading
  back takes memory of its own, a quarter of the queue at most.
- LOST is final: the store's history and the queue no longer meet, and no call waits any more. The agent makes a new
  first appliance in a new epoch and reconciles.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import msgspec
import trio

from dedup.types import Aggregate, Epoch, Record, Seq, VolumeState, Write
from replication.bandwidth import Bandwidth
from replication.errors import HistoryLost, LocalProtocolError, OutageError
from replication.forwarder import Forwarder
from replication.linger import Linger
from replication.messages import PROTOCOL_VERSION, Ack, Compare, Hello, Level, Role, Welcome
from replication.modes import Mode, ModePolicy, Outage, mode_policy
from replication.outage_watch import OUTAGE_AFTER_SECONDS, OutageWatch
from replication.outbox import FRAME_OVERHEAD_BYTES, QUEUE_BYTES_MAX
from replication.progress import Progress
from replication.room import RoomQueue
from replication.spool import Spool
from replication.spool_file import Origin
from replication.spooler import drain_older
from replication.status import FirstApplianceStatus, LinkState
from replication.transport import Connection

log = logging.getLogger("rewindfs.first_appliance")


class FirstAppliance:
    """The near end of replication for one group and one epoch.

    `start` makes the first connection and tells what the store holds; `run`, in a nursery of the caller, forwards and
    reconnects until it is cancelled, or returns once the link is LOST. All calls are made from one trio thread.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        *,
        group: str,
        epoch: Epoch,
        agent: str,
        take_over: bool = False,
        through: bool = False,
        mode: Mode | None = Mode.ASYNC,
        outage: Outage | None = None,
        outage_after: float = OUTAGE_AFTER_SECONDS,
        queue_bytes_max: int = QUEUE_BYTES_MAX,
        offers: bool | None = None,
        bytes_per_second: int = 0,
        spool: Spool | None = None,
        on_change: Callable[[FirstApplianceStatus], None] | None = None,
        on_lost: Callable[[HistoryLost], None] | None = None,
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        """`connect` opens a connection to the second appliance, or (`through`) to a first one on the way there; or it
        raises LinkDown. `epoch` is greater than any used before. `agent` feeds the group, or is to `take_over`.
        `mode` None leaves it to the first appliance that it goes `through`. `outage` None leaves it to the mode.
        `offers`: whether an aggregate is offered before it is sent; None where the link is not a local one.
        `bytes_per_second` is the most that goes over the link; 0 for no limit.
        `spool` is where an outage's records go; the caller opens it before and closes it after `run`. What it holds of
        an older epoch is sent by `start`. `on_change` is called when the link or the outage changes, `on_lost` once,
        `on_progress` after each rise of the levels; none may wait or raise."""
        self._through = through
        self._policy: ModePolicy = mode_policy(mode or Mode.ASYNC, trio.current_time, through=through)
        self._outage_chosen = outage
        self._watch = OutageWatch(
            outage_after, levels=self._levels, needed=self._needs_progress, on_change=self._outage_changed
        )
        self._queue_bytes_max = queue_bytes_max
        self._on_change = on_change
        self._on_lost = on_lost
        self._on_progress = on_progress
        self._progress = Progress()
        self._last_seq = Seq(0)
        self._room = RoomQueue()
        self._aggregate_opened = trio.Event()
        self._linger = Linger()
        self._forwarder = Forwarder(
            self,
            connect,
            Hello(PROTOCOL_VERSION, Role.AGENT, group, epoch, agent, take_over, mode if through else None),
            through=through,
            queue_bytes_max=queue_bytes_max,
            offers=offers,
            bytes_per_second=bytes_per_second,
            spool=spool,
            gather_seconds=self._policy.gather_seconds,
        )
        self._probe: tuple[Seq, float] | None = None
        """A record on its way, and when it set out: what the round trip is measured by."""

    # --- what the agent reads ---

    @property
    def mode(self) -> Mode:
        return self._policy.mode

    @property
    def link(self) -> LinkState:
        return self._forwarder.state

    @property
    def outage(self) -> bool:
        """Whether there was no link, or no progress though someone needs it, for `outage_after`."""
        return self._watch.lasts

    @property
    def outage_policy(self) -> Outage:
        """What writers meet while an outage lasts."""
        return self._policy.outage if self._outage_chosen is None else self._outage_chosen

    @property
    def waits_for_second(self) -> bool:
        """Whether each write waits for the second appliance's word, however long that takes."""
        return self._policy.write_waits_for is not Level.QUEUED and self._policy.patience_seconds is None

    @property
    def last_seq(self) -> Seq:
        """Of the newest record taken; at first what the store held."""
        return self._last_seq

    @property
    def received(self) -> Seq:
        return self._progress.received

    @property
    def durable(self) -> Seq:
        return self._progress.durable

    @property
    def kept(self) -> Seq:
        """Everything up to here is on a disk, of this side's or a peer's."""
        return max(self._forwarder.outbox.kept_seq, self._forwarder.outbox.spooled_seq)

    @property
    def queued_bytes(self) -> int:
        return self._forwarder.outbox.bytes + self._policy.open_bytes

    @property
    def bandwidth(self) -> Bandwidth:
        """What may go over the link; can be changed at any time."""
        return self._forwarder.bandwidth

    @property
    def digest_key(self) -> bytes:
        """Key of this session's Compare digests; another one after each reconnect."""
        return self._forwarder.digest_key

    def status(self) -> FirstApplianceStatus:
        forwarder = self._forwarder
        outbox, traffic, spool = forwarder.outbox, forwarder.traffic, forwarder.spool
        return FirstApplianceStatus(
            link=forwarder.state,
            outage=self._watch.lasts,
            mode=self._policy.mode,
            waits_for=self._policy.write_waits_for,
            last_seq=self._last_seq,
            received=self._progress.received,
            durable=self._progress.durable,
            queued_bytes=self.queued_bytes,
            queued_records=outbox.records + self._policy.open_records,
            oldest_queued=outbox.oldest_time,
            error=forwarder.error,
            written_bytes=traffic.written,
            sent_bytes=traffic.sent,
            saved_bytes=traffic.saved,
            spool_bytes=0 if spool is None else spool.bytes,
            spool_limit=0 if spool is None else spool.limit,
            spool_error="" if spool is None else spool.failed or spool.damage,
        )

    # --- what the agent does ---

    async def start(self) -> tuple[Welcome, list[VolumeState]]:
        """Connects for the first time. What the store holds, or the spool past it, from which the agent numbers on: the
        first record is Welcome.held + 1. Raises LinkDown, ProtocolError or HandshakeRefused; it may be tried again.
        SpoolError where the spool cannot be used."""
        if self._forwarder.spool is not None:
            await drain_older(self._forwarder.spool, self._forwarder.hello, self._older)
        welcome, volumes = await self._forwarder.start()
        self._last_seq = self._forwarder.outbox.last_seq
        self._progress.queue(self._last_seq)
        return msgspec.structs.replace(welcome, held=self._last_seq), volumes

    async def room(self, nbytes: int) -> bool:
        """Waits until the queue can take a record of `nbytes` payload; at once, without a checkpoint, when it can.

        True: append the record now, with no await between. False: the queue is full in an outage and the policy is to
        continue; the record MUST NOT be appended, the agent only marks its region, and begins the records that come
        after with a ReconcileBegin. Raises OutageError in an outage when the policy is to fail, HistoryLost when lost.
        With the policy to block it waits as long as it takes.
        """
        if self.has_room(nbytes):
            return True
        return await self._room.wait(lambda: self._fits(nbytes), self._room_comes)

    def has_room(self, nbytes: int) -> bool:
        """Whether `room` would say True at once, so that a record may be appended in this step. False in an outage."""
        return not self._room and self._forwarder.why_lost is None and not self._watch.lasts and self._fits(nbytes)

    def append(self, record: Record | Compare) -> None:
        """Takes the next record, synchronously; call it right after `room`. The payload must not change from now on.

        Raises LocalProtocolError for a record that does not follow the last one, or that may not be sent; it is not
        taken then. Raises HistoryLost when lost.
        """
        self.check_lost()
        first_seq = record.first_seq if isinstance(record, Aggregate) else record.seq
        if first_seq != self._last_seq + 1:
            raise LocalProtocolError(f"record {first_seq} does not follow {self._last_seq}")
        if isinstance(record, Compare):
            record = self._forwarder.expect(record)
        policy = self._policy
        frames = policy.add(record)
        self._last_seq = record.seq
        if isinstance(record, Write):
            self._forwarder.traffic.written += record.extent.length
        if not self._through:
            self._progress.queue(record.seq)
        if self._probe is None and policy.observes:
            self._probe = record.seq, trio.current_time()
        for frame in frames:
            self._forwarder.push(frame)
        if policy.closes_at is not None and not self._aggregate_opened.is_set():
            self._aggregate_opened.set()

    def is_acknowledged(self, seq: Seq) -> bool:
        """Whether `acknowledged` would say True at once."""
        return self._progress.has_reached(seq, self._policy.write_waits_for)

    async def acknowledged(self, seq: Seq) -> bool:
        """Returns when the mode lets the write `seq` return: True. False: an outage lasts and the policy is to
        continue; the record stays queued. Raises OutageError (to fail; the record stays queued too, so the agent
        corrects it) or HistoryLost. No checkpoint when there is nothing to wait for."""
        policy = self._policy
        level, patience = policy.write_waits_for, policy.patience_seconds
        if not self._progress.has_reached(seq, level):
            self._forwarder.hear_soon()
        if patience is None:
            return await self._reached(seq, level)
        with trio.move_on_after(patience):
            return await self._reached(seq, level)
        # It takes longer, who knows how long: the double brings the mean above the limit, if that goes on.
        self._observe(policy, 2 * patience)
        return await self._reached(seq, Level.QUEUED)

    def flush_soon(self, seq: Seq) -> None:
        """Has what `flushed` waits for come soon; waits for nothing."""
        self.hurry(seq, self._policy.flush_waits_for)

    async def flushed(self, seq: Seq) -> bool:
        """Like `acknowledged`, for the flush record of an fsync."""
        level = self._policy.flush_waits_for
        # On the spot, for a moment: where the second appliance is near, the loop's next turn would be later than that.
        self._linger.until(lambda: self._progress.has_reached(seq, level))
        return await self._reached(seq, level)

    async def reached(self, seq: Seq, level: Level, *, hurry: bool = True) -> None:
        """Waits until `seq` has reached the level, whatever the mode and through any outage. `hurry` closes the
        aggregate that holds it, and asks for a sync if need be; else it comes with time. Raises HistoryLost."""
        if self._progress.has_reached(seq, level):
            return
        self.check_lost()
        if hurry:
            self.hurry(seq, level)
        await self._progress.wait(seq, level, releasable=False)

    async def compared(self, seq: Seq) -> bytes:
        """CompareResult.differing of the Compare `seq`. Raises LinkReset when the link went down before the answer
        came, or the Compare was appended without a link; HistoryLost. One task asks, once."""
        return await self._forwarder.questions.compared(seq)

    async def request(self, command: str, body: dict[str, object]) -> dict[str, object]:
        """Runs a command at the second appliance. It may overtake queued records: wait with `reached` for those it
        concerns. Raises RequestRefused with its error, LinkDown without a link, LinkReset when the link broke before
        the answer: whether it ran is unknown then. Cancelled, it may still run."""
        self.check_lost()
        return await self._forwarder.ask(command, body)

    def switch_mode(self, mode: Mode) -> None:
        """From now on the other mode. What is open goes out first, so order holds; a write that waits keeps waiting
        for what it was promised."""
        self._close_aggregate()
        self._policy = mode_policy(mode, trio.current_time, through=self._through)
        self._forwarder.mode_changed(mode if self._through else None, self._policy.gather_seconds)
        self._settle_waiters()

    async def drain(self) -> None:
        """Waits until everything taken so far is durable at the second appliance; the caller sets a limit of time.
        Raises HistoryLost."""
        await self.reached(self._last_seq, Level.DURABLE)

    async def keep_all(self) -> bool:
        """For a clean end in an outage, while `run` is at work: waits until everything taken so far is in the spool, or
        kept by the peer; the caller sets a limit of time. False, at once, where it cannot be."""
        self._close_aggregate()
        return await self._forwarder.keep_all()

    async def run(self) -> None:
        """Forwards, reconnects, watches for outages. Returns once the link is LOST; else until cancelled, which closes
        the connection and leaves what is queued unsent."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch.run)
            nursery.start_soon(self._close_aggregates_in_time)
            await self._forwarder.run()
            nursery.cancel_scope.cancel()

    # --- queue ---

    def _fits(self, nbytes: int) -> bool:
        queued = self._forwarder.outbox.bytes + self._policy.open_bytes
        return not queued or queued + nbytes + FRAME_OVERHEAD_BYTES <= self._queue_bytes_max

    def _close_aggregate(self) -> None:
        for frame in self._policy.close():
            self._forwarder.push(frame)

    async def _close_aggregates_in_time(self) -> None:
        while True:
            closes_at = self._policy.closes_at
            if closes_at is None:
                self._aggregate_opened = trio.Event()
                await self._aggregate_opened.wait()
                continue
            await trio.sleep_until(closes_at)
            if self._policy.closes_at is not None and self._policy.closes_at <= trio.current_time():
                self._close_aggregate()

    # --- levels and outages ---

    async def _reached(self, seq: Seq, level: Level) -> bool:
        if self._progress.has_reached(seq, level):
            return True
        self.check_lost()
        if not self._goes_on():
            return False
        self.hurry(seq, level)
        # Released without an outage: the policy has changed its mind, and what is held here will do.
        return await self._progress.wait(seq, level, releasable=True) or not self._watch.lasts

    def hurry(self, seq: Seq, level: Level) -> None:
        """Has `seq` reach the level sooner than it would by itself; waits for nothing."""
        if seq > self._forwarder.outbox.last_seq:
            self._close_aggregate()
        if level is Level.DURABLE:
            self._forwarder.ask_for_sync(min(seq, self._last_seq))

    def _goes_on(self) -> bool:
        """Whether a writer has reason to wait. Raises what the policy, or the loss, has it meet instead."""
        self.check_lost()
        if self._watch.lasts and self.outage_policy is Outage.FAIL:
            raise self._outage_error()
        return not (self._watch.lasts and self.outage_policy is Outage.CONTINUE)

    def _room_comes(self) -> bool:
        """As `_goes_on`, for who waits for room; a spool that takes the queue makes some, outage or not."""
        return self._goes_on() or self._forwarder.spools_more

    def check_lost(self) -> None:
        """Raises HistoryLost when lost."""
        if self._forwarder.why_lost is not None:
            raise self._forwarder.why_lost

    def _outage_error(self) -> OutageError:
        why = self._forwarder.error or "the link stands"
        return OutageError(f"no progress at the second appliance for {self._watch.after:g} s: {why}")

    def _needs_progress(self) -> bool:
        """Whether time without progress counts as an outage."""
        return (
            self._forwarder.state is not LinkState.CONNECTED
            or self._forwarder.outbox.unheld
            or self._progress.waiting
            or bool(self._room)
        )

    def _levels(self) -> tuple[Seq, ...]:
        """What progress is seen by: where writes wait for a first appliance's word only, that too."""
        own = self._through and self._policy.write_waits_for is Level.QUEUED
        return (self.received, self.durable, self._progress.queued if own else Seq(0))

    def _outage_changed(self) -> None:
        if self._watch.lasts:
            log.warning("policy: %s", self.outage_policy.value)
        self._forwarder.outage(self._watch.lasts)
        self._settle_waiters()
        self._changed()

    def _observe(self, policy: ModePolicy, seconds: float) -> None:
        """Has the policy know of a round trip; whoever waits for what it does not ask for any more goes on."""
        if not policy.observe(seconds):
            return
        log.info("a round trip takes %.1f ms: writes wait for %s", seconds * 1e3, policy.write_waits_for.name)
        if policy.write_waits_for is Level.QUEUED:
            self._progress.release(None)

    def _settle_waiters(self) -> None:
        """Gives everyone who waits what the outage policy says."""
        if self._watch.lasts:
            policy = self.outage_policy
            if policy is not Outage.BLOCK:
                self._progress.release(self._outage_error() if policy is Outage.FAIL else None)
        self._room.ask_all()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self.status())

    def _older(self, origin: Origin) -> FirstAppliance:
        """What sends the records of an older epoch."""
        forwarder = self._forwarder
        return FirstAppliance(
            forwarder.connect,
            group=origin.group,
            epoch=origin.epoch,
            agent=origin.agent,
            through=self._through,
            mode=None,
            queue_bytes_max=self._queue_bytes_max,
            bytes_per_second=forwarder.bandwidth.bytes_per_second,
            spool=forwarder.spool,
        )

    # --- what the forwarder tells ---

    def greeted(self, welcome: Welcome) -> None:
        """What the peer of a new session says it has; what the second appliance has behind a first one follows."""
        self._progress.queue(welcome.held)
        self._progress.advance(welcome.durable if self._through else welcome.held, welcome.durable)
        if welcome.mode is not None and welcome.mode is not self._policy.mode:
            # The mode was left to the peer. Nothing is open: towards a first appliance each record is a frame.
            self._policy = mode_policy(welcome.mode, trio.current_time, through=True)
            self._settle_waiters()
        if self._on_progress is not None:
            self._on_progress()

    def connected(self) -> None:
        """A session stands."""
        if self._progress.waiting:
            self._forwarder.ask_for_sync(self._forwarder.outbox.last_seq)

    def link_changed(self) -> None:
        """The link's state, or why it is not connected."""
        if self._forwarder.state is not LinkState.CONNECTED:
            self._probe = None
        elif not self._needs_progress():
            self._watch.set(False)
        self._changed()

    def acknowledged_by_peer(self, ack: Ack, room: bool) -> None:
        """The peer said how far the records are; `room` was made by that."""
        self._progress.queue(ack.queued)
        if self._probe is not None and self._probe[0] <= ack.received:
            self._observe(self._policy, trio.current_time() - self._probe[1])
            self._probe = None
        if self._progress.advance(ack.received, ack.durable):
            self._forwarder.went_on()
            if self._watch.lasts:
                self._watch.set(False)
        if room:
            self._room.offer()
        if self._on_progress is not None:
            self._on_progress()

    def spooled(self) -> None:
        """Frames have left memory for the disk, or cannot any more."""
        self._room.ask_all()
        if self._on_progress is not None:
            self._on_progress()

    def room_made(self) -> None:
        """Frames have left memory."""
        self._room.offer()

    def lost(self, error: HistoryLost) -> None:
        """The store's history and the queue no longer meet."""
        log.error("ordered replication of epoch %d is over: %s", self._forwarder.hello.epoch, error)
        self._progress.fail(error)  # compares and requests failed with the link
        self._settle_waiters()
        if self._on_lost is not None:
            self._on_lost(error)

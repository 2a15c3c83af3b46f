"""What a first appliance on a host of its own keeps for one agent: the queue to the second appliance, and who feeds it.

Invariants:
- The records go on with the agent's own group, epoch and seqs, in their order, over any number of its connections: a
  Relay outlives them (`acknowledged-is-kept`).
- At most one session feeds it.
- Comparisons under way at the second appliance are bounded over all those sessions.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from dedup.types import Heartbeat, Seq, VolumeState
from replication.errors import Fenced, HistoryLost, LinkReset
from replication.first_appliance import FirstAppliance
from replication.forwarding import Forwarding
from replication.messages import Ack, Compare, CompareResult, ErrorCode, Hello, Level, Welcome
from replication.modes import Mode, Outage
from replication.outbox import QUEUE_BYTES_MAX
from replication.session import COMPARES_OPEN_MAX
from replication.spool import Spool
from replication.status import FirstApplianceStatus, LinkState
from replication.transport import Connection

log = logging.getLogger("rewindfs.first_service")

UPSTREAM_SECONDS: Final = 6.0
"""How long the second appliance may take to greet: less than an agent waits for its own Welcome."""


Connect = Callable[[], Awaitable[Connection]]
"""Opens a connection to the second appliance, or raises LinkDown."""


class Feeder(Protocol):
    """The session whose records a relay takes."""

    ended: trio.Event

    def end(self, code: ErrorCode, text: str) -> None:
        """End it, with this Failure."""

    def levels_rose(self) -> None:
        """There may be something to acknowledge. May not wait or raise."""

    def compared(self, seq: Seq, result: CompareResult | None) -> None:
        """The answer to its Compare; None when it was not made."""


class Relay:
    """One agent's records in one epoch, on their way. `start`, then `run` in a nursery of the caller's."""

    def __init__(
        self,
        connect: Connect,
        hello: Hello,
        mode: Mode,
        *,
        bytes_max: int = QUEUE_BYTES_MAX,
        forwarding: Forwarding = Forwarding(),  # noqa: B008
        spool: Spool | None = None,
    ) -> None:
        """`mode` is for a Hello that leaves it to this side. No other relay uses the `spool` meanwhile."""
        self.group = hello.group
        self.agent = hello.agent
        self.epoch = hello.epoch
        self.feeder: Feeder | None = None
        self.idle_since = trio.current_time()
        """When the last feeder left."""
        self.leaves_by: float | None = None
        """When a newer epoch of the agent gives up to wait for what is left of this one."""
        self.lost: HistoryLost | None = None
        self.ended = trio.Event()
        """Set when nothing more of it goes out."""
        self.first = FirstAppliance(
            connect,
            group=hello.group,
            epoch=hello.epoch,
            agent=hello.agent,
            take_over=hello.take_over,
            mode=hello.mode or mode,
            outage=Outage.BLOCK,
            queue_bytes_max=bytes_max,
            bytes_per_second=forwarding.bytes_per_second,
            offers=forwarding.offers,
            spool=spool,
            on_change=self._on_change,
            on_lost=self._on_lost,
            on_progress=self._on_progress,
        )
        self.down_since: float | None = None
        """Since when there is no link to the second appliance; None while there is one."""
        self._scope = trio.CancelScope()
        self._welcome: Welcome | None = None
        self._volumes: list[VolumeState] = []
        self._compares = 0
        """Comparisons whose answer is not there yet."""
        self._tasks: trio.Nursery | None = None
        self._sync_wanted = Seq(0)
        self._syncing = False

    async def start(self) -> None:
        """Greets the second appliance, which gets what the spool holds of an older epoch first. Raises LinkDown,
        ProtocolError, HandshakeRefused or SpoolError; it may be tried again."""
        self._welcome, self._volumes = await self.first.start()

    async def run(self) -> None:
        """Forwards until `close`, or until the history is lost."""
        try:
            with self._scope:
                async with trio.open_nursery() as self._tasks:
                    await self.first.run()
                    self._tasks.cancel_scope.cancel()
        finally:
            self._tasks = None
            self.ended.set()

    def close(self) -> None:
        """Have `run` end; what is queued is not sent any more."""
        self._scope.cancel()

    @property
    def leaving(self) -> bool:
        """Whether `close` was called: nobody may feed it any more."""
        return self._scope.cancel_called

    @property
    def settled(self) -> bool:
        """Whether everything taken is durable at the second appliance."""
        return self.first.durable == self.first.last_seq

    def welcome(self) -> tuple[Welcome, list[VolumeState]]:
        """What to tell the agent on a new connection. It looks at the volumes only where it has not sent anything."""
        assert self._welcome is not None, "start has returned"
        first, greeted = self.first, self._welcome
        if first.last_seq != greeted.held:
            self._volumes = []
        welcome = Welcome(
            version=greeted.version,
            store=greeted.store,
            epoch=greeted.epoch,
            held=first.last_seq,
            durable=first.durable,
            time=greeted.time,
            run=greeted.run,
            has_base=greeted.has_base,
            reconciling=greeted.reconciling,
            next_volume=greeted.next_volume,
            digest_key=first.digest_key,
            mode=first.mode,
        )
        return welcome, self._volumes

    def levels(self) -> Ack:
        """How far the records have come, as the agent is told."""
        first = self.first
        # A new session's Welcome raises `durable` first, and what it lets go of a moment later.
        kept = max(first.kept, first.durable)
        return Ack(queued=first.last_seq, kept=kept, received=first.received, durable=first.durable)

    def feed(self, feeder: Feeder) -> None:
        """From now on the records come from there."""
        assert self.feeder is None, "one feeds at a time"
        self.feeder = feeder

    def release(self, feeder: Feeder) -> None:
        """That session has ended."""
        if self.feeder is feeder:
            self.feeder = None
            self.idle_since = trio.current_time()

    def sync(self) -> None:
        """Asks for DURABLE of everything taken so far. Waits for nothing."""
        self._sync_wanted = self.first.last_seq
        if self.first.durable >= self._sync_wanted or self._tasks is None:
            return
        self.first.hurry(self._sync_wanted, Level.DURABLE)
        if not self._syncing:
            self._syncing = True
            self._tasks.start_soon(self._await_sync)

    def compare(self, compare: Compare) -> None:
        """Takes the Compare, after `room`; `feeder.compared` brings the answer. Raises HistoryLost."""
        if self._compares >= COMPARES_OPEN_MAX or self._tasks is None:
            # Those of a session before this one are still open: it is asked again.
            self.first.append(Heartbeat(compare.seq, compare.time, compare.run))
            self._tell(self.feeder, compare.seq, None)
            return
        self.first.append(compare)
        self._compares += 1
        self._tasks.start_soon(self._await_result, compare.seq, self.feeder)

    async def _await_result(self, seq: Seq, asker: Feeder | None) -> None:
        try:
            result = CompareResult(seq, await self.first.compared(seq))
        except LinkReset:
            self._tell(asker, seq, None)
        except HistoryLost:
            pass  # `_on_lost` ends the session
        else:
            self._tell(asker, seq, result)
        finally:
            self._compares -= 1

    def _tell(self, asker: Feeder | None, seq: Seq, result: CompareResult | None) -> None:
        if asker is not None and self.feeder is asker:
            asker.compared(seq, result)

    async def _await_sync(self) -> None:
        try:
            while (wanted := self._sync_wanted) > self.first.durable:
                await self.first.reached(wanted, Level.DURABLE)
        except HistoryLost:
            pass  # `_on_lost` ends the session
        finally:
            self._syncing = False

    def _on_change(self, status: FirstApplianceStatus) -> None:
        if status.link is LinkState.CONNECTED:
            self.down_since = None
        elif self.down_since is None:
            self.down_since = trio.current_time()

    def _on_progress(self) -> None:
        if self.feeder is not None:
            self.feeder.levels_rose()

    def _on_lost(self, error: HistoryLost) -> None:
        """What was kept is of no use any more. The agent is told, or finds out what the second appliance holds when it
        connects again, and decides as if it had spoken with that one itself."""
        self.lost = error
        if self.feeder is not None:
            code = ErrorCode.FENCED if isinstance(error, Fenced) else ErrorCode.UNAVAILABLE
            self.feeder.end(code, str(error))

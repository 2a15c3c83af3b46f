"""A first appliance as a service: agents' records on their way to the second appliance, each agent with its own queue.

Invariants:
- one-writer: a group has one Relay, and that one feeder. Who may feed a group is for the second appliance to say; while
  it has not said so to a newcomer, whoever feeds the group goes on.
- A Relay is given up only when all it took is durable, when its history is lost, when another agent has taken the group
  over, or when a newer start of its own agent has waited for it in vain, which reconciles what is marked.
- A group's spool is used by one Relay at a time: the next one is made when that has ended.
- bounded: sessions, groups, and the bytes of each queue have limits.

An agent that connects again, in its epoch, goes on with its Relay, without the second appliance. One that comes in a
newer epoch waits until the records of the older one are through, for they precede its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from dedup.errors import UnknownFormat
from replication.errors import HandshakeRefused, HistoryLost, LinkDown, ProtocolError, SpoolError
from replication.forwarding import Forwarding
from replication.messages import PROTOCOL_VERSION, ErrorCode, Hello, Role
from replication.modes import Mode
from replication.open_sessions import SESSIONS_MAX, OpenSessions, accept_until
from replication.outbox import QUEUE_BYTES_MAX
from replication.permissions import NotAllowed, check_peer
from replication.refused import Refused
from replication.relay import UPSTREAM_SECONDS, Connect, Relay
from replication.relay_control import relay_control
from replication.relay_session import RelaySession
from replication.server_end import ServerEnd
from replication.spool import Spool
from replication.spooler import discard
from replication.status import LinkState
from replication.transport import Connection, Listener

log = logging.getLogger("rewindfs.first_service")

GROUPS_MAX: Final = 64
"""Most groups whose records are kept at a time; times the bytes of a queue, that is what memory they take."""
SAME_EPOCH_SECONDS: Final = 5.0
"""How long an agent that connects again waits for its connection before to be seen to have ended."""
OLDER_EPOCH_SECONDS: Final = 3.0
"""How long a newer epoch waits, each time it asks, for the records of the older one."""
DISCARD_SECONDS: Final = 60.0
"""How long it asks again, while they do not get through, before they are discarded."""
IDLE_SECONDS: Final = 60.0
"""How long a Relay that has nothing to do is kept for its agent."""
TAKE_UP_SECONDS: Final = 2.0
"""Between two attempts to forward what a spool holds whose agent has not come."""
LEAVING: Final = "this first appliance is leaving; connect again later"
DRAIN_SECONDS: Final = 10.0
"""How long `stop` waits until what was taken is durable, and then until it is in the spool."""


@dataclass(slots=True)
class _Seat:
    """One group's place. Whoever admits an agent to it holds the lock."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    relay: Relay | None = None
    spool: Spool | None = None
    """Open as long as anybody needs the seat."""
    taken_up: bool = False
    """Whether what the spool holds is being forwarded without its agent, or tried to be."""
    users: int = 0
    """Who needs it: sessions that are admitted or wait for it, a relay that runs."""


class FirstService:
    """Serves agents, and passes on the commands of others."""

    def __init__(
        self,
        connect: Connect,
        *,
        mode: Mode = Mode.ASYNC,
        queue_bytes_max: int = QUEUE_BYTES_MAX,
        forwarding: Forwarding = Forwarding(),  # noqa: B008
        sessions_max: int = SESSIONS_MAX,
    ) -> None:
        """`connect` opens a connection to the second appliance. `mode` is for agents that leave it to this side,
        `queue_bytes_max` for each group."""
        self.connect = connect
        self._mode = mode
        self._queue_bytes_max = queue_bytes_max
        self._forwarding = forwarding
        self._spools = forwarding.spools
        self._ends: OpenSessions[ServerEnd] = OpenSessions(sessions_max)
        self._seats: dict[str, _Seat] = {}
        self._relays: trio.Nursery | None = None
        self._stop = trio.Event()

    def stop(self) -> None:
        """Have `serve` take nothing more, make durable what it has taken if it can, and return."""
        self._stop.set()

    def relays(self) -> list[Relay]:
        """Those that there are now."""
        return [seat.relay for seat in self._seats.values() if seat.relay is not None]

    async def serve(
        self, listeners: Sequence[Listener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serves until `stop`; closes the listeners. What a spool holds goes on at once, without waiting for its agent.
        Raises SpoolError where the spools cannot be used."""
        left_behind = [] if self._spools is None else await self._spools.groups()
        async with trio.open_nursery() as self._relays:
            self._relays.start_soon(self._close_idle)
            for group in left_behind:
                self._relays.start_soon(self._take_up, group)
            async with trio.open_nursery() as sessions:
                await accept_until(self._stop, listeners, sessions, self.serve_connection, task_status)
                for end in self._ends:
                    end.end(ErrorCode.UNAVAILABLE, LEAVING)
                await self._ends.all_left()
                sessions.cancel_scope.cancel()
            await self._drain()
            self._relays.cancel_scope.cancel()

    async def serve_connection(self, connection: Connection) -> None:
        """One session, from Hello to its end; closes the connection. Raises nothing of the peer's making."""
        end = ServerEnd(connection)
        self._ends.came(end)
        if self._stop.is_set():
            end.end(ErrorCode.UNAVAILABLE, LEAVING)
        try:
            await end.run(lambda: self._converse(end))
        finally:
            self._ends.left(end)

    # --- who is let in ---

    async def _converse(self, end: ServerEnd) -> None:
        hello = await end.hello()
        if hello is None:
            return
        try:
            check_peer(end.connection.peer, hello.role, hello.group)
        except NotAllowed as error:
            raise Refused(str(error)) from error
        self._ends.greeted(end)
        if hello.role is Role.AGENT:
            await self._serve_agent(end, hello)
        else:
            await relay_control(end, hello, self.connect)

    async def _serve_agent(self, end: ServerEnd, hello: Hello) -> None:
        seat = self._take_seat(hello.group)
        try:
            async with seat.lock:
                try:
                    relay = await self._admit(seat, hello)
                except Refused:
                    self._see_to_spool(hello.group, seat)
                    raise
                session = RelaySession(end, relay)
                relay.feed(session)
            await session.run()
        finally:
            self._leave_seat(hello.group, seat)

    def _take_seat(self, group: str) -> _Seat:
        """The group's seat; `_leave_seat` once. Raises Refused where there are too many."""
        seat = self._seat_or_none(group)
        if seat is None:
            raise Refused(f"{GROUPS_MAX} groups are served here already; use another first appliance")
        return seat

    def _seat_or_none(self, group: str) -> _Seat | None:
        seat = self._seats.get(group)
        if seat is None:
            if len(self._seats) >= GROUPS_MAX:
                return None
            seat = self._seats[group] = _Seat()
        seat.users += 1
        return seat

    def _leave_seat(self, group: str, seat: _Seat) -> None:
        seat.users -= 1
        if not seat.users:
            del self._seats[group]
            if seat.spool is not None:
                seat.spool.close()

    async def _admit(self, seat: _Seat, hello: Hello) -> Relay:
        """The relay that the agent may feed: nobody feeds it now. Raises Refused."""
        relay = seat.relay
        if relay is not None and relay.agent == hello.agent:
            if hello.epoch < relay.epoch:
                raise Refused(f"epoch {hello.epoch} of group {hello.group!r} is over: epoch {relay.epoch} has begun")
            if hello.epoch > relay.epoch:
                await self._end_older(relay, hello)
            elif await self._goes_on(relay, hello):
                return relay
        elif relay is not None:
            await self._take_over(relay, hello)
        return await self._begin(seat, hello)

    async def _goes_on(self, relay: Relay, hello: Hello) -> bool:
        """Whether the agent, connecting again, can go on with its relay. Raises Refused."""
        if relay.feeder is not None:
            with trio.move_on_after(SAME_EPOCH_SECONDS):
                await relay.feeder.ended.wait()
        if relay.feeder is not None:
            text = f"another agent of epoch {hello.epoch} feeds group {hello.group!r}; unmount that one first"
            raise Refused(text)
        if relay.lost is not None or relay.leaving:
            return False
        if hello.mode is not None and hello.mode is not relay.first.mode:
            relay.first.switch_mode(hello.mode)
        return True

    async def _begin(self, seat: _Seat, hello: Hello) -> Relay:
        """A new relay, whose agent the second appliance has taken in. Raises Refused."""
        assert self._relays is not None, "serve runs"
        if seat.relay is not None:
            await seat.relay.ended.wait()
        if self._spools is not None and seat.spool is None:
            try:
                seat.spool = await self._spools.open(hello.group)
            except (SpoolError, UnknownFormat) as error:
                raise Refused(str(error), ErrorCode.UNAVAILABLE) from error
        seat.relay = relay = await self._greeted(hello, seat.spool)
        seat.users += 1
        self._relays.start_soon(self._run, seat, relay)
        return relay

    async def _greeted(self, hello: Hello, spool: Spool | None) -> Relay:
        relay = Relay(
            self.connect, hello, self._mode, bytes_max=self._queue_bytes_max, forwarding=self._forwarding, spool=spool
        )
        try:
            with trio.fail_after(UPSTREAM_SECONDS):
                await relay.start()
        except HandshakeRefused as error:
            raise Refused(str(error), error.code) from error
        except trio.TooSlowError as error:
            text = f"the second appliance does not answer within {UPSTREAM_SECONDS:g} s"
            raise Refused(text, ErrorCode.UNAVAILABLE) from error
        except (LinkDown, ProtocolError) as error:
            text = f"the first appliance cannot reach the second one: {error}"
            raise Refused(text, ErrorCode.UNAVAILABLE) from error
        except SpoolError as error:
            raise Refused(str(error), ErrorCode.UNAVAILABLE) from error
        return relay

    async def _take_over(self, relay: Relay, hello: Hello) -> None:
        """Ends another agent's relay, once the second appliance has said that the newcomer feeds the group. Raises
        Refused."""
        probe = await self._greeted(hello, None)
        probe.close()
        await probe.run()  # closes the connection
        if relay.feeder is not None:
            relay.feeder.end(ErrorCode.FENCED, f"another agent feeds group {hello.group!r} now")
        relay.close()

    async def _end_older(self, relay: Relay, hello: Hello) -> None:
        """Sees that what is left of the agent's older epoch is durable, or is no more. Raises Refused."""
        if relay.feeder is not None:
            relay.feeder.end(ErrorCode.REFUSED, f"a newer start of the agent, epoch {hello.epoch}, feeds the group")
            await relay.feeder.ended.wait()
        with trio.move_on_after(OLDER_EPOCH_SECONDS):
            try:
                await relay.first.drain()
            except HistoryLost as error:
                log.warning("group %r: %s", hello.group, error)
        status = relay.first.status()
        if not relay.settled and relay.lost is None:
            left = f"{status.queued_records} records of the agent's start before"
            if status.link is not LinkState.CONNECTED:
                text = f"{left} are kept here, and the second appliance cannot be reached: {status.error}"
                raise Refused(text, ErrorCode.UNAVAILABLE)
            now = trio.current_time()
            relay.leaves_by = relay.leaves_by or now + DISCARD_SECONDS
            if now < relay.leaves_by:
                raise Refused(f"{left} are on their way to the second appliance; try again", ErrorCode.UNAVAILABLE)
            with trio.move_on_after(OLDER_EPOCH_SECONDS):
                await relay.first.keep_all()
            log.warning("group %r: %s were not sent in time; those in no spool are discarded", hello.group, left)
        relay.close()
        await relay.ended.wait()

    # --- what there is ---

    async def _run(self, seat: _Seat, relay: Relay) -> None:
        log.info("group %r: records of epoch %d go on from %d", relay.group, relay.epoch, relay.first.last_seq + 1)
        try:
            await relay.run()
        finally:
            if seat.relay is relay:
                seat.relay = None
            self._leave_seat(relay.group, seat)

    async def _take_up(self, group: str) -> None:
        """Forwards what the group's spool holds, as the agent it is of, until there is a relay that does.

        Raises SpoolError."""
        assert self._spools is not None, "there is a spool"
        said = ""
        while (seat := self._seat_or_none(group)) is None:
            if not said:
                log.warning(
                    said := f"group {group!r}: what may be spooled waits: {GROUPS_MAX} groups are served already"
                )
            await trio.sleep(TAKE_UP_SECONDS)
        if seat.taken_up:
            self._leave_seat(group, seat)
            return
        seat.taken_up = True
        try:
            while True:
                async with seat.lock:
                    if seat.relay is not None:
                        return
                    seat.spool = seat.spool or await self._spools.open(group)
                    if (origin := seat.spool.origin) is None:
                        return
                    try:
                        await self._begin(seat, Hello(PROTOCOL_VERSION, Role.AGENT, group, origin.epoch, origin.agent))
                    except Refused as error:
                        if error.code is ErrorCode.FENCED:
                            await discard(seat.spool, str(error))  # for good: no agent can bring it there any more
                            return
                        if said != (said := str(error)):
                            log.warning("group %r: what is spooled waits: %s", group, error)
                await trio.sleep(TAKE_UP_SECONDS)
        finally:
            seat.taken_up = False
            self._leave_seat(group, seat)

    def _see_to_spool(self, group: str, seat: _Seat) -> None:
        """After an agent was sent away: what it, or one before it, left in the spool goes on meanwhile. It may be far
        more than gets through while an agent waits for its Welcome."""
        if seat.relay is None and seat.spool is not None and not seat.spool.empty and self._relays is not None:
            self._relays.start_soon(self._take_up, group)

    async def _close_idle(self) -> None:
        while True:
            await trio.sleep(IDLE_SECONDS / 4)
            past = trio.current_time() - IDLE_SECONDS
            for relay in self.relays():
                if relay.feeder is None and relay.settled and relay.idle_since < past:
                    log.info("group %r: nothing to do for %g s", relay.group, IDLE_SECONDS)
                    relay.close()

    async def _drain(self) -> None:
        with trio.move_on_after(DRAIN_SECONDS):
            async with trio.open_nursery() as nursery:
                for relay in self.relays():
                    nursery.start_soon(_drain, relay)
        with trio.move_on_after(DRAIN_SECONDS):
            for relay in self.relays():
                if not relay.settled and not await relay.first.keep_all():
                    log.warning(
                        "group %r: %d records are in no spool, and not durable at the second appliance; the agent has "
                        "them, or reconciles what is marked",
                        relay.group,
                        relay.first.status().queued_records,
                    )


async def _drain(relay: Relay) -> None:
    try:
        await relay.first.drain()
    except HistoryLost as error:
        log.warning("group %r: %s", relay.group, error)

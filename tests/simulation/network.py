"""Links of the simulation: bytes arrive late, in pieces, in order; or not at all.

Invariants:
- what one end sent arrives at the other in order, once, up to the instant where the connection breaks (as TCP has it);
- a sender is held up once WINDOW_BYTES are on their way;
- an end learns of a break by itself, late: the two ends do not agree on what arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf

import trio

from replication.errors import LinkDown
from replication.transport import Connection
from replication.wire import Buffer
from tests.simulation.chance import Chance
from tests.simulation.process import Process, current_process
from tests.simulation.trace import Trace

WINDOW_BYTES = 96 << 10


class _Pipe:
    """One direction of a connection."""

    def __init__(self, line: Line, name: str) -> None:
        self.line = line
        self.name = name
        self.changed = trio.Event()
        self.bytes = 0
        """Sent and not read."""
        self.ended = False
        """Nothing follows what is on its way."""
        self.broken_at = inf
        """From then on its reader, and its writer, meet a reset."""
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._last_arrival = 0.0

    def tell(self) -> None:
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    def put(self, data: bytes) -> None:
        chance = self.line.chance
        while data:
            part = chance.number(1, len(data)) if len(data) > 1 and chance.happens(0.2) else len(data)
            arrival = max(self._last_arrival, trio.current_time() + self.line.delay())
            self._last_arrival = arrival
            self._pieces.append((arrival, data[:part]))
            self.bytes += part
            data = data[part:]
        self.tell()

    def take(self) -> bytes | None:
        """What has arrived; None while nothing has; b"" at the end."""
        now = trio.current_time()
        if now >= self.broken_at:
            raise LinkDown("the link to the peer broke: reset")
        if self.line.holds(self.name):
            return None
        taken: list[bytes] = []
        while self._pieces and self._pieces[0][0] <= now:
            taken.append(self._pieces.popleft()[1])
            if self.line.chance.happens(0.5):
                break
        if taken:
            data = b"".join(taken)
            self.bytes -= len(data)
            self.tell()
            return data
        return b"" if self.ended and not self._pieces else None

    @property
    def next_time(self) -> float:
        """When something happens by itself."""
        arrival = self._pieces[0][0] if self._pieces and not self.line.holds(self.name) else inf
        return min(arrival, self.broken_at)

    def break_at(self, time: float) -> None:
        self.broken_at = min(self.broken_at, time)
        self.tell()


class SimulatedConnection(Connection):
    """One end. Belongs to a process, whose death ends it."""

    def __init__(self, inward: _Pipe, outward: _Pipe, line: Line) -> None:
        self._inward = inward
        self._outward = outward
        self._line = line
        self._owner: Process | None = None
        self._sending = self._receiving = self._closed = False

    def belongs_to(self, process: Process) -> None:
        self._owner = process
        process.owns(self)

    async def send(self, buffers: Sequence[Buffer]) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this connection")
        self._sending = True
        try:
            data = b"".join(buffers)
            while data:
                taken = self._put(data)
                data = data[taken:]
                if data:
                    await self._wait(self._outward, self._outward.broken_at)
        finally:
            self._sending = False

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        if self._sending or self._line.chance.happens(0.1):
            return 0
        return self._put(b"".join(buffers))

    def _put(self, data: bytes) -> int:
        self._check(self._outward)
        taken = min(len(data), max(0, WINDOW_BYTES - self._outward.bytes))
        if taken > 1 and self._line.chance.happens(0.1):
            taken = self._line.chance.number(1, taken)
        self._outward.put(data[:taken])
        return taken

    async def receive(self) -> bytes:
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this connection")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            while True:
                self._check(self._inward)
                data = self._inward.take()
                if data is not None:
                    return data
                await self._wait(self._inward, self._inward.next_time)
        finally:
            self._receiving = False

    def receive_soon(self, milliseconds: int) -> bytes:
        self._check(self._inward)
        return self._inward.take() or b""

    async def _wait(self, pipe: _Pipe, until: float) -> None:
        changed = pipe.changed
        with trio.move_on_at(until):
            await changed.wait()

    def _check(self, pipe: _Pipe) -> None:
        if self._closed:
            raise LinkDown("the connection was closed")
        if trio.current_time() >= pipe.broken_at:
            raise LinkDown("the link to the peer broke: reset")

    async def aclose(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._owner is not None:
            self._owner.disowns(self)
        self._outward.ended = True
        self._outward.tell()
        # Whoever sends to an end that is closed is told, after a while.
        self._inward.break_at(trio.current_time() + self._line.delay())
        self._line.closed(self)

    def owner_died(self, *, power: bool) -> None:
        if self._closed:
            return
        if power:
            # Nobody says anything: the other end hears of it when the host is there again, or gives up by itself.
            self._closed = True
            self._line.orphans.append(self)
            for pipe in (self._inward, self._outward):
                pipe.break_at(trio.current_time() + self._line.chance.between(2, 15))
        else:
            if self._line.chance.happens(0.3):
                self._outward.break_at(trio.current_time() + self._line.delay())
            self._close()

    def reset(self) -> None:
        """The connection breaks, for each direction at a time of its own."""
        now, chance = trio.current_time(), self._line.chance
        for pipe in (self._inward, self._outward):
            pipe.break_at(now if chance.happens(0.5) else now + chance.scaled(1e-4, 1.0))


class Line:
    """The way between two hosts: of all connections between them. Faults are set on it."""

    def __init__(self, name: str, chance: Chance, trace: Trace, delay_max: float) -> None:
        self.name = name
        self.chance = chance
        self.trace = trace
        self.delay_max = delay_max
        self.slow = 1.0
        """How many times as long everything takes."""
        self.up = True
        """Whether new connections can be made."""
        self.orphans: list[SimulatedConnection] = []
        self._held: set[str] = set()
        self._listener: SimulatedListener | None = None
        self._open: dict[SimulatedConnection, None] = {}

    def delay(self) -> float:
        return self.slow * self.chance.scaled(self.delay_max / 100, self.delay_max)

    def holds(self, direction: str) -> bool:
        return direction in self._held

    def hold(self, *directions: str) -> None:
        """Nothing arrives in these directions ("up": to the listener, "down": from it) until `release`."""
        self._held.update(directions)

    def release(self) -> None:
        self._held.clear()
        self._tell_all()

    def cut(self) -> None:
        """Breaks every connection."""
        for connection in list(self._open):
            connection.reset()

    def host_is_back(self) -> None:
        """The host of the listener was without power: what was connected to it is told now."""
        for orphan in self.orphans:
            orphan.reset()
            self.closed(orphan)
        self.orphans.clear()

    def closed(self, connection: SimulatedConnection) -> None:
        self._open.pop(connection, None)

    async def connect(self) -> Connection:
        """For the connecting side. Raises LinkDown when nobody listens, or the line is down."""
        await trio.sleep(self.delay())
        listener = self._listener
        if not self.up or listener is None or self._held:
            if self._held:
                await trio.sleep(1)
            raise LinkDown(f"cannot connect over {self.name}")
        up, down = _Pipe(self, "up"), _Pipe(self, "down")
        near, far = SimulatedConnection(down, up, self), SimulatedConnection(up, down, self)
        near.belongs_to(current_process())
        self._open[near] = self._open[far] = None
        listener.offer(far)
        self.trace.note(f"connect {self.name}")
        return near

    def listen(self) -> SimulatedListener:
        """For the accepting side, in its process."""
        self._listener = SimulatedListener(self, current_process())
        return self._listener

    def stops_listening(self, listener: SimulatedListener) -> None:
        if self._listener is listener:
            self._listener = None

    def _tell_all(self) -> None:
        for connection in self._open:
            connection._inward.tell()


class SimulatedListener:
    """Implements second_appliance.Listener."""

    def __init__(self, line: Line, process: Process) -> None:
        self._line = line
        self._process = process
        self._offered: deque[SimulatedConnection] = deque()
        self._arrived = trio.Event()
        process.owns(self)

    def offer(self, connection: SimulatedConnection) -> None:
        self._offered.append(connection)
        connection.belongs_to(self._process)
        self._arrived.set()

    async def accept(self) -> Connection:
        await trio.lowlevel.checkpoint()
        while not self._offered:
            self._arrived = trio.Event()
            await self._arrived.wait()
        return self._offered.popleft()

    async def aclose(self) -> None:
        self._line.stops_listening(self)
        self._process.disowns(self)

    def owner_died(self, *, power: bool) -> None:
        self._line.stops_listening(self)

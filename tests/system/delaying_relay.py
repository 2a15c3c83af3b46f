"""A link with a delay, a bandwidth and faults: a relay between two sockets, a program of its own.

    python -m tests.system.delaying_relay LISTEN FORWARD

LISTEN and FORWARD are `tcp:HOST:PORT` or `unix:PATH`; port 0 listens at any. The first line on stdout is the address it
listens at. Then each line on stdin is a command, answered by one line of JSON; it ends with stdin.

    delay SECONDS       each way, from now on
    rate BYTES          a second, each way; 0 is without limit
    cut                 resets every connection, and each new one at once
    stall up|down|both  what goes this way (up: to FORWARD) is held back, silently; what was on its way as well
    heal                no cut, no stall
    count               nothing else: each answer is {"address", "up", "down", "connections"}, the bytes taken in so far

Bytes are delayed in a queue of (when due, bytes), so the delay costs no bandwidth. Threads, because they sleep to
0.1 ms where an event loop's timers are whole milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
import time
from collections import deque
from typing import Final

CHUNK_BYTES: Final = 256 << 10
IN_FLIGHT_BYTES_MAX: Final = 16 << 20
"""What a direction holds at most; then its sender waits, as on a full link."""
QUEUE_SECONDS: Final = 0.1
"""With a limited rate, what waits before the link, as in a router: so much and no more, or a slow link would look fast
until the queue is full."""
UP: Final = "up"
DOWN: Final = "down"


class Link:
    """What is true of all connections. Guarded by `changed`, which is notified of each change."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.delay = 0.0
        self.rate = 0
        self.cut = False
        self.stalled: set[str] = set()
        self.taken = {UP: 0, DOWN: 0}
        self.free_at = {UP: 0.0, DOWN: 0.0}
        """When the line has sent what it was given; the rate is shared by the connections."""
        self.accepted = 0
        self.open: set[Pair] = set()

    def take(self, way: str, length: int) -> float:
        """Counts so many bytes; when they are due at the other end."""
        with self.changed:
            self.taken[way] += length
            now = time.monotonic()
            if self.rate:
                self.free_at[way] = max(now, self.free_at[way]) + length / self.rate
                now = self.free_at[way]
            return now + self.delay

    def room(self) -> int:
        """How many bytes a direction may hold now."""
        if not self.rate:
            return IN_FLIGHT_BYTES_MAX
        return max(1, min(IN_FLIGHT_BYTES_MAX, int(self.rate * (self.delay + QUEUE_SECONDS))))


class Pair:
    """One connection and its other half."""

    def __init__(self, link: Link, near: socket.socket, far: socket.socket) -> None:
        self.sockets = (near, far)
        self.ended = False
        self._link = link
        self._running = 2
        for way, source, sink in ((UP, near, far), (DOWN, far, near)):
            pipe = Pipe(link, self, way, source, sink)
            threading.Thread(target=pipe.take, daemon=True).start()
            threading.Thread(target=pipe.give, daemon=True).start()

    def end(self) -> None:
        """Resets both halves. Safe from any thread, with or without the link's lock."""
        with self._link.changed:
            self.ended = True
            self._link.open.discard(self)
            self._link.changed.notify_all()
        for one in self.sockets:
            reset(one)

    def one_way_done(self) -> None:
        """A direction has passed its end on; after both of them the pair is over."""
        with self._link.changed:
            self._running -= 1
            over = self._running == 0
        if over:
            self.end()


class Pipe:
    """One direction of a pair: a thread that takes, a thread that gives when it is due."""

    def __init__(self, link: Link, pair: Pair, way: str, source: socket.socket, sink: socket.socket) -> None:
        self._link = link
        self._pair = pair
        self._way = way
        self._source = source
        self._sink = sink
        self._queue: deque[tuple[float, bytes]] = deque()
        self._held = 0

    def take(self) -> None:
        try:
            while data := self._source.recv(min(CHUNK_BYTES, self._wait_for_room())):
                self._put(data)
            self._put(b"")
        except OSError:
            self._pair.end()

    def _wait_for_room(self) -> int:
        with self._link.changed:
            while (room := self._link.room() - self._held) <= 0 and not self._pair.ended:
                self._link.changed.wait()
            return max(room, 1)

    def _put(self, data: bytes) -> None:
        due = self._link.take(self._way, len(data))
        with self._link.changed:
            self._queue.append((due, data))
            self._held += len(data)
            self._link.changed.notify_all()

    def give(self) -> None:
        try:
            while (data := self._next()) is not None:
                if not data:
                    self._sink.shutdown(socket.SHUT_WR)
                    self._pair.one_way_done()
                    return
                self._sink.sendall(data)
        except OSError:
            self._pair.end()

    def _next(self) -> bytes | None:
        """The next bytes when they are due; None when the pair has ended."""
        link = self._link
        while True:
            with link.changed:
                while not self._pair.ended and (not self._queue or self._way in link.stalled):
                    link.changed.wait()
                if self._pair.ended:
                    return None
                due, data = self._queue[0]
                if (wait := due - time.monotonic()) <= 0:
                    self._queue.popleft()
                    self._held -= len(data)
                    link.changed.notify_all()
                    return data
            time.sleep(wait)


def reset(sock: socket.socket) -> None:
    """Ends a connection the hard way, and wakes who waits for it."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def parse(address: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    kind, _, rest = address.partition(":")
    if kind == "unix":
        return socket.AF_UNIX, rest
    if kind != "tcp":
        raise SystemExit(f"delaying_relay: {address}: neither tcp:HOST:PORT nor unix:PATH")
    host, _, port = rest.rpartition(":")
    return socket.AF_INET, (host, int(port))


def serve(link: Link, listener: socket.socket, forward: str) -> None:
    while True:
        near, _ = listener.accept()
        with link.changed:
            link.accepted += 1
            cut = link.cut
        if cut:
            reset(near)
            continue
        threading.Thread(target=join, args=(link, near, forward), daemon=True).start()


def join(link: Link, near: socket.socket, forward: str) -> None:
    """Connects the other half. A listener that is not there looks like a reset one round trip later."""
    family, place = parse(forward)
    far = socket.socket(family, socket.SOCK_STREAM)
    try:
        time.sleep(2 * link.delay)
        far.connect(place)
        for sock in (near, far):
            if sock.family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        reset(near)
        reset(far)
        return
    with link.changed:
        if link.cut:
            reset(near)
            reset(far)
            return
        link.open.add(Pair(link, near, far))


def obey(link: Link, words: list[str]) -> None:
    with link.changed:
        match words:
            case ["delay", seconds]:
                link.delay = float(seconds)
            case ["rate", per_second]:
                link.rate = int(per_second)
            case ["cut"]:
                link.cut = True
            case ["stall", "both"]:
                link.stalled = {UP, DOWN}
            case ["stall", "up" | "down" as way]:
                link.stalled = {way}
            case ["heal"]:
                link.cut = False
                link.stalled = set()
            case ["count"]:
                pass
            case _:
                raise SystemExit(f"delaying_relay: {' '.join(words)}: no such command")
        link.changed.notify_all()
        pairs = list(link.open) if link.cut else []
    for pair in pairs:
        pair.end()


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    family, place = parse(sys.argv[1])
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        if family == socket.AF_INET:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(16)
        link = Link()
        name = listener.getsockname()
        address = f"unix:{name}" if family == socket.AF_UNIX else f"tcp:{name[0]}:{name[1]}"
        threading.Thread(target=serve, args=(link, listener, sys.argv[2]), daemon=True).start()
        print(json.dumps(address), flush=True)
        for line in sys.stdin:
            obey(link, line.split())
            with link.changed:
                answer = {"address": address, **link.taken, "connections": link.accepted}
            print(json.dumps(answer), flush=True)
        # Threads hold sockets that wait; there is nothing to save.
        os._exit(0)


if __name__ == "__main__":
    main()

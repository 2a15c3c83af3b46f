"""A limit of the bytes per second that one first appliance puts on its link.

Invariant: in any stretch of t seconds no more than t times the limit and one piece leave; what was not used is not
saved up for a burst.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from replication.wire import Buffer

PIECES_PER_SECOND: Final = 10
PIECE_BYTES_MIN: Final = 4 << 10
PIECE_BYTES_MAX: Final = 1 << 20


class Bandwidth:
    """The limit, over all the links of a first appliance. May be changed at any time."""

    def __init__(self, bytes_per_second: int = 0) -> None:
        """0: no limit."""
        self.bytes_per_second = bytes_per_second
        self._free_at = float("-inf")
        """When what was sent is paid for."""

    @property
    def limited(self) -> bool:
        return self.bytes_per_second > 0

    @property
    def piece_bytes(self) -> int:
        """How much goes at once."""
        return max(PIECE_BYTES_MIN, min(PIECE_BYTES_MAX, self.bytes_per_second // PIECES_PER_SECOND))

    async def send(self, send: Callable[[list[Buffer]], Awaitable[None]], buffers: list[Buffer]) -> None:
        """Sends all of it with `send`, in pieces, none before the one before it is paid for. One task at a time.
        Cancelled, some of the pieces may have left."""
        for piece in _pieces(buffers, self.piece_bytes):
            await trio.sleep_until(self._free_at)
            await send(piece)
            if self.limited:
                self._free_at = trio.current_time() + sum(map(len, piece)) / self.bytes_per_second


def _pieces(buffers: list[Buffer], piece_bytes: int) -> list[list[Buffer]]:
    """The buffers in pieces of that length; only the last one may be shorter. Nothing is copied."""
    pieces: list[list[Buffer]] = []
    room = 0
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            if not room:
                pieces.append([])
                room = piece_bytes
            part = view[:room]
            pieces[-1].append(part)
            room -= len(part)
            view = view[len(part) :]
    return pieces

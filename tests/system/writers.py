"""Applications of the system tests: they write blocks that say what they are, and keep a journal of what they know."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 4096
_MARK = struct.Struct("<8sQQ")
_MAGIC = b"BLOCK..."


def block_of(number: int, counter: int) -> bytes:
    """A block that says its place and which write made it; the rest is different in each."""
    return _MARK.pack(_MAGIC, number, counter) + random.Random(number << 32 | counter).randbytes(BLOCK - _MARK.size)


def counter_in(block: bytes, number: int) -> int:
    """Which write made the block; 0 for zeros. AssertionError unless it is whole and in its place."""
    if block == bytes(BLOCK):
        return 0
    magic, found, counter = _MARK.unpack_from(block)
    assert (magic, found) == (_MAGIC, number), f"block {number} holds {block[:24].hex()}"
    assert block == block_of(number, counter), f"block {number} is torn"
    return int(counter)


@dataclass(frozen=True, slots=True)
class Known:
    """One write: the block and its counter, when it began and, if it did, when it returned (ns)."""

    block: int
    counter: int
    began: int
    returned: int | None


@dataclass(slots=True)
class Writer:
    """A thread that writes random blocks of one file until it is told to stop, or the mount dies under it."""

    file: Path
    blocks: int
    seed: int
    fsync_every: int = 50
    pause: float = 0.0
    """Seconds between two writes, so that a long run leaves room for others."""
    known: list[Known] = field(default_factory=list)
    error: OSError | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _counter: int = 0

    def start(self) -> None:
        self.error = None
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended."""
        self._stop.set()
        self.join()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(60)
        assert not self._thread.is_alive(), "a writer hangs"

    def _run(self) -> None:
        dice = random.Random(self.seed + self._counter)
        try:
            fd = os.open(self.file, os.O_RDWR)
        except OSError as error:
            self.error = error
            return
        try:
            while not self._stop.is_set():
                self._write(fd, dice.randrange(self.blocks))
                if self._counter % self.fsync_every == 0:
                    os.fsync(fd)
                if self.pause:
                    time.sleep(self.pause)
        except OSError as error:
            self.error = error
        finally:
            try:
                os.close(fd)
            except OSError as error:
                self.error = self.error or error

    def _write(self, fd: int, block: int) -> None:
        self._counter += 1
        data = block_of(block, self._counter)
        began = time.time_ns()
        returned = None
        try:
            assert os.pwrite(fd, data, block * BLOCK) == BLOCK
            returned = time.time_ns()
        finally:
            self.known.append(Known(block, self._counter, began, returned))

    def moments(self, count: int, dice: random.Random) -> list[int]:
        """Times within what is known, at random."""
        if len(self.known) < 2:
            return []
        return [dice.randrange(self.known[0].began, self.known[-1].began) for _ in range(count)]

    def check(self, content: bytes, moment: int) -> None:
        """Asserts that `content` holds what had returned by `moment`, and nothing that began after it.

        A write that was cut off by a kill may be there or not.
        """
        by_block: dict[int, list[Known]] = defaultdict(list)
        for known in self.known:
            by_block[known.block].append(known)
        for number in range(self.blocks):
            found = counter_in(content[number * BLOCK : (number + 1) * BLOCK], number)
            begun = [known for known in by_block[number] if known.began <= moment]
            had_returned = [known for known in begun if known.returned is not None and known.returned <= moment]
            least = had_returned[-1].counter if had_returned else 0
            allowed = {least} | {known.counter for known in begun if known.counter > least}
            assert found in allowed, f"{self.file.name} block {number} at {moment}: {found}, not one of {allowed}"

    def returned_before(self, moment: int) -> int:
        """How many writes had returned."""
        returned = [known.returned for known in self.known if known.returned is not None]
        return bisect_left(returned, moment)

"""Pins: the moments that readers in other processes must not lose while history is consolidated and swept.

A reading process has a file under `readers/`, which it keeps locked for as long as it lives and in which it writes the
moments that it needs, or that it needs everything. A killed reader's lock is gone, and then its file is nothing: the
writer removes it.

Invariants:
- a moment becomes pinned only inside the barrier (`readers/barrier`, held shared), together with the look that found
  it; the writer holds the barrier alone from reading the pins until its change is committed. So a change never misses
  a pin, and a pinned moment was there when it was pinned;
- the writer never waits for a reader: while one is inside the barrier, even a stopped one, the change is put off;
- what a pin file says is never less than what its reader needs: a file that cannot be understood pins everything, and
  so does a reader without room for its pins;
- bounded: a pin file has at most PINS_MAX pins.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from dedup import layout
from dedup.errors import StoreBusy, StoreError, StoreFailed, StoreFull
from dedup.layout import PIN, PINS_HEADER, PINS_MAGIC, PINS_MAX, checked
from dedup.marker import refuse_network
from dedup.storage import Storage
from dedup.types import Seq

WAIT_SECONDS: Final = 60.0
"""Longest that a reader waits for the writer to let it into the barrier: the writer is in it for one commit."""
_POLL_SECONDS: Final = 0.002
_FREE: Final = bytes(PIN.size)


class Pinning(Enum):
    """What a reader of a store pins."""

    EVERYTHING = "everything"
    """All, for its life: a command that ends soon."""
    MOMENTS = "moments"
    """What it says: a process that stays, such as a mount."""
    NOTHING = "nothing"
    """The writer's own helpers: the writer changes nothing under them."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """What the readers of a store need."""

    everything: bool = False
    moments: frozenset[tuple[str, Seq]] = frozenset()
    """(group, seq) of each pinned moment."""
    holders: tuple[str, ...] = ()
    """The pin files that pin everything; a name begins with the reader's process id."""


class PinBarrier:
    """What keeps the finding of moments and the changing of history apart. One object is for one side of it."""

    def __init__(self, storage: Storage, store_path: Path) -> None:
        """StoreFull, StoreFailed."""
        self._storage = storage
        self._store_path = store_path
        directory = store_path / layout.READERS_NAME
        if not storage.exists(directory):
            with suppress(FileExistsError):  # another reader was quicker
                storage.mkdir(directory)
        self._fd = storage.open(directory / layout.BARRIER_NAME, os.O_RDWR | os.O_CREAT)
        self._turn = threading.Lock()
        self._inside = 0

    @contextmanager
    def shut(self) -> Iterator[Pinned | None]:
        """For the writer: while the block runs nobody pins anything. Gives what is pinned; dead readers are cleared.

        None when a reader is just pinning: nothing may be changed, try again later. Does not wait.
        """
        if not self._storage.lock(self._fd):
            yield None
            return
        try:
            yield pinned(self._storage, self._store_path)
        finally:
            self._storage.unlock(self._fd)

    def enter(self) -> None:
        """For readers, any thread: from here to `leave` the writer changes no history.

        Waits while the writer does; StoreBusy when that takes longer than WAIT_SECONDS.
        """
        with self._turn:
            if not self._inside:
                self._wait()
            self._inside += 1

    def leave(self) -> None:
        """Ends one `enter`."""
        with self._turn:
            self._inside -= 1
            if not self._inside:
                self._storage.unlock(self._fd)

    def _wait(self) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not self._storage.lock(self._fd, shared=True):
            if time.monotonic() >= end:
                raise StoreBusy(
                    f"{self._store_path}: its writer has been thinning history for {WAIT_SECONDS:.0f} s and "
                    "lets no reader in; is it stopped? try again"
                )
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        self._storage.close(self._fd)


@dataclass(slots=True)
class _Pin:
    uses: int
    slot: int | None
    """Its place in the file; None while there is no room for it, and then everything is pinned."""


class ReaderPins:
    """The pins of one reading process. Any thread may use it."""

    def __init__(self, storage: Storage, barrier: PinBarrier | None) -> None:
        self._storage = storage
        self._barrier = barrier
        self._lock = threading.Lock()
        self._path = Path()
        self._fd = -1
        self._writers_lock_fd = -1
        self._pins: dict[tuple[str, Seq], _Pin] = {}
        self._slots_used = 0
        self._free_slots: list[int] = []
        self._crowded: set[tuple[str, Seq]] = set()
        """Pins that found no room."""
        self._everything = False
        self._stays_inside = False

    @classmethod
    def open(cls, store_path: Path, storage: Storage, *, everything: bool = False) -> ReaderPins:
        """Makes this process a known reader of the store; with `everything`, it pins all that there is for its life.

        StoreBusy, StoreFailed. On a read-only file system it keeps any writer out instead, StoreBusy if there is one.
        """
        try:
            barrier = PinBarrier(storage, store_path)
        except StoreFailed as error:
            reason = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
            if reason == errno.EROFS:
                return cls._beside_no_writer(store_path, storage)
            if reason in (errno.EACCES, errno.EPERM):
                raise StoreFailed(
                    f"{store_path / layout.READERS_NAME}: this user cannot write there, so that what it reads might "
                    "be thinned out meanwhile; run this as the user that the store belongs to"
                ) from error
            raise
        pins = cls(storage, barrier)
        try:
            with pins.inside():
                pins._register(store_path / layout.READERS_NAME, everything)
        except BaseException:
            pins.close()
            raise
        return pins

    @classmethod
    def _beside_no_writer(cls, store_path: Path, storage: Storage) -> ReaderPins:
        """A read-only mount of a disk that may be written elsewhere on this host: the writer's lock tells, and keeps
        it so. LMDB cannot register a reader there either."""
        refuse_network(store_path)
        pins = cls(storage, None)
        pins._everything = True
        try:
            pins._writers_lock_fd = storage.open(store_path / layout.LOCK_NAME, os.O_RDONLY)
        except FileNotFoundError:
            return pins  # never opened by a writer
        if not storage.lock(pins._writers_lock_fd, shared=True):
            pins.close()
            raise StoreBusy(
                f"{store_path} is being written, and on the read-only file system here nothing can be pinned; "
                "read it where it is mounted writable"
            )
        return pins

    def _register(self, directory: Path, everything: bool) -> None:
        self._everything = everything
        try:
            while self._fd < 0:
                self._path = directory / f"{os.getpid()}-{os.urandom(6).hex()}{layout.PINS_SUFFIX}"
                self._fd = self._storage.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                if not (self._storage.lock(self._fd) and self._storage.exists(self._path)):
                    # Someone who looked at the pins outside of the barrier took it for a dead reader's.
                    self._storage.close(self._fd)
                    self._fd = -1
            self._write_header()
        except StoreFull:
            self._stay_inside()

    @property
    def everything(self) -> bool:
        """Whether nothing that is read can be lost, since before the first look."""
        return self._everything

    def pin(self, group: str, seq: Seq) -> None:
        """The moment is kept until `unpin`, as often as it was pinned. To be called inside the barrier."""
        with self._lock:
            known = self._pins.get((group, seq))
            if known is not None:
                known.uses += 1
                return
            pin = self._pins[group, seq] = _Pin(1, None)
            if self._fd < 0 or self._place(group, seq, pin):
                return
            self._crowded.add((group, seq))
            if len(self._crowded) == 1:
                self._write_header()

    def pin_again(self, group: str, seq: Seq) -> bool:
        """As `pin`, of a moment that is pinned; needs no barrier. False when it is not."""
        with self._lock:
            known = self._pins.get((group, seq))
            if known is not None:
                known.uses += 1
            return known is not None

    def unpin(self, group: str, seq: Seq) -> bool:
        """Ends one `pin`; True when it was the last of that moment. Never waits."""
        with self._lock:
            pin = self._pins[group, seq]
            pin.uses -= 1
            if pin.uses:
                return False
            del self._pins[group, seq]
            crowded = bool(self._crowded)
            if pin.slot is None:
                self._crowded.discard((group, seq))
            else:
                # On a full disk the moment stays pinned until another takes its place.
                with suppress(StoreFull):
                    self._storage.pwritev(self._fd, [_FREE], _slot_offset(pin.slot))
                self._free_slots.append(pin.slot)
            if crowded:
                self._make_room()
            return True

    def _place(self, group: str, seq: Seq, pin: _Pin) -> bool:
        """Writes the pin into a free place, if there is one."""
        slot = self._free_slots.pop() if self._free_slots else self._slots_used
        if slot >= PINS_MAX:
            return False
        try:
            self._storage.pwritev(self._fd, [_packed(group, seq)], _slot_offset(slot))
        except StoreFull:
            self._free_slots.append(slot)
            return False
        pin.slot = slot
        self._slots_used = max(self._slots_used, slot + 1)
        return True

    def _make_room(self) -> None:
        """Gives free places to pins without one. When all have theirs, no longer everything is pinned.

        The header is written last, and read first: who does not read it as it was sees all the pins.
        """
        while self._crowded:
            group, seq = next(iter(self._crowded))
            if not self._place(group, seq, self._pins[group, seq]):
                return
            self._crowded.discard((group, seq))
        self._write_header()

    def _write_header(self) -> None:
        whole = PINS_HEADER.struct.pack(
            PINS_MAGIC, layout.FORMAT_VERSION, self._everything or bool(self._crowded), 0, 0
        )
        self._storage.pwritev(self._fd, [checked(whole)], 0)

    def _stay_inside(self) -> None:
        """No room on the disk for a pin: stays inside the barrier for its life, so that nothing is changed at all."""
        if self._barrier is not None and not self._stays_inside:
            self._barrier.enter()
            self._stays_inside = True

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While the block runs no history is changed: what is found can be pinned. May wait: StoreBusy."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """What `inside` begins with, where the two ends are in different threads."""
        if self._barrier is not None:
            self._barrier.enter()

    def leave(self) -> None:
        """Ends one `enter`."""
        if self._barrier is not None:
            self._barrier.leave()

    def close(self) -> None:
        """Nothing is pinned any more."""
        if self._fd >= 0:
            with suppress(FileNotFoundError):
                self._storage.unlink(self._path)
            self._storage.close(self._fd)
            self._fd = -1
        if self._writers_lock_fd >= 0:
            self._storage.close(self._writers_lock_fd)
            self._writers_lock_fd = -1
        if self._barrier is not None:
            self._barrier.close()
            self._barrier = None


def pinned(storage: Storage, store_path: Path) -> Pinned:
    """What is pinned now; the files of dead readers are removed. To act on it, see `PinBarrier.shut`."""
    directory = store_path / layout.READERS_NAME
    try:
        names = storage.listdir(directory)
    except FileNotFoundError:
        return Pinned()
    moments: set[tuple[str, Seq]] = set()
    holders: list[str] = []
    for name in names:
        if name.endswith(layout.PINS_SUFFIX):
            found = _pins_in(storage, directory / name)
            if found is None:
                holders.append(name)
            else:
                moments |= found
    return Pinned(bool(holders), frozenset(moments), tuple(holders))


def _pins_in(storage: Storage, path: Path) -> set[tuple[str, Seq]] | None:
    """The moments that a pin file pins, None for everything; none when its reader is dead, and then it is removed."""
    try:
        fd = storage.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return set()
    try:
        if storage.lock(fd):
            storage.unlink(path)
            return set()
        return _unpacked(storage.pread(fd, _slot_offset(PINS_MAX), 0))
    except FileNotFoundError:
        return set()
    except StoreError:
        return None
    finally:
        storage.close(fd)


def _slot_offset(slot: int) -> int:
    return PINS_HEADER.size + slot * PIN.size


def _packed(group: str, seq: Seq) -> bytes:
    return checked(PIN.struct.pack(seq, group.encode(), 0))


def _unpacked(data: bytes) -> set[tuple[str, Seq]] | None:
    """The moments that a pin file's bytes name; None when they pin everything, or cannot be understood."""
    header = data[: PINS_HEADER.size]
    if len(header) < PINS_HEADER.size or checked(header) != header:
        return None
    magic, version, everything, _, _ = PINS_HEADER.struct.unpack(header)
    if magic != PINS_MAGIC or version != layout.FORMAT_VERSION or everything:
        return None
    moments: set[tuple[str, Seq]] = set()
    for at in range(PINS_HEADER.size, len(data), PIN.size):
        packed = data[at : at + PIN.size]
        if packed == _FREE:
            continue
        if len(packed) < PIN.size or checked(packed) != packed:
            return None
        seq, group, _ = PIN.struct.unpack(packed)
        try:
            moments.add((group.rstrip(b"\0").decode(), Seq(seq)))
        except UnicodeDecodeError:
            return None
    return moments

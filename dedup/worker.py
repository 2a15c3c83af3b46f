"""The process that computes for an appliance: seals, marks, rewrites. `python -m dedup.worker STORE`.

It answers requests on its standard input with replies on its standard output, in turn; it never changes what only the
writer may: the index, the journal, which slots are dead.

Invariants:
- it lives at most as long as whoever asks: when its input ends, it ends, wherever it is; all it does may be cut off;
- it yields to everybody else: nice 19, idle IO class, and at most the share of the time that it is given;
- it works under the `worker_lock`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import queue
import struct
import sys
import threading
from io import FileIO
from pathlib import Path
from typing import Final

import msgspec

from dedup import layout
from dedup.catalog import Catalog, Txn
from dedup.consolidation import Folded, GroupHistory, SegmentAges, fold_next
from dedup.consolidation_preview import Preview, preview
from dedup.container_size import examine
from dedup.errors import Damaged, StoreError, StoreFull
from dedup.gc import Boundary, Collector, Dead, Plan
from dedup.pace import Pace
from dedup.pins import Pinning
from dedup.reader import StoreReader
from dedup.retention import Policy
from dedup.sealed import seal
from dedup.types import ContainerId, Seq, TimeNs
from dedup.worker_lock import worker_lock

log = logging.getLogger("rewindfs.worker")

FRAME_BYTES_MAX: Final = 64 << 20
_LENGTH: Final = struct.Struct("<I")


class Work(msgspec.Struct, frozen=True, tag=True):
    """From now on take at most this share of the time. The only request without a reply."""

    share: float


class Seal(msgspec.Struct, frozen=True, tag=True):
    """Seal the container with all its slots. Reply: Freed."""

    container: int


class Mark(msgspec.Struct, frozen=True, tag=True):
    """Begin a collection: find what is live. Reply: Marked."""

    boundary: Boundary


class FindDead(msgspec.Struct, frozen=True, tag=True):
    """The dead slots of a container that the plan names. Reply: Found."""

    container: int


class Remove(msgspec.Struct, frozen=True, tag=True):
    """Rewrite the container without these slots, which were condemned. Reply: Freed."""

    container: int
    slots: tuple[int, ...]


class Thin(msgspec.Struct, frozen=True, tag=True):
    """Fold the first piece of the group's history that is due, but those that end at a seq in `skip`. Reply: Thinned.

    `known` are raw segments that need not be read again.
    """

    group: str
    policy: Policy
    now: TimeNs
    skip: tuple[Seq, ...]
    known: tuple[SegmentAges, ...]


class Foresee(msgspec.Struct, frozen=True, tag=True):
    """What would a consolidation and a collection free? Reply: Foreseen."""

    boundary: Boundary
    policy: Policy
    now: TimeNs


class Freed(msgspec.Struct, frozen=True, tag=True):
    """So many bytes on disk less than before."""

    bytes: int


class Marked(msgspec.Struct, frozen=True, tag=True):
    plan: Plan


class Found(msgspec.Struct, frozen=True, tag=True):
    dead: Dead


class Thinned(msgspec.Struct, frozen=True, tag=True):
    """`folded` is None when nothing is due; `known` are the raw segments that were read."""

    folded: Folded | None
    known: tuple[SegmentAges, ...]


class Foreseen(msgspec.Struct, frozen=True, tag=True):
    preview: Preview


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It could not be done: an error of the store, by the name of its type."""

    kind: str
    text: str


Request = Work | Seal | Mark | FindDead | Remove | Thin | Foresee
Reply = Freed | Marked | Found | Thinned | Foreseen | Refused


class WorkFailed(StoreError):
    """A write or a sync of the worker's failed. What the store keeps is as it was, but nothing more is tried there."""


_KINDS: Final[dict[str, type[StoreError]]] = {"Damaged": Damaged, "StoreFull": StoreFull, "StoreFailed": WorkFailed}
_requests: Final = msgspec.msgpack.Decoder(Request)
_replies: Final = msgspec.msgpack.Decoder(Reply)


def frame(message: Request | Reply) -> bytes:
    """The message as it goes through a pipe: its length (u32), then msgpack."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


class ReplyStream:
    """Takes bytes as they come and gives whole replies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive_data(self, data: bytes) -> None:
        self._buffer += data

    def next_reply(self) -> Reply | None:
        """None: more bytes are needed. StoreError for what is no reply."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        end = _LENGTH.size + length
        if length > FRAME_BYTES_MAX:
            raise StoreError(f"the worker process said what is no reply: {length} bytes")
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        try:
            reply: Reply = _replies.decode(body)
            return reply
        except msgspec.MsgspecError as error:
            raise StoreError(f"the worker process said what is no reply: {error}") from error


def error_of(refused: Refused) -> StoreError:
    """The error that the worker met, to be raised here."""
    return _KINDS.get(refused.kind, StoreError)(refused.text)


class Worker:
    """Answers the requests of one asker."""

    def __init__(self, store: StoreReader, pace: Pace) -> None:
        self._store = store
        self._pace = pace
        self._containers = store.path / layout.CONTAINERS_NAME
        self._collector: Collector | None = None

    def answer(self, request: Request) -> Reply:
        """The reply; Refused for an error of the store."""
        self._pace.begin()
        try:
            match request:
                case Seal(container):
                    return Freed(self._seal(ContainerId(container)))
                case Mark(boundary):
                    store = self._store
                    self._collector = Collector(store.storage, store.path, store.index, boundary, self._pace.breathe)
                    return Marked(self._collector.mark())
                case Thin():
                    return self._thin(request)
                case Foresee(boundary, policy, now):
                    return Foreseen(self._foresee(boundary, policy, now))
                case FindDead(container) if self._collector:
                    return Found(self._collector.dead(ContainerId(container)))
                case Remove(container, slots) if self._collector:
                    return Freed(self._collector.rewrite(ContainerId(container), slots))
        except FileNotFoundError as error:
            return Refused(Damaged.__name__, f"{error.filename}: the container is missing")
        except StoreError as error:
            return Refused(type(error).__name__, str(error))
        return Refused("StoreError", f"{type(request).__name__} has no meaning here")

    def _thin(self, request: Thin) -> Thinned:
        known = {one.segment: one for one in request.known}
        self._store.group(request.group).refresh()
        with self._store.index.read() as txn:
            history = self._history(request.group, txn)
            folded = fold_next(history, request.policy, request.now, known, request.skip, breathe=self._pace.breathe)
        return Thinned(folded, tuple(known.values()))

    def _foresee(self, boundary: Boundary, policy: Policy, now: TimeNs) -> Preview:
        store = self._store
        collector = Collector(store.storage, store.path, store.index, boundary, self._pace.breathe)
        for name in boundary.positions:
            store.group(name).refresh()
        with store.index.read() as txn:
            histories = [(self._history(name, txn), end) for name, end in boundary.positions.items()]
            return preview(histories, collector, policy, now)

    def _history(self, name: str, txn: Txn) -> GroupHistory:
        """The group as it was when it was refreshed, before `txn`: what the index says since only adds to it.

        Only the writer changes history, and it waits for the reply.
        """
        group = self._store.group(name)
        directory = self._store.path / layout.GROUPS_NAME / name / layout.JOURNAL_NAME
        catalog = Catalog(self._store.index, self._store.index.group_ids(txn)[name])
        return GroupHistory(self._store.storage, directory, catalog, txn, group.state)

    def _seal(self, container: ContainerId) -> int:
        storage = self._store.storage
        before = examine(storage, self._containers, container).disk_bytes
        seal(storage, self._containers, container, None, breathe=self._pace.breathe)
        return before - examine(storage, self._containers, container).disk_bytes


def _read_whole(pipe: FileIO, count: int) -> bytes:
    data = b""
    while len(data) < count:
        some = pipe.read(count - len(data))
        if not some:
            os._exit(0)
        data += some
    return data


def _read_requests(pipe: FileIO, requests: queue.SimpleQueue[Request], pace: Pace) -> None:
    """Hands requests over until the input ends, and then ends the process: nobody waits for it any more."""
    while True:
        head = _read_whole(pipe, _LENGTH.size)
        request = _requests.decode(_read_whole(pipe, _LENGTH.unpack(head)[0]))
        if isinstance(request, Work):
            pace.share = request.share
        else:
            requests.put(request)


def yield_to_others() -> None:
    """The least of this machine's time and of its disks, for this process."""
    os.nice(19)
    number = {"x86_64": 251, "aarch64": 30}.get(platform.machine())
    if number is not None:
        who_process, class_idle = 1, 3
        if ctypes.CDLL(None, use_errno=True).syscall(number, who_process, 0, class_idle << 13):
            log.info("no idle IO class here: %s", os.strerror(ctypes.get_errno()))


def main() -> None:
    """Serves the requests of standard input until it ends."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    path = Path(sys.argv[1])
    yield_to_others()
    pace = Pace()
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(FileIO(0), requests, pace), daemon=True).start()
    try:
        store = StoreReader.open(path, pinning=Pinning.NOTHING)
        with worker_lock(store.storage, path):
            worker = Worker(store, pace)
            while True:
                sys.stdout.buffer.write(frame(worker.answer(requests.get())))
                sys.stdout.buffer.flush()
    except StoreError as error:
        log.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()

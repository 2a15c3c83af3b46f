"""An image in a store elsewhere: pointers are asked for once, blocks come from the cache or over the link, ahead of who
reads one after the other.

Invariants:
- `no-wrong-bytes`: each block is checked here against the fingerprint that came with it; pointers, blocks and what they
  are cached by are of one session, and an image made in another one is looked up again before it is read on;
- bounded: LEAVES_MAX leaves, AHEAD_CHUNKS_MAX chunks on their way, and the cache's own bounds; for all images together.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

import numpy as np
import xxhash

from dedup.errors import Damaged, MomentGone, RewindError, WouldBlock
from dedup.image import room_for
from dedup.layout import LEAF_BLOCKS
from dedup.pointer_map import Addresses
from dedup.read_ahead import ReadAhead
from dedup.types import BLOCK_BYTES, TimeNs
from replication import history_queries as said
from replication.block_cache import BlockCache, Mask
from replication.errors import LinkDown
from replication.history_link import SESSIONS_MAX, HistoryLink, SessionChanged
from replication.history_queries import FETCH_BLOCKS_MAX, addresses_of, marks_array

log = logging.getLogger("rewindfs.history")

LEAVES_MAX: Final = 4096
"""Decoded leaves kept: 16 MiB, the pointers of 8 GiB."""
LEAVES_TOGETHER: Final = 8
"""Leaves that are asked for at once."""
AHEAD_CHUNKS: Final = 12
"""Of them, for one who reads one after the other."""
AHEAD_CHUNKS_MAX: Final = 24
"""Chunks of FETCH_BLOCKS_MAX blocks that are fetched ahead at a time, or wait for it."""
FETCHERS: Final = 8
"""Of them, on their way at a time: what a link of 80 MB/s and 0.1 s holds."""

_T = TypeVar("_T")
_Leaf = tuple[int, int, int, int]
"""Session, volume, seq, number."""
_Chunk = tuple[int, int, int]
"""Volume, seq, number."""


class RemoteBlocks:
    """What all images of one link share."""

    def __init__(self, link: HistoryLink, cache: BlockCache) -> None:
        self.link = link
        self.cache = cache
        self._leaves: OrderedDict[_Leaf, Addresses] = OrderedDict()
        self._leaves_lock = threading.Lock()
        self._ahead: dict[_Chunk, Future[None]] = {}
        self._ahead_lock = threading.Lock()
        self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")

    def close(self) -> None:
        """To be called after the link's close: what is under way fails, and is waited for."""
        self._fetchers.shutdown(cancel_futures=True)
        for future in self._ahead.values():
            future.set_result(None)  # of those that were never begun

    def leaf(self, key: _Leaf) -> Addresses | None:
        """The leaf, if it is known."""
        with self._leaves_lock:
            found = self._leaves.get(key)
            if found is not None:
                self._leaves.move_to_end(key)
            return found

    def keep_leaf(self, key: _Leaf, addresses: Addresses) -> None:
        with self._leaves_lock:
            self._leaves[key] = addresses
            if len(self._leaves) > LEAVES_MAX:
                self._leaves.popitem(last=False)

    def fetch_ahead(self, chunk: _Chunk, fetch: Callable[[], None]) -> bool:
        """Has it fetched in the background; False when there is no room for more."""
        with self._ahead_lock:
            if chunk in self._ahead:
                return True
            if len(self._ahead) >= AHEAD_CHUNKS_MAX:
                return False
            future = self._ahead[chunk] = Future()
        self._fetchers.submit(self._fetch, chunk, fetch, future)
        return True

    def _fetch(self, chunk: _Chunk, fetch: Callable[[], None], future: Future[None]) -> None:
        try:
            fetch()
        except (RewindError, SessionChanged) as error:
            log.debug("not fetched ahead: %s", error)  # whoever needs it meets the reason
        finally:
            with self._ahead_lock:
                del self._ahead[chunk]
            future.set_result(None)

    def await_ahead(self, chunk: _Chunk) -> None:
        """Waits for the chunk, if it is on its way."""
        with self._ahead_lock:
            future = self._ahead.get(chunk)
        if future is not None:
            future.result()


class RemoteImage:
    """The volume at one moment; as `history.PastImage`. Errors of the link: LinkDown, ProtocolError, OtherStore."""

    def __init__(self, blocks: RemoteBlocks, volume: int, found: said.ImageFound, generation: int) -> None:
        """`found` in the session of that number."""
        self.size = found.size
        self.time = TimeNs(found.time)
        self.label = found.label
        self._blocks = blocks
        self._link = blocks.link
        self._volume = volume
        self._found = found
        self._generation = generation
        self._one_asks = threading.Lock()
        """For pointers: who needs the same ones waits for them."""
        self._reading = ReadAhead(FETCH_BLOCKS_MAX, AHEAD_CHUNKS)

    @property
    def side(self) -> said.Side:
        """What a comparison is asked for by."""
        return self._volume, self._found.seq

    def read(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        length = min(length, self.size - offset)
        return bytes(self.read_into(offset, length, memoryview(bytearray(room_for(length))), wait=wait))

    def read_into(self, offset: int, length: int, buffer: memoryview, *, wait: bool = True) -> memoryview:
        length = min(length, self.size - offset)
        if length <= 0:
            return buffer[:0]
        first, skip = divmod(offset, BLOCK_BYTES)
        count = -(-(skip + length) // BLOCK_BYTES)
        out = buffer[: count * BLOCK_BYTES]
        try:
            if wait:
                for at in range(0, count, FETCH_BLOCKS_MAX):
                    some = min(FETCH_BLOCKS_MAX, count - at)
                    part = out[at * BLOCK_BYTES : (at + some) * BLOCK_BYTES]
                    self._look_ahead(first + at, some)
                    self._in_one_session(lambda session: self._read(first + at, some, part, session))  # noqa: B023
            else:
                self._read_now(first, count, out)
                self._look_ahead(first, count)
        except Damaged as damage:
            raise Damaged(f"{self.label}, bytes {offset}..{offset + length}: {damage}") from damage
        return buffer[skip : skip + length]

    def next_data(self, offset: int) -> int:
        found = said.At(offset, False)
        while not found.final:
            question = said.NextData(self._volume, self._found.seq, found.offset)
            found = self._in_one_session(lambda session: self._link.ask(question, said.At, session))  # noqa: B023
            if not found.final and found.offset <= question.offset:
                raise self._link.broken(f"no data between {question.offset} and {found.offset}")
        return found.offset

    def allocated(self) -> int:
        question = said.Allocated(self._volume, self._found.seq)
        return self._in_one_session(lambda session: self._link.ask(question, said.AllocatedFound, session)).bytes

    # -- sessions ----------------------------------------------------------------------------------------------------

    def _in_one_session(self, step: Callable[[int], _T]) -> _T:
        """What the step makes, all of it in one session, whose number it is told."""
        for _ in range(SESSIONS_MAX):
            session = self._link.generation
            try:
                self.look_up_again(session)
                return step(session)
            except SessionChanged:
                continue
        raise LinkDown(f"{self._link.address}: {SESSIONS_MAX} sessions ended while {self.label} was read")

    def look_up_again(self, session: int) -> None:
        """In a session that is another one than that in which the image was found, it must be found as it was."""
        if session == self._generation:
            return
        seq = self._found.seq
        found = self._link.ask(said.ImageAt(self._volume, seq), said.ImageFound, session)
        if (found.seq, found.time, found.size) != (seq, self._found.time, self.size):
            raise MomentGone(f"{self.label} is not there any more; look the moment up again")
        self._generation = session

    # -- pointers ----------------------------------------------------------------------------------------------------

    def _leaf_numbers(self, first: int, count: int) -> range:
        return range(first // LEAF_BLOCKS, (first + count - 1) // LEAF_BLOCKS + 1)

    def _known(self, first: int, count: int, session: int) -> Addresses | None:
        """The blocks' addresses, if no question is needed."""
        volume, seq = self._volume, self._found.seq
        leaves = []
        for number in self._leaf_numbers(first, count):
            leaf = self._blocks.leaf((session, volume, seq, number))
            if leaf is None:
                return None
            leaves.append(leaf)
        start = first % LEAF_BLOCKS
        whole = leaves[0] if len(leaves) == 1 else np.concatenate(leaves)
        return whole[start : start + count]

    def _addresses(self, first: int, count: int, session: int) -> Addresses:
        while (known := self._known(first, count, session)) is None:
            with self._one_asks:
                for number in self._leaf_numbers(first, count):
                    if self._blocks.leaf((session, self._volume, self._found.seq, number)) is None:
                        self._ask_for_leaves(number - number % LEAVES_TOGETHER, session)
        return known

    def _ask_for_leaves(self, first: int, session: int) -> None:
        volume, seq = self._volume, self._found.seq
        question = said.Pointers(volume, seq, first, LEAVES_TOGETHER)
        found = self._link.ask(question, said.PointersFound, session)
        addresses = addresses_of(found.steps, LEAVES_TOGETHER)
        for index in range(LEAVES_TOGETHER):
            leaf = addresses[index * LEAF_BLOCKS : (index + 1) * LEAF_BLOCKS].copy()
            self._blocks.keep_leaf((session, volume, seq, first + index), leaf)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _read_now(self, first: int, count: int, out: memoryview) -> None:
        session = self._link.generation
        known = self._known(first, count, session) if session == self._generation else None
        if known is None:
            raise WouldBlock
        self._blocks.cache.read(known, out, session, wait=False)

    def _read(self, first: int, count: int, out: memoryview, session: int) -> None:
        """At most FETCH_BLOCKS_MAX blocks. Damaged."""
        addresses = self._addresses(first, count, session)
        for chunk in range(first // FETCH_BLOCKS_MAX, (first + count - 1) // FETCH_BLOCKS_MAX + 1):
            self._blocks.await_ahead((self._volume, self._found.seq, chunk))
        self._confirm(first, addresses, session)
        missing = self._blocks.cache.read(addresses, out, session)
        if missing.any():
            self._fetch(first, addresses, missing, session, out)

    def _bring(self, first: int, count: int, session: int) -> None:
        """Into the cache; what is damaged stays where it is."""
        addresses = self._addresses(first, count, session)
        self._confirm(first, addresses, session)
        missing = self._blocks.cache.lacks(addresses, session)
        if missing.any():
            self._fetch(first, addresses, missing, session, None)

    def _confirm(self, first: int, addresses: Addresses, session: int) -> None:
        """Asks whether what came in another session is still right."""
        old = self._blocks.cache.unconfirmed(addresses, session)
        if not old.any():
            return
        spans = _spans(first, old)
        found = self._link.ask(said.Marks(self._volume, self._found.seq, spans), said.MarksFound, session)
        marks = marks_array(found.marks, int(old.sum()))
        self._blocks.cache.confirm(addresses[old], marks, session)

    def _fetch(self, first: int, addresses: Addresses, wanted: Mask, session: int, out: memoryview | None) -> None:
        """The wanted blocks, none of them a hole, into the cache, and into `out` where there is one. Damaged, if so."""
        question = said.Blocks(self._volume, self._found.seq, _spans(first, wanted))
        found = self._link.ask(question, said.BlocksFound, session)
        places = np.flatnonzero(wanted)
        marks = marks_array(found.marks, len(places))
        damage = dict(found.damage)
        data = found.data
        sound = [index for index in range(len(places)) if index not in damage]
        if len(data) != len(sound) * BLOCK_BYTES:
            raise self._link.broken(f"{len(data)} bytes for {len(sound)} blocks")
        blocks = [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]
        if b"".join([xxhash.xxh3_128_digest(block) for block in blocks]) != marks[sound].tobytes():
            raise Damaged(f"{self._link.address}: blocks came with a fingerprint that they do not match")
        if out is not None:
            for block, place in zip(blocks, places[sound].tolist(), strict=True):
                out[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES] = block
        self._blocks.cache.insert(addresses[places[sound]], marks[sound], data, session)
        if damage and out is not None:
            raise Damaged(f"{self._link.address}: {next(iter(damage.values()))}")

    # -- ahead -------------------------------------------------------------------------------------------------------

    def _look_ahead(self, first: int, count: int) -> None:
        end = -(-self.size // BLOCK_BYTES)
        for chunk in self._reading.chunks(first, count, end):
            start = chunk * FETCH_BLOCKS_MAX

            def fetch(start: int = start) -> None:
                some = min(FETCH_BLOCKS_MAX, end - start)
                self._in_one_session(lambda session: self._bring(start, some, session))

            if not self._blocks.fetch_ahead((self._volume, self._found.seq, chunk), fetch):
                self._reading.put_off(chunk)
                return


def _spans(first: int, wanted: Mask) -> tuple[said.Span, ...]:
    """The runs of what is wanted, from block `first` on."""
    edges = np.flatnonzero(np.diff(wanted.astype(np.int8), prepend=0, append=0)).tolist()
    return tuple((first + begin, end - begin) for begin, end in zip(edges[::2], edges[1::2], strict=True))

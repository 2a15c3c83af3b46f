"""Answers what a reader asks about the past of one group. Synchronous; several threads may answer at a time.

Invariants:
- what is read is the group's own: blocks are asked for by their place in a volume, never by an address;
- pointers and blocks are of exactly the moment that was asked for: once it is thinned out and not held, MomentGone;
- bounded: IMAGES_MAX images, one listing of each kind, pages.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeVar

import numpy as np
import xxhash

from dedup.errors import Damaged, MomentGone, RewindError
from dedup.history import ByteRange
from dedup.image import Image
from dedup.layout import LEAF_BLOCKS
from dedup.pointer_map import Addresses
from dedup.reader import GroupReader, StoreReader
from dedup.types import BLOCK_BYTES, HOLE, Address, Seq, Snapshot, TimeNs, VolumeId
from replication import history_queries as said
from replication.history_queries import PAGE_BYTES, Answer, Question
from replication.hold_pace import HoldPace
from replication.messages import FINGERPRINT_BYTES

IMAGES_MAX: Final = 16
"""Images kept, each at most some 4 MiB of decoded pointers and the overlay of its moment."""
RANGES_PER_PAGE: Final = 16384
SCAN_BYTES: Final = 1 << 36
"""How much of a volume is looked through for data before the answer is that there is none so far."""
HOLDS_MAX: Final = 4096
"""Moments that one reader may hold."""
_VOLUME_BYTES: Final = 64
"""About what a volume or a name takes, apart from its path."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Opened:
    """An image, and its moment."""

    image: Image
    seq: Seq
    time: TimeNs


class _Walk:
    """Ranges that are being paged through: who asks for the next page goes on where the last one ended."""

    def __init__(self, sides: tuple[said.Side | None, said.Side | None], ranges: Iterator[ByteRange], at: int) -> None:
        self.sides = sides
        self.ranges = ranges
        self.at = at


class HistoryAnswers:
    """Answers the questions of one reader over its own `StoreReader`, which the caller closes."""

    def __init__(self, store: StoreReader, group: str) -> None:
        """UnknownName."""
        self._store = store
        self._group: GroupReader = store.group(group)
        self._turn = threading.Lock()
        """For the group's reader, which is not for two threads at once."""
        self._images: OrderedDict[tuple[int, int], _Opened] = OrderedDict()
        self._holds: Counter[int] = Counter()
        self._pace = HoldPace()
        self._names: list[Snapshot] = []
        self._paths: tuple[frozenset[str], int, list[str]] = (frozenset(), 0, [])
        self._walk: _Walk | None = None

    def answer(self, question: Question) -> Answer:
        """The answer; an error of the store is an answer, too. May wait for a disk, or for the writer."""
        try:
            match question:
                case said.Blocks():
                    return self._blocks(question)
                case said.Pointers():
                    return self._pointers(question)
                case said.Marks():
                    return self._marks(question)
                case said.Hold(seq):
                    return self._hold(Seq(seq))
                case said.Allocated(volume, seq):
                    return self._through(volume, seq, lambda opened: said.AllocatedFound(opened.image.allocated()))
                case said.NextData(volume, seq, offset):
                    return self._through(volume, seq, lambda opened: _next_data(opened.image, offset))
                case _:
                    with self._turn:
                        return self._in_turn(question)
        except RewindError as error:
            return said.refused(error)

    def _in_turn(self, question: Question) -> Answer:
        group = self._group
        match question:
            case said.Refresh():
                group.refresh()
                return said.Refreshed(group.name, group.covered_until, group.rewritten)
            case said.Names(start):
                return self._names_from(start)
            case said.Name(name):
                found = group.snapshot(name)
                return said.NamesPage(() if found is None else (found,), None)
            case said.Paths(known, start):
                return self._paths_from(known, start)
            case said.Resolve(text, now):
                return said.Resolved(group.resolve(text, now=None if now is None else TimeNs(now)))
            case said.Groups(seqs, start):
                return self._groups(seqs, start)
            case said.ImageAt(volume, seq):
                opened = self._open_image(VolumeId(volume), Seq(seq))
                return said.ImageFound(opened.seq, opened.time, opened.image.size, opened.image.label)
            case said.Differing(old, new, start):
                return self._differing(old, new, start)
            case said.Release(seq):
                if self._holds[seq]:
                    self._holds[seq] -= 1
                    if not self._holds[seq]:
                        del self._holds[seq]
                    group.release(Seq(seq))
                return said.Done()
            case said.Require(seq):
                group.require(Seq(seq))
                return said.Done()
        raise AssertionError(f"{type(question).__name__} is answered elsewhere")

    # -- names and moments -------------------------------------------------------------------------------------------

    def _names_from(self, start: int) -> said.NamesPage:
        if not start:
            self._names = self._group.snapshots()
        page = _page(self._names[start:], lambda snapshot: len(snapshot.name) + _VOLUME_BYTES)
        return said.NamesPage(tuple(page), _next(start, page, self._names))

    def _paths_from(self, known: int, start: int) -> said.PathsPage:
        was, version, listed = self._paths
        if not start:
            paths = self._group.paths()
            if paths is not was:
                version, listed = version + 1, sorted(paths)
                self._paths = paths, version, listed
            if version == known:
                return said.PathsPage(version, (), None)
        page = _page(listed[start:], lambda path: 4 * len(path))
        return said.PathsPage(version, tuple(page), _next(start, page, listed))

    def _groups(self, seqs: Sequence[int], start: int) -> said.GroupsPage:
        found: list[said.GroupPage] = []
        room = PAGE_BYTES
        for seq in seqs:
            group = self._group.group_at(Seq(seq))
            volumes = sorted(group.volumes.values(), key=lambda state: state.volume)
            page = _page(volumes[start:], lambda state: 4 * len(state.path) + _VOLUME_BYTES, room)
            following = _next(start, page, volumes)
            if following is not None and found:
                break
            found.append(said.GroupPage(group.moment, tuple(page)))
            if following is not None or start:
                return said.GroupsPage(tuple(found), following)
            room -= sum(4 * len(state.path) + _VOLUME_BYTES for state in page) + _VOLUME_BYTES
            if room <= 0:
                break
        return said.GroupsPage(tuple(found), None)

    def _differing(self, old: said.Side | None, new: said.Side | None, start: int) -> said.Ranges:
        walk = self._walk
        if walk is None or walk.sides != (old, new) or walk.at != start or not start:
            sides = [None if side is None else (VolumeId(side[0]), Seq(side[1])) for side in (old, new)]
            for side in sides:
                if side is not None:
                    self._group.require(side[1])
            walk = _Walk((old, new), self._group.differing(sides[0], sides[1], start), start)
        self._walk = None
        page = [(found.offset, found.length) for found in islice(walk.ranges, RANGES_PER_PAGE)]
        if len(page) < RANGES_PER_PAGE:
            return said.Ranges(tuple(page), None)
        self._walk, walk.at = walk, sum(page[-1])
        return said.Ranges(tuple(page), walk.at)

    def _hold(self, seq: Seq) -> Answer:
        # Whoever waits for the writer, which is changing history, has no turn meanwhile.
        with self._pace.inside(self._group.enter, self._group.leave), self._turn:
            if sum(self._holds.values()) >= HOLDS_MAX:
                return said.Refused("StoreBusy", f"{HOLDS_MAX} moments are held already; close some files")
            self._group.hold(seq)
            self._holds[seq] += 1
            # Made before it was held, an image would end with the next thinning.
            for key in [key for key in self._images if key[1] == seq]:
                del self._images[key]
            return said.Held(self._group.view(seq).state.time)

    # -- images ------------------------------------------------------------------------------------------------------

    def _open_image(self, volume: VolumeId, seq: Seq) -> _Opened:
        """A new one, in its turn."""
        state = self._group.view(seq).state
        opened = _Opened(self._group.image(volume, seq), state.held, state.time)
        self._group.require(opened.seq)
        self._images[volume, opened.seq] = opened
        if len(self._images) > IMAGES_MAX:
            self._images.popitem(last=False)
        return opened

    def _opened(self, volume: int, seq: int) -> _Opened:
        """The image at exactly `seq`. MomentGone."""
        with self._turn:
            opened = self._images.get((volume, seq))
            if opened is not None:
                self._images.move_to_end((volume, seq))
                return opened
            opened = self._open_image(VolumeId(volume), Seq(seq))
            if opened.seq != seq:
                raise MomentGone(f"group {self._group.name}: seq={seq} has been thinned out; look the moment up again")
            return opened

    def _through(self, volume: int, seq: int, step: Callable[[_Opened], _T]) -> _T:
        """What the step makes of the image; once more with a new one, for it may have been held only since."""
        try:
            return step(self._opened(volume, seq))
        except MomentGone:
            with self._turn:
                self._images.pop((volume, seq), None)
            return step(self._opened(volume, seq))

    def _addresses(self, opened: _Opened, spans: Iterable[said.Span]) -> Addresses:
        return np.concatenate([opened.image.addresses(first, count) for first, count in spans])

    def _pointers(self, question: said.Pointers) -> Answer:
        spans = [(leaf * LEAF_BLOCKS, LEAF_BLOCKS) for leaf in range(question.leaf, question.leaf + question.count)]
        found = self._through(question.volume, question.seq, lambda opened: self._addresses(opened, spans))
        return said.PointersFound(said.steps_of(found))

    def _marks(self, question: said.Marks) -> Answer:
        found = self._through(question.volume, question.seq, lambda opened: self._addresses(opened, question.spans))
        return said.MarksFound(b"".join(map(self._mark, found.tolist())))

    def _mark(self, where: Address) -> bytes:
        try:
            return bytes(FINGERPRINT_BYTES) if where == HOLE else self._store.pool.fingerprints(where)
        except Damaged:
            return bytes(FINGERPRINT_BYTES)

    def _blocks(self, question: said.Blocks) -> Answer:
        found = self._through(question.volume, question.seq, lambda opened: self._addresses(opened, question.spans))
        present = found[found != HOLE]
        data = memoryview(bytearray(len(present) * BLOCK_BYTES))
        damage: dict[int, str] = {}
        try:
            self._store.pool.read_addresses(present, data)
        except Damaged:
            damage = self._read_singly(present, data)
        if damage:
            with self._turn:
                # Swept, perhaps, and not damaged: once a moment is thinned out its blocks may go.
                self._group.refresh()
                self._group.require(Seq(question.seq))
        blocks = [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]
        sound = np.array([index for index in range(len(blocks)) if index not in damage], dtype=np.intp)
        if damage:
            blocks = [blocks[index] for index in sound.tolist()]
            data = memoryview(b"".join(blocks))
        places = np.flatnonzero(found != HOLE)
        marks = np.zeros(len(found), dtype=f"V{FINGERPRINT_BYTES}")
        # What was read matches its fingerprint, so this is the one that the store has.
        digests = b"".join([xxhash.xxh3_128_digest(block) for block in blocks])
        marks[places[sound]] = np.frombuffer(digests, dtype=marks.dtype)
        told = tuple((int(places[index]), text) for index, text in damage.items())
        return said.BlocksFound(marks.tobytes(), data, told)

    def _read_singly(self, addresses: Addresses, data: memoryview) -> dict[int, str]:
        """Reads each block by itself; what is wrong with those that are damaged, by their number."""
        damage = {}
        for index, where in enumerate(addresses.tolist()):
            try:
                data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] = self._store.pool.read_block(where)
            except Damaged as error:
                damage[index] = " ".join(str(error).split())[: said.DAMAGE_CHARACTERS_MAX]
        return damage


def _next_data(image: Image, offset: int) -> said.At:
    until = (offset + SCAN_BYTES) // BLOCK_BYTES * BLOCK_BYTES
    found = image.next_data(offset, until=until)
    return said.At(found, found < until or found >= image.size)


def _page(items: Sequence[_T], weight: Callable[[_T], int], room: int = PAGE_BYTES) -> list[_T]:
    """The first of them that fit; one at least, where there is any."""
    page: list[_T] = []
    for item in items:
        room -= weight(item)
        if page and room < 0:
            break
        page.append(item)
    return page


def _next(start: int, page: Sequence[object], whole: Sequence[object]) -> int | None:
    end = start + len(page)
    return end if end < len(whole) else None

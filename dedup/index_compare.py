"""Holds a group's index against its journal: `index-equals-journal`. Every checkpoint, not the last one alone.

Invariants:
- what is compared was read in the index as of the anchors known when the comparison began;
- memory is bounded by a window of leaves (`head_replay`); what does not fit is replayed again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import lmdb
import numpy as np

from dedup.catalog import Catalog, Index, Txn
from dedup.damage import Check, Damage
from dedup.errors import Damaged
from dedup.gaps import merged
from dedup.group_state import Checkpoint, GroupState
from dedup.head_replay import HeadReplay
from dedup.layout import ANCHOR_KEY, LEAF_BLOCKS, POINTER_KEY, SEGMENT_HEADER_BYTES, SLOT_BITS, SLOT_MASK
from dedup.metadata_journal import JournalPosition, Logged
from dedup.pointer_map import LeafKey, split_key
from dedup.reachability import consecutive
from dedup.types import BLOCK_BYTES, Gap, RunStart, Seq, Snapshot, VolumeId, VolumeState

_DRAIN_POINTERS: Final = 1 << 15
_DRAIN_RECORDS: Final = 1 << 13
"""What the replay's overlay holds at most before it goes into the leaves."""
_ANCHORS_PER_REQUEST: Final = 1024


class IndexRefused(Exception):
    """The index, not the journal, is what could not be read. Never leaves `verify`."""


@contextmanager
def _index() -> Iterator[None]:
    try:
        yield
    except (Damaged, lmdb.Error) as error:
        raise IndexRefused(str(error)) from error


AtAnchor = Callable[[Checkpoint, "Replay"], None]


class Replay:
    """What replaying the journal gives: a state, and the leaves of one window as of the last `drain`."""

    def __init__(self, head: HeadReplay, anchors: Iterator[Checkpoint], at_anchor: AtAnchor) -> None:
        self.head = head
        self.state = GroupState()
        self.names: dict[str, Snapshot] = {}
        self.gaps: dict[int, Gap] = {}
        self.runs: dict[int, RunStart] = {}
        self.volumes_changed = False
        """Whether any volume changed since the last anchor."""
        self._anchors = anchors
        self._at_anchor = at_anchor
        with _index():
            self.anchor = next(anchors, None)
            """The next one to be met; None when all were."""
        if self.anchor is not None and not self.anchor.held:
            self._met(self.anchor)

    def take(self, logged: Logged, position: JournalPosition) -> None:
        """The next entry, which ends at `position`. Damaged when it contradicts what came before; IndexRefused."""
        self.begin_segment(position.segment)
        if self.anchor is None:
            self.state.apply(logged)
            self.state.checkpointed()
            return
        self.state.apply(logged)
        if self.state.overlay.count >= _DRAIN_POINTERS or self.state.records >= _DRAIN_RECORDS:
            self.drain()
        if position == self.anchor.position:
            self.drain()
            self._met(self.anchor)

    def begin_segment(self, first: Seq) -> None:
        """What follows lies in that segment: a checkpoint at its start is met, as one at the end of the one before."""
        anchor = self.anchor
        if anchor is None or anchor.held != self.state.held:
            return
        if (anchor.position.segment, anchor.position.offset) == (first, SEGMENT_HEADER_BYTES):
            self.drain()
            self._met(anchor)

    def _met(self, anchor: Checkpoint) -> None:
        with _index():
            self._at_anchor(anchor, self)
            self.anchor = next(self._anchors, None)
        self.head.touched.clear()
        self.volumes_changed = False

    def drain(self) -> None:
        """Everything applied is in `head`, `names` and so on."""
        state = self.state
        self.head.take(state.overlay)
        for name, snapshot in state.new_snapshots.items():
            if snapshot is None:
                self.names.pop(name, None)
            else:
                self.names[name] = snapshot
        self.gaps.update((gap.first, gap) for gap in state.new_gaps)
        self.runs.update((run.run, run) for run in state.new_runs)
        self.volumes_changed = self.volumes_changed or bool(state.new_volumes)
        state.checkpointed()


class IndexCompare:
    """Adds what differs to the check of one group. Nothing here changes the index."""

    def __init__(self, index: Index, catalog: Catalog, check: Check, name: str, last: Seq) -> None:
        """`last` is the seq of the last checkpoint: its leaves are left to `window`."""
        self._last = last
        self._index = index
        self._catalog = catalog
        self._check = check
        self._name = name

    def add(self, what: str, **where: str | int) -> None:
        self._check.add(Damage(what, group=self._name, **where))  # type: ignore[arg-type]

    def anchors(self) -> Iterator[Checkpoint]:
        """Every checkpoint up to the last, ascending. Damaged."""
        last = self._last
        start = ANCHOR_KEY.pack(self._catalog.group_id, 0)
        prefix = start[:2]
        while start:
            found: list[Checkpoint] = []
            with self._index.read() as txn:
                with txn.cursor(self._index.db["anchors"]) as cursor:
                    more = cursor.set_range(start)
                    seqs: list[Seq] = []
                    while more and cursor.key().startswith(prefix) and len(seqs) < _ANCHORS_PER_REQUEST:
                        seqs.append(Seq(int.from_bytes(cursor.key()[2:], "big")))
                        more = cursor.next()
                for seq in seqs:
                    if seq <= last and (anchor := self._catalog.anchor(txn, seq)) is not None:
                        found.append(anchor)
            yield from found
            start = ANCHOR_KEY.pack(self._catalog.group_id, seqs[-1] + 1) if seqs and seqs[-1] < last else b""

    def at_anchor(self, anchor: Checkpoint, replay: Replay) -> None:
        """What the checkpoint says, and what of the window changed since the one before."""
        self._check.items += 1
        said = replay.state.checkpoint(anchor.position)
        if said != anchor:
            self.add(f"the checkpoint of seq {anchor.held} says other than the journal: {anchor}")
        if replay.volumes_changed:
            with self._index.read() as txn:
                self._volumes(txn, anchor, replay.state.volumes)
        self.leaves_at_anchor(anchor, replay)

    def leaves_at_anchor(self, anchor: Checkpoint, replay: Replay) -> None:
        """The leaves of the window that changed since the checkpoint before."""
        with self._index.read() as txn:
            for key in sorted(replay.head.touched) if anchor.held < self._last else ():
                if replay.head.covers(key):
                    self._leaf(txn, key, anchor.held, replay.head, replay.state.volumes)

    def names(self, held: Mapping[str, Snapshot], replay: Replay) -> None:
        self._each("name", held, replay.names)

    def gaps(self, held: list[Gap], replay: Replay) -> None:
        self._each("gap", {gap.first: gap for gap in held}, {gap.first: gap for gap in merged(replay.gaps.values())})

    def runs(self, held: list[RunStart], replay: Replay) -> None:
        self._each("clock run", {run.run: run for run in held}, replay.runs)

    def _volumes(self, txn: Txn, anchor: Checkpoint, said: Mapping[VolumeId, VolumeState]) -> None:
        held = self._catalog.state(txn, anchor).volumes
        for number in sorted({*held, *said}):
            self._check.items += 1
            one, other = held.get(number), said.get(number)
            if one != other:
                path = (other or one or VolumeState(number, "", 0, 0, 0, 0)).path
                self.add(f"as of seq {anchor.held} the index says {one}, the journal {other}", volume=path)

    def _each(self, what: str, held: Mapping[Any, object], said: Mapping[Any, object]) -> None:
        for key in sorted({*held, *said}):
            self._check.items += 1
            if held.get(key) != said.get(key):
                self.add(f"{what} {key}: the index says {held.get(key)}, the journal {said.get(key)}")

    def window(self, seq: Seq, head: HeadReplay, volumes: Mapping[VolumeId, VolumeState]) -> None:
        """Every leaf of the window as of the last checkpoint, `seq`, also those that only one of the two has."""
        with self._index.read() as txn:
            previous: LeafKey | None = None
            for key in heapq.merge(head.leaves(), self._indexed_leaves(txn, head)):
                if key != previous:
                    self._leaf(txn, key, seq, head, volumes)
                previous = key

    def _leaf(
        self, txn: Txn, key: LeafKey, seq: Seq, head: HeadReplay, volumes: Mapping[VolumeId, VolumeState]
    ) -> None:
        self._check.items += 1
        try:
            held = self._catalog.pointers.leaf(txn, *key, seq)
        except Damaged as error:
            self._check.add(leaf_damage(self._name, volumes, key, f"{error} (seq={seq})", 0, LEAF_BLOCKS))
            return
        said = head.leaf(key)
        differs = np.flatnonzero(said if held is None else held != said)
        for first, count in consecutive(differs):
            shown = 0 if held is None else int(held[first])
            what = f"the pointer map of seq {seq} says {_shown(shown)}, the journal {_shown(int(said[first]))}"
            self._check.add(leaf_damage(self._name, volumes, key, what, first, count))

    def _indexed_leaves(self, txn: Txn, head: HeadReplay) -> Iterator[LeafKey]:
        """Leaves of the window that the index has, ascending."""
        group_id = self._catalog.group_id
        volume = _next_volume(self._index, txn, group_id, head.start[0])
        while volume is not None:
            first = head.start[1] if volume == head.start[0] else 0
            for leaf in self._catalog.pointers.leaves(txn, volume, first):
                if not head.covers((volume, leaf)):
                    return
                yield volume, leaf
            volume = _next_volume(self._index, txn, group_id, VolumeId(volume + 1))


def leaf_damage(
    group: str, volumes: Mapping[VolumeId, VolumeState], key: LeafKey, what: str, first: int, count: int
) -> Damage:
    """Blocks first..first + count of a leaf, as a range of its volume."""
    volume, leaf = key
    state = volumes.get(volume)
    path = f"volume {volume}" if state is None else state.path
    offset = (leaf * LEAF_BLOCKS + first) * BLOCK_BYTES
    return Damage(what, None, group, None, path, offset, count * BLOCK_BYTES)


def _shown(where: int) -> str:
    return f"container {where >> SLOT_BITS} slot {where & SLOT_MASK}" if where else "a hole"


def _next_volume(index: Index, txn: Txn, group_id: int, first: VolumeId) -> VolumeId | None:
    """The first volume at or after `first` that has a pointer map."""
    with txn.cursor(index.db["pointers"]) as cursor:
        if not cursor.set_range(POINTER_KEY.pack(group_id, first, 0, 0)):
            return None
        group, volume, _, _ = split_key(cursor.key())
        return volume if group == group_id else None

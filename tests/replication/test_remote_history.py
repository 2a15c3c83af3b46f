"""A history over a link says what the store's own reader says, byte for byte, whatever the link and the store do."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from dedup.errors import BadTime, Damaged, MomentGone, RewindError, UnknownName, WouldBlock
from dedup.history import ByteRange, History
from dedup.layout import RAW_SLOTS_OFFSET, container_path
from dedup.pins import ReaderPins
from dedup.reader import GroupReader, StoreReader
from dedup.store import Store
from dedup.types import BLOCK_BYTES, ContainerId, Extent, Resize, Seq, VolumeId, Write
from fusefs.snapshot_mount import _image_of
from fusefs.snapshot_tree import SnapshotFile
from replication import history_answers
from replication import history_queries as said
from replication.block_cache import CACHE_BYTES_MIN, BlockCache
from replication.errors import ProtocolError
from replication.history_answers import HistoryAnswers
from replication.history_queries import Answer, Question
from replication.remote_history import RemoteHistory
from tests.dedup import model
from tests.dedup.thinned_world import POLICY, STEP_NS, World
from tests.fusefs.snapshot_history import GROUP
from tests.fusefs.snapshot_history import History as SmallHistory
from tests.replication.direct_link import DirectLink


@dataclass
class Remote:
    """A remote history, and what is behind it."""

    link: DirectLink
    cache: BlockCache
    history: RemoteHistory

    def close(self) -> None:
        self.history.close()
        self.cache.close()


def remote_of(answers: HistoryAnswers, directory: Path) -> Remote:
    link = DirectLink(answers)
    cache = BlockCache(directory, CACHE_BYTES_MIN)
    return Remote(link, cache, RemoteHistory(link, cache))  # type: ignore[arg-type]


def answers_over(store: Store, group: str, pins: ReaderPins | None) -> HistoryAnswers:
    """Beside the store's writer, in its process: over its index."""
    return HistoryAnswers(StoreReader(store.path, store.storage, store.index, store.pool, pins), group)


def said_by(call: Callable[[], Any]) -> Any:
    """What it returns, or which error it raises, in which words."""
    try:
        return call()
    except RewindError as error:
        return type(error), str(error)


def check_same_image(near: History, far: History, volume: VolumeId, seq: Seq, rng: random.Random) -> None:
    one, other = (said_by(lambda history=history: history.image(volume, seq)) for history in (near, far))
    if isinstance(one, tuple):
        assert other == one
        return
    assert (other.size, other.label) == (one.size, one.label)
    ranges = [(0, one.size), *((rng.randrange(one.size + 9000), rng.randrange(1, 40_000)) for _ in range(4))]
    for offset, length in ranges:
        content = one.read(offset, length)
        assert other.read(offset, length) == content
        with suppress(WouldBlock):  # all of it is cached now, but a file system may not tell what it has in memory
            assert other.read(offset, length, wait=False) == content
        assert other.next_data(offset) == one.next_data(offset)
    assert other.allocated() == one.allocated()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallHistory]:
    """A group with renames, resizes, retired volumes and names of every kind."""
    made = SmallHistory(tmp_path / "store")
    yield made
    made.close()


def test_it_says_what_the_reader_says(small: SmallHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = small.refused_write()
    for page_bytes in (said.PAGE_BYTES, 200, 1):
        monkeypatch.setattr(history_answers, "PAGE_BYTES", page_bytes)
        monkeypatch.setattr(history_answers._page, "__defaults__", (page_bytes,))
        near = StoreReader(small.path, small.store.storage, small.store.index, small.store.pool).group(GROUP)
        remote = remote_of(answers_over(small.store, GROUP, None), tmp_path)
        far = remote.history
        rng = random.Random(page_bytes)
        assert (far.name, far.covered_until) == (near.name, near.covered_until)
        assert far.snapshots() == near.snapshots()
        assert far.paths() == near.paths() and far.paths() is far.paths()
        times = [
            "latest",
            "base",
            "early",
            "x.img",
            "nothing",
            "seq=1",
            f"seq={refused}",
            "late~flush",
            "1970-01-01",
            "~",
        ]
        for text in [*times, *(f"seq={rng.randrange(small.model.seq + 2)}" for _ in range(20))]:
            resolved = [said_by(lambda h=h, text=text: h.resolve(text)) for h in (near, far)]
            assert resolved[0] == resolved[1], text
            assert far.snapshot(text) == near.snapshot(text)
        moments = [Seq(seq) for seq in rng.sample(range(small.model.seq + 3), 12)]
        for seq in moments:
            assert far.group_at(seq) == near.group_at(seq)
            for volume in (small.disk, small.first, small.gone, VolumeId(99)):
                check_same_image(near, far, volume, seq, rng)
            other = rng.choice(moments)
            for old, new in [((small.disk, other), (small.disk, seq)), (None, (small.first, seq))]:
                pair = [said_by(lambda h=h, old=old, new=new: list(h.differing(old, new, 9000))) for h in (near, far)]
                assert pair[0] == pair[1]
        assert remote.link.breaks == 0
        remote.close()


def test_ranges_go_on_over_pages(small: SmallHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = StoreReader(small.path, small.store.storage, small.store.index, small.store.pool).group(GROUP)
    old, new = (small.disk, Seq(small.moments["early"])), (small.disk, Seq(small.model.seq))
    expected = list(near.differing(old, new))
    assert len(expected) > 10
    for rows in (1, 3, len(expected)):
        monkeypatch.setattr(history_answers, "RANGES_PER_PAGE", rows)
        remote = remote_of(answers_over(small.store, GROUP, None), tmp_path)
        assert list(remote.history.differing(old, new)) == expected
        ranges = remote.history.differing(old, new)
        assert next(ranges) == expected[0]
        remote.link.session(answers_over(small.store, GROUP, None))  # another one that knows of no page
        assert list(ranges) == expected[1:]
        remote.close()
    whole = [(0, 4096), (4096, 4096), (12288, 1)]
    pages = iter([said.Ranges((whole[0],), 4096), said.Ranges((whole[1],), 12288), said.Ranges((whole[2],), None)])
    remote = remote_of(answers_over(small.store, GROUP, None), tmp_path)
    remote.link.mangle = lambda question, answer: next(pages) if isinstance(question, said.Differing) else answer
    assert list(remote.history.differing(old, new)) == [ByteRange(0, 8192), ByteRange(12288, 1)]
    remote.close()


def test_what_is_thinned_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "STEP_NS", STEP_NS)
    thinned, shown = go_back_while_it_is_thinned(tmp_path, 5, 60)
    assert thinned > 2 and shown > 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_what_is_thinned_meanwhile_at_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(model, "STEP_NS", STEP_NS)
    thinned, shown = go_back_while_it_is_thinned(tmp_path, seed, 100)
    assert thinned > 5 and shown > 20


def go_back_while_it_is_thinned(tmp_path: Path, seed: int, steps: int) -> tuple[int, int]:
    """Steps of a writer and of somebody who goes back, near and from afar; sessions come and go. How many pieces were
    thinned, and how often a held image was read."""
    world = World(tmp_path / "store")
    pins = ReaderPins.open(world.path, world.store.storage)
    far_pins = ReaderPins.open(world.path, world.store.storage)
    near: GroupReader = world.open_reader(world.store.storage, pins)
    remote = remote_of(answers_over(world.store, "g", far_pins), tmp_path)
    far = remote.history
    rng = random.Random(seed)
    held: list[Seq] = []
    images: dict[Seq, Any] = {}
    thinned = shown = 0
    for step in range(steps):
        match rng.randrange(6):
            case 0 | 1:
                world.history(2)
            case 2:
                thinned += world.thin(POLICY).pieces
            case 3:
                old_pins, far_pins = far_pins, ReaderPins.open(world.path, world.store.storage)
                remote.link.session(answers_over(world.store, "g", far_pins))
                old_pins.close()
            case 4:
                # All of them, for what is held is not thinned, nor what is around it.
                for seq in held:
                    near.release(seq)
                    far.release(seq)
                held.clear()
                images.clear()
                thinned += world.thin(POLICY).pieces
            case _ if len(held) < 3:
                kept = [seq for seq in world.kept() if world.has_volume(seq)]
                seq = Seq(rng.choice(kept[-4:] if step % 2 else kept))
                outcome = [said_by(lambda h=h, seq=seq: h.hold(seq)) for h in (near, far)]
                assert outcome[0] == outcome[1]
                if outcome[0] is None:
                    held.append(seq)
                    if world.has_volume(seq):
                        images[seq] = far.image(world.volume, seq)
        near.refresh()
        far.refresh()
        seq = Seq(rng.randrange(world.model.seq + 1))
        assert far.group_at(seq) == near.group_at(seq), step
        check_same_image(near, far, world.volume, seq, rng)
        for seq, image in images.items():
            assert image.read(0, image.size) == world.content(seq), f"step {step}, seq {seq}"
            shown += 1
    remote.close()
    pins.close()
    far_pins.close()
    world.close()
    return thinned, shown


def test_a_moment_that_goes_while_nobody_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "STEP_NS", STEP_NS)
    world = World(tmp_path / "store")
    pins = ReaderPins.open(world.path, world.store.storage)
    world.history(12)
    world.store.checkpoint()
    remote = remote_of(answers_over(world.store, "g", pins), tmp_path)
    far = remote.history
    kept, gone = (Seq(seq) for seq in kept_and_gone(world))
    images = {seq: far.image(world.volume, seq) for seq in (kept, gone)}
    for seq in (kept, gone):
        far.hold(seq)
        far.hold(seq)
    # The session ends, and with it its pins; history is thinned before there is another one.
    pins.close()
    pins = ReaderPins.open(world.path, world.store.storage)
    world.thin(POLICY)
    assert gone not in world.kept()
    remote.link.session(answers_over(world.store, "g", pins))
    far.refresh()
    assert not far.hold_again(gone)
    with pytest.raises(MomentGone):
        images[gone].read(0, 4096)
    with pytest.raises(MomentGone):
        far.hold(gone)
    if kept in world.kept():
        assert far.hold_again(kept)
        assert images[kept].read(0, world.size) == world.content(kept)
        far.release(kept)
    for seq in (kept, kept, gone, gone):
        far.release(seq)
    remote.close()
    pins.close()
    world.close()


def test_pages_are_of_the_moments_that_were_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of what is told from others at that seq by the time the next page is asked for."""
    monkeypatch.setattr(model, "STEP_NS", STEP_NS)
    monkeypatch.setattr(history_answers, "RANGES_PER_PAGE", 1)
    world = World(tmp_path / "store")
    pins = ReaderPins.open(world.path, world.store.storage)
    world.history(12)
    world.store.checkpoint()
    remote = remote_of(answers_over(world.store, "g", pins), tmp_path)
    far = remote.history
    kept, gone = (Seq(seq) for seq in kept_and_gone(world))
    last = Seq(world.model.seq)
    ranges = far.differing((world.volume, gone), (world.volume, last))  # the first page
    assert list(far.differing(None, (world.volume, kept)))  # what is paged through there is another comparison
    world.thin(POLICY)
    assert gone not in world.kept()
    far.refresh()
    with pytest.raises(MomentGone):
        list(ranges)
    remote.close()
    pins.close()
    world.close()


def test_a_text_that_cannot_be_said_is_no_name_of_anything(small: SmallHistory, tmp_path: Path) -> None:
    remote = remote_of(answers_over(small.store, GROUP, None), tmp_path)
    asked = len(remote.link.asked)
    for text in ("\udcff", "bookmark=\udcff", "x" * (said.TEXT_CHARACTERS_MAX + 1)):
        with pytest.raises(BadTime, match="is no TIME"):
            remote.history.resolve(text)
        assert remote.history.snapshot(text) is None
    assert len(remote.link.asked) == asked
    remote.close()


def test_what_is_held_no_more_takes_no_room(small: SmallHistory) -> None:
    pins = ReaderPins.open(small.path, small.store.storage)
    answers = answers_over(small.store, GROUP, pins)
    seqs = sorted(set(small.moments.values()))
    for question in (said.Hold, said.Hold, said.Release, said.Release, said.Release):
        for seq in seqs:
            assert not isinstance(answers.answer(question(seq)), said.Refused)
    assert not answers._holds
    pins.close()


def test_blocks_that_were_swept_are_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "STEP_NS", STEP_NS)
    world = World(tmp_path / "store")
    pins = ReaderPins.open(world.path, world.store.storage)
    world.history(12)
    world.store.checkpoint()
    remote = remote_of(answers_over(world.store, "g", pins), tmp_path)
    kept, gone = kept_and_gone(world)
    images = {seq: remote.history.image(world.volume, Seq(seq)) for seq in (kept, gone)}
    for image in images.values():
        image.read(0, BLOCK_BYTES)  # the pointers of all of it are known from here on
    assert world.thin(POLICY).pieces
    for file in (world.path / "containers").iterdir():
        world.store.pool.forget(ContainerId(int(file.stem)))
        file.rename(file.with_suffix(".away"))
    with pytest.raises(MomentGone):
        images[gone].read(0, world.size)
    with pytest.raises(Damaged, match="is missing"):
        images[kept].read(0, world.size)
    remote.close()
    pins.close()
    world.close()


def kept_and_gone(world: World) -> tuple[int, int]:
    """A moment that thinning keeps, and one that it takes."""
    kept = [seq for seq in world.kept() if world.has_volume(seq)]
    return kept[-1], next(seq for seq in kept[5:] if not world.in_gap(seq) and seq not in (kept[0], kept[-1]))


# -- what a cached block may be used for -------------------------------------------------------------------------------


def test_the_next_snapshot_fetches_what_changed(small: SmallHistory, tmp_path: Path) -> None:
    remote = remote_of(answers_over(small.store, GROUP, None), tmp_path)
    early = remote.history.image(small.disk, Seq(small.moments["early"]))
    early.read(0, early.size)
    first, remote.link.blocks = remote.link.blocks, 0
    late = remote.history.image(small.disk, Seq(small.moments["late"]))
    assert late.read(0, late.size) == small.content(small.moments["late"], "disk.img")
    assert first > 700 and 0 < remote.link.blocks < 150
    remote.link.session(answers_over(small.store, GROUP, None))
    remote.link.blocks = 0
    assert late.read(0, late.size) == small.content(small.moments["late"], "disk.img")
    assert remote.link.blocks == 0  # said to be the same, and not sent again
    assert any(isinstance(question, said.Marks) for question in remote.link.asked)
    remote.close()


def test_a_store_put_back_to_an_older_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same id, with other blocks in the same slots at the same seqs: nothing that was read before is used."""
    monkeypatch.setattr(model, "STEP_NS", STEP_NS)
    world = World(tmp_path / "store")
    world.write(5)
    world.close()
    shutil.copytree(world.path, tmp_path / "copy")
    before = deepcopy(world.model)

    def go_on(path: Path, seed: int, elapsed_ns: int) -> Store:
        store = Store.open(path)
        world.store, world.group, world.random = store, store.group("g"), random.Random(seed)
        world.model = deepcopy(before)
        world.model.elapsed_ns = elapsed_ns
        world.write(20)
        return store

    store = go_on(world.path, 1, 0)
    remote = remote_of(answers_over(store, "g", None), tmp_path)
    seen = Seq(world.model.seq)
    image = remote.history.image(world.volume, seen)
    first = image.read(0, image.size)
    assert first == world.content(seen)
    node = SnapshotFile(remote.history.group_at(seen).volume("a.img"), remote.history.resolve(f"seq={seen}"))
    assert _image_of(remote.history, node).read(0, image.size) == first
    remote.history.hold(seen)
    store.close()

    store = go_on(tmp_path / "copy", 2, 1_000_000)
    remote.link.session(answers_over(store, "g", None))
    assert world.content(seen) != first
    with pytest.raises(WouldBlock):
        image.read(0, 4096, wait=False)
    with pytest.raises(MomentGone):
        image.read(0, 4096)
    with pytest.raises(MomentGone, match="another moment now than the one that is held"):
        remote.history.image(world.volume, seen)
    remote.history.release(seen)
    with pytest.raises(MomentGone, match="another moment now, in another copy"):
        _image_of(remote.history, node)  # a file that the kernel has in mind is not another one's bytes from now on
    again = remote.history.image(world.volume, seen)
    assert again.read(0, again.size) == world.content(seen)
    remote.close()
    store.close()


# -- damage, and a peer that lies --------------------------------------------------------------------------------------


def test_a_damaged_block_is_named_and_the_others_are_read(small: SmallHistory, tmp_path: Path) -> None:
    seq = Seq(small.moments["early"])
    near = StoreReader(small.path, small.store.storage, small.store.index, small.store.pool).group(GROUP)
    (where,) = near.image(small.disk, seq).addresses(300, 1).tolist()
    path = container_path(small.path / "containers", where >> 16)
    with open(path, "r+b") as file:
        file.seek(RAW_SLOTS_OFFSET + (where & 0xFFFF) * BLOCK_BYTES + 77)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    remote = remote_of(answers_over(small.store, GROUP, None), tmp_path)
    image = remote.history.image(small.disk, seq)
    content = small.content(seq, "disk.img")
    assert content is not None
    with pytest.raises(Damaged, match=rf"disk.img at seq={seq}, bytes {250 * 4096}\.\..*{path.name}.*does not match"):
        image.read(250 * BLOCK_BYTES, 100 * BLOCK_BYTES)
    asked = len(remote.link.asked)
    for first, count in ((250, 50), (301, 49)):
        found = image.read(first * BLOCK_BYTES, count * BLOCK_BYTES)
        assert found == content[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES]
    later = [question for question in remote.link.asked[asked:] if isinstance(question, said.Blocks)]
    assert all(first >= 350 for question in later for first, _ in question.spans)  # they came beside the damaged one
    remote.close()


LIES: dict[str, Callable[[Any], Any]] = {
    "other data": lambda found: replace(found, data=bytes([found.data[0] ^ 1]) + found.data[1:]),
    "other marks": lambda found: replace(found, marks=found.marks[16:] + found.marks[:16]),
    "less data": lambda found: replace(found, data=found.data[:-1]),
    "fewer marks": lambda found: replace(found, marks=found.marks[16:]),
    "no marks": lambda found: replace(found, marks=bytes(len(found.marks))),
    "another answer": lambda found: said.Done(),
    "a hole": lambda found: replace(found, marks=bytes(16) + found.marks[16:], data=found.data[4096:]),
    "damage": lambda found: replace(found, damage=((0, "gone"),)),
}


def test_pages_that_lead_nowhere_are_refused(
    small: SmallHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = remote_of(answers_over(small.store, GROUP, None), tmp_path)
    far, seq = remote.history, Seq(small.moments["late"])

    def again(_question: Question, answer: Answer) -> Answer:
        if isinstance(answer, said.At):
            return replace(answer, offset=0, final=False)
        if isinstance(answer, said.NamesPage | said.PathsPage | said.GroupsPage | said.Ranges):
            return replace(answer, next=0)
        return answer

    def nothing(question: Question, answer: Answer) -> Answer:
        if isinstance(question, said.Groups):
            return replace(answer, groups=() if question.start else answer.groups, next=1)  # type: ignore[call-arg]
        return answer

    image = far.image(small.disk, seq)
    remote.link.mangle = again
    for call in (
        far.snapshots,
        far.paths,
        lambda: far.group_at(seq),
        lambda: far.differing(None, (small.disk, seq)),
        lambda: image.next_data(0),
    ):
        with pytest.raises(ProtocolError):
            call()
    remote.link.mangle = nothing
    with pytest.raises(ProtocolError, match="0 moments for one"):
        far.group_at(seq)
    assert remote.link.breaks == 6
    remote.close()


@pytest.mark.parametrize("lie", LIES)
def test_what_a_peer_says_wrongly_is_refused_and_never_kept(small: SmallHistory, tmp_path: Path, lie: str) -> None:
    remote = remote_of(answers_over(small.store, GROUP, None), tmp_path)
    seq = Seq(small.moments["late"])
    image = remote.history.image(small.disk, seq)

    def mangle(question: Question, answer: Answer) -> Answer:
        return LIES[lie](answer) if isinstance(question, said.Blocks) else answer  # type: ignore[no-any-return]

    honest, remote.link.mangle = remote.link.mangle, mangle
    with pytest.raises((Damaged, ProtocolError)):
        image.read(0, 100 * BLOCK_BYTES)
    remote.link.mangle = honest
    assert image.read(0, image.size) == small.content(seq, "disk.img")
    remote.close()


IMPOSSIBLE: list[dict[str, Any]] = [
    *({"path": path} for path in ("../out.img", "/etc/out.img", "dir/../../out.img", "dir//x", "", "a\0b")),
    {"size": -1},
    {"size": 1 << 60},
]


@pytest.mark.parametrize("wrong", IMPOSSIBLE, ids=str)
def test_a_volume_that_cannot_be_is_refused(small: SmallHistory, tmp_path: Path, wrong: dict[str, Any]) -> None:
    remote = remote_of(answers_over(small.store, GROUP, None), tmp_path)

    def mangle(question: Question, answer: Answer) -> Answer:
        if not isinstance(answer, said.GroupsPage):
            return answer
        (first, *others) = answer.groups[0].volumes
        lie = replace(answer.groups[0], volumes=(dataclasses.replace(first, **wrong), *others))
        return replace(answer, groups=(lie, *answer.groups[1:]))

    remote.link.mangle = mangle
    with pytest.raises(ProtocolError):
        remote.history.group_at(Seq(small.moments["late"]))
    remote.close()


def test_an_answer_that_a_link_has_changed_is_refused() -> None:
    answer = said.PointersFound(said.steps_of(np.arange(512, dtype=np.uint64)))
    for compress in (False, True):
        body = bytes(said.answer_bytes(answer, compress=compress))
        assert said.answer_of(body) == answer
        for at in range(len(body) if compress else 200):
            with pytest.raises(ProtocolError):
                said.answer_of(body[:at] + bytes([body[at] ^ 0x10]) + body[at + 1 :])
            with pytest.raises(ProtocolError):
                said.answer_of(body[:at])


QUESTION = said.question_bytes(said.Refresh())
MALFORMED = {
    "noise": b"\xff" * 20,
    "empty": b"\x80",
    "more behind it": QUESTION + b"x",
    "a negative number": b"\x82\xa2is\xa4hold\xa3seq\xff",
    "an unknown field": b"\x83\xa2is\xa4hold\xa3seq\x01\xa1x\x01",
    "an unknown question": b"\x81\xa2is\xa5write",
    "too large a number": said.question_bytes(said.Hold(1 << 63)),
    "too many blocks": said.question_bytes(said.Blocks(1, 5, ((0, 200), (300, 57)))),
    "too long a span": said.question_bytes(said.Marks(1, 5, ((0, 257),))),
    "no blocks": said.question_bytes(said.Blocks(1, 5, ())),
    "an empty span": said.question_bytes(said.Blocks(1, 5, ((0, 0),))),
    "too many leaves": said.question_bytes(said.Pointers(1, 5, 0, 17)),
    "too many moments": said.question_bytes(said.Groups((1,) * 65)),
    "too long a text": said.question_bytes(said.Resolve("x" * 4097, None)),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_no_question_is_refused(what: str) -> None:
    with pytest.raises(ProtocolError):
        said.question_of(MALFORMED[what])


def test_a_long_hole_is_looked_through_in_steps(
    small: SmallHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 5 * (1 << 30) + 7
    made = small.model.create("sparse.img", 0)
    small.model.content[made.volume] = b""
    seq, time, run = small.model._next()
    small.group.ingest([made, Resize(seq, time, run, made.volume, size)])
    at = 3 * (1 << 30) + 5000
    seq, time, run = small.model._next()
    small.group.ingest([Write(seq, time, run, Extent(made.volume, at, b"data"))])
    near = StoreReader(small.path, small.store.storage, small.store.index, small.store.pool).group(GROUP)
    for scan_bytes in (1 << 36, 1 << 30, 1 << 29):
        monkeypatch.setattr(history_answers, "SCAN_BYTES", scan_bytes)
        remote = remote_of(answers_over(small.store, GROUP, None), tmp_path)
        image, local = remote.history.image(made.volume, seq), near.image(made.volume, seq)
        data = at // BLOCK_BYTES * BLOCK_BYTES
        for offset, expected in [
            (0, data),
            (4097, data),
            (at, at),
            (data + 4096, size),
            (size, size),
            (size + 9, size),
        ]:
            assert image.next_data(offset) == local.next_data(offset) == expected
        remote.close()


def test_volumes_that_never_were(small: SmallHistory, tmp_path: Path) -> None:
    remote = remote_of(answers_over(small.store, GROUP, None), tmp_path)
    with pytest.raises(UnknownName):
        remote.history.image(VolumeId(77), Seq(3))
    with pytest.raises(UnknownName):
        remote.history.differing((VolumeId(77), Seq(3)), None)
    image = remote.history.image(small.disk, Seq(small.moments["late"]))
    assert image.read(image.size, 4096) == b"" == image.read(image.size + (1 << 40), 4096)
    remote.close()

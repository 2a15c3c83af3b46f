"""Runs of fingerprints whose bytes rot, or that the disk does not give back: what was taken out stays out, for whoever
looks and however; what is merged has an end; only what was hit is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup import fingerprint_merge
from dedup.errors import Damaged, StoreFull, UnknownFormat, Unreadable
from dedup.fingerprint_merge import FingerprintMerge
from dedup.fingerprint_run import (
    RUN_HEADER,
    RUN_MAGIC,
    RUN_PAGE_BYTES,
    RUN_PAGE_ROWS,
    FingerprintRun,
    RunWriter,
    write_run,
)
from dedup.fingerprint_table import halves
from dedup.layout import FORMAT_VERSION, checked, checksum
from dedup.storage import Storage
from dedup.types import HOLE, Address
from tests.dedup.crash_storage import unsynced
from tests.dedup.faults import FaultyStorage, open_descriptors
from tests.dedup.test_fingerprint_runs import rows_of, spread

RUNS, PAGES = 3, 5
ROWS = RUN_PAGE_ROWS * PAGES - 20
FENCES, START = 2 * RUN_PAGE_BYTES, 3 * RUN_PAGE_BYTES
HALVES_BYTES = 2 * RUN_PAGE_ROWS * 8
Entries = dict[bytes, Address]


@pytest.fixture(autouse=True)
def _unsynced() -> Iterator[None]:
    with unsynced():
        yield


def alike(rng: random.Random, count: int) -> list[bytes]:
    """Fingerprints of which some thirty have one first half."""
    return [rng.randrange(count // 30).to_bytes(8, "little") + rng.randbytes(8) for _ in range(count)]


def made(directory: Path, rng: random.Random, *, is_dense: bool = False) -> tuple[list[Path], list[Entries]]:
    """RUNS files of ROWS fingerprints each, and what is in each."""
    marks = iter(dict.fromkeys((alike if is_dense else spread)(rng, RUNS * ROWS)))
    paths, entries = [directory / str(number) for number in range(RUNS)], []
    for number, path in enumerate(paths):
        some = {next(marks): Address(number * ROWS + at) for at in range(1, ROWS + 1)}
        run = write_run(Storage(), path, ROWS, [rows_of(dict(some))])
        assert run is not None and run.page_count == PAGES
        assert path.stat().st_size == START + PAGES * RUN_PAGE_BYTES
        run.close()
        entries.append(some)
    return paths, entries


def found_in(run: FingerprintRun, marks: Sequence[bytes]) -> Entries:
    """Asked for together and one by one, which is the same."""
    high, low = halves(b"".join(marks))
    found = run.find(high, low).tolist()
    assert found == [run.find_one(*one) for one in zip(high.tolist(), low.tolist(), strict=True)]
    return {mark: Address(where) for mark, where in zip(marks, found, strict=True) if where != HOLE}


@dataclass
class Rot:
    """Bytes of a file that become others, and what they were again if nobody wrote there meanwhile."""

    path: Path
    offset: int
    new: bytes
    old: bytes = b""

    def begin(self) -> None:
        with self.path.open("r+b") as file:
            file.seek(self.offset)
            self.old = file.read(len(self.new))
            file.seek(self.offset)
            file.write(self.new[: len(self.old)])

    def end(self) -> None:
        with self.path.open("r+b") as file:
            file.seek(self.offset)
            is_same = file.read(len(self.old)) == self.new[: len(self.old)]
            if is_same and self.new != bytes(RUN_PAGE_BYTES):  # as a removal writes it, too
                file.seek(self.offset)
                file.write(self.old)


@st.composite
def rots(draw: st.DrawFn) -> tuple[int, bytes | int]:
    """Where in a run, and what comes there; a number: these bits flip. Addresses stay: they are of bytes that whoever
    finds them compares."""
    if draw(st.booleans()):
        page = draw(st.integers(0, START // RUN_PAGE_BYTES + PAGES - 1))
        return page * RUN_PAGE_BYTES, bytes([draw(st.integers(0, 255))]) * RUN_PAGE_BYTES
    fence = st.integers(0, PAGES - 1).map(lambda number: FENCES + number * 8)
    header = st.integers(0, RUN_HEADER.size // 8 - 1).map(lambda number: number * 8)
    word = st.integers(0, HALVES_BYTES // 8 - 1) | st.sampled_from([3 * RUN_PAGE_ROWS, 3 * RUN_PAGE_ROWS + 1])
    of_page = st.tuples(st.integers(0, PAGES - 1), word).map(lambda at: START + at[0] * RUN_PAGE_BYTES + at[1] * 8)
    in_filter = st.integers(RUN_PAGE_BYTES // 8, FENCES // 8 - 1).map(lambda number: number * 8)
    what = st.integers(0, 63).map(lambda bit: 1 << bit) | st.binary(min_size=8, max_size=8)
    return draw(st.one_of(of_page, of_page, of_page, fence, header, in_filter)), draw(what)


def rot_of(path: Path, where: tuple[int, bytes | int]) -> Rot:
    offset, what = where
    if isinstance(what, int):
        word = int.from_bytes(path.read_bytes()[offset : offset + 8], "little")
        what = (word ^ what).to_bytes(8, "little")
    return Rot(path, offset, what)


def opened(paths: Sequence[Path]) -> list[FingerprintRun]:
    """Those of them that are not refused."""
    runs = []
    for path in paths:
        try:
            runs.append(FingerprintRun.open(Storage(), path))
        except (Damaged, UnknownFormat):
            continue
    return runs


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)
@given(
    seed=st.integers(0, 1 << 30),
    is_dense=st.booleans(),
    where=rots(),
    begins=st.sampled_from(["before it is opened", "before it is merged", "while it is merged"]),
    drops=st.sampled_from(["before the merge", "in the merge", "after the merge"]),
    ends=st.booleans(),
)
def test_what_was_taken_out_stays_out(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    is_dense: bool,
    where: tuple[int, bytes | int],
    begins: str,
    drops: str,
    ends: bool,
) -> None:
    """A word or a page of one of three runs rots and is right again, before, while and after they are merged."""
    monkeypatch.setattr(fingerprint_merge, "_PAGES_PER_PIECE", (1, 3 * RUNS)[seed % 2])
    rng, directory, known = random.Random(seed), tmp_path_factory.mktemp("rot"), open_descriptors()
    paths, entries = made(directory, rng, is_dense=is_dense)
    whole = entries[0] | entries[1] | entries[2]
    rot = rot_of(paths[1], where)
    taken = dict(rng.sample(sorted(whole.items()), rng.choice((100, len(whole)))))

    if begins == "before it is opened":
        rot.begin()
    runs = opened(paths)
    merge = FingerprintMerge(Storage(), directory / "merged", runs)

    def drop() -> None:
        for run in runs:
            run.drop(list(taken.items()))
        merge.drop(list(taken.items()))
        if ends:
            rot.end()

    def check(those: Sequence[FingerprintRun]) -> None:
        """Of what is there nothing that was taken out is found, and no more is lost than was hit."""
        for run in those:
            which = [*paths, directory / "merged"].index(run.path)
            wanted = (*entries, whole)[which].items() - taken.items()
            found = found_in(run, list((*entries, whole)[which]))
            assert found.items() <= wanted
            hit = which == 1 or which == RUNS
            assert len(wanted - found.items()) <= (RUN_PAGE_ROWS if hit and rot.offset >= START else ROWS if hit else 0)

    if begins == "before it is merged":
        rot.begin()
    if drops == "before the merge":
        drop()
        check(runs)
    pieces = 0
    try:
        while not merge.is_done:
            if pieces == 2:
                if begins == "while it is merged":
                    rot.begin()
                if drops == "in the merge":
                    drop()
                    check(runs)
            merge.step()
            pieces += 1
            assert pieces <= RUNS * PAGES
    except Damaged:
        assert begins != "before it is opened"
        merge.abandon()
        assert not (directory / "merged").exists()
    if drops == "after the merge" or pieces <= 2:
        drop()
    names = [run.path for run in runs] + ([merge.merged.path] if merge.merged is not None else [])
    check(runs if merge.merged is None else [*runs, merge.merged])
    again = opened(names)
    check(again)
    for run in [*runs, *again]:
        run.close()
    merge.close()
    assert open_descriptors() == known


@pytest.mark.parametrize("row", [0, 21, RUN_PAGE_ROWS - 1])
@pytest.mark.parametrize("column", ["first halves", "second halves", "checksum"])
@pytest.mark.parametrize("comes", ["zero", "a bit", "ones"])
def test_a_word_that_rots_while_rows_are_taken_out_does_not_bring_them_back(
    tmp_path: Path, row: int, column: str, comes: str
) -> None:
    """Not even if it reads right again."""
    paths, (entries, *_) = made(tmp_path, random.Random(7))
    word = {"first halves": row, "second halves": RUN_PAGE_ROWS + row, "checksum": 3 * RUN_PAGE_ROWS}[column]
    offset = START + RUN_PAGE_BYTES + word * 8
    what: dict[str, bytes | int] = {"zero": bytes(8), "a bit": 1 << 61, "ones": b"\xff" * 8}
    rot = rot_of(paths[0], (offset, what[comes]))
    rot.begin()
    (run,) = opened(paths[:1])
    marks = sorted(entries)
    gone = marks[RUN_PAGE_ROWS : 2 * RUN_PAGE_ROWS]
    left = {mark: entries[mark] for mark in marks if mark not in gone}
    assert found_in(run, marks) == left
    assert len(run.rows(0, PAGES)[0]) == len(left)
    run.drop([(gone[row], entries[gone[row]])])
    rot.end()
    assert found_in(run, marks) == left
    merge = FingerprintMerge(Storage(), tmp_path / "merged", [run])
    while not merge.is_done:
        merge.step()
    assert merge.merged is not None and found_in(merge.merged, marks) == left
    merge.close()
    run.close()


def test_a_merge_of_fences_that_do_not_ascend_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They did when the run was opened."""
    monkeypatch.setattr(fingerprint_merge, "_PAGES_PER_PIECE", 3)
    paths, _ = made(tmp_path, random.Random(7))
    (run,) = opened(paths[:1])
    Rot(paths[0], FENCES + 3 * 8, bytes(8)).begin()
    merge = FingerprintMerge(Storage(), tmp_path / "merged", [run])
    with pytest.raises(Damaged, match="do not ascend"):
        for _ in range(PAGES):
            merge.step()
    merge.abandon()
    run.close()


def test_a_merge_of_rows_that_do_not_ascend_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the checksum of their page is right."""
    monkeypatch.setattr(fingerprint_merge, "_PAGES_PER_PIECE", 1)
    paths, _ = made(tmp_path, random.Random(7))
    page = bytearray(paths[0].read_bytes()[START + RUN_PAGE_BYTES : START + 2 * RUN_PAGE_BYTES])
    page[85 * 8 : 86 * 8] = bytes(8)
    page[3 * RUN_PAGE_ROWS * 8 : (3 * RUN_PAGE_ROWS + 1) * 8] = checksum(page[:HALVES_BYTES]).to_bytes(8, "little")
    Rot(paths[0], START + RUN_PAGE_BYTES, bytes(page)).begin()
    (run,) = opened(paths[:1])
    merge = FingerprintMerge(Storage(), tmp_path / "merged", [run])
    with pytest.raises(Damaged, match="rows of what is merged"):
        for _ in range(PAGES):
            merge.step()
    merge.abandon()
    run.close()


class BadSectors(FaultyStorage):
    """The disk refuses what is at these offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[int] = set()

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        if any(offset <= one < offset + length for one in self.bad):
            raise Unreadable(f"{self.path_of(fd)}: offset {offset}: cannot be read")
        return super().pread(fd, length, offset)


def test_a_page_that_cannot_be_read_costs_its_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For now; and for good, once something was to be taken out of it."""
    paths, (entries, *_) = made(tmp_path, random.Random(1))
    storage = BadSectors()
    run = FingerprintRun.open(storage, paths[0])
    marks = sorted(entries)
    lost = marks[2 * RUN_PAGE_ROWS : 3 * RUN_PAGE_ROWS]
    left = {mark: where for mark, where in entries.items() if mark not in lost}
    storage.bad = {START + 2 * RUN_PAGE_BYTES + 512}
    assert found_in(run, marks) == left
    assert len(run.rows(0, PAGES)[0]) == len(left)
    assert "cannot be read" in caplog.text and len(caplog.records) == 1
    storage.bad = set()
    assert found_in(run, marks) == entries
    storage.bad = {START + 2 * RUN_PAGE_BYTES + 512}
    run.drop([(lost[5], entries[lost[5]])])
    storage.bad = set()
    assert found_in(run, marks) == left
    run.close()
    (again,) = opened(paths[:1])
    assert found_in(again, marks) == left
    again.close()


@pytest.mark.parametrize("count", [17, 256, 257, 600])
def test_each_page_is_read_once_for_all_that_are_there(tmp_path: Path, count: int) -> None:
    """One that is not has no say in what the others are."""
    rng = random.Random(count)
    paths, (entries, *_) = made(tmp_path, rng)
    storage = FaultyStorage()
    run = FingerprintRun.open(storage, paths[0])
    some = dict(rng.sample(sorted(entries.items()), count))
    storage.reads.clear()
    assert run.find(*halves(b"".join(some))).tolist() == [*some.values()]
    assert len(storage.reads) <= PAGES * -(-count // 256) and set(storage.reads) == {RUN_PAGE_BYTES}
    more = [*some, *spread(rng, 1)]
    rng.shuffle(more)
    assert found_in(run, more) == some
    run.drop([*some.items()][:1])
    assert found_in(run, more) == dict([*some.items()][1:])
    run.close()


@pytest.mark.parametrize("bad", [0, RUN_PAGE_BYTES, FENCES])
def test_a_front_that_cannot_be_read_is_refused(tmp_path: Path, bad: int) -> None:
    paths, _ = made(tmp_path, random.Random(1))
    storage, known = BadSectors(), open_descriptors()
    storage.bad = {bad}
    with pytest.raises(Unreadable):
        FingerprintRun.open(storage, paths[0])
    assert open_descriptors() == known


def test_a_page_in_the_place_of_another_is_not_looked_at(tmp_path: Path) -> None:
    paths, entries = made(tmp_path, random.Random(2))
    strange = paths[2].read_bytes()[START : START + RUN_PAGE_BYTES]
    Rot(paths[1], START, strange).begin()
    (run,) = opened(paths[1:2])
    assert not found_in(run, [*entries[2]])
    assert len(found_in(run, [*entries[1]])) == ROWS - RUN_PAGE_ROWS
    run.close()


def test_a_header_that_says_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """Though its checksum is right."""
    paths, _ = made(tmp_path, random.Random(1))
    whole = paths[0].read_bytes()
    fences_sum = checksum(whole[FENCES : FENCES + PAGES * 8])
    turned = whole[FENCES + 8 : FENCES + 16] + whole[FENCES : FENCES + 8] + whole[FENCES + 16 : FENCES + PAGES * 8]
    cases: list[tuple[tuple[int, int, int, int], bytes, str]] = [
        ((10, 2000, 5, fences_sum), b"", "header is damaged"),
        ((ROWS, PAGES, ROWS - RUN_PAGE_ROWS, fences_sum), b"", "header is damaged"),
        ((ROWS, PAGES + 1, ROWS, fences_sum), b"", "header is damaged"),
        ((ROWS - 1, PAGES, ROWS, fences_sum), b"", "header is damaged"),
        ((1 << 62, PAGES, ROWS, fences_sum), b"", "cut short"),
        ((ROWS, PAGES, ROWS, fences_sum ^ 1), b"", "fences are damaged"),
        ((ROWS, PAGES, ROWS, checksum(turned)), turned, "fences are damaged"),
    ]
    for numbers, fences, said in cases:
        header = checked(RUN_HEADER.struct.pack(RUN_MAGIC, FORMAT_VERSION, b"", *numbers, 0))
        content = bytearray(whole)
        content[: len(header)] = header
        content[FENCES : FENCES + len(fences)] = fences
        paths[0].write_bytes(content)
        with pytest.raises(Damaged, match=said):
            FingerprintRun.open(Storage(), paths[0])


def test_more_rows_than_there_is_room_for_are_damage(tmp_path: Path) -> None:
    writer = RunWriter(Storage(), tmp_path / "run", 2)
    with pytest.raises(Damaged, match="more fingerprints"):
        writer.append(rows_of(dict.fromkeys(spread(random.Random(1), 3), 1)))
    writer.abandon()
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_what_was_written_before_the_disk_was_full_is_synced_when_it_is_not(tmp_path: Path) -> None:
    paths, (entries, *_) = made(tmp_path, random.Random(1))
    storage = FaultyStorage()
    run = FingerprintRun.open(storage, paths[0])
    taken = list(entries.items())[:2]
    storage.refuse_write_after = 8
    with pytest.raises(StoreFull):
        run.drop(taken)
    storage.refuse_write_after = None
    (first,) = [entry for entry in taken if not found_in(run, [entry[0]])]
    assert not storage.synced
    run.drop([first])
    assert storage.synced == [paths[0]]
    run.drop([first])
    assert storage.synced == [paths[0]]
    run.close()

"""Runs of fingerprints against a dict: made, looked up, merged, emptied, opened anew; and what bytes may do to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup import fingerprint_merge, fingerprint_runs
from dedup.errors import Damaged, StoreError, UnknownFormat
from dedup.fingerprint_filter import bits_of, bits_of_one, may_have, may_have_one
from dedup.fingerprint_run import RUN_HEADER, RUN_PAGE_BYTES, RUN_PAGE_ROWS, FingerprintRun, RunWriter
from dedup.fingerprint_runs import FAN, FingerprintRuns, run_name, run_named
from dedup.fingerprint_table import FingerprintTable, Rows, halves
from dedup.layout import checked
from dedup.storage import Storage
from dedup.types import HOLE, Address
from tests.dedup.crash_storage import unsynced
from tests.dedup.faults import open_descriptors
from tests.dedup.mutations import either


@pytest.fixture(autouse=True)
def _unsynced() -> Iterator[None]:
    with unsynced():
        yield


Marks = Callable[[random.Random, int], list[bytes]]


def table_of(entries: dict[bytes, int]) -> FingerprintTable:
    table = FingerprintTable()
    table.add(b"".join(entries), np.array(list(entries.values()), np.uint64))
    return table


def rows_of(entries: dict[bytes, int]) -> Rows:
    high, low, where = (np.concatenate(column) for column in zip(*table_of(entries).pieces(), strict=True))
    return high, low, where


def dense(rng: random.Random, count: int) -> list[bytes]:
    """Fingerprints of which many have one first half, for pages on end."""
    return [rng.choice((0, 5, 1 << 63, (1 << 64) - 1)).to_bytes(8, "big") + rng.randbytes(8) for _ in range(count)]


def spread(rng: random.Random, count: int) -> list[bytes]:
    return [rng.randbytes(16) for _ in range(count)]


@contextmanager
def written(path: Path, entries: dict[bytes, int], pieces: int = 1) -> Iterator[FingerprintRun]:
    """A run of these, opened anew."""
    high, low, where = rows_of(entries)
    writer = RunWriter(Storage(), path, len(high))
    for piece in range(pieces):
        some = slice(len(high) * piece // pieces, len(high) * (piece + 1) // pieces)
        writer.append((high[some], low[some], where[some]))
    writer.finish().close()
    run = FingerprintRun.open(Storage(), path)
    yield run
    run.close()


@pytest.mark.parametrize("marks", [dense, spread])
@pytest.mark.parametrize("count", [1, RUN_PAGE_ROWS - 1, RUN_PAGE_ROWS, RUN_PAGE_ROWS + 1, 3000])
def test_a_run_has_what_was_written_and_nothing_else(tmp_path: Path, marks: Marks, count: int) -> None:
    rng = random.Random(count)
    entries = {mark: number for number, mark in enumerate(marks(rng, count), 1)}
    strange = marks(rng, 500)
    with written(tmp_path / "run", entries, pieces=7) as run:
        assert run.row_count == len(entries)
        asked = [*entries, *strange]
        rng.shuffle(asked)
        high, low = halves(b"".join(asked))
        wanted = [entries.get(mark, HOLE) for mark in asked]
        assert run.find(high, low).tolist() == wanted
        assert [run.find_one(*one) for one in zip(high.tolist(), low.tolist(), strict=True)] == wanted
        numbers, places = may_have([run.filter], high, low)
        maybe = set(places.tolist())
        assert not numbers.any() and {at for at, where in enumerate(wanted) if where != HOLE} <= maybe
        bits = list(map(bits_of_one, low.tolist()))
        assert bits == list(zip(bits_of(low, 0).tolist(), bits_of(low, 1).tolist(), strict=True))
        each = enumerate(zip(high.tolist(), bits, strict=True))
        assert {at for at, one in each if may_have_one(run.quick_filter, *one)} == maybe
        if marks is spread and count == 3000:
            assert len(maybe) - len(entries) < 3
        assert [column.tolist() for column in run.rows(0, run.page_count)] == [
            column.tolist() for column in rows_of(entries)
        ]


def test_what_is_dropped_is_dropped_for_good_and_only_with_its_address(tmp_path: Path) -> None:
    entries = {mark: number for number, mark in enumerate(spread(random.Random(1), 400), 1)}
    gone = dict(list(entries.items())[::3])
    with written(tmp_path / "run", entries) as run:
        run.drop([(mark, Address(where + 1)) for mark, where in entries.items()])
        run.drop([(mark, Address(where)) for mark, where in gone.items()] + [(bytes(16), Address(1))])
        for opened in (run, FingerprintRun.open(Storage(), run.path)):
            high, low = halves(b"".join(entries))
            assert opened.find(high, low).tolist() == [0 if mark in gone else entries[mark] for mark in entries]
            assert len(opened.rows(0, opened.page_count)[0]) == len(entries) - len(gone)
        opened.close()


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(0, 1 << 30), is_dense=st.booleans())
def test_runs_equal_a_dict(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, seed: int, is_dense: bool
) -> None:
    """Made, merged piece by piece, dropped from before, during and after; a commit may fail, the process may end."""
    monkeypatch.setattr(fingerprint_merge, "_PAGES_PER_PIECE", 1)
    rng = random.Random(seed)
    monkeypatch.setattr(fingerprint_merge, "DROPPED_MAX", rng.choice((3, 1 << 16)))
    directory, storage, known = tmp_path_factory.mktemp("runs"), Storage(), open_descriptors()
    runs, named = FingerprintRuns(storage, directory, []), list[int]()
    marks = (dense if is_dense else spread)(rng, 4000)
    model: dict[bytes, Address] = {}
    number = most = 0
    for _ in range(80):
        match rng.choice(("run", "run", "none", "merge", "merge", "merge", "drop", "open")):
            case "run" | "none" as what:
                unknown = [mark for mark in rng.sample(marks, rng.choice((1, 40, 400))) if mark not in model]
                some = {mark: Address(number + at) for at, mark in enumerate(unknown, 1)} if what == "run" else {}
                number += len(some)
                numbers = runs.prepare(table_of(dict(some)) if some else None)
                while rng.random() < 0.5 and runs.merge():
                    pass  # beside the commit
                if rng.random() < 0.7:
                    runs.settle()
                    named = numbers
                    model |= some
            case "merge":
                while runs.merge() and rng.random() < 0.8:
                    pass
            case "drop" if model:
                taken = rng.sample(sorted(model.items()), min(5, len(model)))
                runs.drop([*taken, (rng.choice(marks), Address(number + 1))])
                for mark, _ in taken:
                    del model[mark]
            case "open":
                runs.close()
                runs = FingerprintRuns(storage, directory, named)
                assert {path.name for path in directory.iterdir()} == set(map(run_name, named))
        most = max(most, len(runs))
        asked = rng.sample(marks, rng.choice((1, 5, 13, 1000)))
        assert found_in(runs, asked) == {mark: model[mark] for mark in asked if mark in model}
    assert most < 5 * FAN
    runs.close()
    assert open_descriptors() == known


def found_in(runs: FingerprintRuns, asked: list[bytes]) -> dict[bytes, int]:
    """Asked together and one by one."""
    high, low = halves(b"".join(asked))
    found = runs.find(high, low).tolist()
    assert found == [runs.find_one(*one) for one in zip(high.tolist(), low.tolist(), strict=True)]
    return {mark: where for mark, where in zip(asked, found, strict=True) if where != HOLE}


def settled(runs: FingerprintRuns, entries: dict[bytes, int] | None = None) -> list[int]:
    numbers = runs.prepare(table_of(entries) if entries else None)
    runs.settle()
    return numbers


def test_the_oldest_address_counts(tmp_path: Path) -> None:
    """In separate runs, and in the one that they become; and what was taken out does not come back in it."""
    marks = spread(random.Random(3), 900)
    runs = FingerprintRuns(Storage(), tmp_path, [])
    for number in range(FAN):
        settled(runs, {mark: number * 1000 + at for at, mark in enumerate(marks[number * 60 :], 1)})
    first = {mark: at for at, mark in enumerate(marks, 1)}
    assert found_in(runs, marks) == first
    runs.drop([(mark, Address(first[mark])) for mark in marks[:60]])
    while runs.merge():
        pass
    assert len(settled(runs)) == 1 and len(runs) == 1
    assert found_in(runs, marks) == {mark: first[mark] for mark in marks[60:]}
    assert runs.row_count == len(marks) - 60
    runs.close()


def test_runs_of_which_nothing_is_left_become_none(tmp_path: Path) -> None:
    runs = FingerprintRuns(Storage(), tmp_path, [])
    for number in range(FAN):
        settled(runs, {bytes([number]) * 16: number + 1})
    runs.drop([(bytes([number]) * 16, Address(number + 1)) for number in range(FAN)])
    while runs.merge():
        pass
    assert settled(runs) == [] and not list(tmp_path.iterdir())
    assert found_in(runs, [bytes(16)] * 20) == {}
    runs.close()


def test_small_old_runs_do_not_keep_those_behind_them_from_being_merged(tmp_path: Path) -> None:
    rng = random.Random(4)
    runs = FingerprintRuns(Storage(), tmp_path, [])
    sizes = [3, 2000, *[100] * FAN]
    for size in sizes:
        settled(runs, dict.fromkeys(spread(rng, size), 1))
    while runs.merge():
        pass
    settled(runs)
    assert runs.row_count == sum(sizes) and len(runs) == 3
    runs.close()


def test_who_never_merges_has_few_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_merge, "_PAGES_PER_PIECE", 1)
    monkeypatch.setattr(fingerprint_runs, "_ROWS_PER_PIECE_MIN", 1)
    rng = random.Random(4)
    runs = FingerprintRuns(Storage(), tmp_path, [])
    for _ in range(200):
        settled(runs, dict.fromkeys(spread(rng, 400), 1))
        assert len(runs) <= 5 * FAN
    assert runs.row_count == 200 * 400
    runs.close()


def test_names() -> None:
    assert run_named(run_name(17)) == 17
    for name in ("data.mdb", "0000000017.rwf.tmp", "17.rwf", "000000001x.rwf", ".rwf"):
        assert run_named(name) is None


@given(data=st.data())
def test_a_run_may_be_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """It is refused, or what is asked of it has an end, and is an address or none."""
    rng = random.Random(2)
    entries = {mark: number for number, mark in enumerate([*dense(rng, 200), *spread(rng, 200)], 1)}
    path = tmp_path_factory.mktemp("any") / "run"
    with written(path, entries):
        whole = path.read_bytes()
    if data.draw(st.booleans()):
        content = data.draw(either(whole))
    else:
        counts = data.draw(st.tuples(*[st.integers(0, 600) | st.integers(0, (1 << 64) - 1)] * 4))
        content = checked(RUN_HEADER.struct.pack(whole[:8], 1, b"", *counts, 0)) + whole[RUN_HEADER.size :]
    path.write_bytes(content)
    try:
        run = FingerprintRun.open(Storage(), path)
    except StoreError:
        return
    high, low = halves(b"".join([*entries, *spread(rng, 100)]))
    assert len(run.find(high, low)) == len(high)
    for one in list(zip(high.tolist(), low.tolist(), strict=True))[::20]:
        assert run.find_one(*one) >= 0
    may_have([run.filter], high, low)
    run.rows(0, run.page_count)
    run.close()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    path, known = tmp_path / "run", open_descriptors()
    with written(path, {bytes(16): 1}):
        whole = path.read_bytes()
    cases: list[tuple[bytes, type[StoreError], str]] = [
        (b"", Damaged, "is no run"),
        (b"x" + whole[1:], Damaged, "is no run"),
        (whole[:8] + b"\x02" + whole[9:], UnknownFormat, "version 2"),
        (whole[:16] + b"\x02" + whole[17:], Damaged, "header is damaged"),
        (whole[:-1], Damaged, "cut short"),
        (whole[:RUN_PAGE_BYTES], Damaged, "cut short"),
    ]
    for content, error, said in cases:
        path.write_bytes(content)
        with pytest.raises(error, match=said):
            FingerprintRun.open(Storage(), path)
    assert open_descriptors() == known

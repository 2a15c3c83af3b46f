"""The damage matrix: each kind of file × each kind of damage. Nothing may come of it but what was, or an error by name.

A store is damaged, then opened, each of its moments read, verified, repaired, and read again; in a process of its own,
since LMDB maps its file. Never wrong bytes, never an exception that is no error of the store's, never a repair that
leaves less than there was.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import lmdb
import pytest

from dedup.consolidator import consolidate
from dedup.damage import Report
from dedup.errors import RewindError
from dedup.layout import RAW_SLOTS_OFFSET, RAW_TABLE_OFFSET, consolidated_named, segment_named
from dedup.pins import ReaderPins
from dedup.reader import StoreReader
from dedup.repair import repair
from dedup.retention import DAY_NS, HOUR_NS, Policy, save_policy
from dedup.sealed import seal
from dedup.storage import Storage
from dedup.store import Store
from dedup.types import ContainerId, Seq
from dedup.verify import verify
from tests.dedup.model import Model

T = TypeVar("T")
BLOCK: Final = 4096
ALL: Final = 20
"""So many places asked for, or more: every place of interest too."""
SIGNALLED: Final = "killed by signal"


@dataclass
class Sample:
    """A closed store with every kind of file, an older copy of it, and what each of its moments holds."""

    path: Path
    older: Path
    model: Model
    points: set[int]
    """Seqs of the recovery points that the sound store gives."""
    kinds: dict[str, Path] = field(default_factory=dict)
    """Kind of file → one of it, relative to the store."""


def write(store: Store, model: Model, dice: random.Random, count: int) -> None:
    for _ in range(count):
        model.elapsed_ns += 10 * 10**9
        offset = dice.randrange(12) * BLOCK + dice.choice((0, 0, 9))
        store.group("g").ingest([model.write(1, offset, dice.randbytes(dice.choice((BLOCK, 2 * BLOCK, 700))))])  # type: ignore[arg-type]


def build(directory: Path) -> Sample:
    path, older = directory / "store", directory / "older"
    model, dice = Model(), random.Random(5)
    Store.create(path)
    save_policy(Storage(), path, Policy())
    store = Store.open(path)
    group = store.group("g")
    group.ingest([*model.begin(), model.create("a.img", 16 * BLOCK), model.create("b.img")])
    group.ingest([model.reconcile(1, 0, dice.randbytes(8 * BLOCK))])  # type: ignore[arg-type]
    write(store, model, dice, 12)
    group.create_snapshot("early")
    write(store, model, dice, 4)
    group.complete_segment()
    model.elapsed_ns += 3 * HOUR_NS
    for _ in range(3):
        write(store, model, dice, 5)
        group.ingest([model.flush(1)])  # type: ignore[arg-type]
        store.checkpoint()
        group.complete_segment()
    consolidate(group, Policy(), group.time)
    store.close()
    seal(Storage(), path / "containers", ContainerId(2), None)
    shutil.copytree(path, older)
    store = Store.open(path)
    write(store, model, dice, 6)
    store.checkpoint()
    store.group("g").complete_segment()
    model.elapsed_ns += 2 * DAY_NS
    write(store, model, dice, 3)
    consolidate(store.group("g"), Policy(every_write_ns=HOUR_NS, minutes_ns=2 * HOUR_NS), store.group("g").time)
    for _ in range(3):
        write(store, model, dice, 3)
        store.checkpoint()
        store.group("g").complete_segment()
    write(store, model, dice, 3)
    store.close()
    compact(path)
    sample = Sample(path, older, model, set())
    sample.points = {seq for seq, outcome in moments(path, model).items() if outcome == "right"}
    assert len(sample.points) > 10, "the sound store has moments"
    sample.kinds = kinds_of(path)
    return sample


def compact(path: Path) -> None:
    """So that few bytes of the index are of pages that nothing uses."""
    env = lmdb.open(str(path / "index"), max_dbs=32, map_size=1 << 40)
    copy = path / "compact"
    copy.mkdir()
    env.copy(str(copy), compact=True)
    env.close()
    (copy / "data.mdb").replace(path / "index" / "data.mdb")
    copy.rmdir()


def kinds_of(path: Path) -> dict[str, Path]:
    journal = path / "groups" / "g" / "journal"
    raw = sorted(name for name in os.listdir(journal) if segment_named(name) is not None)
    folded = sorted(name for name in os.listdir(journal) if consolidated_named(name) is not None)
    assert len(raw) >= 3 and folded, (raw, folded)
    containers = sorted(os.listdir(path / "containers"))
    pins = ReaderPins.open(path, Storage(), everything=True)
    (pin,) = [name for name in os.listdir(path / "readers") if name.endswith(".pins")]
    kept = (path / "readers" / pin).read_bytes()
    pins.close()
    (path / "readers" / "1-left.pins").write_bytes(kept)
    files = {
        "marker": path / "STORE",
        "policy": path / "policy",
        "manifest": journal / "MANIFEST",
        "raw-first": journal / raw[0],
        "raw-middle": journal / raw[len(raw) // 2],
        "raw-last": journal / raw[-1],
        "consolidated": journal / folded[0],
        "raw-container": path / "containers" / containers[-1],
        "base-container": path / "containers" / containers[0],
        "sealed-container": path / "containers" / containers[1],
        "index": path / "index" / "data.mdb",
        "index-lock": path / "index" / "lock.mdb",
        "lock": path / "lock",
        "pin": path / "readers" / "1-left.pins",
    }
    return {kind: file.relative_to(path) for kind, file in files.items()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return build(tmp_path_factory.mktemp("matrix"))


# -- what is read ------------------------------------------------------------------------------------------------------


def moments(path: Path, model: Model) -> dict[int, str]:
    """What reading each moment whole gave: `right`, the error's name, or `WRONG` and what."""
    found: dict[int, str] = {}
    store = StoreReader.open(path)
    try:
        group = store.group("g")
        for seq, (content, paths) in model.history.items():
            try:
                if group.resolve(f"seq={seq}").seq != seq:
                    found[seq] = "another point"
                    continue
                volumes = group.volumes_at(Seq(seq))
                if {state.volume: name for name, state in volumes.items()} != paths:
                    found[seq] = f"WRONG volumes {volumes}"
                    continue
                for volume, data in content.items():
                    image = group.image(volume, Seq(seq))
                    if image.read(0, image.size) != data:
                        found[seq] = f"WRONG bytes of volume {volume} at seq {seq}"
                        break
                else:
                    found[seq] = "right"
            except RewindError as error:
                found[seq] = named(error)
    finally:
        store.close()
    return found


def named(error: RewindError) -> str:
    assert "\n" not in str(error) and str(error), error
    return type(error).__name__


def opened_for_writing(path: Path) -> str:
    Store.open(path).close()
    return "right"


@dataclass
class Outcome:
    """What came of one case."""

    before: dict[int, str] | str
    verified: bool | str
    repaired: bool | str
    repairs: int
    after: dict[int, str] | str
    opened: str
    fault: str = ""


def examine(path: Path, model: Model) -> Outcome:
    """Everything that is done with a damaged store; an exception that is no error of the store's is the fault."""
    outcome = Outcome("", "", "", 0, "", "")
    try:
        outcome.before = _or_error(lambda: moments(path, model))
        outcome.verified = _or_error(lambda: verify(path, read_data=True).ok)
        report = _or_error(lambda: repair(path, read_data=True))
        if isinstance(report, Report):
            outcome.repaired, outcome.repairs = report.ok, report.repaired
        else:
            outcome.repaired = report
        outcome.after = _or_error(lambda: moments(path, model))
        outcome.opened = _or_error(lambda: opened_for_writing(path))
    except Exception:  # noqa: BLE001
        outcome.fault = traceback.format_exc()
    return outcome


def _or_error(function: Callable[[], T]) -> T | str:
    try:
        return function()
    except RewindError as error:
        return named(error)


def in_a_process(path: Path, model: Model) -> Outcome:
    """`examine` in a child: a damaged map may end the process that reads it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as out:
                out.write(pickle.dumps(examine(path, model)))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as back:
        answer = back.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Outcome("", "", "", 0, "", "", f"{SIGNALLED} {os.WTERMSIG(status)}")
    outcome = pickle.loads(answer)
    assert isinstance(outcome, Outcome)
    return outcome


# -- what is damaged ---------------------------------------------------------------------------------------------------

Damage = tuple[str, Callable[[Path], None]]


def flips(file: Path, count: int, dice: random.Random) -> Iterator[Damage]:
    """One bit each, at the ends and borders of what the file has, and where chance says."""
    size = file.stat().st_size
    places = {0, 9, 20, size // 2, size - 1, RAW_TABLE_OFFSET + 5, RAW_SLOTS_OFFSET + 77}
    places |= {dice.randrange(size) for _ in range(count) if size}
    for place in chosen(places, size, count, dice):
        yield f"flip at {place}", partial(flip, place=place, bit=1 << dice.randrange(8))


def chosen(places: set[int], size: int, count: int, dice: random.Random) -> list[int]:
    """All of the places that the file has, or a few of them."""
    there = sorted(one for one in places if 0 <= one < size)
    return there if count >= ALL else dice.sample(there, min(count, len(there)))


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bit]))


def cuts(file: Path, count: int, dice: random.Random) -> Iterator[Damage]:
    size = file.stat().st_size
    places = {0, size // 2, size - 1, min(size, 48), *(dice.randrange(size) for _ in range(count) if size)}
    for place in chosen(places, size, count, dice):
        yield f"cut at {place}", partial(os.truncate, length=place)


def damages(sample: Sample, kind: str, count: int) -> Iterator[Damage]:
    file = sample.path / sample.kinds[kind]
    dice = random.Random(kind)
    yield from flips(file, count, dice)
    yield from cuts(file, max(2, count // 2), dice)
    yield "deleted", lambda path: path.unlink()
    older = sample.older / sample.kinds[kind]
    if older.exists():
        yield "an older copy", lambda path: shutil.copyfile(older, path)  # type: ignore[return-value]


LOSES_NOTHING: Final = {"marker", "policy", "manifest", "index", "index-lock", "lock", "pin"}
"""Kinds that hold nothing which the others do not say: after a repair every moment is there."""


def judge(sample: Sample, kind: str, what: str, outcome: Outcome) -> str:
    """The class of the outcome; an AssertionError for one that may not be."""
    where = f"{kind}, {what}: "
    assert not outcome.fault, where + outcome.fault
    # LMDB's own pages and keys have no checksum: what is hidden there `verify` alone finds, and a repair undoes.
    hidden = kind == "index" and outcome.verified is False
    for read in (outcome.after,) if hidden else (outcome.before, outcome.after):
        if isinstance(read, dict):
            wrong = [one for one in read.values() if one.startswith("WRONG")]
            assert not wrong, where + wrong[0]
            other = {seq for seq, one in read.items() if seq in sample.points and one == "another point"}
            assert not other, where + f"{sorted(other)} are taken for other points"
    if outcome.repaired is True:
        assert isinstance(outcome.after, dict), where + str(outcome.after)
        there = {seq for seq, one in outcome.after.items() if one == "right"}
        if kind in LOSES_NOTHING:
            assert there >= sample.points, where + f"repaired, and {sorted(sample.points - there)} are gone"
        lost = {one for seq, one in outcome.after.items() if seq in sample.points and one == "Damaged"}
        assert not lost, where + f"the report says it is sound, and moments are not: {outcome.after}"
        assert outcome.opened == "right", where + outcome.opened
        return "sound all along" if outcome.verified is True and not outcome.repairs else "repaired"
    if kind in LOSES_NOTHING - {"policy", "manifest"} and outcome.repaired != "UnknownFormat":
        raise AssertionError(where + f"was not repaired: {outcome}")
    if isinstance(outcome.before, dict) and isinstance(outcome.after, dict):
        worse = {seq for seq, one in outcome.before.items() if one == "right" and outcome.after.get(seq) != "right"}
        assert not worse, where + f"the repair cost {sorted(worse)}"
    return "named"


def run(sample: Sample, kind: str, count: int, directory: Path) -> Counter[str]:
    classes: Counter[str] = Counter()
    for number, (what, damage) in enumerate(damages(sample, kind, count)):
        path = directory / str(number)
        shutil.copytree(sample.path, path)
        damage(path / sample.kinds[kind])
        classes[judge(sample, kind, what, in_a_process(path, sample.model))] += 1
        shutil.rmtree(path)
    return classes


KINDS: Final = (
    "marker", "policy", "manifest", "raw-first", "raw-middle", "raw-last", "consolidated", "raw-container",
    "base-container", "sealed-container", "index", "index-lock", "lock", "pin",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_each_kind_of_file(
    sample: Sample, kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    assert set(KINDS) == set(sample.kinds)
    classes = run(sample, kind, 2, tmp_path)
    record_property("cases", sum(classes.values()))
    print(f"{kind}: {sum(classes.values())} cases: {dict(classes)}")
    assert sum(classes.values()) >= (4 if (sample.path / sample.kinds[kind]).stat().st_size else 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damage_at_many_places(
    sample: Sample, kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    classes = run(sample, kind, 100, tmp_path)
    record_property("cases", sum(classes.values()))
    print(f"{kind}: {sum(classes.values())} cases: {dict(classes)}")
    assert sum(classes.values()) >= min(100, (sample.path / sample.kinds[kind]).stat().st_size)

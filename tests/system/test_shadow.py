"""What is restored is, byte for byte, what was there: against a shadow of every state that the source ever had.

A group of five volumes is written at random through a real mount, by one writer, so that the shadow is in the order of
the agent's records. Afterwards moments are drawn at random and copied with `cp` from the snapshot mount: by seq, by
time, by `~flush` and by bookmark, as a whole group and volume by volume.
"""

from __future__ import annotations

import os
import random
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dedup.moment import rfc3339
from dedup.types import TimeNs
from tests.system.harness import World, check_same

State = dict[str, bytes]
"""Path → content, of every volume that there is."""
SIZE_MAX = 120_000


@dataclass(frozen=True)
class Deed:
    """One change as the application saw it, with the last seq before and the last one after it."""

    before: int
    after: int
    begun: int
    returned: int
    state: State
    halfway: tuple[State, ...] = ()
    """The kernel may make several writes of one that does not begin with a page: what there may be in between."""


class Writer:
    """Changes the volumes through the mount, and keeps what they hold after each change."""

    def __init__(self, world: World, seed: int, flushes: bool) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.flushes = flushes
        self.state: State = {}
        self.halfway: tuple[State, ...] = ()
        self.deeds: list[Deed] = []
        self.flushed: list[int] = []
        """Which of the deeds are flushes."""
        self.bookmarks: dict[str, int] = {}
        self.first = self.seq()

    def seq(self) -> int:
        return int(self.world.ask("status")["seq"])

    def do(self, change: Callable[[], State]) -> None:
        before = self.deeds[-1].after if self.deeds else self.first
        self.halfway = ()
        begun = time.time_ns()
        self.state = change()
        returned = time.time_ns()
        self.deeds.append(Deed(before, self.seq(), begun, returned, self.state, self.halfway))

    def path(self, name: str) -> Path:
        return self.world.mnt / name

    def create(self, name: str) -> State:
        self.path(name).parent.mkdir(exist_ok=True)
        os.close(os.open(self.path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        return {**self.state, name: b""}

    def write(self, name: str) -> State:
        old = self.state[name]
        length = self.random.choice([1, 100, 4096, 5000, 40_000])
        offset = self.random.randrange(min(len(old) + 5000, SIZE_MAX - length))
        data = self.random.choice([self.random.randbytes(length), bytes(length)])
        with open(self.path(name), "r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), data, offset) == length

        def written(upto: int) -> State:
            content = old[:offset].ljust(offset, b"\0") + data[: upto - offset]
            return {**self.state, name: content + old[len(content) :]}

        self.halfway = tuple(map(written, range(offset + 4096 - offset % 4096, offset + length, 4096)))
        return written(offset + length)

    def resize(self, name: str) -> State:
        size = self.random.randrange(SIZE_MAX)
        os.truncate(self.path(name), size)
        return {**self.state, name: self.state[name][:size].ljust(size, b"\0")}

    def rename(self, name: str, new: str) -> State:
        self.path(new).parent.mkdir(exist_ok=True)
        self.path(name).rename(self.path(new))
        state = {**self.state, new: self.state[name]}
        del state[name]
        return state

    def remove(self, name: str) -> State:
        self.path(name).unlink()
        return {path: content for path, content in self.state.items() if path != name}

    def flush(self, name: str) -> State:
        with open(self.path(name), "r+b", buffering=0) as file:
            os.fsync(file.fileno())
        self.flushed.append(len(self.deeds))
        return self.state

    def bookmark(self) -> State:
        name = f"mark{len(self.bookmarks)}"
        self.bookmarks[name] = int(self.world.ask("bookmark", name=name)["seq"])
        return self.state

    def play(self, changes: int) -> None:
        """The fifth volume goes and comes again, the third is renamed, twice; the fourth is resized now and then."""
        for name in ("one.img", "sub/two.img", "three.img", "four.img", "five.img"):
            self.do(lambda: self.create(name))  # noqa: B023 - called at once
        special = {
            changes // 5: lambda: self.rename("three.img", "sub/drei.img"),
            changes * 2 // 5: lambda: self.remove("five.img"),
            changes * 3 // 5: lambda: self.create("five.img"),
            changes * 4 // 5: lambda: self.rename("sub/drei.img", "one.img"),
        }
        for number in range(changes):
            self.do(special.get(number) or self.any_change())

    def any_change(self) -> Callable[[], State]:
        name, chance = self.random.choice(sorted(self.state)), self.random.random()
        if chance < 0.08 and "four.img" in self.state:
            return lambda: self.resize("four.img")
        if chance < 0.12:
            return self.bookmark
        if chance < 0.35 and self.flushes:
            return lambda: self.flush(name)
        return lambda: self.write(name)


class Checker:
    """Restores moments, and counts them by their kind."""

    def __init__(self, writer: Writer, mode: str) -> None:
        self.writer = writer
        self.mode = mode
        self.world = writer.world
        self.afters = [deed.after for deed in writer.deeds]
        self.kinds: Counter[str] = Counter()
        self.copies = 0

    def states_at(self, seq: int) -> list[State]:
        """What the group may have held after `seq`: one state, unless several records belong to one change."""
        at = bisect_right(self.afters, seq)
        deeds = self.writer.deeds
        within = at < len(deeds) and deeds[at].before < seq
        following = [*deeds[at].halfway, deeds[at].state] if within else []
        return [deeds[at - 1].state if at else {}, *following]

    def check(self, name: str, chance: random.Random) -> int:
        """Asserts that what is found by `@name` is what was there; returns the seq that it was resolved to."""
        directory = self.world.snap / "points" / f"@{name}"
        assert directory.exists(), os.getxattr(directory.parent, "user.rewindfs.refused")
        seq = int(os.getxattr(directory, "user.rewindfs.seq"))
        kind = os.getxattr(directory, "user.rewindfs.kind").decode()
        self.kinds[kind] += 1
        if chance.random() < 0.5:
            found = self.copy_group(directory)
        else:
            found = self.copy_volumes(name)
        wanted = self.states_at(seq)
        if found not in wanted:
            assert found.keys() == wanted[0].keys(), f"{name}: seq={seq}"
            for path, content in wanted[0].items():
                check_same(found[path], content, f"{path} at {name}, seq={seq}")
        return seq

    def copy_group(self, directory: Path) -> State:
        target = self.world.directory / f"copy{self.copies}"
        self.copies += 1
        self.world.run("cp", "-r", "--sparse=auto", directory, target)
        return {str(file.relative_to(target)): file.read_bytes() for file in target.rglob("*") if file.is_file()}

    def copy_volumes(self, name: str) -> State:
        """Each from volumes/; a path that was no volume's then is not found."""
        found: State = {}
        paths = sorted({path for deed in self.writer.deeds for path in deed.state})
        for path in paths:
            past = self.world.snap / "volumes" / path / f"@{name}"
            if past.exists():
                target = self.world.directory / "copy.img"
                self.world.run("cp", past, target)
                found[path] = target.read_bytes()
        return found

    def by_seq(self, chance: random.Random) -> None:
        seq = chance.randrange(self.afters[0], self.afters[-1] + 1)
        found = self.check(f"seq={seq}", chance)
        assert found == seq if self.mode != "batch" else found <= seq

    def by_time(self, chance: random.Random) -> None:
        deeds = self.writer.deeds
        moment = chance.randrange(deeds[0].returned, deeds[-1].begun)  # what follows the last record is refused
        found = self.check(rfc3339(TimeNs(moment)), chance)
        assert all(found <= deed.after for deed in deeds if deed.begun > moment)
        if self.mode != "batch":  # where a moment in an aggregate is the one before it
            assert all(deed.after <= found for deed in deeds if deed.returned < moment)

    def by_flush(self, chance: random.Random) -> None:
        """From a flush itself, if there was any, or from any change on back to the bookmark before it."""
        writer = self.writer
        first = min(writer.bookmarks.values())
        flushes = [writer.deeds[index] for index in writer.flushed]
        deed = chance.choice(flushes or [deed for deed in writer.deeds if deed.after >= first])
        found = self.check(f"seq={deed.after}~flush", chance)
        assert found <= deed.after
        assert found > deed.before if writer.flushed else found in writer.bookmarks.values()

    def by_bookmark(self, chance: random.Random) -> None:
        name, seq = chance.choice(sorted(self.writer.bookmarks.items()))
        assert self.check(name, chance) == seq


def play(world: World, mode: str, *, flushes: bool, changes: int, moments: int) -> None:
    world.mount(mode)
    writer = Writer(world, seed=changes, flushes=flushes)
    writer.play(changes)
    writer.do(writer.bookmark)
    world.unmount()
    world.browse()
    checker = Checker(writer, mode)
    chance = random.Random(moments)
    for number in range(moments):
        (checker.by_seq, checker.by_time, checker.by_flush, checker.by_bookmark)[number % 4](chance)
    assert set(checker.kinds) <= {"crash", "flush", "bookmark"}
    assert checker.kinds["crash"] > 0
    assert checker.kinds["bookmark"] > 0
    assert (checker.kinds["flush"] > 0) == flushes
    final = {str(file.relative_to(world.source)) for file in world.source.rglob("*.img")}
    assert final == writer.state.keys()
    for path, content in writer.state.items():
        check_same((world.source / path).read_bytes(), content, path)


@pytest.mark.parametrize(("mode", "flushes"), [("sync", True), ("async", False), ("batch", True)])
def test_moments_of_a_group(world: World, mode: str, flushes: bool) -> None:
    play(world, mode, flushes=flushes, changes=60, moments=12)


@pytest.mark.slow
@pytest.mark.parametrize("flushes", [True, False])
@pytest.mark.parametrize("mode", ["sync", "async", "batch"])
def test_a_hundred_moments_of_a_group(world: World, mode: str, flushes: bool) -> None:
    play(world, mode, flushes=flushes, changes=600, moments=100)

"""Faults at random under load, from a seed: kill −9, SIGSTOP, orderly restarts, cut links, a full disk.

    python -m tests.system.chaos --site embedded --mode async --faults all --seconds 120 [--seed N]

A seed makes the same schedule again; what it meets is up to the machine. Afterwards the store must verify, equal the
source, hold every commit that had returned, give only moments that SQLite recovers from, and have no gap but those that
a killed mount, or an outage longer than the mount was told to wait, leaves.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from dedup.errors import MomentRefused
from dedup.moment import rfc3339
from dedup.reader import GroupReader
from dedup.types import Seq, TimeNs
from tests.system.harness import World, image_bytes
from tests.system.loads import JOURNALS, SUFFIXES, Fio, Orders, orders_in
from tests.system.network import two_hosts
from tests.system.sites import FIRST, MOUNT, Embedded, Remote, Site
from tests.system.writers import BLOCK, Writer

DATABASE = "db/shop.db"
BLOCKS_FILE = "blocks.img"
FIO_FILE = "fio.img"
BLOCKS = 1024
FIO_MEBIBYTES = 8
STORE_DISK_BYTES = 4 << 30
BALLAST = "ballast"
MODES = ("sync", "async", "batch")
MIXED = "mixed"
"""Begins as async; the faults are joined by switches to any mode."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Which faults happen, and for how long."""

    mount_dies: bool
    outage_after: str
    seconds: tuple[float, float]
    """How long a fault lasts."""
    outages: bool = False
    """Whether faults last longer than `outage_after`."""


PROFILES = {
    # A short disconnection leaves no gap, whatever it is that is short.
    "short": Profile(False, "60s", (0.05, 2.5)),
    "all": Profile(True, "60s", (0.05, 2.5)),
    "long": Profile(True, "1s", (0.5, 5.0), outages=True),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` of `part`: kill, stop or restart of a process, link of a network fault, mode of a switch to another one,
    full of the store's disk."""

    kind: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.part}".strip()


@dataclass(frozen=True, slots=True)
class Step:
    """After a pause the faults begin, one in the middle of the other, and all end together."""

    pause: float
    faults: tuple[Fault, ...]
    seconds: float


def schedule(dice: random.Random, seconds: float, faults: list[Fault], profile: Profile) -> list[Step]:
    """Steps for so many seconds. Each kind of fault is as likely as any other, however many parts it can strike."""
    kinds = sorted({fault.kind for fault in faults})
    steps = []
    left = seconds
    while left > 0:
        chosen: list[Fault] = []
        for _ in range(2 if dice.random() < 0.3 else 1):
            kind = dice.choice(kinds)
            fault = dice.choice([fault for fault in faults if fault.kind == kind])
            # What waits for an answer cannot be had of a process that is stopped or has died.
            if not chosen or (fault.part != chosen[0].part and not {fault.kind, chosen[0].kind} & {"restart", "mode"}):
                chosen.append(fault)
        step = Step(dice.uniform(0.1, 1.5), tuple(chosen), dice.uniform(*profile.seconds))
        left -= step.pause + step.seconds
        steps.append(step)
    return steps


@dataclass(slots=True)
class Findings:
    """What a run did and what was checked."""

    faults: Counter[str] = field(default_factory=Counter)
    orders: int = 0
    writes: int = 0
    moments: int = 0
    refused: int = 0
    gaps: int = 0

    def __str__(self) -> str:
        faults = ", ".join(f"{count} × {fault}" for fault, count in sorted(self.faults.items()))
        return (
            f"{faults}; {self.orders} commits, {self.writes} block writes; "
            f"{self.moments} moments held, {self.refused} in gaps, {self.gaps} gaps"
        )


class Chaos:
    """One run at one site."""

    def __init__(self, world: World, site: Site, seed: int, profile: Profile, *, with_fio: bool = True) -> None:
        self.world = world
        self.site = site
        self.findings = Findings()
        self._dice = random.Random(seed)
        self._profile = profile
        self._mount_kills = 0
        self._mixed = site.mode == MIXED
        if self._mixed:
            site.mode = "async"
        self._grainy = self._mixed or site.mode == "batch"
        """Moments lie between aggregates."""
        for name, length in ((BLOCKS_FILE, BLOCKS * BLOCK), (FIO_FILE, FIO_MEBIBYTES << 20)):
            (world.source / name).write_bytes(bytes(length))
        (world.source / DATABASE).parent.mkdir()
        self._orders = Orders(world.mnt / DATABASE, self._dice.choice(JOURNALS))
        self._writer = Writer(world.mnt / BLOCKS_FILE, BLOCKS, seed, pause=0.002)
        fio = [Fio(world.mnt / FIO_FILE, world.environment, FIO_MEBIBYTES, 1024)] if with_fio else []
        self._loads: list[Orders | Writer | Fio] = [self._orders, self._writer, *fio]

    def run(self, seconds: float, say: Callable[[str], None] = print) -> Findings:
        """Faults for so many seconds, then the checks. AssertionError says what is broken."""
        faults = self._possible()
        say(f"SQLite in journal_mode={self._orders.journal}; {', '.join(map(str, faults))}")
        self.site.start()
        self._start_loads()
        try:
            for step in schedule(self._dice, seconds, faults, self._profile):
                say(f"{step.pause:.2f} s, then {' and '.join(map(str, step.faults))} for {step.seconds:.2f} s")
                time.sleep(step.pause)
                self._do(step)
                self._check_loads()
        except BaseException:
            self._abandon()
            raise
        for load in self._loads:
            load.stop()
        self._check_loads()
        self.site.wait_until_well()
        self._check(say)
        return self.findings

    def _possible(self) -> list[Fault]:
        parts = [part for part in self.site.parts if part != MOUNT]
        faults = [Fault(kind, part) for kind in ("kill", "restart", "stop") for part in parts]
        faults += [Fault("stop", MOUNT), Fault("restart", MOUNT)]
        faults += [Fault("link", fault) for fault in self.site.links]
        if self._profile.mount_dies:
            faults.append(Fault("kill", MOUNT))
        if self._disk is not None:
            faults.append(Fault("full"))
        if self._mixed:
            faults += [Fault("mode", mode) for mode in MODES]
        return faults

    @property
    def _disk(self) -> Path | None:
        """The store's own small disk, if it has one."""
        disk = self.world.store.parent
        return disk if os.path.ismount(disk) else None

    def _start_loads(self) -> None:
        for load in self._loads:
            load.start()

    def _do(self, step: Step) -> None:
        ends = []
        # The mount stops last and goes on first: what is done to the others may start processes, which see `Fio`.
        faults = sorted(step.faults, key=lambda fault: fault == Fault("stop", MOUNT))
        for number, fault in enumerate(faults):
            if number:
                time.sleep(step.seconds / 2)
            self.findings.faults[str(fault)] += 1
            ends.append(self._begin(fault))
        time.sleep(step.seconds / len(step.faults))
        # First what is stopped, cut or full, then what has died: that needs the others in order to start.
        for end in reversed(ends):
            end()
        dead = not self.site.mounted()
        if dead:
            self._mount_kills += 1
            for load in self._loads:
                load.join()
            if self.site.mode == "sync" and not self._mixed:
                self._check_acknowledged()
        self.site.start()
        if dead:
            self._start_loads()

    def _begin(self, fault: Fault) -> Callable[[], None]:
        """Begins a fault; what is returned ends it, but for a kill."""
        match fault.kind:
            case "kill":
                self.site.kill(fault.part)
                return lambda: None
            case "stop":
                return self.site.stop(fault.part)
            case "link":
                self.site.break_link(fault.part)
                return self.site.heal_link
            case "full":
                return self._fill()
            case "mode":
                self.site.mode = fault.part
                if self.site.mounted():
                    self.world.rewindfs("mode", self.world.mnt, fault.part)
                return lambda: None
            case "restart":
                if fault.part == MOUNT:
                    for load in self._loads:
                        load.stop()
                    self._check_loads()
                self.site.restart(fault.part)
                if fault.part == MOUNT:
                    self._start_loads()
                return lambda: None
        raise AssertionError(fault)

    def _fill(self) -> Callable[[], None]:
        """Nothing is free on the store's disk."""
        assert self._disk is not None
        ballast = self._disk / BALLAST
        free = os.statvfs(self._disk)
        fd = os.open(ballast, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(fd, 0, max(1, (free.f_bavail - 64) * free.f_frsize))
        except OSError as error:
            # The store was faster: full it is.
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(fd)
        return ballast.unlink

    def _check_loads(self) -> None:
        """No application has seen an error. Where the mount has died each has, and was started again."""
        for load in self._loads:
            assert load.error is None, f"{type(load).__name__}: {load.error!r}\n{self.world.logs()}"

    def _abandon(self) -> None:
        """After a failure: what is stopped goes on, and the loads end."""
        self.site.heal_link()
        for pid in self.world.processes():
            os.kill(pid, signal.SIGCONT)
        if self._disk is not None:
            (self._disk / BALLAST).unlink(missing_ok=True)
        for load in self._loads:
            load.stop()
        self.site.give_up()

    # -- what must be true -------------------------------------------------------------------------------------------

    def _check_acknowledged(self) -> None:
        """The mount has died in sync mode: the store alone holds every commit that had returned."""
        with self.world.reader() as group:
            found = self._orders_at(group, group.resolve("latest").seq)
        assert found >= self._orders.returned(), f"{self._orders.returned()} commits returned, the store holds {found}"

    def _check(self, say: Callable[[str], None]) -> None:
        self.world.check_equal()
        gaps = self.world.gaps()
        self.findings.gaps = len(gaps)
        permitted = self._mount_kills
        if self._profile.outages:
            # What spools for the mount was away itself; and a mount that was stopped cannot tell who was.
            done = self.findings.faults
            permitted += sum(done[f"{kind} {FIRST}"] for kind in ("kill", "restart", "stop")) + done[f"stop {MOUNT}"]
        if self.site.spools or not self._profile.outages:
            assert len(gaps) <= permitted, f"{len(gaps)} gaps, not {permitted} at most: {gaps}"
        with self.world.reader() as group:
            found = self._orders_at(group, group.resolve("latest").seq)
            self.findings.orders = self._orders.returned()
            self.findings.writes = len(self._writer.known)
            assert found >= self._orders.returned(), f"{self._orders.returned()} commits returned, {found} are there"
            for _ in range(30):
                self._check_moment(group)
        say("no application runs: unmounting, verifying")
        self.site.close()
        verified = self.world.json("verify", self.world.store, "--read-data")
        assert verified["ok"], verified
        self.world.check_equal()

    def _check_moment(self, group: GroupReader) -> None:
        """A moment at random holds what had been promised by then, and nothing that began later; or lies in a gap."""
        asked = self._dice.randrange(self._orders.commits[0].began, self._orders.commits[-1].began)
        try:
            point = group.resolve(rfc3339(TimeNs(asked)))
        except MomentRefused as refusal:
            assert "gap" in str(refusal) and self.findings.gaps, refusal
            self.findings.refused += 1
            return
        self.findings.moments += 1
        # An aggregate is one point: what is said of a moment within it is true of the aggregate's end before it.
        moment = point.time if self._grainy else asked
        found = self._orders_at(group, point.seq)
        least, most = self._orders.returned(moment), self._orders.begun(asked)
        assert least <= found <= most, f"seq={point.seq}: {found} orders, not {least} to {most}"
        if not self._grainy:
            self._writer.check(image_bytes(group, BLOCKS_FILE, point.seq), asked)

    def _orders_at(self, group: GroupReader, seq: Seq) -> int:
        """How many orders SQLite finds in what the store gives as the database's files at `seq`."""
        with tempfile.TemporaryDirectory(dir=self.world.directory) as place:
            copy = Path(place) / Path(DATABASE).name
            volumes = group.volumes_at(seq)
            for suffix in SUFFIXES:
                if DATABASE + suffix in volumes:
                    copy.with_name(copy.name + suffix).write_bytes(image_bytes(group, DATABASE + suffix, seq))
            return orders_in(copy)


def site_of(name: str, world: World, mode: str, options: tuple[str, ...], stack: ExitStack) -> Site:
    """One of SITES."""
    if name == "embedded":
        return Embedded(world, mode, options)
    return Remote(world, mode, options, stack.enter_context(two_hosts(world)), first=name == "first")


SITES = ("embedded", "remote", "first")
"""All on one machine; a second appliance on another host; the same with a first appliance that spools."""


def small_disk(world: World) -> None:
    """Puts the store on a disk of its own, that can be filled up."""
    image = world.directory / "disk.img"
    with open(image, "xb") as file:
        file.truncate(STORE_DISK_BYTES)
    world.run("mkfs.ext4", "-q", "-F", "-m", "0", image)
    world.store = world.loop_mount(image) / "store"


def strike(
    world: World,
    site: str,
    mode: str,
    faults: str,
    seconds: float,
    seed: int,
    *,
    say: Callable[[str], None] = print,
    with_fio: bool = True,
    with_disk: bool = True,
) -> Findings:
    """One run, from a new world to the last check."""
    profile = PROFILES[faults]
    say(
        f"seed {seed}: python -m tests.system.chaos --site {site} --mode {mode} --faults {faults} "
        f"--seconds {seconds:g} --seed {seed}"
    )
    if with_disk:
        small_disk(world)
    with ExitStack() as stack:
        options = ("--outage-after", profile.outage_after)
        return Chaos(world, site_of(site, world, mode, options, stack), seed, profile, with_fio=with_fio).run(
            seconds, say
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", choices=SITES, default="embedded")
    parser.add_argument("--mode", choices=(*MODES, MIXED), default="async")
    parser.add_argument("--faults", choices=PROFILES, default="all")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None)
    asked = parser.parse_args()
    seed = random.randrange(1 << 32) if asked.seed is None else asked.seed
    with tempfile.TemporaryDirectory(prefix="rewindfs-chaos-") as directory:
        world = World(Path(directory))
        try:
            print(strike(world, asked.site, asked.mode, asked.faults, asked.seconds, seed))
        except AssertionError as error:
            print(f"FAILED with seed {seed}: {error}", file=sys.stderr)
            raise
        finally:
            if left := world.close():
                print("left behind: " + "; ".join(left), file=sys.stderr)


if __name__ == "__main__":
    main()

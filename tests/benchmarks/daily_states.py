"""How large a store is with the daily states of a Linux-like image, beside borg's and restic's repositories of them.

    python -m tests.benchmarks.daily_states [--quick] [--json FILE]

The image (`debian_image`) lies in a rewindfs mount and is changed there, through a loop device, for 20 days, of which
the first is the base snapshot; at the end of each, unmounted, it is a snapshot of ours by name, a `borg create` with
the default compression (lz4) and one with zstd, and a `restic backup` with the default compression and one with `max`
(the latter not with --quick).
All of them have the same 20 states then, and are compared by what their files occupy on the disk. Borg's and restic's
caches are not counted; our index is.

Ours is measured as its maintenance leaves it, every container sealed, and with every write of all days still a moment
to go back to: thinning it to the snapshots, which is all that the others have, would only make it smaller. What the
snapshots hold in the end is compared with what the image was on those days.

Sizes do not vary from run to run by more than what ext4 does with the time of day: there is one run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import xxhash

from dedup import layout
from dedup.container import ContainerReader
from dedup.sealed import seal
from dedup.store import Store
from dedup.types import ContainerForm
from tests.benchmarks.borg import BorgRepository
from tests.benchmarks.debian_image import SMALL_SYSTEM, SYSTEM, DebianImage
from tests.benchmarks.mounts import rewindfs, workplace
from tests.benchmarks.report import Report, ratio, run_subject
from tests.benchmarks.restic import ResticRepository
from tests.benchmarks.snapshots import stored_bytes

IMAGE: Final = "disk.img"
MIB: Final = 1 << 20
OURS: Final = "rewindfs"


class Peers:
    """The others' repositories, and the backups that each of them makes of a day."""

    def __init__(self, place: Path, quick: bool) -> None:
        borg, borg_zstd = BorgRepository.create(place / "borg"), BorgRepository.create(place / "borg-zstd")
        restic = ResticRepository.create(place / "restic")
        self._paths = {"borg": borg.path, "borg, zstd": borg_zstd.path, "restic": restic.path}
        self._backups: list[Callable[[str, Path], None]] = [
            borg.backup,
            lambda day, image: borg_zstd.backup(day, image, "--compression=zstd"),
            lambda day, image: restic.backup(image),
        ]
        if not quick:
            restic_max = ResticRepository.create(place / "restic-max")
            self._paths["restic, max"] = restic_max.path
            self._backups.append(lambda day, image: restic_max.backup(image, "--compression=max"))

    def backup(self, day: str, image: Path) -> None:
        """All of them, side by side: their time is not what is compared."""
        with ThreadPoolExecutor(len(self._backups)) as pool:
            for done in [pool.submit(backup, day, image) for backup in self._backups]:
                done.result()

    def sizes(self) -> dict[str, float]:
        return {name: stored_bytes(path) / MIB for name, path in self._paths.items()}


def digest(image: Path) -> bytes:
    """Of all its bytes."""
    found = xxhash.xxh3_128()
    with open(image, "rb") as file:
        while piece := file.read(MIB):
            found.update(piece)
    return found.digest()


def seal_all(path: Path) -> None:
    """What the appliance's maintenance does with containers that nobody appends to, without its waits."""
    store = Store.open(path)
    try:
        store.settle()
        containers = path / layout.CONTAINERS_NAME
        for name in store.storage.listdir(containers):
            container = layout.container_named(name)
            assert container is not None
            reader = ContainerReader.open(store.storage, containers, container)
            is_raw = reader.header.form is ContainerForm.RAW
            reader.close()
            if is_raw:
                seal(store.storage, containers, container, None)
    finally:
        store.close()


def check_states(path: Path, group_name: str, states: dict[str, bytes]) -> None:
    """RuntimeError where a snapshot of the store is not what the image was."""
    store = Store.open(path)
    try:
        reader = store.group(group_name).reader()
        for name, expected in states.items():
            seq = reader.resolve(name).seq
            image = reader.image(reader.volumes_at(seq)[IMAGE].volume, seq)
            found = xxhash.xxh3_128()
            for at in range(0, image.size, MIB):
                found.update(image.read(at, min(MIB, image.size - at)))
            if found.digest() != expected:
                raise RuntimeError(f"{name} is not what it was")
    finally:
        store.close()


def _live(directory: Path, image: DebianImage, days: int, store: Path, peers: Peers) -> dict[str, bytes]:
    """All days, in a mount; the digest of each state."""
    source, mountpoint, inside = directory / "source", directory / "mnt", directory / "inside"
    source.mkdir()
    mountpoint.mkdir()
    image.make(source / IMAGE, inside)
    states = {}
    rewindfs("mount", source, mountpoint, "--store", store, "--mode", "sync", "--wait-base")
    try:
        for day in range(days):
            if day:
                image.live_a_day(mountpoint / IMAGE, inside)
                # In sync mode a durable image is durable in the store.
                fd = os.open(mountpoint / IMAGE, os.O_RDWR)
                os.fsync(fd)
                os.close(fd)
            name = f"day-{day:02d}"
            rewindfs("snapshot", "create", store, "--name", name)
            peers.backup(name, source / IMAGE)
            states[name] = digest(source / IMAGE)
    finally:
        rewindfs("unmount", mountpoint)
    return states


def measure(report: Report, quick: bool) -> None:
    days = 5 if quick else 20
    with workplace() as directory:
        store = directory / "store"
        peers = Peers(directory / "peers", quick)
        image = DebianImage(SMALL_SYSTEM if quick else SYSTEM, days, (192 if quick else 512) * MIB)
        states = _live(directory, image, days, store, peers)
        seal_all(store)
        sizes = {OURS: [stored_bytes(store) / MIB]}
        sizes |= {name: [size] for name, size in peers.sizes().items()}
        (group_name,) = os.listdir(store / layout.GROUPS_NAME)
        check_states(store, group_name, states)
        best = min((name for name in sizes if name != OURS), key=lambda name: sizes[name][0])
        title = f"{days} daily states of an image of {os.stat(directory / 'source' / IMAGE).st_blocks * 512 // MIB} MiB"
        report.table(title, "MiB", sizes, best)
        parts = {part: stored_bytes(store / part) / MIB for part in ("containers", "groups", "index")}
        report.note("of ours: " + ", ".join(f"{size:.1f} MiB in {part}" for part, size in parts.items()))
        report.at_most(f"size of {days} daily states", f"the better, {best}", ratio(sizes, OURS, best), 0.8)


def main() -> None:
    run_subject(measure, __doc__)


if __name__ == "__main__":
    main()

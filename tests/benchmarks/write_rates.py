"""Write rates on the mount in each mode, against a bare pyfuse3 passthrough and against QEMU's synchronous mirror.

    python -m tests.benchmarks.write_rates [--quick] [--tables depth1,depth16,sequential,writeback]

All subjects lie on one disk and run in turn; between two runs everything queued has become durable and the disk has
what was written, and that is outside the time of async and batch, whose promise is to have it later. Every write is of
new random bytes (fio's refill_buffers, with another seed each run), so that nothing is deduplicated or compressed.
The second appliance is a process of its own in every mode. Memory of all processes is watched meanwhile.

depth1: 4 KiB random writes over a volume of 256 MiB (quick: 64) full of data, one at a time, through write(2) as
applications do it: each is one request of the kernel's. The mirror of QEMU, in C, answers after its two copies have the
write in their page caches; sync answers after the second appliance has journalled it and the source has it.

depth16: 4 KiB random O_DIRECT writes, 16 at a time, in two readings, since write(2) to one file holds the inode's lock
in the kernel for the whole request (16 threads on one file are one at a time, then): one job that submits 16 at a time
(fio's libaio with iodepth 16), as a virtual machine's disk does, to one file; and 16 writers (psync) with a file each.

sequential: one pass of 1 MiB writes over a volume of 4 GiB (quick: 0.5) that was a hole, on a mount made for that run:
longer than any queue. Without an fsync in any of them: what lies in page caches at the end lies there for all.

writeback: the same with the kernel collecting writes (`rewindfs mount --writeback`, the bare passthrough's own
`--writeback`), and one fsync at the end within the time: else writes were still on their way to either.

Beside them, where a target may be out of reach, the least replication (`least_replication`): the floor, of runs of
gigabytes in the first three rounds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.benchmarks.mounts import (
    BARE,
    LEAST,
    MODES,
    NEW_DATA,
    bare_mount,
    fio,
    interleaved,
    interleaved_anew,
    least_mount,
    protected_mount,
    settled,
    workplace,
)
from tests.benchmarks.peak_memory import PeakMemory
from tests.benchmarks.qemu_mirror import QEMU, qemu_mirror
from tests.benchmarks.report import Report, floor_ratio, ratio, run_subject

BLOCK_BYTES = 4096
DEPTH = 16
WRITER_BYTES = 8 << 20


@contextmanager
def side_by_side(
    size: int, modes: Sequence[str], peaks: PeakMemory, least: Sequence[str] = ()
) -> Iterator[tuple[Path, dict[str, Path]]]:
    """A bare mount, one of each of the modes, and the least replication in some; the directory they are in."""
    with workplace() as directory, ExitStack() as stack:
        mounts = {BARE: stack.enter_context(bare_mount(directory / "bare", size))}
        for mode in least:
            mounts[LEAST[mode]] = stack.enter_context(least_mount(directory / f"least-{mode}", size, mode))
        for mode in modes:
            mounts[mode] = stack.enter_context(protected_mount(directory / mode, size, mode))
            peaks.watch_mount(mounts[mode])
        yield directory, mounts


def random_4k(file: Path, seconds: float, *options: str) -> float:
    """IOPS."""
    timed = ("--rw=randwrite", "--bs=4k", "--time_based", f"--runtime={seconds * 1000:.0f}ms")
    return fio(file, *timed, *NEW_DATA, *options) / BLOCK_BYTES


def one_job(place: Path, seconds: float) -> float:
    return random_4k(place / "data", seconds, "--direct=1", "--ioengine=libaio", f"--iodepth={DEPTH}")


def many_writers(place: Path, seconds: float) -> float:
    files = ("--filename_format=writer$jobnum", f"--size={WRITER_BYTES}")
    return random_4k(place, seconds, "--direct=1", f"--numjobs={DEPTH}", "--group_reporting", *files)


def depth1(report: Report, quick: bool, peaks: PeakMemory) -> None:
    rounds, seconds, size = _random_runs(quick)
    with (
        side_by_side(size, MODES, peaks) as (directory, mounts),
        qemu_mirror(directory / "qemu", size) as mirror,
    ):
        results = interleaved(rounds, mounts | {QEMU: mirror}, lambda place: random_4k(place / "data", seconds))
    what = "4 KiB random writes, depth 1"
    report.table(what, "IOPS", results, BARE)
    for mode, floor in (("async", 0.90), ("batch", 0.90), ("sync", 0.55)):
        report.at_least(f"{what}: {mode}", BARE, ratio(results, mode, BARE), floor)
    report.at_least(f"{what}: sync", QEMU, ratio(results, "sync", QEMU), 1.0)


def depth16(report: Report, quick: bool, peaks: PeakMemory) -> None:
    rounds, seconds, size = _random_runs(quick)
    least = [] if quick else ["sync"]
    with side_by_side(size, ["sync"], peaks, least) as (_directory, mounts):
        for place in mounts.values():
            for number in range(DEPTH):
                (place / f"writer{number}").write_bytes(os.urandom(WRITER_BYTES))
            settled(place)
        for way, measure in {"one job, one file": one_job, f"{DEPTH} writers, a file each": many_writers}.items():
            results = interleaved(rounds, mounts, partial(measure, seconds=seconds))
            what = f"4 KiB random writes, O_DIRECT, depth {DEPTH}: {way}"
            report.table(what, "IOPS", results, BARE)
            floor = floor_ratio(results, LEAST["sync"], BARE)
            report.at_least(f"{what}: sync", BARE, ratio(results, "sync", BARE), 0.60, floor=floor)


def _random_runs(quick: bool) -> tuple[int, float, int]:
    """Rounds, seconds of each run, bytes of the volume."""
    return (3, 0.5, 64 << 20) if quick else (5, 1.5, 256 << 20)


def sequential(report: Report, quick: bool, peaks: PeakMemory) -> None:
    rounds, size = (3, 512 << 20) if quick else (5, 4 << 30)
    what = f"1 MiB sequential writes of new data, {size / (1 << 30):g} GiB"
    modes = ["async", "sync"]
    results = _on_new_mounts(rounds, size, modes, peaks, [] if quick else modes)
    report.table(what, "MB/s", results, BARE)
    for mode, wanted in (("async", 0.80), ("sync", 0.60)):
        floor = floor_ratio(results, LEAST[mode], BARE)
        report.at_least(f"{what}: {mode}", BARE, ratio(results, mode, BARE), wanted, floor=floor)


def writeback(report: Report, quick: bool, peaks: PeakMemory) -> None:
    rounds, size = (3, 256 << 20) if quick else (5, 1 << 30)
    what = f"1 MiB sequential writes of new data, {size / (1 << 30):g} GiB, --writeback"
    results = _on_new_mounts(rounds, size, ["async"], peaks, [] if quick else ["async"], writeback=True)
    report.table(f"{what}, with an fsync at the end", "MB/s", results, BARE)
    floor = floor_ratio(results, LEAST["async"], BARE)
    report.at_least(f"{what}: async", f"{BARE} with kernel writeback", ratio(results, "async", BARE), 0.70, floor=floor)


def _on_new_mounts(
    rounds: int,
    size: int,
    modes: Sequence[str],
    peaks: PeakMemory,
    least: Sequence[str],
    *,
    writeback: bool = False,
) -> dict[str, list[float]]:
    """MB/s; with `writeback`, of the writes and the fsync behind them."""
    subjects = {BARE: partial(bare_mount, size=size, sparse=True, writeback=writeback)}
    for mode in least:
        subjects[LEAST[mode]] = partial(least_mount, size=size, mode=mode, sparse=True, writeback=writeback)
    for mode in modes:
        subjects[mode] = partial(protected_mount, size=size, mode=mode, sparse=True, writeback=writeback)
    end = ["--end_fsync=1"] if writeback else []

    def measure(place: Path) -> float:
        if (place.parent / "store").exists():
            peaks.watch_mount(place)
        return fio(place / "data", "--rw=write", "--bs=1m", *NEW_DATA, *end) / 1e6

    with workplace() as directory:
        return interleaved_anew(rounds, directory, subjects, measure)


TABLES = {"depth1": depth1, "depth16": depth16, "sequential": sequential, "writeback": writeback}


def measure(report: Report, quick: bool, tables: Sequence[str] = tuple(TABLES)) -> None:
    with PeakMemory() as peaks:
        for name in tables:
            TABLES[name](report, quick, peaks)
    peaks.tell(report, "written to at full rate")


def main() -> None:
    run_subject(measure, __doc__, tuple(TABLES))


if __name__ == "__main__":
    main()

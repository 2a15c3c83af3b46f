"""What a store grows by, and what memory each process takes, with a small and with a huge sparse volume.

python -m tests.benchmarks.footprint [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.mounts import rewindfs, rss_anon, workplace

BLOCK_BYTES = 4096


def size_on_disk(directory: Path) -> int:
    """Bytes that a directory's files occupy."""
    return sum(
        os.stat(os.path.join(place, name)).st_blocks * 512 for place, _, names in os.walk(directory) for name in names
    )


def write_blocks(file: Path, size: int, unique: int, duplicates: int) -> None:
    """Random blocks at random places: `unique` ones with content of their own, then `duplicates` of them elsewhere."""
    generator = random.Random(7)
    places = generator.sample(range(size // BLOCK_BYTES), unique + duplicates)
    with open(file, "r+b", buffering=0) as data:
        for number, place in enumerate(places):
            content = random.Random(number % unique).randbytes(BLOCK_BYTES)
            os.pwrite(data.fileno(), content, place * BLOCK_BYTES)
        os.fsync(data.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer blocks")
    unique = 8_000 if parser.parse_args().quick else 64_000
    table = Table(title=f"{unique} unique blocks and a quarter of them again, at random places")
    for column in ("volume", "mode", "store grew by, of unique bytes", "RssAnon mount", "RssAnon second"):
        table.add_column(column, justify="right")
    with workplace() as directory:
        for gibibytes, mode in ((1, "sync"), (1, "async"), (1, "batch"), (100, "async")):
            place = directory / f"{gibibytes}-{mode}"
            source, mountpoint, store = place / "source", place / "mnt", place / "store"
            source.mkdir(parents=True)
            mountpoint.mkdir()
            with open(source / "data", "wb") as data:
                data.truncate(gibibytes << 30)
            rewindfs("mount", source, mountpoint, "--store", store, "--mode", mode, "--wait-base")
            before = size_on_disk(store)
            write_blocks(mountpoint / "data", gibibytes << 30, unique, unique // 4)
            pids = json.loads(rewindfs("status", mountpoint, "--json"))["pids"]
            mount, second = (rss_anon(pids[name]) >> 20 for name in ("mount", "second"))
            rewindfs("unmount", mountpoint)
            grown = (size_on_disk(store) - before) / (unique * BLOCK_BYTES)
            table.add_row(f"{gibibytes} GiB", mode, f"{grown:.3f}", f"{mount} MiB", f"{second} MiB")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

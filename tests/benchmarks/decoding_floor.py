"""How fast the compressed groups of a sealed store can be had at all: pread and zstd, in threads, and nothing else.

No fingerprint is looked at, no block is looked up, and what was decoded is thrown away; a mount has the same groups to
decode, and then to hand them over on the same cores.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import zstandard

from dedup.layout import CONTAINER_PAGE_BYTES, CONTAINERS_NAME, container_named
from dedup.sealed_layout import CODING_ZSTD, SEALED_GROUP, unpack_sealed_header
from dedup.types import BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Group:
    """A compressed group: where it lies, in a file that is named, and the bytes that it becomes."""

    path: Path
    offset: int
    stored_bytes: int
    bytes: int


def compressed_groups(store: Path) -> list[Group]:
    """Those of all containers of a store, which are sealed, in the order in which they lie."""
    groups = []
    for path in sorted((store / CONTAINERS_NAME).iterdir()):
        if container_named(path.name) is None:
            continue
        with open(path, "rb") as file:
            header = unpack_sealed_header(file.read(CONTAINER_PAGE_BYTES), path)
            file.seek(header.groups_offset)
            rows = file.read(header.table_end - header.groups_offset)
        for offset, stored_bytes, blocks, coding, _ in SEALED_GROUP.struct.iter_unpack(rows):
            if coding == CODING_ZSTD:
                groups.append(Group(path, offset, stored_bytes, blocks * BLOCK_BYTES))
    return groups


def decoding_rate(groups: Sequence[Group], threads: int) -> float:
    """Decoded bytes a second."""
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {group.path for group in groups}}

    def decode(part: Sequence[Group]) -> None:
        decompressor = zstandard.ZstdDecompressor()
        for group in part:
            coded = os.pread(descriptors[group.path], group.stored_bytes, group.offset)
            decoded = decompressor.decompress(coded, max_output_size=group.bytes)
            if len(decoded) != group.bytes:
                raise RuntimeError(f"{group.path}: offset {group.offset}: the group has {len(decoded)} bytes")

    try:
        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            for done in [pool.submit(decode, groups[start::threads]) for start in range(threads)]:
                done.result()
            return sum(group.bytes for group in groups) / (time.perf_counter() - begin)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)

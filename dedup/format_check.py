"""Whether every file of a store is of a version that is known here: what a repair asks before it touches anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from dedup import layout
from dedup.container_size import examine
from dedup.errors import Damaged, NotAStore, UnknownFormat
from dedup.manifest import read_manifest
from dedup.marker import read_marker
from dedup.storage import Storage


def refuse_unknown(storage: Storage, path: Path) -> None:
    """UnknownFormat for a store with a marker, container, manifest or segment of a newer version; names the file.

    What is damaged or missing is not looked for. Reads no more than the files' heads, and manifests.
    """
    for what in _looks(storage, path):
        try:
            what()
        except (Damaged, NotAStore):
            continue
        except UnknownFormat as error:
            raise UnknownFormat(f"{error}; it is no damage, and nothing of this store was repaired") from error


def _looks(storage: Storage, path: Path) -> Iterator[Callable[[], object]]:
    yield partial(read_marker, storage, path)
    containers, groups = path / layout.CONTAINERS_NAME, path / layout.GROUPS_NAME
    for name in _names(storage, containers):
        if (container := layout.container_named(name)) is not None:
            yield partial(examine, storage, containers, container)
    for group in _names(storage, groups):
        journal = groups / group / layout.JOURNAL_NAME
        yield partial(read_manifest, storage, journal)
        for name in _names(storage, journal):
            if layout.segment_named(name) is not None or layout.consolidated_named(name) is not None:
                yield partial(_read_segment_header, storage, journal / name)


def _names(storage: Storage, directory: Path) -> list[str]:
    return storage.listdir(directory) if storage.exists(directory) else []


def _read_segment_header(storage: Storage, path: Path) -> None:
    fd = storage.open(path, os.O_RDONLY)
    try:
        layout.unpack_segment_header(storage.pread(fd, layout.SEGMENT_HEADER.size, 0), path)
    finally:
        storage.close(fd)

"""A store as one file: packed the same way each time, unpacked into an empty directory.

What belongs to a running process is left out: sockets, and LMDB's lock file, which is of no use on another machine.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Final

DIRECTORY: Final = Path(__file__).parent
_LEFT_OUT: Final = ("socket", "index/lock.mdb")


def archive_path(name: str) -> Path:
    return DIRECTORY / f"{name}.tar.xz"


def pack(store: Path, name: str) -> None:
    """Writes the archive of that name; one that is there is never written over (FileExistsError)."""
    with (
        open(archive_path(name), "xb") as file,
        tarfile.open(fileobj=file, mode="w:xz", preset=9, format=tarfile.USTAR_FORMAT) as archive,
    ):
        for path in sorted(store.rglob("*")):
            relative = str(path.relative_to(store))
            if relative in _LEFT_OUT:
                continue
            entry = tarfile.TarInfo(relative)
            if path.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, 0o700
                archive.addfile(entry)
            else:
                entry.mode, entry.size = 0o600, path.stat().st_size
                archive.addfile(entry, io.BytesIO(path.read_bytes()))


def unpack(name: str, store: Path) -> None:
    """Makes the directory `store` from the archive of that name; what is zeros becomes holes."""
    store.mkdir()
    with tarfile.open(archive_path(name), mode="r:xz") as archive:
        for entry in archive:
            target = store / entry.name
            if entry.isdir():
                target.mkdir()
                continue
            content = archive.extractfile(entry)
            assert content is not None, entry.name
            with open(target, "xb") as file:
                while page := content.read(4096):
                    if any(page):
                        file.write(page)
                    else:
                        file.seek(len(page), os.SEEK_CUR)
                file.truncate(entry.size)

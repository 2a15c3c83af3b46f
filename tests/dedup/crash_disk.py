"""What a power cut may take: a model of the disk under a store.

What `Disk` lets a power cut leave (`Survival`), a superset of what
ext4, xfs and btrfs do in their default modes, is:

- a file's bytes, page by page, independently: what the page held at the last fdatasync or after any change since; with
  `sectors`, each 512 bytes of a page on their own;
- a file's size, independently of its bytes: any that it had since the last fdatasync; what lies past it is gone, and
  what was never written is zeros;
- a directory's names: the changes since its last fsync (a name made, removed, renamed over another) each whole or not
  at all, in any order, except that of two changes to one name the later needs the earlier. A rename within a directory
  is one change; one between two directories is never in neither. An fsync of a file does not keep its name: ext4 does
  that, but it is not relied on;
- what a failed fdatasync was to write may never be written: later ones of the same file call it written;
- LMDB's file as it was after the last commit; its name like any other.

A killed process loses none of what it wrote; of the write that it was in, a part may be there.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

PAGE: Final = 4096
SECTOR: Final = 512
_NO_PAGE: Final = bytes(PAGE)


class File:
    """A file's content: what is durable, and every version since."""

    def __init__(self) -> None:
        self.pages: dict[int, list[bytes]] = {}
        """Per page its versions: the durable one, then one per change since the last sync."""
        self.sizes: list[int] = [0]
        self.doubtful: set[int] = set()
        """Pages that a failed sync has dropped: the kernel calls them clean, so that no later sync writes them."""

    def page(self, number: int) -> bytes:
        """What the page holds now."""
        versions = self.pages.get(number)
        return _NO_PAGE if versions is None else versions[-1]

    def write(self, offset: int, data: bytes) -> None:
        at = 0
        while at < len(data):
            number, start = divmod(offset + at, PAGE)
            part = data[at : at + PAGE - start]
            old = self.page(number)
            self._change(number, old[:start] + part + old[start + len(part) :])
            at += len(part)
        if offset + len(data) > self.sizes[-1]:
            self.sizes.append(offset + len(data))

    def truncate(self, size: int) -> None:
        edge, kept = divmod(size, PAGE)
        for number in list(self.pages):
            if number > edge or (number == edge and not kept):
                self._change(number, _NO_PAGE)
            elif number == edge:
                self._change(number, self.page(number)[:kept].ljust(PAGE, b"\0"))
        self.sizes.append(size)

    def _change(self, number: int, page: bytes) -> None:
        self.pages.setdefault(number, [_NO_PAGE]).append(page)
        self.doubtful.discard(number)

    def sync(self) -> None:
        self.sizes = self.sizes[-1:]
        for number, versions in self.pages.items():
            if number not in self.doubtful:
                del versions[:-1]

    def fail_sync(self) -> None:
        self.doubtful.update(number for number, versions in self.pages.items() if len(versions) > 1)

    def forget(self) -> dict[int, bytes]:
        """Memory is dropped: the doubtful pages are again what is durable. Those pages."""
        for number in self.doubtful:
            del self.pages[number][1:]
        dropped = {number: self.pages[number][0] for number in self.doubtful}
        self.doubtful.clear()
        return dropped

    def store(self, content: bytes) -> None:
        """The whole content at once, durable."""
        self.pages = {at // PAGE: [content[at : at + PAGE].ljust(PAGE, b"\0")] for at in range(0, len(content), PAGE)}
        self.sizes = [len(content)]


class Directory:
    """A directory's names: what is durable, and the changes since."""

    def __init__(self) -> None:
        self.durable: dict[str, File | Directory] = {}
        self.now: dict[str, File | Directory] = {}
        self.changes: list[Change] = []

    def change(self, names: dict[str, File | Directory | None], needs: Directory | None = None) -> None:
        change = Change(names, None if needs is None else (needs, needs.changes[-1]))
        self.changes.append(change)
        _take(self.now, names)

    def sync(self) -> None:
        for change in self.changes:
            change.settle()
        self.durable, self.changes = dict(self.now), []


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One change of a directory's names. `needs` is another directory's, without which this one is never there: a name
    that moves is never in neither."""

    names: dict[str, File | Directory | None]
    needs: tuple[Directory, Change] | None

    def settle(self) -> None:
        """What it needs is durable when it is."""
        if self.needs is not None:
            directory, change = self.needs
            if change in directory.changes:
                directory.changes.remove(change)
                _take(directory.durable, change.names)


def _take(names: dict[str, File | Directory], change: dict[str, File | Directory | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Kept(Enum):
    """Which of the changes that were not synced are there after the crash."""

    NONE = "none"
    ALL = "all"
    SOME = "some"
    LAST = "last"
    """Of each file its last page only; of names and sizes, all."""
    BUT_LAST = "all but the last"


@dataclass(frozen=True, slots=True)
class Survival:
    """What a crash leaves of the changes that were not synced."""

    names: Kept
    sizes: Kept
    pages: Kept
    seed: int = 0
    sectors: bool = False

    def __str__(self) -> str:
        return f"names {self.names.value}, sizes {self.sizes.value}, pages {self.pages.value}, seed {self.seed}"


ALL: Final = Survival(Kept.ALL, Kept.ALL, Kept.ALL)
"""A killed process; and a power cut that took nothing."""
CORNERS: Final = (
    Survival(Kept.NONE, Kept.NONE, Kept.NONE),
    Survival(Kept.NONE, Kept.ALL, Kept.ALL),
    Survival(Kept.ALL, Kept.NONE, Kept.NONE),
    Survival(Kept.ALL, Kept.ALL, Kept.NONE),
    Survival(Kept.ALL, Kept.ALL, Kept.LAST),
    Survival(Kept.ALL, Kept.ALL, Kept.BUT_LAST),
)


def some(seed: int) -> Survival:
    """A random one."""
    rng = random.Random(seed)
    kinds = (Kept.SOME, Kept.SOME, Kept.ALL)
    return Survival(rng.choice(kinds), rng.choice(kinds), Kept.SOME, seed, rng.random() < 0.5)


@dataclass(slots=True)
class Image:
    """The files and directories that a crash leaves; `pages` of a file by number."""

    directories: list[str] = field(default_factory=list)
    files: dict[str, tuple[int, dict[int, bytes]]] = field(default_factory=dict)

    def fingerprint(self) -> int:
        """Equal for equal images."""
        files = [(path, size, *sorted(pages.items())) for path, (size, pages) in sorted(self.files.items())]
        return hash((tuple(self.directories), tuple(files)))

    def write(self, target: Path) -> None:
        """Makes the files under `target`, a directory that is there."""
        for name in self.directories:
            (target / name).mkdir()
        for name, (size, pages) in self.files.items():
            fd = os.open(target / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.ftruncate(fd, size)
                for number, page in pages.items():
                    if page is not _NO_PAGE and number * PAGE < size:
                        os.pwrite(fd, page[: size - number * PAGE], number * PAGE)
            finally:
                os.close(fd)


class Disk:
    """The files of a directory tree, as they are and as they may be found after a crash."""

    def __init__(self) -> None:
        self.root = Directory()
        self.files: list[File] = []
        """In the order in which they were made: played twice, the same changes make the same numbers."""

    def make(self, path: str) -> int:
        """A new, empty file; its number."""
        self.files.append(File())
        directory, name = self.split(path)
        directory.change({name: self.files[-1]})
        return len(self.files) - 1

    def number(self, path: str) -> int | None:
        """The number of the file of that name; None when there is none."""
        directory, name = self.split(path)
        node = directory.now.get(name)
        return self.files.index(node) if isinstance(node, File) else None

    def rename(self, source: str, target: str) -> None:
        directory, old = self.split(source)
        other, new = self.split(target)
        node = directory.now[old]
        if directory is other:
            directory.change({old: None, new: node})
        else:
            other.change({new: node})
            directory.change({old: None}, needs=other)

    def second_name(self, source: str, target: str) -> None:
        """A hard link."""
        directory, old = self.split(source)
        other, new = self.split(target)
        other.change({new: directory.now[old]})

    def link(self, path: str, node: Directory | None) -> None:
        """A new directory under that name, or no more what had it."""
        directory, name = self.split(path)
        directory.change({name: node})

    def store_index(self, path: str, content: bytes) -> None:
        """What LMDB's file holds after a commit."""
        number = self.number(path)
        self.files[self.make(path) if number is None else number].store(content)

    def directory(self, path: str) -> Directory:
        node: File | Directory = self.root
        for part in Path(path).parts:
            assert isinstance(node, Directory)
            node = node.now[part]
        assert isinstance(node, Directory), path
        return node

    def split(self, path: str) -> tuple[Directory, str]:
        """The directory that a path lies in, and its name there."""
        return self.directory(os.path.dirname(path)), os.path.basename(path)

    def after(self, survival: Survival) -> Image:
        """What is found after a crash now."""
        return _Crash(survival).image(self.root)


class _Crash:
    """One choice of what survives."""

    def __init__(self, survival: Survival) -> None:
        self._survival = survival
        self._rng = random.Random(survival.seed)
        self._image = Image()
        self._contents: dict[File, tuple[int, dict[int, bytes]]] = {}
        self._kept: dict[Directory, list[Change]] = {}

    def image(self, root: Directory) -> Image:
        self._walk(root, "")
        return self._image

    def _walk(self, directory: Directory, path: str) -> None:
        names = dict(directory.durable)
        for change in self._changes(directory):
            _take(names, change.names)
        for name, node in sorted(names.items()):
            if isinstance(node, Directory):
                self._image.directories.append(path + name)
                self._walk(node, f"{path}{name}/")
            else:
                self._image.files[path + name] = self._content(node)

    def _content(self, file: File) -> tuple[int, dict[int, bytes]]:
        """The same under each of its names."""
        if file not in self._contents:
            survival, rng = self._survival, self._rng
            self._contents[file] = _size(file, survival.sizes, rng), _pages(file, survival, rng)
        return self._contents[file]

    def _changes(self, directory: Directory) -> list[Change]:
        """Those of the directory's changes that are there after the crash."""
        if directory in self._kept:
            return self._kept[directory]
        share = {Kept.NONE: 0.0, Kept.SOME: self._rng.choice((0.1, 0.5, 0.9))}.get(self._survival.names, 1.0)
        kept = self._kept[directory] = []
        lost: set[str] = set()
        for change in directory.changes:
            possible = change.needs is None or self._is_kept(*change.needs)
            if possible and self._rng.random() < share and not lost & change.names.keys():
                kept.append(change)
            else:
                lost |= change.names.keys()
        return kept

    def _is_kept(self, directory: Directory, change: Change) -> bool:
        return change not in directory.changes or change in self._changes(directory)


def _size(file: File, kept: Kept, rng: random.Random) -> int:
    if kept is Kept.NONE:
        return file.sizes[0]
    return rng.choice(file.sizes) if kept is Kept.SOME else file.sizes[-1]


def _pages(file: File, survival: Survival, rng: random.Random) -> dict[int, bytes]:
    kept = survival.pages
    changed = [number for number, versions in file.pages.items() if len(versions) > 1]
    last = max(changed, default=-1)
    share = rng.choice((0.1, 0.5, 0.9))
    pages = {}
    for number, versions in file.pages.items():
        if len(versions) == 1 or kept is Kept.ALL:
            page = versions[-1]
        elif kept is Kept.SOME:
            page = _some_version(versions, survival.sectors, share, rng)
        else:
            is_kept = kept is not Kept.NONE and (number == last) == (kept is Kept.LAST)
            page = versions[-1] if is_kept else versions[0]
        pages[number] = page
    return pages


def _some_version(versions: list[bytes], sectors: bool, share: float, rng: random.Random) -> bytes:
    def pick() -> bytes:
        return versions[-1] if rng.random() < share else rng.choice(versions)

    if not sectors:
        return pick()
    return b"".join([pick()[at : at + SECTOR] for at in range(0, PAGE, SECTOR)])

"""Names inside images that the kernel may remember: it would remember all that it ever saw, and this process with it.

Invariant: at most NAMES_MAX of them, and as many nodes; when there are more, the kernel is told to forget those that it
was given first. It looks them up again when they are wanted; files that are open stay as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

NAMES_MAX: Final = 40_000
"""At about 1 KiB each."""


class KnownNames:
    """Of files and symbolic links, not of directories: those may be somebody's working directory, and are fewer."""

    def __init__(self, forget: Callable[[int, bytes], None]) -> None:
        """`forget` tells the kernel to forget a name in the directory of an inode number; it must not wait."""
        self._forget = forget
        self._names: OrderedDict[tuple[int, bytes], None] = OrderedDict()

    def add(self, directory: int, name: bytes) -> None:
        """The kernel was given this name."""
        self._names[directory, name] = None
        self._names.move_to_end((directory, name))
        if len(self._names) > NAMES_MAX:
            (oldest, old_name), _ = self._names.popitem(last=False)
            self._forget(oldest, old_name)

"""The inode numbers of the snapshot mount.

Invariants:
- `numbers-never-return`: a number the kernel still remembers means one node ever, so what it caches is never another's;
- one number per key: a file that is reached by two names is one file;
- a node is here while the kernel holds `lookups` references to it, given by replies and taken back by forget. The root
  always is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from fusefs.snapshot_tree import Node, Root

ROOT_NUMBER: Final = 1
"""FUSE's number of the root."""


@dataclass(slots=True, eq=False)
class _Known:
    node: Node
    lookups: int
    allocated: int | None = None


class SnapshotInodes:
    """Nodes by number. Synchronous; for one task at a time."""

    def __init__(self) -> None:
        root = Root()
        self._known: dict[int, _Known] = {ROOT_NUMBER: _Known(root, 1)}
        self._numbers: dict[Hashable, int] = {root.key: ROOT_NUMBER}
        self._next_number = ROOT_NUMBER + 1

    def __len__(self) -> int:
        return len(self._known)

    def node(self, number: int) -> Node:
        """What a number stands for. ESTALE when it was forgotten."""
        known = self._known.get(number)
        if known is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return known.node

    def number(self, node: Node) -> int:
        """The number of a node, which stays its own only while the kernel refers to it: `refer` or `forget` it next."""
        number = self._numbers.get(node.key)
        if number is None:
            number = self._next_number
            self._next_number += 1
            self._numbers[node.key] = number
            self._known[number] = _Known(node, 0)
        return number

    def allocated(self, number: int) -> int | None:
        """What `set_allocated` said; None before."""
        known = self._known.get(number)
        return None if known is None else known.allocated

    def set_allocated(self, number: int, allocated: int) -> None:
        """The file's `PastImage.allocated`. Remembered as long as the kernel refers to it."""
        self._known[number].allocated = allocated

    def refer(self, number: int) -> None:
        """The kernel was given the number once more."""
        self._known[number].lookups += 1

    def forget(self, number: int, lookups: int = 0) -> None:
        """The kernel gave `lookups` references back; without any left the node goes."""
        known = self._known.get(number)
        if known is None or number == ROOT_NUMBER:
            return
        known.lookups -= lookups
        if known.lookups <= 0:
            del self._known[number]
            del self._numbers[known.node.key]

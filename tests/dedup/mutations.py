"""Bytes that a decoder may meet: valid ones, changed a little; and files that are only in memory.

A decoder is right when whatever it is given, it returns a value or raises one of REFUSALS: no other exception, and no
more memory or time than its input is worth (a length of 2^63 is just a number).
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from hypothesis import settings
from hypothesis import strategies as st

from dedup.errors import Damaged, NotAStore, UnknownFormat
from dedup.layout import CHECKSUM_BYTES, Fields, checksum
from dedup.storage import Storage

REFUSALS: Final = (Damaged, UnknownFormat, NotAStore)
_EDGES: Final = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, (1 << 31) - 1, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, 1 << 63]
FEW: Final = settings(max_examples=max(10, settings.default.max_examples // 8))
"""For a test that is run once for each of many samples."""
_Value = TypeVar("_Value")


@st.composite
def mutated(draw: st.DrawFn, data: bytes, *, same_length: bool = False) -> bytes:
    """`data` after one to three changes; now and then the same as before."""
    changed = bytearray(data)
    kinds = ["flip", "number", "bytes"] if same_length else ["flip", "number", "bytes", "cut", "remove", "insert"]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        match draw(st.sampled_from(kinds)):
            case "flip" if changed:
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "number":
                width = draw(st.sampled_from([1, 2, 4, 8]))
                number = draw(st.sampled_from(_EDGES) | st.integers(0, (1 << 64) - 1)) & ((1 << width * 8) - 1)
                at -= at % draw(st.sampled_from([1, width]))
                _put(changed, at, number.to_bytes(width, draw(st.sampled_from(["little", "big"]))))
            case "bytes":
                _put(changed, at, draw(st.binary(min_size=1, max_size=20)))
            case "cut":
                del changed[at:]
            case "remove":
                del changed[at : at + draw(st.integers(1, 40))]
            case "insert":
                changed[at:at] = draw(st.binary(min_size=1, max_size=40))
    return bytes(changed)


def _put(changed: bytearray, at: int, new: bytes) -> None:
    changed[at : at + len(new)] = new[: len(changed) - at]


def either(data: bytes) -> st.SearchStrategy[bytes]:
    """Mutations of `data`, and bytes that have nothing to do with it."""
    return mutated(data) | st.binary(max_size=200) | st.binary(max_size=200).map(lambda rest: data[:16] + rest)


def outcome(decode: Callable[[], _Value]) -> _Value | None:
    """What `decode` returns; None when it refused. Anything else that it raises is a fault."""
    try:
        return decode()
    except REFUSALS:
        return None


def with_checksum(data: bytes, start: int = 0, end: int | None = None) -> bytes:
    """`data` with the last 8 bytes of start..end made the checksum of those before: what is behind it is reached."""
    end = len(data) if end is None else end
    if not start + CHECKSUM_BYTES <= end <= len(data):
        return data
    body = data[start : end - CHECKSUM_BYTES]
    return data[:start] + body + checksum(body).to_bytes(CHECKSUM_BYTES, "little") + data[end:]


def without_reserved(fields: Fields, data: bytes) -> bytes:
    """The bytes of a header that mean something: its checksum left out, reserved ones as zeros."""
    kept = bytearray(data[: fields.size])
    for offset, length, name in fields.table():
        if name.startswith("reserved") or name == "checksum":
            kept[offset : offset + length] = bytes(length)
    return bytes(kept)


class MemoryFiles(Storage):
    """A storage whose files are what `files` says; reading them is real system calls. Nothing can be written."""

    def __init__(self, files: dict[Path, bytes]) -> None:
        super().__init__()
        self.files = files

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        try:
            content = self.files[path]
        except KeyError:
            raise FileNotFoundError(path) from None
        fd = os.memfd_create(path.name)
        os.write(fd, content)
        self._paths[fd] = path
        return fd

    def listdir(self, path: Path) -> list[str]:
        return sorted(found.name for found in self.files if found.parent == path)

    def exists(self, path: Path) -> bool:
        return path in self.files


def with_largest_numbers(data: bytes) -> Iterator[bytes]:
    """`data` with 4 or 8 of its bytes, at each place where a number may be, made as large as they can be."""
    for width in (4, 8):
        for number in ((1 << width * 8) - 1, (1 << (width * 8 - 1)) - 1):
            for at in range(0, len(data) - width + 1, 4):
                yield data[:at] + number.to_bytes(width, "little") + data[at + width :]


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that Python objects took while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

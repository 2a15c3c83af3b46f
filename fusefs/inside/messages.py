"""What the mount and the process of an image say to each other, over one connection of bytes.

The mount asks one question at a time; until its answer comes, the process may ask for bytes of the image.
"""

from __future__ import annotations

from typing import Final

import msgspec

from fusefs.inside.filesystem import Node, Status

MESSAGE_BYTES_MAX: Final = 72 << 20
"""More than the most bytes that are fetched at once, and than the most entries of one answer."""
ENTRIES_PER_ANSWER: Final = 500
READ_BYTES_MAX: Final = 1 << 20
MEMORY_STATUS: Final = 3
"""With which the process ends that is out of memory: it cannot even say so any more."""


class Open(msgspec.Struct, frozen=True, tag=True):
    """What does the image hold? The first question, answered by Opened."""

    size: int


class Lookup(msgspec.Struct, frozen=True, tag=True):
    """What has this name in a directory? One entry, or none."""

    node: Node
    name: bytes


class List(msgspec.Struct, frozen=True, tag=True):
    """The entries of a directory from the `start`th on, at most ENTRIES_PER_ANSWER."""

    node: Node
    start: int


class Read(msgspec.Struct, frozen=True, tag=True):
    """Bytes of a file."""

    node: Node
    offset: int
    length: int


class Readlink(msgspec.Struct, frozen=True, tag=True):
    """The target of a symbolic link."""

    node: Node


class Xattrs(msgspec.Struct, frozen=True, tag=True):
    """The extended attributes of an inode."""

    node: Node


Question = Open | Lookup | List | Read | Readlink | Xattrs


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A name; `status` is missing where the inode cannot be read, for the reason `why`."""

    name: bytes
    node: Node
    status: Status | None
    why: str = ""


class Opened(msgspec.Struct, frozen=True, tag=True):
    """`unclean`, if not empty, says why something may be older than what was written."""

    root: Node
    unclean: str
    refused: str


class Entries(msgspec.Struct, frozen=True, tag=True):
    """`unusable` names of the directory cannot be shown. After the last entry comes an answer with none."""

    entries: list[Entry]
    unusable: int = 0


class Bytes(msgspec.Struct, frozen=True, tag=True):
    """Of a file, a link; or of the image, to the process."""

    data: bytes


class Attributes(msgspec.Struct, frozen=True, tag=True):
    """Extended ones."""

    values: dict[bytes, bytes]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Instead of an answer: what is wrong with the image, in one line. `nothing`: it holds no file system."""

    what: str
    nothing: bool = False


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Not an answer: give me these bytes of the image. Answered by Bytes, or by the end of the connection."""

    offset: int
    length: int


Answer = Opened | Entries | Bytes | Attributes | Failed | Fetch

QUESTIONS: Final = msgspec.msgpack.Decoder(Question | Bytes)
ANSWERS: Final = msgspec.msgpack.Decoder(Answer)
encode: Final = msgspec.msgpack.Encoder().encode

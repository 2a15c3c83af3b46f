"""What every frame begins with: its length, its type, its flags. The rest of the layout is in frame_layout.py."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes; a memoryview must have one-byte items."""


class MessageType(IntEnum):
    """The `type` byte of a frame. Records are 32 and up."""

    HELLO = 1
    WELCOME = 2
    VOLUME_PAGE = 3
    REQUEST = 4
    REPLY = 5
    FAILURE = 6
    SYNC_REQUEST = 7
    ACK = 8
    COMPARE = 9
    COMPARE_RESULT = 10
    UNCOMPARED = 11
    OFFER = 12
    WANTED = 13
    QUERY = 14
    RESULT = 15
    WRITE = 32
    AGGREGATE = 33
    RECONCILE = 34
    CORRECT = 35
    RESIZE = 36
    CREATE = 37
    RENAME = 38
    RETIRE = 39
    ATTRIBUTES = 40
    FLUSH = 41
    BOOKMARK = 42
    HEARTBEAT = 43
    EPOCH_START = 44
    RECONCILE_BEGIN = 45
    RECONCILE_END = 46
    REMAINDER = 47


HEAD: Final = "<IBBH"
HEADER: Final = Struct(HEAD)
"""length u32 (whole frame), type u8, flags u8, reserved u16 = 0."""

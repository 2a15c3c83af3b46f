"""The process that reads one image: `python -m fusefs.inside.worker DESCRIPTOR SECONDS`, started by `image_process`.

Invariants:
- the image is untrusted: whatever it makes the libraries do ends with an answer, with Failed, or with this process:
  after SECONDS of computing for one question (OPEN_FACTOR times that for the first), or where MEMORY_BYTES are not
  enough;
- it writes nothing, opens nothing and reads nothing but its connection, and ends with it.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Final

from fusefs.inside.filesystem import NoFilesystem
from fusefs.inside.image_stream import ImageBytes
from fusefs.inside.image_tree import ImageTree, said
from fusefs.inside.messages import (
    ENTRIES_PER_ANSWER,
    MEMORY_STATUS,
    MESSAGE_BYTES_MAX,
    QUESTIONS,
    Answer,
    Attributes,
    Bytes,
    Entries,
    Entry,
    Failed,
    Fetch,
    List,
    Lookup,
    Open,
    Opened,
    Question,
    Read,
    Readlink,
    Xattrs,
    encode,
)

OPEN_FACTOR: Final = 3
"""Opening may have the checksums of a whole journal to count."""
MEMORY_BYTES: Final = 1 << 30
"""Of address space, most of which is never touched."""


class _ConnectionLost(BaseException):
    """Nobody is there to answer to. No library catches it."""


class _Worker:
    def __init__(self, connection: Connection, seconds: float) -> None:
        self._connection = connection
        self._seconds = seconds
        self._tree: ImageTree | None = None

    def serve(self) -> None:
        """Answers until the connection ends."""
        while True:
            question = self._receive()
            seconds = self._seconds * (OPEN_FACTOR if isinstance(question, Open) else 1)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                answer = encode(self._answer(question))
            except MemoryError:
                os._exit(MEMORY_STATUS)
            except Exception as error:  # noqa: BLE001 - what an image may cause is anything
                answer = encode(Failed(said(error), isinstance(error, NoFilesystem)))
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._send(answer)

    def _answer(self, question: Question | Bytes) -> Answer:
        if isinstance(question, Open):
            self._tree = tree = ImageTree(ImageBytes(question.size, self._fetch))
            refused = "; ".join(f"{name.decode()}: {why}" for name, why in tree.refused.items())
            return Opened(tree.root, tree.unclean, refused)
        assert self._tree is not None
        return _answer(self._tree, question)

    def _fetch(self, offset: int, length: int) -> bytes:
        self._send(encode(Fetch(offset, length)))
        reply = self._receive()
        if not isinstance(reply, Bytes) or len(reply.data) != length:
            raise _ConnectionLost
        return reply.data

    def _send(self, message: bytes) -> None:
        try:
            self._connection.send_bytes(message)
        except OSError:
            raise _ConnectionLost from None

    def _receive(self) -> Question | Bytes:
        try:
            message: Question | Bytes = QUESTIONS.decode(self._connection.recv_bytes(MESSAGE_BYTES_MAX))
        except (EOFError, OSError):
            raise _ConnectionLost from None
        return message


def _answer(tree: ImageTree, question: Question | Bytes) -> Answer:
    match question:
        case Lookup(node, name):
            found = tree.lookup(node, name)
            return Entries([] if found is None else [_entry(tree, name, found)])
        case List(node, start):
            names = tree.names(node, start, ENTRIES_PER_ANSWER)
            return Entries([_entry(tree, name, inner) for name, inner in names], tree.unusable(node))
        case Read(node, offset, length):
            return Bytes(tree.read(node, offset, length))
        case Readlink(node):
            return Bytes(tree.readlink(node))
        case Xattrs(node):
            return Attributes(tree.xattrs(node))
    raise AssertionError(f"not a question: {type(question)}")


def _entry(tree: ImageTree, name: bytes, node: tuple[int, ...]) -> Entry:
    try:
        return Entry(name, node, tree.status(node))
    except Exception as error:  # noqa: BLE001 - one damaged inode is not the whole directory
        return Entry(name, node, None, said(error))


def main() -> None:
    """The process."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _Worker(Connection(int(sys.argv[1])), float(sys.argv[2])).serve()
    except _ConnectionLost:
        return


if __name__ == "__main__":
    main()

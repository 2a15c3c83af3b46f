"""The mount's side of the process that reads an image: it gives the bytes, asks, and survives whatever comes of it.

Invariants:
- one question at a time for each image (`_lock`); any thread may ask, and waits;
- an image whose process ended by itself, or said what it must not, is broken for BROKEN_SECONDS: each question fails;
- bytes of the image that cannot be had are that error and no other: whoever asked gets it, and the process is gone.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Final, TypeVar

import msgspec

from dedup.errors import RewindError
from dedup.history import PastImage
from fusefs.inside.filesystem import Node
from fusefs.inside.image_stream import READ_BYTES_MAX as FETCH_BYTES_MAX
from fusefs.inside.messages import (
    ANSWERS,
    MEMORY_STATUS,
    MESSAGE_BYTES_MAX,
    Answer,
    Attributes,
    Bytes,
    Entries,
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
from replication.supervisor import child_environment, python_module

LIBRARIES: Final = ("extfs", "xfs", "btrfs", "ntfs", "fat", "volume")
QUESTION_SECONDS: Final = 20.0
"""Of the process's own time: waiting for bytes of the image does not count."""
BROKEN_SECONDS: Final = 60.0
END_SECONDS: Final = 2.0
_FETCH_STEP_BYTES: Final = 1 << 20
_T = TypeVar("_T", Opened, Entries, Bytes, Attributes)


class FilesUnavailable(RewindError):
    """The libraries that `--files` needs are not installed."""


class ImageUnreadable(RewindError):
    """What an image holds is damaged, or is not read here; `inside_files` adds of what."""


class NothingInside(ImageUnreadable):
    """An image holds no file system."""


def check_libraries() -> None:
    """FilesUnavailable says what to install."""
    missing = [name for name in LIBRARIES if _is_missing(f"dissect.{name}")]
    if missing:
        names = ", ".join(f"dissect.{name}" for name in missing)
        raise FilesUnavailable(f"--files: {names} not installed; install them with pip install 'rewindfs[files]'")


def _is_missing(name: str) -> bool:
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:
        return True


class ImageProcess:
    """Reads the files in one image. All methods but `close` may raise ImageUnreadable, or what the image raises."""

    def __init__(self, image: PastImage, *, question_seconds: float = QUESTION_SECONDS) -> None:
        """Starts nothing yet. A question may take `question_seconds` of computing."""
        self._question_seconds = question_seconds
        self.label = image.label
        self._image = image
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._closed = False
        self._broken: ImageUnreadable | None = None
        self._broken_until = 0.0
        self.opened: Opened | None = None
        """What the image holds, once it was looked at."""

    def open(self) -> Opened:
        """What the image holds. Looked at once."""
        with self._lock:
            return self._opened()

    def lookup(self, node: Node, name: bytes) -> Entries:
        """One entry or none."""
        return self._ask(Lookup(node, name), Entries)

    def list(self, node: Node, start: int) -> Entries:
        """Some entries from the `start`th on."""
        return self._ask(List(node, start), Entries)

    def read(self, node: Node, offset: int, length: int) -> bytes:
        """Bytes of a file, fewer at its end."""
        data = self._ask(Read(node, offset, length), Bytes).data
        if len(data) > length:
            raise ImageUnreadable("more bytes than there are")
        return data

    def readlink(self, node: Node) -> bytes:
        """The target of a symbolic link."""
        return self._ask(Readlink(node), Bytes).data

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        """The extended attributes of an inode."""
        return self._ask(Xattrs(node), Attributes).values

    def close(self) -> None:
        """Ends the process. Waits for a question that is being answered; those that come later are refused."""
        with self._lock:
            self._closed = True
            self._end()

    def _ask(self, question: Question, kind: type[_T]) -> _T:
        with self._lock:
            self._opened()
            return self._put(question, kind)

    def _opened(self) -> Opened:
        """With a process that has opened the image."""
        if self._closed:
            raise ImageUnreadable("it was closed")
        if self._broken and time.monotonic() < self._broken_until:
            raise type(self._broken)(str(self._broken))
        if self._connection is None:
            self._start()
            try:
                opened = self._put(Open(self._image.size), Opened)
            except ImageUnreadable as error:
                self._end()
                self._remember(error)
                raise
            self.opened = opened
        assert self.opened is not None
        return self.opened

    def _put(self, question: Question, kind: type[_T]) -> _T:
        """The answer, handing out bytes of the image until it comes."""
        answer = self._exchange(encode(question))
        while isinstance(answer, Fetch):
            try:
                data = self._bytes(answer)
            except BaseException:
                self._end()  # it waits for bytes that it will not get
                raise
            answer = self._exchange(encode(Bytes(data)))
        if isinstance(answer, Failed):
            raise (NothingInside if answer.nothing else ImageUnreadable)(answer.what)
        if not isinstance(answer, kind):
            self._end()
            raise self._break("the process that read it answered something else")
        return answer

    def _exchange(self, message: bytes) -> Answer:
        assert self._connection is not None
        try:
            self._connection.send_bytes(message)
            answer: Answer = ANSWERS.decode(self._connection.recv_bytes(MESSAGE_BYTES_MAX))
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            # Whoever asks again would wait as long for the same.
            raise self._break(f"the process that read it {self._end()}: the image may be damaged") from error
        return answer

    def _bytes(self, fetch: Fetch) -> bytes:
        end = fetch.offset + fetch.length
        if fetch.offset < 0 or not 0 <= fetch.length <= FETCH_BYTES_MAX or end > self._image.size:
            raise self._break("the process that read it asked for bytes that are not there")
        steps = range(fetch.offset, end, _FETCH_STEP_BYTES)
        return b"".join(self._image.read(at, min(_FETCH_STEP_BYTES, end - at)) for at in steps)

    def _break(self, what: str) -> ImageUnreadable:
        """The error to raise, now and for a while."""
        error = ImageUnreadable(what)
        self._remember(error)
        return error

    def _remember(self, error: ImageUnreadable) -> None:
        self._broken, self._broken_until = error, time.monotonic() + BROKEN_SECONDS

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*python_module("fusefs.inside.worker"), str(theirs.fileno()), str(self._question_seconds)],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())

    def _end(self) -> str:
        """Ends the process; how it ended."""
        if self._connection is None or self._process is None:
            return "was not there"
        self._connection.close()
        self._connection = None
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process = None
        if code == -signal.SIGPROF:
            return "took too long"
        if code == MEMORY_STATUS:
            return "needed too much memory"
        return f"ended with signal {-code}" if code < 0 else f"ended with status {code}"

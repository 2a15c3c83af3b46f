"""Connections that carry buffers in order, over sockets and in memory; Unix sockets. TCP and TLS build on it.

Invariants:
- One task sends on a connection at a time, one receives; a second one raises trio.BusyResourceError.
- A `send` that did not return leaves the stream cut at an unknown byte: the connection must be closed.
- A socket file has mode 0600 from its first instant, and only the holder of the store's lock replaces a stale one.
"""

from __future__ import annotations

import os
import socket
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import trio

from replication.address import Address, UnixAddress
from replication.errors import LinkDown, ReplicationError
from replication.identity import Peer
from replication.linger import Linger
from replication.patient_poll import PatientPoll
from replication.unix_path import connect_or_close, with_address
from replication.wire import Buffer

RECEIVE_BYTES_MAX: Final = 1 << 20
RECEIVE_BYTES_MIN: Final = 64 << 10
SOCKET_BUFFER_BYTES: Final = 2 << 20
"""Takes a record of the largest size at once, with what the kernel adds."""
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
"""Of asm-generic/socket.h: past the system's limit, for CAP_NET_ADMIN. Python does not name them."""
GATHER_BUFFERS_MAX: Final = 1024
"""IOV_MAX of Linux."""
BACKLOG: Final = 16


T = TypeVar("T")


def enlarge_buffers(sock: socket.socket) -> None:
    """Has the kernel take SOCKET_BUFFER_BYTES each way, or as much of that as the system's limit lets."""
    for option, forced in ((socket.SO_SNDBUF, _SO_SNDBUFFORCE), (socket.SO_RCVBUF, _SO_RCVBUFFORCE)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER_BYTES)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


class Connection(ABC):
    """A byte stream in both directions. Errors of the link are LinkDown, whatever the system calls them."""

    peer: Peer | None = None
    """Whose key the other end has proved to hold: set before `receive` returns its first byte, and for a connection
    that `connect` gave, at once. None where nobody proves anything: Unix sockets, plain TCP, memory."""

    fills = False
    """Whether there is `receive_into`."""

    is_local = False
    """Whether it ends on this host for certain, so that bytes cost little more than a copy."""

    @property
    def descriptor(self) -> int | None:
        """Becomes readable with what `receive_soon` gives; None where that takes more than the descriptor's bytes."""
        return None

    @abstractmethod
    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Puts all of the buffers on the stream, in order. May return without a checkpoint when the link takes them at
        once. Cancelled or failed: an unknown part was sent, close the connection. Raises LinkDown."""

    @abstractmethod
    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        """Puts as many bytes of the buffers on the stream as it takes at once, 0 when a `send` is under way or the link
        is congested, and returns how many. Raises LinkDown."""

    @abstractmethod
    async def receive(self) -> bytes:
        """The next bytes, at most RECEIVE_BYTES_MAX; b"" at the end of the stream. Always a checkpoint, unless it
        lingers; cancelled, it has consumed nothing. Raises LinkDown."""

    def receive_soon(self, milliseconds: int) -> bytes:
        """The next bytes if they come within so many milliseconds, for which this blocks the thread; else b"", also at
        the end of the stream, which `receive` then tells. A `receive` that waits meanwhile goes on waiting, and gets
        what comes after. Never more than RECEIVE_BYTES_MAX. Raises LinkDown."""
        return b""

    async def receive_into(self, buffer: memoryview) -> int:
        """As `receive`, into `buffer`, which is not empty; how many bytes came. Only where `fills` says so."""
        raise NotImplementedError

    def linger(self) -> None:  # noqa: B027 - a hint, which need not be taken
        """Has `receive` wait on the spot for a moment (`Linger`) where that is possible: for a peer that goes on as
        soon as it has its answer. `receive` may return without a checkpoint from now on."""

    @abstractmethod
    async def aclose(self) -> None:
        """Closes both directions at once; waiting calls raise LinkDown. Harmless when closed. Does not wait."""

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()


class SocketConnection(Connection):
    """A connected stream socket."""

    fills = True

    def __init__(self, sock: socket.socket, receive_bytes_max: int = RECEIVE_BYTES_MAX) -> None:
        sock.setblocking(False)
        enlarge_buffers(sock)
        self._sock = sock
        self._linger: Linger | None = None
        self.is_local = sock.family == socket.AF_UNIX
        self._sending = False
        self._receiving = False
        self._receive_bytes = RECEIVE_BYTES_MIN
        self._receive_bytes_max = receive_bytes_max
        self._poll = PatientPoll(sock.fileno())

    @property
    def descriptor(self) -> int:
        return self._sock.fileno()

    async def send(self, buffers: Sequence[Buffer]) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this connection")
        self._sending = True
        try:
            await self._send_all(buffers)
        except OSError as error:
            raise LinkDown(f"the link to the peer broke: {error}") from error
        except trio.ClosedResourceError as error:
            raise LinkDown("the connection was closed") from error
        finally:
            self._sending = False

    async def _send_all(self, buffers: Sequence[Buffer]) -> None:
        pending = list(buffers)
        while pending:
            try:
                sent = self._open_socket().sendmsg(pending[:GATHER_BUFFERS_MAX])
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)
                continue
            pending = _after(pending, sent)

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        if self._sending:
            return 0
        try:
            return self._open_socket().sendmsg(buffers[:GATHER_BUFFERS_MAX])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkDown(f"the link to the peer broke: {error}") from error

    def linger(self) -> None:
        self._linger = Linger()

    async def receive(self) -> bytes:
        return await self._receive(self._take_some)

    async def receive_into(self, buffer: memoryview) -> int:
        count = await self._receive(lambda: self._open_socket().recv_into(buffer))
        self._receive_bytes = RECEIVE_BYTES_MIN  # of the next large frame, too, only the beginning is to be copied
        return count

    async def _receive(self, take: Callable[[], T]) -> T:
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this connection")
        self._receiving = True
        try:
            return await self._when_readable(take)
        except OSError as error:
            raise LinkDown(f"the link to the peer broke: {error}") from error
        except trio.ClosedResourceError as error:
            raise LinkDown("the connection was closed") from error
        finally:
            self._receiving = False

    def receive_soon(self, milliseconds: int) -> bytes:
        self._open_socket()
        try:
            return self._take_some() if self._poll.poll(milliseconds) else b""
        except BlockingIOError:
            return b""
        except OSError as error:
            raise LinkDown(f"the link to the peer broke: {error}") from error

    async def _when_readable(self, take: Callable[[], T]) -> T:
        while True:
            # A wait before the bytes are taken: a peer that never pauses must not starve the other tasks, and a
            # cancelled receive must lose nothing.
            descriptor = self._open_socket().fileno()
            if self._linger is None:
                await trio.lowlevel.wait_readable(descriptor)
            else:
                await self._linger.readable(descriptor)
            try:
                return take()
            except BlockingIOError:
                continue

    def _take_some(self) -> bytes:
        data = self._open_socket().recv(self._receive_bytes)
        # Large buffers only while they are filled: making one costs more than a small message.
        full = len(data) == self._receive_bytes
        self._receive_bytes = self._receive_bytes_max if full else RECEIVE_BYTES_MIN
        return data

    def finish(self) -> None:
        """Tells the peer that nothing more comes; `receive` goes on. Raises LinkDown."""
        try:
            self._open_socket().shutdown(socket.SHUT_WR)
        except OSError as error:
            raise LinkDown(f"the link to the peer broke: {error}") from error

    def _open_socket(self) -> socket.socket:
        if self._sock.fileno() < 0:
            raise LinkDown("the connection was closed")
        return self._sock

    def close(self) -> None:
        """`aclose`, which does not wait here."""
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    async def aclose(self) -> None:
        self.close()


class MemoryConnection(Connection):
    """One end of `memory_pair`: for tests, and for what trio's streams can do and a socket cannot."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._sending = False

    async def send(self, buffers: Sequence[Buffer]) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this connection")
        self._sending = True
        try:
            await self._stream.send_all(b"".join(buffers))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LinkDown(f"the link to the peer broke: {error}") from error
        finally:
            self._sending = False

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        return 0

    async def receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(RECEIVE_BYTES_MAX))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LinkDown(f"the link to the peer broke: {error}") from error

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            await self._stream.aclose()


def memory_pair() -> tuple[MemoryConnection, MemoryConnection]:
    """Two connections joined in memory, unbounded."""
    import trio.testing  # here, because no process but a test's needs it

    one, other = trio.testing.memory_stream_pair()
    return MemoryConnection(one), MemoryConnection(other)


def socket_pair() -> tuple[SocketConnection, SocketConnection]:
    """Two connections over a Unix socket pair."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return SocketConnection(one), SocketConnection(other)


class Listener(ABC):
    """A listening socket, of whichever kind."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self._sock = sock
        self.address = address
        """Where it listens; a port that the system chose is the one it chose."""

    @abstractmethod
    async def accept(self) -> Connection:
        """The next connection; never held up by a peer that has connected before. Cancelled, it has accepted none.
        Raises trio.ClosedResourceError when closed, OSError when the system has no room for another."""

    async def _accept_socket(self) -> socket.socket:
        await trio.lowlevel.checkpoint()
        while True:
            if self._sock.fileno() < 0:
                raise trio.ClosedResourceError("the listener was closed")
            try:
                return self._sock.accept()[0]
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
            except ConnectionAbortedError:
                continue

    async def aclose(self) -> None:
        """Stops listening. What it accepted stays open. Harmless when closed. Does not wait."""
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


class UnixListener(Listener):
    """Made by `listen_unix`."""

    def __init__(self, sock: socket.socket, path: Path) -> None:
        super().__init__(sock, UnixAddress(path))
        self._path = path

    async def accept(self) -> SocketConnection:
        return SocketConnection(await self._accept_socket())

    async def aclose(self) -> None:
        """Removes the socket file, too; the caller still holds the store's lock."""
        if self._sock.fileno() >= 0:
            self._path.unlink(missing_ok=True)
        await super().aclose()


async def connect_unix(path: Path) -> SocketConnection:
    """Connects to the socket at `path`. Raises LinkDown when nobody listens, or more are waiting than it takes."""
    await trio.lowlevel.checkpoint()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    connect_or_close(sock, path)
    return SocketConnection(sock)


def listen_unix(path: Path, *, replace_stale: bool = False) -> UnixListener:
    """Listens at `path` with mode 0600.

    `replace_stale` removes a socket file that is there: only for the caller who holds the lock that says that no other
    listener lives. Raises ReplicationError when the path is taken or too long.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # The mode of the socket is the mode of the file that bind makes: there is no instant at which it is wider.
        os.fchmod(sock.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        if replace_stale and _is_socket(path):
            path.unlink(missing_ok=True)
        with_address(path, sock.bind)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ReplicationError(f"cannot listen at {path}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    return UnixListener(sock, path)


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _after(buffers: list[Buffer], sent: int) -> list[Buffer]:
    """What remains of the buffers after `sent` bytes of them."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            rest = buffers[index:]
            if sent:
                rest[0] = memoryview(buffer)[sent:]
            return rest
        sent -= len(buffer)
    return []

"""Where a peer listens, as a person writes it: `unix:PATH`, `tls://HOST:PORT`, `tcp://HOST:PORT`, or a store's path."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Final

from msgspec import Struct

from replication.errors import ReplicationError

SOCKET_NAME: Final = "socket"
"""In a store: where its second appliance listens, while one runs."""
UNIX_PREFIX: Final = "unix:"
PORT_MAX: Final = 65535
LOOPBACK_NAME: Final = "localhost"
"""The one name that is taken for the loopback without a look-up; it means nothing else (RFC 6761)."""
_FORMS: Final = "write unix:PATH, tls://HOST:PORT, tcp://HOST:PORT or a store's path"


class AddressError(ReplicationError):
    """The text is no address, or none that may be used so."""


class UnixAddress(Struct, frozen=True):
    """A Unix socket. `store` is set where the address was given as a store's path, within which the socket lies."""

    path: Path
    store: Path | None = None

    def __str__(self) -> str:
        return f"{UNIX_PREFIX}{self.path}" if self.store is None else str(self.store)


class NetworkAddress(Struct, frozen=True):
    """A TCP port, spoken to in TLS or plainly. Port 0 is for listening: the system chooses one."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this machine are there: an address of the loopback, or `localhost`."""
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return self.host.lower() == LOOPBACK_NAME

    def allow(self, *, insecure_tcp: bool) -> None:
        """Raises AddressError where plain TCP would leave this machine and nobody has said that it may."""
        if not (self.tls or self.is_loopback or insecure_tcp):
            raise AddressError(
                f"{self}: anybody on the way can read and change plain TCP, so it is for 127.0.0.1, [::1] and "
                "localhost only; use tls://, or allow it with --insecure-tcp"
            )


Address = UnixAddress | NetworkAddress


def parse_address(text: str | Path) -> Address:
    """The address that `text` means. A Path, or a text of no other form, is a store's path. Raises AddressError."""
    if isinstance(text, Path):
        return UnixAddress(text / SOCKET_NAME, text)
    if text.startswith(UNIX_PREFIX):
        path = text.removeprefix(UNIX_PREFIX)
        if not path:
            raise AddressError(f"{text!r} names no socket; write unix:PATH")
        return UnixAddress(Path(path))
    scheme, separator, rest = text.partition("://")
    if separator and "/" not in scheme:
        if scheme not in ("tls", "tcp"):
            raise AddressError(f"{text!r}: unknown kind of address; {_FORMS}")
        return _network(text, rest, tls=scheme == "tls")
    if not text:
        raise AddressError(f"an address is empty; {_FORMS}")
    return UnixAddress(Path(text) / SOCKET_NAME, Path(text))


def store_path(text: str | Path) -> Path | None:
    """The store's path where `text` is one, None where it is an appliance's address. Raises AddressError."""
    address = parse_address(text)
    return address.store if isinstance(address, UnixAddress) else None


def absolute_address(store: str) -> str:
    """A STORE for a process whose directory is another than this one's. AddressError."""
    path = store_path(store)
    if path is not None:
        return str(path.absolute())
    address = parse_address(store)
    return str(UnixAddress(address.path.absolute()) if isinstance(address, UnixAddress) else address)


def _network(text: str, rest: str, *, tls: bool) -> NetworkAddress:
    form = f"{'tls' if tls else 'tcp'}://HOST:PORT"
    host, colon, port = rest.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
        if not _is_ipv6(host):
            raise AddressError(f"{text!r}: there is no IPv6 address between the brackets; write {form}")
    elif ":" in host:
        raise AddressError(f"{text!r}: write an IPv6 address in brackets, e.g. {form[:3]}://[::1]:7070")
    if not colon or not host or not all(char.isprintable() and char not in " /@?#[]" for char in host):
        raise AddressError(f"{text!r}: write {form}")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= PORT_MAX):
        raise AddressError(f"{text!r}: {port!r} is no port; write {form}")
    return NetworkAddress(host, int(port), tls)


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True

"""Who this machine is to its peers, and which of them it trusts, for tls://: the files of an identity.

`identity.pem`: the private key and its self-signed certificate, mode 0600. `trusted.json`: the certificates that are
trusted, and what for. Nothing else is trusted: no authority, no host name.

Invariants:
- A file is replaced as a whole: written under another name, synced, renamed over, directory synced. The key and its
  certificate are one file, so that they belong together at any moment.
- One process at a time changes an identity: the one that holds the lock on its directory.
- A key that anybody but its owner and group could read, or a file that another user could have written, is not used.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NewType

import msgspec

from replication.durable_file import replace_file, sync_directory
from replication.errors import ReplicationError
from replication.messages import Role

if TYPE_CHECKING:
    from replication.certificate import Certificate

Fingerprint = NewType("Fingerprint", str)
"""`SHA256:` and the unpadded base64 of the SHA-256 of a public key (its SubjectPublicKeyInfo), as ssh writes one."""

FINGERPRINT_PREFIX: Final = "SHA256:"
KEY_NAME: Final = "identity.pem"
TRUSTED_NAME: Final = "trusted.json"
TRUSTED_VERSION: Final = 1
TRUSTED_MAX: Final = 1024
"""Most keys that are trusted."""
NAME_CHARACTERS_MAX: Final = 64
FILE_BYTES_MAX: Final = 16 << 20
DIRECTORY_VARIABLE: Final = "REWINDFS_IDENTITY"

Stamp = tuple[tuple[int, int, int] | None, ...]


class IdentityError(ReplicationError):
    """The identity is absent, damaged or not safe to use; the message names the file and says what to do."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Someone whose key is trusted here, and what that allows.

    `role` is what it may do where it connects to this side; None: it may not connect. `groups` are those that it may
    touch, empty: all. `server`: this side may connect to it as to its appliance.
    """

    name: str
    role: Role | None
    groups: frozenset[str]
    fingerprint: Fingerprint
    server: bool = False

    def may_touch(self, group: str) -> bool:
        """Whether the group is one of its own."""
        return not self.groups or group in self.groups

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint})"


@dataclass(frozen=True, slots=True)
class Trusted:
    """A peer and the certificate that it must show, in PEM."""

    peer: Peer
    certificate: str


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    role: Role | None
    server: bool
    groups: list[str]
    fingerprint: str
    certificate: str


@dataclass(frozen=True, slots=True)
class _TrustedFile:
    version: int
    peers: list[_Entry]


class Identity:
    """The identity in a directory. It is read anew by each method, so that changes are met; all of them block for as
    long as a small file takes. Errors are IdentityError."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key_path = directory / KEY_NAME
        self._trusted_path = directory / TRUSTED_NAME

    def stamp(self) -> Stamp:
        """What changes when the key or the trusted keys do."""
        return _stamp(self.key_path), _stamp(self._trusted_path)

    def check_key(self) -> None:
        """That there is a key, and that others cannot read it."""
        with _explained(self.key_path):
            try:
                mode = self.key_path.stat().st_mode
            except FileNotFoundError as error:
                raise IdentityError(
                    f"there is no identity in {self.directory}; make one with `rewindfs identity create`, or name "
                    f"another directory with --identity or {DIRECTORY_VARIABLE}"
                ) from error
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise IdentityError(f"{self.key_path} is open to others; `chmod 600` it, if nobody can have read it")

    def certificate(self) -> Certificate:
        """The own certificate, for peers to trust."""
        from replication.certificate import own_certificate  # only commands pay for cryptography

        self.check_key()
        return own_certificate(_read(self.key_path), str(self.key_path))

    def trusted(self) -> tuple[Trusted, ...]:
        """Whom this machine trusts. Nobody where no file says so."""
        with _explained(self._trusted_path):
            try:
                mode = self._trusted_path.stat().st_mode
            except FileNotFoundError:
                return ()
        if mode & (stat.S_IWOTH | stat.S_IWGRP):
            raise IdentityError(
                f"{self._trusted_path} can be written by others; look whom it trusts, then `chmod 600` it"
            )
        try:
            found = msgspec.json.decode(_read(self._trusted_path), type=_TrustedFile)
        except msgspec.MsgspecError as error:
            raise IdentityError(
                f"{self._trusted_path} is damaged: {error}; restore it, or remove it and trust anew"
            ) from error
        if found.version != TRUSTED_VERSION:
            raise IdentityError(
                f"{self._trusted_path} is of version {found.version}, which this rewindfs does not know"
            )
        return tuple(
            Trusted(
                Peer(entry.name, entry.role, frozenset(entry.groups), Fingerprint(entry.fingerprint), entry.server),
                entry.certificate,
            )
            for entry in found.peers
        )

    def create(self, *, replace: bool = False) -> Certificate:
        """Makes a key with its certificate, durably. One that is there stays, unless `replace`."""
        from replication.certificate import make_identity

        self._make_directory()
        with self._locked():
            if not replace and _stamp(self.key_path) is not None:
                raise IdentityError(
                    f"{self.key_path} exists; use it (`rewindfs identity show`), or give it up with --replace: every "
                    "peer must then trust the new one"
                )
            content, certificate = make_identity()
            _write(self.key_path, content)
        return certificate

    def trust(
        self,
        certificate: Certificate,
        *,
        role: Role | None,
        server: bool,
        groups: Sequence[str] = (),
        name: str | None = None,
    ) -> Peer:
        """Trusts the certificate from now on, durably, for this and nothing else, also where it was trusted before."""
        if name is not None:
            check_name(name)
        self._make_directory()
        with self._locked():
            others = []
            for one in self.trusted():
                if one.peer.fingerprint != certificate.fingerprint:
                    others.append(one)
                elif name is None:
                    name = one.peer.name
            if name is None:
                name = certificate.fingerprint.removeprefix(FINGERPRINT_PREFIX)[:12]
            if any(one.peer.name == name for one in others):
                raise IdentityError(
                    f"another key is trusted as {name!r}; choose a name with --name, or revoke that one"
                )
            if len(others) >= TRUSTED_MAX:
                raise IdentityError(f"{TRUSTED_MAX} keys are trusted already; revoke one that is not needed")
            peer = Peer(name, role, frozenset(groups), certificate.fingerprint, server)
            self._save([*others, Trusted(peer, certificate.pem)])
        return peer

    def revoke(self, who: str) -> Peer:
        """Trusts the peer of that name or fingerprint no longer, durably."""
        with self._locked():
            trusted = self.trusted()
            for one in trusted:
                if who in (one.peer.name, one.peer.fingerprint):
                    self._save([other for other in trusted if other is not one])
                    return one.peer
        raise IdentityError(
            f"nobody called {who!r} is trusted in {self.directory}; `rewindfs identity list` lists them"
        )

    def _save(self, trusted: Sequence[Trusted]) -> None:
        entries = [
            _Entry(
                name=one.peer.name,
                role=one.peer.role,
                server=one.peer.server,
                groups=sorted(one.peer.groups),
                fingerprint=one.peer.fingerprint,
                certificate=one.certificate,
            )
            for one in sorted(trusted, key=lambda one: one.peer.name)
        ]
        _write(self._trusted_path, msgspec.json.format(msgspec.json.encode(_TrustedFile(TRUSTED_VERSION, entries))))

    def _make_directory(self) -> None:
        with _explained(self.directory):
            missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
            for path in reversed(missing):
                path.mkdir(mode=0o700, exist_ok=True)
                sync_directory(path.parent)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _explained(self.directory):
            descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def default_directory() -> Path:
    """Where the identity is unless an option says otherwise: REWINDFS_IDENTITY, else root's or the user's own place."""
    if chosen := os.environ.get(DIRECTORY_VARIABLE):
        if not os.path.isabs(chosen):
            # A process in the background is in another directory than the command that started it.
            raise IdentityError(f"{DIRECTORY_VARIABLE} is {chosen!r}; it must be an absolute path")
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/etc/rewindfs/identity")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "rewindfs" / "identity"


def check_name(name: str) -> None:
    """That a peer may be called so. Raises IdentityError."""
    if not name or not name.isprintable() or len(name) > NAME_CHARACTERS_MAX or name.startswith(FINGERPRINT_PREFIX):
        raise IdentityError(f"{name!r} is no name for a peer: 1 to {NAME_CHARACTERS_MAX} printable characters")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    with _explained(path):
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> bytes:
    with _explained(path), open(path, "rb") as file:
        content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise IdentityError(f"{path} is larger than any identity is; restore it")
    return content


def _write(path: Path, content: bytes) -> None:
    """Replaces the file durably. To be called with the lock: nobody else uses the other name."""
    with _explained(path):
        replace_file(path, content)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IdentityError(f"cannot use the identity: {path}: {error.strerror or error}") from error

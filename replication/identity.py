"""Who this machine is to its peers, and which of them it trusts, for tls://."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NewType

from replication.errors import ReplicationError
from replication.messages import Role

Fingerprint = NewType("Fingerprint", str)
"""`SHA256:` and the unpadded base64 of the SHA-256 of a public key (its SubjectPublicKeyInfo), as ssh writes one."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Someone whose key is trusted here, and what that allows.

    `role` is what it may do where it connects to this side, None: it may not connect. `groups` are those that it may
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


class IdentityError(ReplicationError):
    """The identity is absent, damaged or not safe to use; the message names the file and what to do."""


class Identity:
    """The key of this machine and the keys that it trusts, as they are in `directory`; read when they are needed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory


def default_directory() -> Path:
    """Where the identity of this user is, unless an option says otherwise."""
    if os.geteuid() == 0:
        return Path("/etc/rewindfs/identity")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "rewindfs" / "identity"

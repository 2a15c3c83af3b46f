"""What a peer whose key is known may do: which roles it may take, which groups it may touch.

Where nobody proves a key (a Unix socket of mode 0600, plain TCP where that was allowed) a peer may do anything.

Invariant: what is said to a peer names no group but its own, neither in an answer nor in an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from replication.errors import ReplicationError
from replication.identity import Peer
from replication.messages import Role

_TAKES: Final[dict[Role, frozenset[Role]]] = {
    Role.AGENT: frozenset({Role.AGENT, Role.READER}),
    Role.READER: frozenset({Role.READER}),
    Role.ADMIN: frozenset(Role),
}
"""What a peer is trusted as → the roles that its sessions may have."""


class NotAllowed(ReplicationError):
    """The peer is not trusted with this; the message goes to it."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `group` is the one of an agent's session, or the one a command named; empty: none. `peer` is who the
    other end has proved to be, None where nobody does."""

    role: Role
    group: str
    peer: Peer | None = None

    @property
    def limited(self) -> bool:
        """Whether it may touch some groups only."""
        return self._of_one_group or (self.peer is not None and bool(self.peer.groups))

    def may_touch(self, group: str) -> bool:
        if self._of_one_group:
            return group == self.group
        return self.peer is None or self.peer.may_touch(group)

    @property
    def _of_one_group(self) -> bool:
        """An agent's session is of one group, and so is a reader's that named one: a first appliance passes on what its
        own peers ask, with a key of its own that may more than they."""
        return self.role is Role.AGENT or (self.role is Role.READER and bool(self.group))


def check_peer(peer: Peer | None, role: Role, group: str) -> None:
    """That the peer may have a session of that role about that group, which may be empty. NotAllowed."""
    if peer is None:
        return
    if peer.role is None:
        raise NotAllowed(f"{peer.name} is not trusted to connect here; `rewindfs identity trust` gives it a role")
    if role not in _TAKES[peer.role]:
        raise NotAllowed(f"{peer.name} is trusted as {peer.role.value} here, and may not be {role.value}")
    if group and not peer.may_touch(group):
        raise NotAllowed(f"{peer.name} is not trusted with group {group!r} here")

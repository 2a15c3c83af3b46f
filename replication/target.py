"""Where a mount's records go: to a second appliance, embedded or elsewhere, or to a first one on the way there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from replication.address import SOCKET_NAME, Address, UnixAddress, parse_address
from replication.control import exchange
from replication.endpoint import connect
from replication.errors import LinkDown
from replication.messages import Role
from replication.route import Route
from replication.transport import Connection

ASK_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Target:
    """`through`: a first appliance listens at `address`. Where `address` has a store, the mount serves that itself."""

    address: Address
    through: bool = False
    route: Route = field(default_factory=Route)

    @classmethod
    def embedded(cls, store: Path) -> Target:
        """The store at that path, which is absolute, by a second appliance of the mount's own."""
        return cls(UnixAddress(store / SOCKET_NAME, store))

    @classmethod
    def elsewhere(cls, text: str, route: Route, *, through: bool) -> Target:
        """An appliance that runs already. Raises AddressError."""
        place = parse_address(text)
        if isinstance(place, UnixAddress):
            place = UnixAddress(place.path.absolute())
        else:
            place.allow(insecure_tcp=route.insecure_tcp)
        return cls(place, through, route)

    @property
    def store(self) -> Path | None:
        """The path of the embedded store."""
        return self.address.store if isinstance(self.address, UnixAddress) else None

    async def connect(self) -> Connection:
        """A connection for a first appliance's records. Raises LinkDown."""
        return await connect(self.address, identity=self.route.identity, insecure_tcp=self.route.insecure_tcp)

    async def ask(self, group: str, command: str) -> dict[str, object]:
        """The reply of the second appliance to a question that any role may ask. Raises LinkDown (of it LinkReset),
        HandshakeRefused or RequestRefused."""
        with trio.move_on_after(ASK_SECONDS):
            async with await self.connect() as connection:
                return await exchange(connection, group, command, {}, role=Role.READER)
        raise LinkDown(f"no answer from {self.address} within {ASK_SECONDS:g} s")

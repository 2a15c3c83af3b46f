"""What a history is like, drawn from its seed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from replication.modes import Mode, Outage
from tests.simulation.chance import Chance


class Profile(Enum):
    """Which faults a history has."""

    CALM = "calm"
    """None: a gap, or a lost record, has no excuse."""
    SHORT = "short"
    """Short ones, the agent lives: there must be no gap and no reconcile after the base snapshot."""
    ROUGH = "rough"
    """All kinds, one after the other."""
    STORM = "storm"
    """All kinds, several at a time."""


class Topology(Enum):
    """What lies between the agent and the second appliance."""

    DIRECT = "direct"
    """Nothing: the first appliance is in the agent's process."""
    SPOOLED = "spooled"
    """The same, with a spool."""
    RELAYED = "relayed"
    """A first appliance on a host of its own."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds of the simulation."""

    profile: Profile
    topology: Topology
    mode: Mode
    outage: Outage | None
    outage_after: float
    queue_bytes_max: int
    offers: bool
    spool_bytes_max: int
    delay_max: float
    writers: int
    pause: float
    """Between two requests of an application, about."""
    seconds: float
    """For how long applications write and faults happen."""
    fault_every: float

    @classmethod
    def drawn(cls, chance: Chance) -> Settings:
        profile = chance.weighted({Profile.CALM: 1, Profile.SHORT: 3, Profile.ROUGH: 8, Profile.STORM: 4})
        is_short = profile in (Profile.CALM, Profile.SHORT)
        writers = chance.number(1, 5)
        seconds = chance.between(3, 25)
        return cls(
            profile=profile,
            topology=chance.weighted({Topology.DIRECT: 5, Topology.SPOOLED: 2, Topology.RELAYED: 4}),
            mode=chance.one_of(list(Mode)),
            outage=chance.one_of([None, None, *Outage]),
            # A cut may be seen half a minute later by one end than by the other: no outage comes of a short one.
            outage_after=60.0 if is_short else chance.scaled(1, 8),
            queue_bytes_max=32 << 20 if is_short else chance.one_of([48 << 10, 128 << 10, 512 << 10, 4 << 20]),
            spool_bytes_max=chance.one_of([256 << 10, 1 << 20, 1 << 30]),
            offers=chance.happens(0.5),
            delay_max=chance.scaled(2e-4, 5e-2),
            writers=writers,
            pause=2 * seconds * writers / chance.scaled(20, 500),
            seconds=seconds,
            fault_every=6.0 if is_short else chance.scaled(0.3, 5),
        )

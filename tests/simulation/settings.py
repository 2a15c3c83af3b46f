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


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds of the simulation."""

    profile: Profile
    mode: Mode
    outage: Outage | None
    outage_after: float
    queue_bytes_max: int
    offers: bool
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
            mode=chance.one_of(list(Mode)),
            outage=chance.one_of([None, None, *Outage]),
            outage_after=10.0 if is_short else chance.scaled(1, 8),
            queue_bytes_max=32 << 20 if is_short else chance.one_of([48 << 10, 128 << 10, 512 << 10, 4 << 20]),
            offers=chance.happens(0.5),
            delay_max=chance.scaled(2e-4, 5e-2),
            writers=writers,
            pause=2 * seconds * writers / chance.scaled(20, 500),
            seconds=seconds,
            fault_every=6.0 if is_short else chance.scaled(0.3, 5),
        )

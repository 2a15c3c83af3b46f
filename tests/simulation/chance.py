"""Where a history's decisions come from: its seed, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import exp, log
from typing import TypeVar

T = TypeVar("T")


class Chance:
    """A stream of decisions. Each part of the simulation has a branch of its own, so that one more decision in one part
    does not change those of another."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._random = random.Random(name)

    def branch(self, name: str) -> Chance:
        """Another stream, the same for the same seed and name."""
        return Chance(f"{self._name}/{name}")

    def happens(self, probability: float) -> bool:
        return self._random.random() < probability

    def between(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)

    def scaled(self, low: float, high: float) -> float:
        """Between two positive numbers, each order of magnitude as often."""
        return exp(self._random.uniform(log(low), log(high)))

    def number(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return self._random.randint(low, high)

    def one_of(self, choices: Sequence[T]) -> T:
        return self._random.choice(choices)

    def weighted(self, weights: dict[T, float]) -> T:
        return self._random.choices(list(weights), list(weights.values()))[0]

    def data(self, length: int) -> bytes:
        """Bytes that do not compress; now and then those that were given before."""
        if length >= 4096 and self.happens(0.5):
            block = random.Random(self._random.randrange(8)).randbytes(4096)
            return (block * (length // 4096 + 1))[:length]
        return self._random.randbytes(length)

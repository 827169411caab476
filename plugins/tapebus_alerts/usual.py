"""How many events are usual at an hour of the week, and how odd it would be to see so few.

Events within an hour are taken as Poisson with a rate nobody knows. After `n` such hours with `s` events in all, the
rate has a gamma distribution of shape ``s + 1/2`` and rate ``n`` (Jeffreys' prior), and the next count a negative
binomial one: with few weeks seen it is wide, and little can be called odd. A window over parts of several hours takes
the gamma distribution of the same mean and variance as the weighted sum (Welch and Satterthwaite's approximation).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

#: So many weeks make up what is usual.
WEEKS = 12


class Expectation(NamedTuple):
    """A gamma distribution of what a window should hold; ``weeks`` is the least that was seen of its hours."""

    shape: float
    rate: float
    weeks: int

    @property
    def mean(self) -> float:
        return self.shape / self.rate

    def at_most(self, count: int) -> float:
        """The probability of `count` events or fewer."""
        p = self.rate / (self.rate + 1.0)
        first = self.shape * math.log(p) - math.lgamma(self.shape)
        terms = (
            math.exp(first + math.lgamma(k + self.shape) - math.lgamma(k + 1.0) + k * math.log1p(-p))
            for k in range(count + 1)
        )
        return min(1.0, math.fsum(terms))


class Usual:
    """Counts by hour of the week, each ``(hours seen, events in them)``; what is older than `WEEKS` fades."""

    def __init__(self, hours: dict[int, tuple[int, float]]) -> None:
        self._hours = hours

    def learn(self, slot: int, count: int) -> tuple[int, float]:
        """Take in one more hour; what is now known of its slot."""
        seen, total = self._hours.get(slot, (0, 0.0))
        if seen >= WEEKS:
            seen, total = WEEKS - 1, total * (WEEKS - 1) / WEEKS
        self._hours[slot] = (seen + 1, total + count)
        return self._hours[slot]

    def expect(self, parts: Iterable[tuple[int, float]], weeks: int) -> Expectation | None:
        """What to expect of these parts of hours; None where one of them was seen less than `weeks` times."""
        mean = variance = 0.0
        least = 0
        for slot, share in parts:
            seen, total = self._hours.get(slot, (0, 0.0))
            if seen < weeks:
                return None
            least = min(least or seen, seen)
            mean += share * (total + 0.5) / seen
            variance += share * share * (total + 0.5) / (seen * seen)
        return Expectation(mean * mean / variance, mean / variance, least) if variance else None

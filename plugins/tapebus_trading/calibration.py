"""Stated confidence against what happened: how good it is as a forecast, and a curve that corrects it.

Everything works on *counts*: stated confidence in percent → wins and trades decided (WIN or LOSS, nothing else). They
are all that a fit needs, and as confidence comes in tenths they stay small however many trades there are. Rates are
fractions, confidence and what a curve returns are percent. Pure functions, safe from any thread.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from msgspec import Struct

from tapebus_trading.proportions import wilson

Counts = Mapping[float, tuple[int, int]]
Knots = list[tuple[float, float]]

BIN = 5
#: From so many trades on the next richer method is used; with fewer it would fit noise.
PLATT_FROM, ISOTONIC_FROM = 200, 1000
#: Trades at the base rate that each bin is given on top of its own.
SHRINKAGE = 20
#: A step of the isotonic curve rests on so many trades at least, or the last one would be a single win.
STEP = 20


class Bin(Struct, frozen=True):
    """One bin of the reliability table, ``low <= confidence < high`` (the last one includes 100)."""

    low: int
    n: int
    wins: int
    stated: float
    observed: float
    interval: tuple[float, float]

    @property
    def high(self) -> int:
        return self.low + BIN


class Score(Struct, frozen=True):
    """How good confidence was as a forecast.

    ``brier`` is the mean squared difference of forecast and result, ``reference`` that of always saying the base rate,
    ``skill`` is 1 - brier / reference: 0 or less is worse than saying the base rate; None where every trade ended the
    same way. ``ece`` is the expected calibration error over the bins.
    """

    n: int
    base_rate: float
    brier: float
    reference: float
    skill: float | None
    ece: float
    bins: tuple[Bin, ...]


def score(counts: Counts) -> Score | None:
    """The score of the confidences in `counts`; None when no trade was decided."""
    n, wins = _totals(counts)
    if not n:
        return None
    base = wins / n
    brier = math.fsum(k * (c / 100 - 1) ** 2 + (m - k) * (c / 100) ** 2 for c, (k, m) in counts.items()) / n
    reference = base * (1 - base)
    bins = reliability(counts)
    ece = math.fsum(each.n * abs(each.observed - each.stated / 100) for each in bins) / n
    return Score(n, base, brier, reference, 1 - brier / reference if reference else None, ece, bins)


def reliability(counts: Counts) -> tuple[Bin, ...]:
    """The bins of five points that hold anything, ascending."""
    held: dict[int, list[float]] = {}
    # in order, or the last digit of a sum would depend on which confidence came first
    for confidence, (k, m) in sorted(counts.items()):
        if m:
            low = bin_of(confidence)
            sums = held.setdefault(low, [0, 0, 0.0])
            sums[0] += k
            sums[1] += m
            sums[2] += m * confidence
    return tuple(
        Bin(low, int(n), int(k), stated / n, k / n, wilson(int(k), int(n)))
        for low, (k, n, stated) in sorted(held.items())
    )


def bin_of(confidence: float) -> int:
    """The lower end of the bin that `confidence` is in."""
    return min(int(confidence // BIN) * BIN, 100 - BIN)


class Curve(Struct, frozen=True):
    """A fit: ascending pairs of stated confidence and calibrated win rate, both percent.

    Between two knots the line counts, beyond the ends the end.
    """

    knots: Sequence[tuple[float, float]]
    method: str = ""
    n: int = 0
    version: int = 0

    def apply(self, confidence: float) -> float:
        """The win rate in percent that trades of this stated `confidence` had; `confidence` itself without a knot."""
        knots = self.knots
        if not knots:
            return confidence
        i = bisect_right(knots, confidence, key=lambda knot: knot[0])
        if i == 0 or i == len(knots):
            return knots[max(0, i - 1)][1]
        (x0, y0), (x1, y1) = knots[i - 1], knots[i]
        return y0 + (y1 - y0) * (confidence - x0) / (x1 - x0)


def fit(counts: Counts, version: int = 0) -> Curve:
    """The curve of `counts`, which hold past trades only: by their number bins with shrinkage, Platt or isotonic."""
    n, _ = _totals(counts)
    if n >= ISOTONIC_FROM:
        return Curve(isotonic(counts), "isotonic", n, version)
    if n >= PLATT_FROM:
        return Curve(platt(counts), "platt", n, version)
    return Curve(shrunk(counts), "shrinkage", n, version)


def shrunk(counts: Counts, strength: float = SHRINKAGE) -> Knots:
    """One knot a bin, its rate drawn to the base rate: (k + s base) / (n + s)."""
    n, wins = _totals(counts)
    base = wins / n if n else 0.0
    return [(each.stated, 100 * (each.wins + strength * base) / (each.n + strength)) for each in reliability(counts)]


def platt(counts: Counts) -> Knots:
    """A logistic curve in two parameters (Platt 1999), fitted by Newton steps, with a knot a point.

    Wins count as (k + 1) / (k + 2) and losses as 1 / (n - k + 2), so that no sample demands certainty.
    """
    n, wins = _totals(counts)
    if not n:
        return []
    win, loss = (wins + 1) / (wins + 2), 1 / (n - wins + 2)
    mean = math.fsum(c * m for c, (_, m) in counts.items()) / n
    spread = math.sqrt(math.fsum(m * (c - mean) ** 2 for c, (_, m) in counts.items()) / n)
    # one stated confidence alone has no slope: any scale will do
    scale = spread or 1.0
    points = [((c - mean) / scale, m, k * win + (m - k) * loss) for c, (k, m) in sorted(counts.items()) if m]
    level, slope = _newton(points, sloped=spread > 0)
    low, high = min(c for c, (_, m) in counts.items() if m), max(c for c, (_, m) in counts.items() if m)
    at = [low, *range(math.floor(low) + 1, math.ceil(high)), high]
    return [(c, 100 * _logistic(level + slope * (c - mean) / scale)) for c in dict.fromkeys(map(float, at))]


def _newton(points: list[tuple[float, int, float]], sloped: bool) -> tuple[float, float]:
    """Level and slope of the logistic curve with the least log loss over (x, n, sum of targets).

    The loss is convex; a step that does not lower it is halved.
    """

    def loss(level: float, slope: float) -> float:
        return math.fsum(m * _softplus(level + slope * x) - t * (level + slope * x) for x, m, t in points)

    level = slope = 0.0
    now = loss(level, slope)
    for _ in range(50):
        g0 = g1 = h00 = h01 = h11 = 0.0
        for x, m, t in points:
            p = _logistic(level + slope * x)
            error, weight = m * p - t, m * p * (1 - p)
            g0, g1 = g0 + error, g1 + error * x
            h00, h01, h11 = h00 + weight, h01 + weight * x, h11 + weight * x * x
        determinant = h00 * h11 - h01 * h01
        if not sloped or determinant <= 1e-12 * h00 * h11:
            d0, d1 = g0 / h00 if h00 else 0.0, 0.0
        else:
            d0, d1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        step = 1.0
        while (then := loss(level - step * d0, slope - step * d1)) > now and step > 1e-6:
            step /= 2
        level, slope = level - step * d0, slope - step * d1
        if now - then <= 1e-12 * abs(now):
            break
        now = then
    return level, slope


def isotonic(counts: Counts, step: int = STEP) -> Knots:
    """The rising step curve of least squares (pool adjacent violators), over groups of `step` trades at least.

    A pool gives two knots, its first and its last confidence, so between two pools the line counts.
    """
    pools: list[_Pool] = []
    for group in _groups(counts, step):
        pools.append(group)
        while len(pools) > 1 and pools[-2].rate >= pools[-1].rate:
            last = pools.pop()
            pools[-1] = pools[-1].with_(last)
    return [(x, 100 * each.rate) for each in pools for x in dict.fromkeys((each.first, each.last))]


class _Pool(Struct):
    """Neighbouring confidences from ``first`` to ``last`` with one rate."""

    first: float
    last: float
    wins: int
    n: int

    @property
    def rate(self) -> float:
        return self.wins / self.n

    def with_(self, other: _Pool) -> _Pool:
        return _Pool(self.first, other.last, self.wins + other.wins, self.n + other.n)


def _groups(counts: Counts, step: int) -> list[_Pool]:
    """Neighbouring confidences put together until each group has `step` trades; what is left joins the last."""
    groups: list[_Pool] = []
    for confidence in sorted(counts):
        wins, n = counts[confidence]
        if not n:
            continue
        own = _Pool(confidence, confidence, wins, n)
        if groups and groups[-1].n < step:
            groups[-1] = groups[-1].with_(own)
        else:
            groups.append(own)
    if len(groups) > 1 and groups[-1].n < step:
        last = groups.pop()
        groups[-1] = groups[-1].with_(last)
    return groups


def _totals(counts: Counts) -> tuple[int, int]:
    return sum(m for _, m in counts.values()), sum(k for k, _ in counts.values())


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _softplus(x: float) -> float:
    """log(1 + e^x) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

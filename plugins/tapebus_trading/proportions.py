"""Win rates with what they prove: intervals, exact tails, corrections for many and for repeated looks.

Pure functions of counts, `math` only. Rates and probabilities are fractions. Safe from any thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

#: The two-sided 95 % point of the normal distribution.
Z95 = 1.959963984540054
_BISECTIONS = 60


def wilson(wins: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a rate of `wins` in `n`; (0, 1) when nothing is known."""
    _check("wilson", wins, n)
    if n == 0:
        return 0.0, 1.0
    p, zz = wins / n, z * z
    scale = 1 + zz / n
    centre = (p + zz / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / scale
    low = 0.0 if wins == 0 else max(0.0, centre - half)
    return low, 1.0 if wins == n else min(1.0, centre + half)


def clopper_pearson(wins: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """The exact interval of Clopper and Pearson: the rates that neither tail of `alpha` / 2 excludes."""
    _check("clopper_pearson", wins, n)
    low = 0.0 if wins == 0 else _crossing(lambda p: at_least(wins, n, p) - alpha / 2)
    high = 1.0 if wins == n else _crossing(lambda p: alpha / 2 - at_most(wins, n, p))
    return low, high


def _crossing(rising: Callable[[float], float]) -> float:
    """Where a function that rises over (0, 1) passes zero, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def at_least(wins: int, n: int, p: float) -> float:
    """P(X >= wins) for n trades that each win with probability `p`: the one-sided p-value of "better than p"."""
    _check("at_least", wins, n)
    # the shorter tail is summed: the longer one would round to 1 long before it is
    if wins <= n * p:
        return max(0.0, 1 - _sum(0, wins - 1, n, p))
    return min(1.0, _sum(wins, n, n, p))


def at_most(wins: int, n: int, p: float) -> float:
    """P(X <= wins) for n trades that each win with probability `p`: the one-sided p-value of "worse than p"."""
    return at_least(n - wins, n, 1 - p)


def _sum(first: int, last: int, n: int, p: float) -> float:
    if p <= 0 or p >= 1:
        certain = 0 if p <= 0 else n
        return 1.0 if first <= certain <= last else 0.0
    win, lose, whole = math.log(p), math.log1p(-p), math.lgamma(n + 1)
    return math.fsum(
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * win + (n - k) * lose)
        for k in range(first, last + 1)
    )


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Each p-value adjusted within the family `p_values`, in the order given (Benjamini and Hochberg 1995)."""
    m = len(p_values)
    adjusted, least = [1.0] * m, 1.0
    for rank, i in enumerate(sorted(range(m), key=lambda i: -p_values[i])):
        least = min(least, p_values[i] * (m / (m - rank)))
        adjusted[i] = least
    return adjusted


def breakeven_win_rate(reward_risk: float) -> float:
    """The win rate at which trades with this reward:risk earn nothing (costs aside)."""
    if not reward_risk > 0:
        raise ValueError(f"breakeven_win_rate: reward:risk must be positive, not {reward_risk}")
    return 1 / (1 + reward_risk)


def log_mixture(wins: int, n: int) -> float:
    """The log probability of one order of `wins` in `n` when every win rate is weighed with Beta(1/2, 1/2)."""
    _check("log_mixture", wins, n)
    return _log_beta(0.5 + wins, 0.5 + n - wins) - _log_beta(0.5, 0.5)


def log_null(wins: int, n: int, p: float) -> float:
    """The log probability of one order of `wins` in `n` trades that each win with probability `p`."""
    return wins * math.log(p) + (n - wins) * math.log1p(-p)


def log_e_value(wins: int, n: int, p: float) -> float:
    """log E of the hypothesis that the win rate is `p`; evidence against it may be looked at after every trade.

    P(E ever reaches 1 / alpha) <= alpha where the hypothesis is true (Ville's inequality). E says *that* the rate is
    another, not on which side: compare ``wins / n`` with `p`. For trades with a `p` of their own each, subtract the
    sum of their `log_null` from `log_mixture`.
    """
    return log_mixture(wins, n) - log_null(wins, n, p)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _check(name: str, wins: int, n: int) -> None:
    if not 0 <= wins <= n:
        raise ValueError(f"{name}: {wins} wins of {n} is impossible")

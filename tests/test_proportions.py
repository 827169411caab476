"""Intervals, tails and evidence against published tables and against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapebus_trading.proportions import (
    at_least,
    at_most,
    benjamini_hochberg,
    breakeven_win_rate,
    clopper_pearson,
    log_e_value,
    log_mixture,
    log_null,
    wilson,
)

PAIRS = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
RATES = st.integers(1, 999).map(lambda part: part / 1000)


def percent(interval: tuple[float, float]) -> tuple[float, float]:
    return round(interval[0] * 100, 1), round(interval[1] * 100, 1)


# -- published tables -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "n", "by_wilson", "exact"),
    [
        (4, 4, (51.0, 100), (39.8, 100)),
        (12, 13, (66.7, 98.6), (64.0, 99.8)),
        (6, 9, (35.4, 87.9), (29.9, 92.5)),
        (0, 2, (0, 65.8), (0, 84.2)),
        (22, 28, (60.5, 89.8), (59.0, 91.7)),
    ],
)
def test_both_intervals_match_the_reference_table(
    wins: int, n: int, by_wilson: tuple[float, float], exact: tuple[float, float]
) -> None:
    assert percent(wilson(wins, n)) == by_wilson
    assert percent(clopper_pearson(wins, n)) == exact


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(660, 1641, 37.9, 42.6), (88, 275, 26.8, 37.7), (7, 25, 14.3, 47.6), (7, 20, 18.1, 56.7)],
)
def test_the_wilson_interval_matches_the_recorded_logs(wins: int, n: int, low: float, high: float) -> None:
    assert percent(wilson(wins, n)) == (low, high)


@pytest.mark.parametrize(
    ("wins", "n", "p", "value", "digits"),
    [
        (4, 4, 0.5, 0.0625, 4),
        (12, 13, 0.5, 0.0017, 4),
        (6, 9, 0.5, 0.254, 3),
        (0, 2, 0.5, 1.0, 9),
        (22, 28, 0.5, 0.0019, 4),
        (4, 4, 1 / 2, 0.063, 3),
        (12, 13, 1 / 1.7, 0.010, 3),
        (6, 9, 1 / 1.6, 0.546, 3),
        (22, 28, 1 / 1.75, 0.015, 3),
    ],
)
def test_the_one_sided_p_values_match_the_reference_table(
    wins: int, n: int, p: float, value: float, digits: int
) -> None:
    got = at_least(wins, n, p)
    # 0.0625 was rounded to 0.063 there, half up
    assert math.floor(got * 10**digits + 0.5) / 10**digits == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("n", "points"), [(10, 26), (20, 20), (30, 17), (50, 13), (100, 10), (200, 7), (400, 5)])
def test_half_the_width_of_the_wilson_interval_at_half_matches_the_reference(n: int, points: int) -> None:
    low, high = wilson(n // 2, n)
    assert round((high - low) * 50) == points


@pytest.mark.parametrize(
    ("reward_risk", "rate"),
    [(0.5, 66.7), (0.6, 62.5), (0.7, 58.8), (0.75, 57.1), (1, 50), (1.25, 44.4), (1.5, 40), (2, 33.3), (3, 25)],
)
def test_breakeven_win_rates_match_the_reference_table(reward_risk: float, rate: float) -> None:
    assert round(breakeven_win_rate(reward_risk) * 100, 1) == rate


@pytest.mark.parametrize(
    ("p0", "n", "wins"),
    [
        *((0.4, n, k) for n, k in ((20, 1), (30, 4), (50, 9), (100, 24), (200, 56))),
        *((0.588, n, k) for n, k in ((20, 4), (30, 9), (50, 18), (100, 42), (200, 93))),
    ],
)
def test_the_largest_number_of_wins_that_eliminates_matches_the_reference(p0: float, n: int, wins: int) -> None:
    eliminates = [k for k in range(n + 1) if k / n < p0 and log_e_value(k, n, p0) >= math.log(20)]
    assert max(eliminates) == wins


def test_the_p_values_of_september_are_adjusted_as_published() -> None:
    """Five patterns were one family; each is compared with the breakeven of its own mean reward:risk."""
    family = [(46, 56, 0.56084), (9, 13, 0.47741), (6, 10, 0.59242), (1, 5, 0.52192), (1, 1, 0.49261)]
    raw = [at_least(*each) for each in family]
    assert [round(p, digits) for p, digits in zip(raw, (5, 3, 2, 2), strict=False)] == [0.00004, 0.101, 0.61, 0.98]
    adjusted = benjamini_hochberg(raw)
    assert round(adjusted[0], 5) == 0.00018
    assert [round(p, 2) for p in adjusted[1:4]] == [0.25, 0.77, 0.98]


@pytest.mark.parametrize(
    ("p0", "p1", "n"),
    [
        *((0.5, p1, n) for p1, n in ((0.55, 620), (0.6, 158), (0.7, 37))),
        *((1 / 1.7, p1, n) for p1, n in ((0.65, 390), (0.7, 120))),
        *((0.4, p1, n) for p1, n in ((0.3, 143), (0.35, 585))),
    ],
)
def test_the_sample_sizes_for_a_power_of_eighty_percent_match_the_reference(p0: float, p1: float, n: int) -> None:
    """One-sided at 5 %: the published n is the first whose exact power reaches 80 %."""

    def power(size: int) -> float:
        if p1 > p0:
            critical = next(k for k in range(size + 1) if at_least(k, size, p0) <= 0.05)
            return at_least(critical, size, p1)
        critical = next(k for k in range(size, -1, -1) if at_most(k, size, p0) <= 0.05)
        return at_most(critical, size, p1)

    assert power(n) >= 0.8
    assert all(power(each) < 0.8 for each in range(n - 3, n))


# -- properties and an exact oracle ---------------------------------------------------------------


@given(PAIRS)
def test_the_wilson_bounds_solve_the_score_equation(pair: tuple[int, int]) -> None:
    wins, n = pair
    for bound in wilson(wins, n):
        assert 0 <= bound <= 1
        if 0 < bound < 1:
            z = abs(wins / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert z == pytest.approx(1.959964, abs=1e-4)


def exact_tail(wins: int, n: int, p: Fraction) -> Fraction:
    """P(X >= wins), by the definition, without rounding."""
    return sum((math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(wins, n + 1)), Fraction(0))


@given(st.integers(0, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.integers(1, 99))
def test_the_tails_agree_with_exact_arithmetic(pair: tuple[int, int], part: int) -> None:
    wins, n = pair
    p = Fraction(part, 100)
    assert at_least(wins, n, float(p)) == pytest.approx(float(exact_tail(wins, n, p)), rel=1e-9, abs=1e-12)
    below = 1 - exact_tail(wins + 1, n, p) if wins < n else Fraction(1)
    assert at_most(wins, n, float(p)) == pytest.approx(float(below), rel=1e-9, abs=1e-12)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_exact_interval_leaves_its_share_in_each_tail(pair: tuple[int, int]) -> None:
    wins, n = pair
    low, high = clopper_pearson(wins, n)
    assert low <= wins / n <= high
    assert low == 0 if wins == 0 else at_least(wins, n, low) == pytest.approx(0.025, abs=1e-9)
    assert high == 1 if wins == n else at_most(wins, n, high) == pytest.approx(0.025, abs=1e-9)


@given(st.lists(st.floats(0, 1), max_size=30))
def test_adjusted_p_values_keep_the_order_and_are_never_smaller(raw: list[float]) -> None:
    adjusted = benjamini_hochberg(raw)
    assert all(p <= a <= 1 for p, a in zip(raw, adjusted, strict=True))
    pairs = sorted(zip(raw, adjusted, strict=True))
    assert all(left[1] <= right[1] for left, right in pairwise(pairs))
    # by the definition: the least of p(j) m / j over all j from its own rank on
    m = len(raw)
    for p, a in pairs:
        assert a == pytest.approx(min(1.0, *(q * m / (j + 1) for j, q in enumerate(sorted(raw)) if q >= p)))


@given(st.lists(st.booleans(), max_size=60), RATES)
def test_the_mixture_is_the_product_of_its_own_forecasts(wins: list[bool], p: float) -> None:
    """Beta(1/2, 1/2) forecasts the next win with (k + 1/2) / (n + 1): a way to E without a Beta function."""
    log_e, k = 0.0, 0
    for n, win in enumerate(wins):
        forecast = (k + 0.5) / (n + 1)
        log_e += math.log((forecast if win else 1 - forecast) / (p if win else 1 - p))
        k += win
    assert log_e_value(k, len(wins), p) == pytest.approx(log_e, abs=1e-9)
    assert log_mixture(k, len(wins)) - log_null(k, len(wins), p) == pytest.approx(log_e, abs=1e-9)


@given(st.integers(1, 40), RATES)
def test_the_expected_e_value_is_one_where_the_hypothesis_is_true(n: int, p: float) -> None:
    mean = math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) * math.exp(log_e_value(k, n, p)) for k in range(n + 1))
    assert mean == pytest.approx(1, rel=1e-9)


def test_no_decided_signal_means_nothing_is_known() -> None:
    assert wilson(0, 0) == clopper_pearson(0, 0) == (0.0, 1.0)
    assert at_least(0, 0, 0.4) == at_most(0, 0, 0.4) == 1.0
    assert log_e_value(0, 0, 0.4) == pytest.approx(0)


@pytest.mark.parametrize("figure", [wilson, clopper_pearson, log_mixture])
def test_more_wins_than_trades_are_refused(figure: object) -> None:
    with pytest.raises(ValueError, match="impossible"):
        figure(3, 2)  # type: ignore[operator]


@pytest.mark.parametrize("reward_risk", [0, -1, math.nan])
def test_a_reward_risk_that_is_not_positive_has_no_breakeven(reward_risk: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        breakeven_win_rate(reward_risk)

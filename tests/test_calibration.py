"""Scores and curves of confidence against recorded figures, brute force and closed forms."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapebus_trading.calibration import Counts, Curve, fit, isotonic, platt, reliability, score, shrunk

PAIRS = st.lists(st.tuples(st.integers(0, 1000).map(lambda tenth: tenth / 10), st.booleans()), min_size=1, max_size=80)


def counted(pairs: list[tuple[float, bool]]) -> dict[float, tuple[int, int]]:
    wins, n = Counter(c for c, win in pairs if win), Counter(c for c, _ in pairs)
    return {c: (wins[c], n[c]) for c in n}


def drawn(n: int, rate: Any, seed: int = 1, low: int = 650, high: int = 950) -> dict[float, tuple[int, int]]:
    chance = random.Random(seed)
    found = []
    for _ in range(n):
        c = chance.randint(low, high) / 10
        found.append((c, chance.random() < rate(c)))
    return counted(found)


# -- recorded logs --------------------------------------------------------------------------------


def recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_truth_log_scores_as_recorded(shared_data: Path) -> None:
    rows = [r for r in recorded(shared_data / "legacy" / "truth_log.jsonl") if r.get("win") is not None]
    found = score(counted([(r["confidence"], r["win"]) for r in rows]))
    assert found is not None
    assert found.n == 3358
    assert found.base_rate == pytest.approx(0.392, abs=0.0005)
    assert found.brier == pytest.approx(0.3827, abs=0.0001)
    assert found.reference == pytest.approx(0.238, abs=0.0005)
    assert found.skill == pytest.approx(-0.605, abs=0.0005)
    table = {each.low: (each.n, round(100 * each.observed, 1)) for each in found.bins}
    rates = {low: rate for low, (_, rate) in table.items() if low < 90}
    assert rates == {65: 36.0, 70: 35.5, 75: 41.3, 80: 41.6, 85: 41.2}
    assert (found.bins[-1].low, found.bins[-1].wins, found.bins[-1].n) == (90, 1, 2)
    gate = [each for each in found.bins if each.low in (80, 85)]
    n, wins = sum(each.n for each in gate), sum(each.wins for each in gate)
    assert (n, round(100 * wins / n, 1)) == (1407, 41.4)


def test_the_september_log_scores_as_recorded(shared_data: Path) -> None:
    rows = [r for r in recorded(shared_data / "legacy" / "comprehensive_tracking.jsonl") if r.get("outcome")]
    found = score(counted([(r["confidence"], r["outcome"] == "WIN") for r in rows]))
    assert found is not None
    assert (found.n, round(100 * found.base_rate, 1)) == (85, 74.1)
    assert [round(each or 9, 3) for each in (found.brier, found.reference, found.skill)] == [0.208, 0.192, -0.085]


def test_a_curve_of_the_past_repairs_what_the_truth_log_states_later(shared_data: Path) -> None:
    rows = [r for r in recorded(shared_data / "legacy" / "truth_log.jsonl") if r.get("win") is not None]
    rows.sort(key=lambda r: r["timestamp"])
    past, later = rows[:2300], rows[2300:]
    curve = fit(counted([(r["confidence"], r["win"]) for r in past]))
    stated = score(counted([(r["confidence"], r["win"]) for r in later]))
    repaired = score(counted([(curve.apply(r["confidence"]), r["win"]) for r in later]))
    assert curve.method == "isotonic"
    assert stated is not None and repaired is not None
    assert repaired.brier < 0.26 < 0.36 < stated.brier
    assert repaired.ece < stated.ece / 3


# -- scores ---------------------------------------------------------------------------------------


@given(PAIRS)
def test_a_score_is_what_its_definition_says(pairs: list[tuple[float, bool]]) -> None:
    found = score(counted(pairs))
    assert found is not None
    n = len(pairs)
    base = sum(win for _, win in pairs) / n
    assert found.brier == pytest.approx(sum((c / 100 - win) ** 2 for c, win in pairs) / n)
    assert found.reference == pytest.approx(base * (1 - base))
    if found.skill is None:
        assert base in (0, 1)
    else:
        assert found.skill == pytest.approx(1 - found.brier / found.reference)
    gaps = 0.0
    for low in range(0, 100, 5):
        inside = [(c, win) for c, win in pairs if low <= c < low + 5 or (low == 95 and c == 100)]
        if inside:
            m = len(inside)
            gaps += m / n * abs(sum(win for _, win in inside) / m - sum(c for c, _ in inside) / m / 100)
    assert found.ece == pytest.approx(gaps)
    assert sum(each.n for each in found.bins) == n


@pytest.mark.parametrize(
    ("confidence", "low"), [(0, 0), (4.9, 0), (5, 5), (79.9, 75), (80, 80), (89.9, 85), (95, 95), (99.9, 95), (100, 95)]
)
def test_a_bin_holds_its_lower_end_and_the_last_one_a_hundred(confidence: float, low: int) -> None:
    assert [each.low for each in reliability({confidence: (1, 1)})] == [low]


def test_nothing_decided_has_no_score_and_changes_nothing() -> None:
    assert score({}) is None
    assert score({80.0: (0, 0)}) is None
    assert fit({}).apply(83.0) == 83.0


# -- curves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "method"), [(1, "shrinkage"), (199, "shrinkage"), (200, "platt"), (999, "platt"), (1000, "isotonic")]
)
def test_the_number_of_trades_chooses_the_method(n: int, method: str) -> None:
    curve = fit(drawn(n, lambda c: 0.4), version=3)
    assert (curve.method, curve.n, curve.version) == (method, n, 3)


def test_small_bins_are_drawn_to_the_base_rate() -> None:
    # base 5 of 10; the bin 80 has 2 of 2, the bin 85 has 3 of 8
    knots = shrunk({81.0: (1, 1), 83.0: (1, 1), 86.0: (3, 8)})
    assert knots == [(82.0, pytest.approx(100 * (2 + 10) / 22)), (86.0, pytest.approx(100 * (3 + 10) / 28))]


@pytest.mark.parametrize(
    ("confidence", "rate"), [(50, 30), (70, 30), (75, 40), (80, 50), (80.001, 50.001), (85, 55), (90, 60), (99, 60)]
)
def test_a_curve_is_straight_between_its_knots_and_flat_beyond_them(confidence: float, rate: float) -> None:
    curve = Curve([(70.0, 30.0), (80.0, 50.0), (90.0, 60.0)])
    assert curve.apply(confidence) == pytest.approx(rate)


def test_platt_finds_the_curve_that_made_the_trades() -> None:
    def rate(c: float) -> float:
        return 1 / (1 + math.exp(-(0.08 * (c - 80) - 0.2)))

    curve = Curve(platt(drawn(60_000, rate)))
    for c in (67, 75, 80, 88, 94):
        assert curve.apply(c) == pytest.approx(100 * rate(c), abs=2)


def test_platt_satisfies_the_equations_of_its_optimum() -> None:
    """At the optimum the residuals sum to zero, plain and weighted with confidence."""
    counts = drawn(500, lambda c: (c - 40) / 80)
    knots = platt(counts)
    (x0, y0), (x1, y1) = knots[0], knots[-1]
    slope = (math.log(y1 / (100 - y1)) - math.log(y0 / (100 - y0))) / (x1 - x0)
    level = math.log(y0 / (100 - y0)) - slope * x0
    n, wins = sum(m for _, m in counts.values()), sum(k for k, _ in counts.values())
    up, down = (wins + 1) / (wins + 2), 1 / (n - wins + 2)
    plain = weighted = 0.0
    for c, (k, m) in counts.items():
        rest = m / (1 + math.exp(-(level + slope * c))) - k * up - (m - k) * down
        plain, weighted = plain + rest, weighted + rest * (c - 80)
    assert plain == pytest.approx(0, abs=1e-3)
    assert weighted == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("counts", [{80.0: (150, 300)}, {80.0: (300, 300)}, {70.0: (0, 150), 90.0: (0, 150)}])
def test_platt_stays_inside_certainty_where_the_sample_has_no_slope(counts: Counts) -> None:
    rates = [rate for _, rate in platt(counts)]
    assert all(0 < rate < 100 for rate in rates)
    assert max(rates) - min(rates) < 1e-6


def brute_force_isotonic(rates: list[float], weights: list[int]) -> list[float]:
    """By the min-max formula: max over a <= i of min over b >= i of the mean of a..b."""

    def mean(a: int, b: int) -> float:
        return sum(r * w for r, w in zip(rates[a : b + 1], weights[a : b + 1], strict=True)) / sum(weights[a : b + 1])

    size = len(rates)
    return [max(min(mean(a, b) for b in range(i, size)) for a in range(i + 1)) for i in range(size)]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=14))
def test_isotonic_regression_is_the_min_max_formula(groups: list[tuple[int, int]]) -> None:
    counts = {60.0 + i: (min(k, n), n) for i, (k, n) in enumerate(groups)}
    expected = brute_force_isotonic([k / n for k, n in counts.values()], [n for _, n in counts.values()])
    curve = Curve(isotonic(counts, step=1))
    assert [curve.apply(c) for c in counts] == pytest.approx([100 * rate for rate in expected])


def test_no_step_of_the_isotonic_curve_rests_on_a_handful_of_trades() -> None:
    counts = {**drawn(2000, lambda c: 0.4, high=899), 92.0: (1, 1)}
    knots = isotonic(counts)
    assert knots[-1][0] == 92.0
    assert knots[-1][1] < 70


@pytest.mark.parametrize("n", [150, 600, 5000])
def test_knots_ascend_and_are_percentages(n: int) -> None:
    knots = fit(drawn(n, lambda c: (c - 50) / 60)).knots
    assert all(left[0] < right[0] for left, right in pairwise(knots))
    assert all(0 <= rate <= 100 for _, rate in knots)
    assert len(knots) <= 1000


@settings(max_examples=30)
@given(PAIRS, st.integers(0, 1000), st.sampled_from([1, 4, 40]))
def test_neither_score_nor_curve_depends_on_the_order_of_the_trades(
    pairs: list[tuple[float, bool]], seed: int, times: int
) -> None:
    mixed = list(pairs)
    random.Random(seed).shuffle(mixed)
    first, second = counted(pairs * times), counted(mixed * times)
    assert (score(first), fit(first)) == (score(second), fit(second))

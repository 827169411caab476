"""Figures of the outcomes plugin against published values and direct counting."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapebus_outcomes.record import OUTCOMES
from tapebus_outcomes.stats import summarise


def test_a_pattern_without_a_loss_has_no_profit_factor() -> None:
    [row] = summarise([{"pattern_type": "A", "outcome": "WIN", "r": 1.5, "duration_s": 60.0}])
    assert row["profit_factor"] is None and row["win_rate"] == 1.0 and row["expectancy_r"] == 1.5


def test_timeouts_and_open_signals_are_shown_but_are_neither_wins_nor_losses() -> None:
    rows: list[dict[str, Any]] = [{"pattern_type": "A", "outcome": "TIMEOUT", "r": 0.2}] * 74
    rows += [{"pattern_type": "A", "outcome": None}] * 3
    [row] = summarise(rows)
    assert (row["n"], row["timeouts"], row["open"], row["decided"], row["win_rate"]) == (77, 74, 3, 0, None)


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "pattern_type": st.sampled_from(["A", "B"]),
            "outcome": st.sampled_from([*OUTCOMES, None]),
            "r": st.none() | st.floats(-5, 5),
            "duration_s": st.floats(0, 1e5),
            "fired": st.booleans(),
        }
    )
)


@given(ROWS)
def test_the_table_equals_counting_by_hand_in_any_order(rows: list[dict[str, Any]]) -> None:
    table = {row["pattern_type"]: row for row in summarise(reversed(rows))}
    assert set(table) == {row["pattern_type"] for row in rows}
    for pattern, row in table.items():
        mine = [each for each in rows if each["pattern_type"] == pattern]
        kinds = [each["outcome"] for each in mine]
        assert row["n"] == len(mine)
        assert (row["wins"], row["losses"], row["open"]) == (kinds.count("WIN"), kinds.count("LOSS"), kinds.count(None))
        ended = [e["r"] for e in mine if e["outcome"] in ("WIN", "LOSS", "BREAKEVEN") and e["r"] is not None]
        if ended:
            assert row["expectancy_r"] == pytest.approx(sum(ended) / len(ended), abs=1e-9)
        else:
            assert row["expectancy_r"] is None

"""Outcomes decided by bars: each rule by name, and what a restart must not change."""

from __future__ import annotations

import random
from typing import Any

import pytest
from msgspec import structs

import tapebus_outcomes
from bus_support import PATIENCE, wait_until
from tapebus.errors import ConfigError
from tapebus.events import Registry
from tapebus.testing import PluginBench
from tapebus_outcomes.bars import timeframe_s
from tapebus_schema.catalog import default_types

#: Opens of M5 bars; nothing depends on the day.
T0 = 1_700_000_100.0
M5 = 300.0
#: A signal that is open when the bar at T0 begins.
BUY = {"direction": "BUY", "entry": 1.1000, "sl": 1.0990, "tp": 1.1020}
SELL = {"direction": "SELL", "entry": 1.1000, "sl": 1.1010, "tp": 1.0980}
SPREAD = 0.0002


def bench(**config: Any) -> PluginBench:
    return PluginBench(tapebus_outcomes, Registry(default_types()), config, name="outcomes")


def signal(b: PluginBench, at: float = T0 - 10, signal_id: str = "S", **data: Any) -> Any:
    fixed = {"signal_id": signal_id, "symbol": "EURUSD", "confidence": 80.0, "pattern_type": "SWEEP"}
    return b.event("signal_generated", at, {**fixed, **(data or BUY)})


def bar(
    b: PluginBench, start: float, o: float, h: float, low: float, c: float, stamp: float | None = None, **data: Any
) -> Any:
    prices = {"open": o, "high": h, "low": low, "close": c}
    fixed = {"symbol": "EURUSD", "timeframe": "M5", "volume": 1.0, "timestamp": start, "spread": SPREAD}
    return b.event("market_data.ohlcv", start + M5 if stamp is None else stamp, {**fixed, **prices, **data})


def quote(b: PluginBench, at: float, bid: float, symbol: str = "EURUSD") -> Any:
    return b.event("market_data", at, {"symbol": symbol, "bid": bid, "ask": bid + SPREAD})


def outcomes(b: PluginBench) -> list[dict[str, Any]]:
    return [wire.data for wire in b.emitted]


def figures(b: PluginBench) -> dict[str, Any]:
    return tapebus_outcomes.tapebus_metrics(context=b.context)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("M1", 60), ("M5", 300), ("15m", 900), ("1min", 60), ("H1", 3600), ("4h", 14_400), ("1H", 3600), ("D1", 86_400)]
    + [("1d", 86_400), ("W1", 604_800), ("30s", 30)]
    # months have no fixed length, and 1M is not M1
    + [(text, None) for text in ("1M", "MN1", "M0", "0m", "tick", "", "m", "M", "1", "5 m", "M1000000")],
)
def test_a_timeframe_is_known_in_both_spellings(text, seconds):
    assert timeframe_s(text) == seconds


# -- the order of decisions ---------------------------------------------------------------------

# fmt: off
DECISIONS = {
    # 1. the open beyond a level
    "a BUY whose stop the open jumped over ends at the open":
        (BUY, (1.0985, 1.1030, 1.0980, 1.1000), ("LOSS", 1.0985, -1.5, False)),
    "a BUY whose target the open jumped over ends at the open":
        (BUY, (1.1025, 1.1030, 1.0980, 1.1000), ("WIN", 1.1025, 2.5, False)),
    "a SELL whose stop the open jumped over ends at the open plus spread":
        (SELL, (1.1012, 1.1012, 1.0970, 1.1000), ("LOSS", 1.1014, -1.4, False)),
    "a SELL whose target the open jumped over ends at the open plus spread":
        (SELL, (1.0975, 1.1030, 1.0970, 1.1000), ("WIN", 1.0977, 2.3, False)),
    # 2. one level inside
    "a BUY ends at the target that the high touched":
        (BUY, (1.1000, 1.1020, 1.0995, 1.1001), ("WIN", 1.1020, 2.0, False)),
    "a BUY ends at the stop that the low touched":
        (BUY, (1.1000, 1.1019, 1.0990, 1.1001), ("LOSS", 1.0990, -1.0, False)),
    "a SELL ends at the target that the low plus spread touched":
        (SELL, (1.1000, 1.1007, 1.0978, 1.0990), ("WIN", 1.0980, 2.0, False)),
    "a SELL ends at the stop that the high plus spread touched":
        (SELL, (1.1000, 1.1008, 1.0979, 1.0990), ("LOSS", 1.1010, -1.0, False)),
    "a SELL whose target only the bid reached stays open":
        (SELL, (1.1000, 1.1005, 1.0979, 1.0990), None),
    "a BUY whose target only the ask reached stays open":
        (BUY, (1.1000, 1.1019, 1.0991, 1.0995), None),
    # 3. both inside
    "of two levels inside a bar the stop of a BUY wins, and the outcome is ambiguous":
        (BUY, (1.1000, 1.1021, 1.0989, 1.1020), ("LOSS", 1.0990, -1.0, True)),
    "of two levels inside a bar the stop of a SELL wins, and the outcome is ambiguous":
        (SELL, (1.1000, 1.1009, 1.0977, 1.0978), ("LOSS", 1.1010, -1.0, True)),
}
# 4. the bar that the signal was opened in
ENTRY_BAR = {
    "no level inside: nothing happens":
        (BUY, (1.1000, 1.1010, 1.0995, 1.1001), None),
    "the stop inside: it may have been before the entry":
        (BUY, (1.1000, 1.1010, 1.0990, 1.1001), ("LOSS", 1.0990, -1.0, True)),
    "the stop inside and the close beyond it: it was after the entry":
        (BUY, (1.1000, 1.1010, 1.0980, 1.0985), ("LOSS", 1.0990, -1.0, False)),
    "the target inside and the close beyond it: it was after the entry":
        (BUY, (1.1000, 1.1030, 1.0995, 1.1025), ("WIN", 1.1020, 2.0, False)),
    "both inside and the close beyond the target: the stop may have been first":
        (BUY, (1.1000, 1.1030, 1.0990, 1.1025), ("LOSS", 1.0990, -1.0, True)),
    "the open beyond the stop was before the entry, the close is on this side of it":
        (BUY, (1.0980, 1.1010, 1.0980, 1.1000), ("LOSS", 1.0990, -1.0, True)),
    "a SELL with the stop inside":
        (SELL, (1.1000, 1.1009, 1.0990, 1.1000), ("LOSS", 1.1010, -1.0, True)),
}
# fmt: on


@pytest.mark.parametrize(("given", "prices", "wanted"), DECISIONS.values(), ids=DECISIONS)
def test_a_bar_decides_in_the_stated_order(given, prices, wanted):
    b = bench()
    b.feed([signal(b, **given), bar(b, T0, *prices)])
    got = [(d["outcome"], d["exit_price"], d["r"], d["ambiguous"]) for d in outcomes(b)]
    assert got == ([wanted] if wanted else [])


@pytest.mark.parametrize(("given", "prices", "wanted"), ENTRY_BAR.values(), ids=ENTRY_BAR)
def test_in_the_bar_of_the_entry_a_level_counts_only_as_far_as_the_bar_can_tell(given, prices, wanted):
    b = bench()
    b.feed([signal(b, T0 + 100, **given), bar(b, T0, *prices)])
    got = [(d["outcome"], d["exit_price"], d["r"], d["ambiguous"]) for d in outcomes(b)]
    assert got == ([wanted] if wanted else [])


def test_a_target_that_the_entry_bar_cannot_tell_is_not_credited_and_leaves_its_doubt_on_the_outcome():
    b = bench()
    b.feed([signal(b, T0 + 100), bar(b, T0, 1.1000, 1.1025, 1.0995, 1.1001)])
    assert outcomes(b) == []
    b.restart()
    b.feed([bar(b, T0 + M5, 1.1001, 1.1001, 1.0980, 1.0985)])
    [got] = outcomes(b)
    assert (got["outcome"], got["ambiguous"], got["bars_seen"], got["mode"]) == ("LOSS", True, 2, "bar")
    assert figures(b)["ambiguous"] == 1


def test_a_signal_opened_as_the_bar_begins_lives_through_all_of_it():
    b = bench()
    b.feed([signal(b, T0), bar(b, T0, 1.1000, 1.1005, 1.0990, 1.1001)])
    assert [(d["outcome"], d["ambiguous"]) for d in outcomes(b)] == [("LOSS", False)]


def test_a_bar_from_before_the_signal_says_nothing_about_it():
    b = bench()
    b.feed([signal(b, T0 + M5), bar(b, T0, 1.1, 1.2, 1.0, 1.1, stamp=T0 + M5 + 1)])
    assert outcomes(b) == [] and figures(b)["bars"] == 1


def test_a_signal_that_comes_after_the_bar_it_was_opened_in_ends_ambiguous():
    b = bench()
    b.feed([signal(b, T0 - 500, "other"), bar(b, T0, 1.1, 1.1001, 1.0999, 1.1, stamp=T0), signal(b, T0 + 20)])
    b.feed([bar(b, T0 + M5, 1.1, 1.102, 1.0999, 1.1)])
    assert [(d["signal_id"], d["ambiguous"]) for d in outcomes(b)] == [("other", False), ("S", True)]


# -- entry, extremes, times ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opened", "direction", "entry"),
    [(-1, "BUY", 1.1002), (-1, "SELL", 1.1000), (100, "BUY", 1.1003), (100, "SELL", 1.1001)],
)
def test_without_an_entry_the_first_price_after_the_opening_gives_it(opened, direction, entry):
    b = bench()
    levels = {"sl": 1.0900, "tp": 1.1100} if direction == "BUY" else {"sl": 1.1100, "tp": 1.0900}
    b.feed([signal(b, T0 + opened, direction=direction, **levels), bar(b, T0, 1.1, 1.105, 1.095, 1.1001)])
    b.restart()
    b.feed([bar(b, T0 + M5, 1.1001, 1.2, 1.1001, 1.2) if direction == "BUY" else bar(b, T0 + M5, 1.1, 1.1, 1.0, 1.0)])
    [got] = outcomes(b)
    assert (got["outcome"], got["entry"]) == ("WIN", pytest.approx(entry, abs=1e-9))


def test_levels_on_the_wrong_side_of_the_entry_a_bar_gives_end_the_signal_as_unknown():
    b = bench()
    b.feed([signal(b, direction="BUY", sl=1.2, tp=1.3), bar(b, T0, 1.1, 1.105, 1.095, 1.1)])
    assert [(d["outcome"], d["exit_price"]) for d in outcomes(b)] == [("UNKNOWN", None)]


@pytest.mark.parametrize(
    ("given", "last", "mfe", "mae"),
    [
        # the exit bar: no more to its favour than is sure, all against it as far as the stop
        (BUY, (1.1005, 1.1030, 1.0992, 1.1025), 0.0020, -0.0008),
        (BUY, (1.1005, 1.1015, 1.0950, 1.0960), 0.0010, -0.0010),
        (BUY, (1.0950, 1.1015, 1.0940, 1.0960), 0.0010, -0.0050),
        (SELL, (1.0995, 1.1007, 1.0970, 1.0975), 0.0020, -0.0009),
        (SELL, (1.0995, 1.1030, 1.0985, 1.1020), 0.0008, -0.0010),
    ],
)
def test_extremes_are_those_of_whole_bars_and_of_the_exit_bar_what_is_sure(given, last, mfe, mae):
    b = bench()
    first = (1.1000, 1.1010, 1.0993, 1.1005) if given is BUY else (1.1000, 1.1006, 1.0990, 1.0995)
    b.feed([signal(b, **given), bar(b, T0, *first)])
    b.restart()
    b.feed([bar(b, T0 + M5, *last)])
    [got] = outcomes(b)
    assert (got["mfe"], got["mae"]) == (pytest.approx(mfe), pytest.approx(mae))
    assert got["mfe_r"] == pytest.approx(mfe / 0.001) and got["mae_pips"] == pytest.approx(mae * 10_000)


def test_an_exit_at_the_open_is_at_its_time_and_any_other_at_the_end_of_its_bar():
    b = bench()
    b.feed([signal(b, T0 - 10), signal(b, T0 - 10, "gap", direction="BUY", entry=1.1, sl=1.0999, tp=1.2)])
    b.feed([bar(b, T0, 1.0995, 1.0996, 1.0985, 1.0990)])
    ends = {d["signal_id"]: (d["closed_at"], d["duration_s"]) for d in outcomes(b)}
    assert ends == {"gap": (T0, 10.0), "S": (T0 + M5, 310.0)}


def test_a_hole_before_the_bar_that_decides_is_told():
    b = bench(max_gap_s=60.0)
    b.feed([signal(b), bar(b, T0, 1.1, 1.1, 1.1, 1.1), bar(b, T0 + 3 * M5, 1.1, 1.1, 1.0980, 1.0985)])
    [got] = outcomes(b)
    assert (got["gap_before_exit"], got["gap_ms"]) == (True, 600_000.0)


@pytest.mark.parametrize(
    ("given", "ticks", "typical", "ask"),
    [({"spread": 0.0005}, 0, None, 1.0975), ({"spread": None}, 1, None, 1.0972), ({"spread": None}, 0, 0.0001, 1.0971)],
    ids=["its own", "of the last quote", "typical of the symbol"],
)
def test_the_ask_of_a_bar_is_its_bid_plus_a_spread(given, ticks, typical, ask):
    b = bench()
    b.feed([signal(b, **SELL)] + [quote(b, T0 - 5, 1.1)] * ticks)
    b.feed([bar(b, T0, 1.0970, 1.0970, 1.0960, 1.0960, **given)])
    assert [d["exit_price"] for d in outcomes(b)] == [pytest.approx(ask, abs=1e-9)]


# -- deadlines ----------------------------------------------------------------------------------


def test_a_deadline_waits_for_the_bar_that_tells_of_the_time_before_it():
    b = bench()
    b.feed([bar(b, T0 - M5, 1.1, 1.1, 1.1, 1.1, stamp=T0)])
    b.feed([signal(b, T0 + 1, expires_at=T0 + M5 + 60, **BUY), bar(b, T0, 1.1, 1.1001, 1.0999, 1.1)])
    # another symbol shows that its time is over, but the bar of that time has not come
    b.feed([quote(b, T0 + M5 + 61, 0.9, "USDCHF")])
    assert outcomes(b) == []
    b.restart()
    b.feed([bar(b, T0 + M5, 1.1, 1.1021, 1.0999, 1.1)])
    [got] = outcomes(b)
    # the target may have been touched after the deadline: it is not credited
    assert (got["outcome"], got["exit_price"], got["closed_at"]) == ("TIMEOUT", 1.1, T0 + M5 + 60)
    assert got["ambiguous"] is True


def test_a_deadline_does_not_wait_for_ever():
    b = bench()
    b.feed([signal(b, expires_at=T0 + M5 + 60, **BUY), bar(b, T0, 1.1, 1.1001, 1.0999, 1.1)])
    b.feed([quote(b, T0 + 3 * M5 + 59, 0.9, "USDCHF")])
    assert outcomes(b) == []
    b.feed([quote(b, T0 + 3 * M5 + 60, 0.9, "USDCHF")])
    [got] = outcomes(b)
    assert (got["outcome"], got["exit_price"], got["closed_at"]) == ("TIMEOUT", 1.1, T0 + M5 + 60)


def test_a_stop_touched_in_the_bar_of_the_deadline_is_a_loss_that_is_ambiguous():
    b = bench()
    b.feed([signal(b, expires_at=T0 + 60, **BUY), bar(b, T0, 1.1, 1.1001, 1.0980, 1.1, stamp=T0)])
    assert [(d["outcome"], d["ambiguous"], d["closed_at"]) for d in outcomes(b)] == [("LOSS", True, T0 + 60)]


def test_a_signal_opened_and_over_within_one_bar_saw_no_price_of_its_life():
    b = bench()
    b.feed([bar(b, T0 - M5, 1.1, 1.1, 1.1, 1.1, stamp=T0), signal(b, T0 + 20, expires_at=T0 + 60, **BUY)])
    b.feed([bar(b, T0, 1.1, 1.1010, 1.0995, 1.1005)])
    assert [(d["outcome"], d["exit_price"], d["mfe"]) for d in outcomes(b)] == [("UNKNOWN", None, None)]


def test_a_deadline_at_the_end_of_a_bar_ends_at_its_close():
    b = bench()
    b.feed([signal(b, expires_at=T0 + M5, **BUY), bar(b, T0, 1.1, 1.1010, 1.0995, 1.1005, stamp=T0)])
    [got] = outcomes(b)
    assert (got["outcome"], got["exit_price"], got["r"], got["ambiguous"]) == ("TIMEOUT", 1.1005, 0.5, False)


def test_a_bar_that_begins_at_the_deadline_says_nothing_however_it_opens():
    b = bench()
    b.feed([signal(b, expires_at=T0 + M5, **BUY), bar(b, T0, 1.1, 1.1010, 1.0995, 1.1005, timeframe="M1")])
    b.feed([bar(b, T0 + M5, 1.0900, 1.0901, 1.0890, 1.0895)])
    [got] = outcomes(b)
    assert (got["outcome"], got["exit_price"], got["closed_at"]) == ("TIMEOUT", 1.1005, T0 + M5)


def test_a_signal_taken_back_waits_for_the_bar_of_that_time():
    for prices, wanted in (
        ((1.0985, 1.0999, 1.0980, 1.0990), ("LOSS", 1.0985)),
        ((1.1000, 1.1001, 1.0999, 1.1001), ("CANCELLED", 1.1)),
    ):
        b = bench()
        b.feed([signal(b), bar(b, T0, 1.1, 1.1001, 1.0999, 1.1)])
        b.feed([b.event("signal_expired", T0 + M5 + 30, {"signal_id": "S"})])
        assert outcomes(b) == []
        b.restart()
        b.feed([bar(b, T0 + M5, *prices)])
        assert [(d["outcome"], d["exit_price"]) for d in outcomes(b)] == [wanted]


def test_a_quote_after_the_deadline_ends_what_waited_for_a_bar_before_it_counts():
    b = bench()
    b.feed([signal(b, expires_at=T0 + M5 + 60, **BUY), bar(b, T0, 1.1, 1.1001, 1.0999, 1.1)])
    b.feed([quote(b, T0 + M5 + 61, 1.2)])
    [got] = outcomes(b)
    assert (got["outcome"], got["exit_price"], got["mfe"]) == ("TIMEOUT", 1.1, pytest.approx(0.0001))


# -- which bars count ---------------------------------------------------------------------------


def test_bars_decide_only_where_the_last_quote_is_older_than_the_bar():
    b = bench()
    b.feed([signal(b), quote(b, T0 + 1, 1.1), bar(b, T0, 1.1, 1.1030, 1.0950, 1.1)])
    assert outcomes(b) == [] and figures(b)["bars"] == 0
    b.feed([bar(b, T0 + M5, 1.1, 1.1030, 1.1, 1.1)])
    [got] = outcomes(b)
    assert (got["outcome"], got["mode"], got["quotes_seen"], got["bars_seen"]) == ("WIN", "bar", 1, 1)


def test_quotes_decide_again_when_they_come_back():
    b = bench()
    b.feed([signal(b), quote(b, T0 - 1, 1.1005), bar(b, T0, 1.1, 1.1010, 1.0995, 1.1)])
    b.restart()
    b.feed([quote(b, T0 + M5 + 5, 1.0999), quote(b, T0 + M5 + 6, 1.1015), quote(b, T0 + M5 + 7, 1.1021)])
    [got] = outcomes(b)
    assert (got["outcome"], got["mode"], got["quotes_seen"], got["bars_seen"]) == ("WIN", "tick", 4, 1)
    assert (got["mfe"], got["mae"]) == (pytest.approx(0.0021), pytest.approx(-0.0005))


@pytest.mark.parametrize(("mode", "wanted"), [("tick", "LOSS"), ("bar", "WIN"), ("auto", "LOSS")])
def test_the_mode_says_what_decides(mode, wanted):
    b = bench(mode=mode)
    b.feed([signal(b), quote(b, T0 + 1, 1.0980), bar(b, T0, 1.1, 1.1030, 1.1, 1.1)])
    assert [d["outcome"] for d in outcomes(b)] == [wanted]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="mode"):
        bench(mode="bars")


def test_the_last_bar_sent_again_after_a_reconnect_is_ignored_and_counted():
    b = bench()
    last = (T0, 1.1, 1.1030, 1.0980, 1.1)
    b.feed([bar(b, *last), signal(b, T0 + 100), bar(b, *last)])
    b.restart()
    b.feed([bar(b, *last)])
    assert outcomes(b) == [] and figures(b)["repeated_bars"] == 2


def test_a_bar_out_of_order_is_ignored_and_counted():
    b = bench()
    b.feed([bar(b, T0 + M5, 1.1, 1.1, 1.1, 1.1), signal(b, T0 - 10), bar(b, T0, 1.1, 1.2, 1.0, 1.1)])
    assert outcomes(b) == [] and figures(b)["late_bars"] == 1


def test_the_finest_timeframe_decides_and_a_coarser_one_only_where_it_has_a_hole():
    b = bench()
    minute = {"timeframe": "M1"}
    b.feed([signal(b)])
    for n in range(4):
        b.feed([bar(b, T0 + 60 * n, 1.1, 1.1001, 1.0999, 1.1, **minute)])
    # the M5 overtakes the last M1 of its span, which is the one that can tell
    b.feed([bar(b, T0, 1.1, 1.1030, 1.0980, 1.1)])
    assert outcomes(b) == [] and figures(b)["coarser_bars"] == 1
    b.feed([bar(b, T0 + 240, 1.1, 1.1001, 1.0999, 1.1, **minute), bar(b, T0 + M5, 1.1, 1.1030, 1.1, 1.1)])
    assert [(d["outcome"], d["closed_at"]) for d in outcomes(b)] == [("WIN", T0 + 2 * M5)]


@pytest.mark.parametrize(
    ("stamp", "used"),
    [(T0, 1), (T0 + 1, 0), (T0 + 290, 0), (T0 + 296, 1), (T0 + 300, 1), (T0 + 900, 1), (T0 - 7200, 0)],
    ids=["its own start", "forming", "forming", "clock behind", "its end", "late", "broker time ahead of ours"],
)
def test_a_bar_stamped_before_its_end_is_still_forming_and_not_used(stamp, used):
    b = bench()
    b.feed([signal(b), bar(b, T0, 1.1, 1.1030, 1.1, 1.1, stamp=stamp)])
    got = figures(b)
    assert (len(outcomes(b)), got["bars"], got["unfinished_bars"]) == (used, used, 1 - used)


@pytest.mark.parametrize("wrong", [{"timeframe": "1M"}, {"high": 1.0}, {"low": 1.2}, {"open": 2.0}])
def test_what_is_no_bar_is_counted(wrong):
    b = bench()
    event = bar(b, T0, 1.1, 1.1030, 1.1, 1.1)
    b.feed([signal(b), structs.replace(event, data=structs.replace(event.data, **wrong))])
    assert outcomes(b) == [] and figures(b)["invalid_bars"] == 1


def test_a_running_bus_decides_by_bars_as_feeds_spell_them(embed):
    bus = embed(["schema", "store", "outcomes"])
    made = {"pair": "EURUSD", "timeframe": "5m", "open": 1.1, "high": 1.1021, "low": 1.0995, "close": 1.1, "volume": 3}
    with bus.publisher() as publisher:
        fixed = {"signal_id": "S", "pair": "EURUSD", "confidence": 80.0, "pattern": "SWEEP", "type": "BUY"}
        levels = {"entry_price": 1.1, "stop_loss": 1.099, "take_profit": 1.102}
        assert publisher.publish("signal_generated", fixed | levels, timestamp=T0 - 10)
        for wrong in ({"high": 1.05}, {}, {}):
            assert publisher.publish("market_data.ohlcv", made | wrong | {"ts": T0}, timestamp=T0 + M5)
        assert publisher.flush(PATIENCE)
    with bus.tape() as tape:
        [got] = wait_until(lambda: list(tape.read(topics=["signal_outcome"])), "the outcome")
    assert (got.data.outcome, got.data.r, got.data.mode, got.data.closed_at) == ("WIN", 2.0, "bar", T0 + M5)
    assert (got.correlation_id, got.timestamp) == ("S", T0 + M5)


def mixed(b: PluginBench, chance: random.Random) -> list[Any]:
    """Hours of signals, quotes that come and go, bars of two timeframes, some late, twice or forming."""
    found, ids, price, now = [], ["nobody"], 1.1, T0
    for minute in range(240):
        now = T0 + 60 * minute
        quoted = (minute // 25) % 2
        path = [price := round(price + chance.choice((-3, -1, 0, 1, 3)) * 1e-4, 5) for _ in range(6)]
        for n, each in enumerate(path):
            if quoted and chance.random() < 0.9:
                found.append(quote(b, now + 10 * n, each))
            if chance.random() < 0.2:
                sign = chance.choice((1, -1))
                sl, tp = each - sign * chance.choice((2e-4, 8e-4)), each + sign * chance.choice((2e-4, 8e-4))
                more = {"direction": "BUY" if sign > 0 else "SELL", "sl": sl, "tp": tp}
                if chance.random() < 0.7:
                    more["entry"] = each
                if chance.random() < 0.5:
                    more["expires_at"] = now + 10 * n + chance.choice((30, 90, 400, 1500))
                ids.append(f"S{len(ids)}")
                found.append(signal(b, now + 10 * n + 1, ids[-1], **more))
        if chance.random() < 0.3:
            found.append(b.event("signal_expired", now + 55, {"signal_id": chance.choice(ids[-5:])}))
        prices = (path[0], max(path), min(path), path[-1])
        for _ in range(chance.choice((0, 1, 1, 1, 2))):
            stamp = now + chance.choice((60, 60, 60.5, 30))
            found.append(bar(b, now, *prices, stamp=stamp, timeframe="M1", spread=chance.choice((None, SPREAD))))
        if minute % 5 == 4:
            found.append(bar(b, now - 240, *prices, stamp=now + 60))
    found.append(quote(b, now + 200_000, 0.9, "USDCHF"))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_a_restart_anywhere_among_quotes_and_bars_changes_no_outcome(seed):
    runs = []
    for restarts in (False, True):
        b, chance = bench(), random.Random(seed)
        waiting = mixed(b, chance)
        while waiting:
            size = chance.randrange(1, 12)
            b.feed(waiting[:size])
            del waiting[:size]
            if restarts:
                b.restart()
        by_id = {each["signal_id"]: each for each in outcomes(b)}
        assert len(by_id) == len(b.emitted) == figures(b)["opened"] and figures(b)["open"] == 0
        runs.append((by_id, figures(b)))
    assert runs[0] == runs[1]
    found = runs[0][0].values()
    assert {each.get("mode") for each in found} >= {"tick", "bar"} and any(each["ambiguous"] for each in found)
    assert {each["outcome"] for each in found} >= {"WIN", "LOSS", "TIMEOUT", "CANCELLED"}
    for each in found:
        assert each["duration_s"] == each["closed_at"] - each["opened_at"] >= 0
        if each["r"] is not None:
            assert each["mae_r"] - 1e-6 <= each["r"] and each["mae"] <= 0 <= each["mfe"]
            # a target is filled at its level, which the price of its quote may be beyond
            assert each["r"] <= each["mfe_r"] + 1e-6

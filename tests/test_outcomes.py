"""The outcomes plugin by quotes: a case for every rule, a model of all of them, and what a restart must not change."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tapebus_outcomes
from outcome_days import make_orders, read_day, stream
from outcome_model import Model
from tapebus.errors import ConfigError
from tapebus.events import Registry
from tapebus.testing import PluginBench
from tapebus_outcomes.record import tidy
from tapebus_schema.catalog import default_types

REGISTRY = Registry(default_types())
BUY = {"direction": "BUY", "entry": 1.1, "sl": 1.099, "tp": 1.102}
SELL = {"direction": "SELL", "entry": 1.1, "sl": 1.101, "tp": 1.098}


def bench(**config: Any) -> PluginBench:
    return PluginBench(tapebus_outcomes, REGISTRY, config, name="outcomes")


def signal(b: PluginBench, at: float, given: dict[str, Any] = BUY, **more: Any) -> Any:
    fixed = {"signal_id": "S", "symbol": "EURUSD", "confidence": 80.0, "pattern_type": "SWEEP"}
    return b.event("signal_generated", at, {**fixed, **given, **more})


def quote(b: PluginBench, at: float, bid: float, ask: float, symbol: str = "EURUSD") -> Any:
    return b.event("market_data", at, {"symbol": symbol, "bid": bid, "ask": ask})


def expired(b: PluginBench, at: float) -> Any:
    return b.event("signal_expired", at, {"signal_id": "S"})


def outcomes(b: PluginBench) -> list[dict[str, Any]]:
    return [wire.data for wire in b.emitted]


def figures(b: PluginBench) -> dict[str, Any]:
    return tapebus_outcomes.tapebus_metrics(context=b.context)


# -- rules --------------------------------------------------------------------------------------

# fmt: off
#: Signal, then quotes a second apart as (bid, ask), then what the outcome holds; None: none yet.
RULES = {
    # sides
    "a BUY whose target only the ask reached stays open":
        (BUY, [(1.1019, 1.1021)], None),
    "a BUY whose target equals the ask and is above the bid stays open":
        (BUY, [(1.1018, 1.102)], None),
    "a BUY is won when the bid touches the target":
        (BUY, [(1.1019, 1.1021), (1.102, 1.1022)], {"outcome": "WIN", "exit_price": 1.102, "r": 2.0, "pips": 20.0}),
    "a BUY is lost when the bid touches the stop":
        (BUY, [(1.099, 1.0992)], {"outcome": "LOSS", "exit_price": 1.099, "r": -1.0, "pips": -10.0}),
    "a SELL whose target only the bid reached stays open":
        (SELL, [(1.0979, 1.0981)], None),
    "a SELL whose stop only the bid has not reached is lost":
        (SELL, [(1.1009, 1.101)], {"outcome": "LOSS", "exit_price": 1.101, "r": -1.0, "pips": -10.0}),
    "a SELL is won when the ask touches the target":
        (SELL, [(1.0979, 1.0981), (1.0978, 1.098)], {"outcome": "WIN", "exit_price": 1.098, "r": 2.0, "pips": 20.0}),
    "a SELL whose stop equals the bid of a quote is lost, for its ask is above":
        (SELL, [(1.101, 1.1012)], {"outcome": "LOSS", "exit_price": 1.1012, "slippage": 0.0002}),
    # fills
    "a stop that was jumped over is filled at the worse price":
        (BUY, [(1.097, 1.0972)], {"outcome": "LOSS", "exit_price": 1.097, "r": -3.0, "slippage": -0.002}),
    "a target that was jumped over is filled at its level":
        (BUY, [(1.103, 1.1032)], {"outcome": "WIN", "exit_price": 1.102, "r": 2.0, "slippage": 0.0}),
    # entry
    "without an entry a BUY enters on the ask of its first quote":
        ({"direction": "BUY", "sl": 1.099, "tp": 1.102}, [(1.0998, 1.1), (1.102, 1.1022)],
         {"outcome": "WIN", "entry": 1.1, "r": 2.0, "quotes_seen": 2}),
    "without an entry a SELL enters on the bid of its first quote":
        ({"direction": "SELL", "sl": 1.101, "tp": 1.098}, [(1.1, 1.1002), (1.0978, 1.098)],
         {"outcome": "WIN", "entry": 1.1, "r": 2.0, "quotes_seen": 2}),
    "an entry of 0 means at market, and a stop or target of 0 means none":
        ({**BUY, "entry": 0.0, "sl": 0.0, "tp": 1.102}, [(1.0998, 1.1), (1.05, 1.06), (1.102, 1.1022)],
         {"outcome": "WIN", "entry": 1.1, "r": None, "pips": 20.0}),
    "levels that the entry from the first quote leaves on one side end as unknown":
        ({"direction": "BUY", "sl": 1.101, "tp": 1.102}, [(1.0998, 1.1)],
         {"outcome": "UNKNOWN", "exit_price": None, "r": None}),
    # what float arithmetic adds to a level means nothing
    "a target with the noise of float arithmetic is touched by the price it means":
        ({**BUY, "entry": 1.14, "sl": 1.139, "tp": 1.1444500000000001}, [(1.14445, 1.1446)],
         {"outcome": "WIN", "exit_price": 1.14445}),
    # neither won nor lost
    "a target at the entry breaks even":
        ({**BUY, "tp": 1.1}, [(1.1, 1.1001)], {"outcome": "BREAKEVEN", "r": 0.0}),
    "a stop at the entry breaks even where it is filled at it":
        ({**BUY, "sl": 1.1}, [(1.1, 1.1001)], {"outcome": "BREAKEVEN", "r": None, "pips": 0.0}),
    "a stop at the entry that was jumped over is a loss, of unknown R":
        ({**BUY, "sl": 1.1}, [(1.0999, 1.1001)], {"outcome": "LOSS", "r": None, "pips": -1.0}),
    "less than a hundredth of the risk is no win":
        ({**BUY, "sl": 1.09, "tp": 1.10009}, [(1.1001, 1.1002)], {"outcome": "BREAKEVEN", "r": 0.009}),
    "a hundredth of the risk is one":
        ({**BUY, "sl": 1.09, "tp": 1.1001}, [(1.1001, 1.1002)], {"outcome": "WIN", "r": 0.01}),
    # extremes, from entry to exit inclusive
    "extremes are those of the side that closes, the exit included":
        (BUY, [(1.1005, 1.1205), (1.0995, 1.1015), (1.0985, 1.0987)],
         {"mfe": 0.0005, "mae": -0.0015, "mfe_r": 0.5, "mae_r": -1.5, "mfe_pips": 5.0, "mae_pips": -15.0}),
    "extremes of a SELL are those of the ask":
        (SELL, [(1.0805, 1.0995), (1.1, 1.1005), (1.0973, 1.0975)], {"mfe": 0.0025, "mae": -0.0005, "quotes_seen": 3}),
    "an extreme that was never on its side of the entry is 0":
        (BUY, [(1.0985, 1.0987)], {"mfe": 0.0, "mae": -0.0015}),
    # crossed quotes
    "a crossed quote decides nothing, is no extreme and is not counted as seen":
        (BUY, [(1.103, 1.1029), (1.05, 1.0499), (1.102, 1.1021)], {"quotes_seen": 1, "mae": 0.0, "mfe": 0.002}),
    "a quote without spread is a good one":
        (BUY, [(1.102, 1.102)], {"outcome": "WIN"}),
    # what else the record holds
    "the record holds the figures that statistics ask for":
        (BUY, [(1.102, 1.1021)], {"entry": 1.1, "sl": 1.099, "tp": 1.102, "risk": 0.001, "risk_reward": 2.0,
                                  "gap_ms": 1000.0, "mode": "tick", "fired": False, "ambiguous": False}),
}
# fmt: on
FIELDS = {
    *("signal_id", "symbol", "direction", "pattern_type", "confidence", "outcome", "exit_price", "r", "pips", "mfe"),
    *("mae", "opened_at", "closed_at", "duration_s", "ambiguous", "gap_before_exit", "quotes_seen", "fired"),
}


@pytest.mark.parametrize(("given", "quotes", "wanted"), RULES.values(), ids=RULES)
def test_quotes_decide_by_the_rules(given, quotes, wanted):
    b = bench()
    b.feed([signal(b, 0.0, given)] + [quote(b, 1.0 + n, *each) for n, each in enumerate(quotes)])
    assert len(b.emitted) == (wanted is not None)
    for got in outcomes(b):
        assert got.keys() >= FIELDS
        assert {key: got[key] for key in wanted} == pytest.approx(wanted, abs=1e-9)
        assert got["duration_s"] == got["closed_at"] - got["opened_at"]
        assert b.event("signal_outcome", 1.0, got).data.outcome == got["outcome"]


def test_a_target_may_be_credited_with_what_the_quote_gave_beyond_it():
    b = bench(tp_fill="tick")
    b.feed([signal(b, 0), quote(b, 1, 1.103, 1.1031)])
    [got] = outcomes(b)
    assert (got["exit_price"], got["r"], got["slippage"]) == (1.103, 3.0, pytest.approx(0.001))


@pytest.mark.parametrize(
    ("before", "gap"), [([1, 61], False), ([1, 61.5], True), ([61.5], True), ([30, 59, 90], False)], ids=str
)
def test_an_exit_on_the_first_quote_after_a_hole_says_so(before, gap):
    b = bench(max_gap_s=60)
    b.feed([signal(b, 0)] + [quote(b, at, 1.1, 1.1001) for at in before[:-1]] + [quote(b, before[-1], 1.097, 1.0975)])
    assert [d["gap_before_exit"] for d in outcomes(b)] == [gap] and figures(b)["after_gaps"] == gap


def test_a_signal_opened_inside_a_hole_knows_of_all_of_it_and_a_crossed_quote_does_not_end_it():
    b = bench(max_gap_s=60)
    b.feed([signal(b, 0, signal_id="first", tp=2.0), quote(b, 1, 1.1, 1.1001), signal(b, 70)])
    b.feed([quote(b, 71, 1.1, 1.0999), quote(b, 72, 1.102, 1.1021)])
    [got] = outcomes(b)
    assert (got["gap_before_exit"], got["gap_ms"]) == (True, 71_000.0)


# -- ends without a level -----------------------------------------------------------------------


def test_a_timeout_ends_at_the_deadline_on_the_last_price_whoever_shows_the_time():
    b = bench(max_age_s=10)
    b.feed([signal(b, 0), quote(b, 1, 1.1005, 1.1006), quote(b, 12, 1.3, 1.31, "GBPUSD")])
    [got] = outcomes(b)
    assert (got["outcome"], got["closed_at"], got["exit_price"], got["r"]) == ("TIMEOUT", 10.0, 1.1005, 0.5)
    assert b.emitted[0].timestamp == 12 and b.emitted[0].correlation_id == "S"


def test_a_program_whose_clock_is_ahead_ends_no_signal_of_another():
    b = bench()
    b.feed([signal(b, 0, expires_at=60.0), signal(b, 10_800, signal_id="broker time", expires_at=10_860.0)])
    b.feed([b.event("signal_expired", 10_801, {"signal_id": "broker time"}), quote(b, 1, 1.102, 1.1021)])
    assert {d["signal_id"]: d["outcome"] for d in outcomes(b)} == {"S": "WIN", "broker time": "CANCELLED"}


def test_a_signal_taken_back_after_its_deadline_had_run_out_at_it():
    b = bench()
    b.feed([signal(b, 0, expires_at=5.0), quote(b, 4, 1.1005, 1.1006), expired(b, 6)])
    assert [(d["outcome"], d["exit_price"], d["closed_at"]) for d in outcomes(b)] == [("TIMEOUT", 1.1005, 5.0)]


def test_a_quote_at_the_deadline_comes_too_late():
    b = bench()
    b.feed([signal(b, 0, expires_at=5.0), quote(b, 4, 1.1, 1.1001), quote(b, 5, 1.102, 1.1021)])
    assert [(d["outcome"], d["exit_price"]) for d in outcomes(b)] == [("TIMEOUT", 1.1)]


def test_a_signal_that_never_saw_a_quote_ends_as_unknown():
    b = bench()
    b.feed([signal(b, 0, expires_at=5.0), quote(b, 6, 1.103, 1.1031)])
    [got] = outcomes(b)
    assert (got["outcome"], got["exit_price"], got["r"], got["quotes_seen"]) == ("UNKNOWN", None, None, 0)


def test_levels_on_the_wrong_side_of_the_entry_end_as_unknown_at_once():
    b = bench()
    b.feed([signal(b, 0, {**SELL, "direction": "BUY"})])
    assert outcomes(b)[0]["outcome"] == "UNKNOWN"


def test_an_expired_signal_is_cancelled_and_a_repeated_id_is_counted_even_after_a_restart():
    b = bench()
    b.feed([signal(b, 0), signal(b, 1, SELL), quote(b, 2, 1.1004, 1.1005), expired(b, 3), expired(b, 4)])
    b.restart()
    b.feed([signal(b, 5)])
    assert [(d["outcome"], d["exit_price"], d["r"]) for d in outcomes(b)] == [("CANCELLED", 1.1004, 0.4)]
    assert (figures(b)["duplicates"], figures(b)["open"]) == (2, 0)


def test_every_way_to_end_has_its_counter_and_they_add_up():
    b = bench()
    ways = {"WIN": {}, "LOSS": {}, "BREAKEVEN": {"tp": 1.1}, "TIMEOUT": {"expires_at": 5.0}, "CANCELLED": {}}
    ways["UNKNOWN"] = {"direction": "SELL"}
    at = {"WIN": (1.102, 1.1021), "LOSS": (1.099, 1.0991), "BREAKEVEN": (1.1, 1.1001), "TIMEOUT": (1.0995, 1.0996)}
    for outcome, more in ways.items():
        b.feed([signal(b, 0, signal_id=outcome, **more)])
        if outcome in at:
            b.feed([quote(b, 1, *at[outcome])])
        if outcome == "TIMEOUT":
            b.feed([quote(b, 6, 1.1, 1.1001)])
    b.feed([signal(b, 7, signal_id="open"), b.event("signal_expired", 8, {"signal_id": "CANCELLED"})])
    b.restart()
    assert {d["signal_id"]: d["outcome"] for d in outcomes(b)} == {each: each for each in ways}
    got = figures(b)
    names = ("wins", "losses", "breakevens", "timeouts", "cancelled", "unknown")
    assert [got[name] for name in names] == [1] * 6 and (got["open"], got["opened"], got["resolved"]) == (1, 7, 3)
    health = tapebus_outcomes.tapebus_health(context=b.context)
    assert "1 open, 3 resolved, 1 timed out, 1 cancelled, 1 unknown, 0 ambiguous" in health["message"]


def test_a_quote_stamped_before_the_signal_leaves_no_negative_duration_and_is_ambiguous():
    b = bench()
    b.feed([signal(b, 100.0), quote(b, 99.0, 1.102, 1.1021)])
    [got] = outcomes(b)
    assert (got["duration_s"], got["closed_at"], got["ambiguous"]) == (0.0, 100.0, True)


def test_a_duration_that_is_not_the_difference_of_its_times_is_refused():
    # a record of an older system: 189.6 minutes for four seconds, 189.6 being the average of all its trades
    b = bench()
    fixed = {"signal_id": "ELITE_RAPID_KALMAN_QUICKFIRE_1757993286", "symbol": "USDCNH", "direction": "BUY"}
    fixed |= {
        "pattern_type": "KALMAN_QUICKFIRE",
        "confidence": 73.4,
        "outcome": "WIN",
        "quotes_seen": 1,
        "fired": False,
    }
    event = b.event(
        "signal_outcome", 0, {**fixed, "opened_at": 1757993286.0, "closed_at": 1757993290.0, "duration_s": 189.6 * 60}
    )
    [check] = [each.check for each in default_types() if each.name == "signal_outcome"]
    assert "duration_s" in check(event)


# -- what else it hears -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event_type", "data", "fired"),
    [
        ("fire_command", {"fire_id": "F", "signal_id": "S", "status": "queued"}, True),
        ("fire_command", {"fire_id": "S"}, True),
        ("fire_command", {"fire_id": "F", "signal_id": "S", "status": "REJECTED"}, False),
        ("fire_command", {"fire_id": "F", "signal_id": "another"}, False),
        ("trade_executed", {"fire_id": "F", "signal_id": "S", "status": "FILLED"}, True),
        ("trade_confirmed", {"fire_id": "F", "signal_id": "S", "status": "FAILED"}, False),
    ],
)
def test_a_signal_is_followed_fired_or_not_and_says_which(event_type, data, fired):
    b = bench()
    order = {"symbol": "EURUSD", "direction": "BUY", "lot": 0.1} if event_type == "fire_command" else {}
    b.feed([signal(b, 0), b.event(event_type, 1, {**order, **data})])
    b.restart()
    b.feed([quote(b, 2, 1.102, 1.1021)])
    assert [d["fired"] for d in outcomes(b)] == [fired]


def test_a_pip_is_that_of_the_registry_and_the_brokers_own_wins_also_after_a_restart():
    gold = {"symbol": "XAUUSD", "direction": "BUY", "entry": 3646.5, "sl": 3643.5, "tp": 3649.5}
    said = {"symbol": "XAUUSD", "digits": 2, "contract_size": 100.0, "volume_min": 0.01, "volume_step": 0.01}
    pips = []
    for config, told in (({}, []), ({"symbols": {"XAUUSD": {"pip": 0.01}}}, []), ({}, [{**said, "pip": 1.0}])):
        b = bench(**config)
        b.feed([b.event("symbol_specification", 0, each) for each in told])
        b.restart()
        b.feed([signal(b, 1, gold), quote(b, 2, 3649.5, 3649.8, "XAUUSD")])
        [got] = outcomes(b)
        assert got["r"] == 1.0
        pips.append(got["pips"])
    assert pips == [30.0, 300.0, 3.0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_gap": 3}, "max_gap_s"),
        ({"symbols": {"XAUUSD": {"pip": -1.0}}}, "XAUUSD"),
        ({"max_age_s": 0}, "greater than 0"),
        ({"breakeven_r": -0.1}, "must not be below 0"),
        ({"tp_fill": "market"}, "tp_fill"),
    ],
)
def test_a_wrong_configuration_is_refused_by_its_key(config, message):
    with pytest.raises(ConfigError, match=message):
        bench(**config)


@given(st.integers(1, 10**9), st.integers(0, 8), st.sampled_from([0.0, 2.3e-16, -1.2e-16]))
def test_a_price_without_its_noise_is_the_float_that_its_decimals_are_read_as(digits, places, noise):
    price = float(f"{digits}e-{places}")
    # up to there a float holds ten decimals and more
    if price < 5000:
        assert tidy(price * (1 + noise)) == price
    assert tidy(price) == price


# -- mirrors ------------------------------------------------------------------------------------

#: Whole numbers of points around 1000, which floats hold exactly.
WALKS = st.lists(st.integers(-6, 6), min_size=1, max_size=40)
DISTANCES = st.integers(1, 15)


@given(WALKS, DISTANCES)
def test_with_direction_and_levels_swapped_one_stream_gives_the_negated_r(moves, distance):
    results = []
    for direction, sl, tp in (("BUY", 1000 - distance, 1000 + distance), ("SELL", 1000 + distance, 1000 - distance)):
        b = bench(tp_fill="tick")
        b.feed([signal(b, 0, {"direction": direction, "entry": 1000.0, "sl": float(sl), "tp": float(tp)})])
        price = 1000.0
        for n, move in enumerate(moves):
            price += move
            b.feed([quote(b, n + 1, price, price)])
        b.feed([quote(b, 1e6, 1.0, 1.0, "GBPUSD")])
        results.append(outcomes(b)[0])
    buy, sell = results
    assert buy["r"] == -sell["r"] and (buy["mfe"], buy["mae"]) == (-sell["mae"], -sell["mfe"])
    swapped = {"WIN": "LOSS", "LOSS": "WIN", "TIMEOUT": "TIMEOUT"}
    assert buy["outcome"] == swapped[sell["outcome"]] and buy["duration_s"] == sell["duration_s"]


@given(st.booleans(), WALKS, st.lists(st.integers(0, 3), min_size=40, max_size=40), DISTANCES, DISTANCES)
def test_with_all_prices_mirrored_a_sell_ends_as_the_buy(by_bars, moves, spreads, risk, reward):
    results = []
    for sign, direction in ((1, "BUY"), (-1, "SELL")):
        b = bench()
        entry, sl, tp = 1000.0, 1000.0 - sign * risk, 1000.0 + sign * reward
        b.feed([signal(b, 0, {"direction": direction, "entry": entry, "sl": sl, "tp": tp})])
        price = 0
        for n, (move, spread) in enumerate(zip(moves, spreads, strict=False)):
            # what closes the signal is `price` on either side; the other side is `spread` away
            opened, price = price, price + move
            lift = 1000.0 - (spread if sign < 0 else 0)
            if by_bars:
                edges = sorted((sign * opened, sign * price))
                data = {"open": sign * opened, "high": edges[1] + 1, "low": edges[0] - 1, "close": sign * price}
                data = {name: lift + each for name, each in data.items()} | {"spread": float(spread), "volume": 1.0}
                data |= {"symbol": "EURUSD", "timeframe": "M1", "timestamp": 60.0 * n}
                b.feed([b.event("market_data.ohlcv", 60.0 * n + 60, data)])
            else:
                b.feed([quote(b, n + 1, lift + sign * price, lift + sign * price + spread)])
        b.feed([quote(b, 1e6, 1.0, 1.0, "GBPUSD")])
        results.append(outcomes(b)[0])
    same = ("outcome", "r", "pips", "mfe", "mae", "closed_at", "ambiguous", "gap_before_exit", "quotes_seen", "mode")
    buy, sell = ({name: each.get(name) for name in same} for each in results)
    assert buy == sell


# -- a model of all rules -----------------------------------------------------------------------

QUOTES = st.tuples(st.just("quote"), st.integers(0, 12), st.sampled_from([0, 1, 1, 2, -1]))
#: Number, BUY, entry, stop and target as distances from it (seldom on its wrong side), entry said, life.
SIGNALS = st.tuples(
    st.just("signal"),
    st.integers(0, 9),
    st.booleans(),
    st.integers(4, 8),
    st.none() | st.integers(0, 4) | st.integers(-1, 6),
    st.none() | st.integers(0, 4) | st.integers(-1, 6),
    st.booleans(),
    st.none() | st.integers(1, 30),
)
ENDS = st.tuples(st.just("expired"), st.integers(0, 9)) | st.just(("again",))
ACTIONS = st.lists(st.tuples(st.integers(0, 4), QUOTES | SIGNALS | QUOTES | ENDS), min_size=15, max_size=80)


@settings(max_examples=200, deadline=None)
@given(ACTIONS, st.integers(1, 9))
def test_any_mix_of_events_and_restarts_ends_as_the_model_says(actions, size):
    b, model = bench(max_age_s=40.0), Model(40.0)
    now, batch = 0.0, []
    for wait, action in actions:
        now += wait
        kind, *rest = action
        if kind == "quote":
            bid, ask = 100.0 + rest[0], 100.0 + rest[0] + rest[1]
            model.quote(now, bid, ask)
            batch.append(quote(b, now, bid, ask))
        elif kind == "signal":
            number, buy, middle, risk, reward, said, life = rest
            sign, middle = 1 if buy else -1, 100.0 + middle
            sl, tp = None if risk is None else middle - sign * risk, None if reward is None else middle + sign * reward
            entry = middle if said else None
            data = {"direction": "BUY" if buy else "SELL", "entry": entry, "sl": sl, "tp": tp}
            data["expires_at"] = None if life is None else now + life
            model.signal(now, {"id": f"S{number}", "sign": sign, "entry": entry, "sl": sl, "tp": tp}, life)
            batch.append(signal(b, now, data, signal_id=f"S{number}"))
        elif kind == "expired":
            model.expired(now, f"S{rest[0]}")
            batch.append(b.event("signal_expired", now, {"signal_id": f"S{rest[0]}"}))
        if kind == "again" or len(batch) >= size:
            b.feed(batch)
            batch = []
        if kind == "again":
            b.restart()
    b.feed(batch)
    got = {each["signal_id"]: each for each in outcomes(b)}
    assert len(got) == len(b.emitted) and got.keys() == model.done.keys()
    for signal_id, want in model.done.items():
        have = got[signal_id]
        assert {key: have[key] for key in want} == pytest.approx(want, abs=1e-6), (want, have)
        assert have["duration_s"] == have["closed_at"] - have["opened_at"]
    assert figures(b)["open"] == len(model.open)


# -- restarts -----------------------------------------------------------------------------------


def test_an_interrupted_run_emits_exactly_what_an_uninterrupted_one_emits(shared_data):
    day = read_day(shared_data / "ticks" / "oanda_eurusd_20140508.zip").part(0, 6000)
    orders = make_orders(day, random.Random(7), 300)
    runs = []
    for restarts in (False, True):
        b = bench()
        events = [b.event(*each) for each in stream(day, orders)]
        for at in range(0, len(events), 37):
            b.feed(events[at : at + 37])
            if restarts:
                b.restart()
        runs.append((b.emitted, figures(b)))
    assert runs[0] == runs[1] and len(runs[0][0]) == 300

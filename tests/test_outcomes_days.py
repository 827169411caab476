"""Whole recorded days with thousands of signals: every outcome is that of a scan over all quotes of its life."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest

import tapebus_outcomes
from outcome_days import DAYS, KINDS, MAX_AGE_S, MAX_GAP_S, Day, Oracle, Order, make_orders, read_day, stream
from tapebus.events import Registry
from tapebus.testing import PluginBench
from tapebus_outcomes.bars import Bar, decide
from tapebus_schema.catalog import default_types

EURUSD = "oanda_eurusd_20140508.zip"
PIPS = {"EURUSD": Fraction(1, 10_000), "XAUUSD": Fraction(1, 10)}
SIGNALS = 3000


def bench(**config: Any) -> PluginBench:
    config = {"max_gap_s": MAX_GAP_S, "max_age_s": MAX_AGE_S, **config}
    return PluginBench(tapebus_outcomes, Registry(default_types()), config, name="outcomes")


def feed(b: PluginBench, day: Day, orders: list[Order], chance: random.Random, restarts: int) -> None:
    """Everything in batches of any size; between some of them the plugin loses its memory."""
    events = [b.event(*event) for event in stream(day, orders)]
    again = {chance.randrange(len(events)) for _ in range(restarts)}
    at = 0
    while at < len(events):
        size = chance.choice((1, 7, 300, 1000))
        b.feed(events[at : at + size])
        if not again.isdisjoint(range(at, at + size)):
            b.restart()
        at += size


@pytest.mark.parametrize("name", DAYS)
def test_every_signal_of_a_recorded_day_ends_as_a_scan_of_its_quotes_says(shared_data, name) -> None:
    day, chance = read_day(shared_data / "ticks" / name), random.Random(name)
    day.cross(chance, 500)
    orders = make_orders(day, chance, SIGNALS)
    b = bench()
    feed(b, day, orders, chance, restarts=20)
    got = {wire.data["signal_id"]: wire.data for wire in b.emitted}
    assert len(got) == len(b.emitted) == SIGNALS
    oracle = Oracle(day, PIPS[day.symbol], orders[0])
    kinds: Counter[tuple[str, str]] = Counter()
    for order in orders:
        wanted = oracle.judge(order)
        assert not wanted.differences(got[order.signal_id], order.opened_at), (order, wanted)
        kinds[order.kind, wanted.outcome] += 1
    # nothing passed because nothing happened
    assert {kind for kind, _ in kinds} == set(KINDS)
    outcomes: Counter[str] = Counter()
    for (_, outcome), count in kinds.items():
        outcomes[outcome] += count
    assert all(outcomes[each] >= 20 for each in ("WIN", "LOSS", "TIMEOUT", "CANCELLED", "UNKNOWN")), outcomes
    assert any(got[order.signal_id]["gap_before_exit"] for order in orders if order.kind == "in hole")
    figures = tapebus_outcomes.tapebus_metrics(context=b.context)
    crossed = sum(ask < bid for bid, ask in zip(day.bids, day.asks, strict=True))
    assert figures["open"] == 0 and crossed - figures["crossed_quotes"] in range(orders[0].place)


# -- days of bars -------------------------------------------------------------------------------


def made_of(day: Day, seconds: int) -> list[Bar]:
    """The bars of the bid, from the quotes."""
    bars: dict[float, list[float]] = {}
    for time, bid in zip(day.times, day.bids, strict=True):
        bars.setdefault(time // seconds * seconds, []).append(bid)
    return [Bar(at, at + seconds, p[0], max(p), min(p), p[-1]) for at, p in bars.items()]


@pytest.mark.parametrize(("seconds", "both", "bars"), [(60, 0, 1419), (300, 3, 288), (900, 4, 96), (3600, 3, 24)])
def test_five_pips_either_way_of_the_open_are_both_reached_as_often_as_the_quotes_of_a_day_say(
    shared_data, seconds, both, bars
):
    made = made_of(read_day(shared_data / "ticks" / EURUSD), seconds)
    decided = [decide(each, each.open - 0.0005, each.open + 0.0005, each.start, each.end + 1) for each in made]
    assert (len(made), sum(step.doubt for step in decided)) == (bars, both)


def with_one_spread(day: Day, spread: float) -> Day:
    """The day as bars can tell it: their ask is the bid plus a spread."""
    return Day(day.symbol, day.decimals, day.half_point, day.times, day.bids, [bid + spread for bid in day.bids])


def bar_events(b: PluginBench, day: Day, orders: list[Any], seconds: int, spread: float) -> Iterator[Any]:
    """Signals, and bars as they end."""
    made = iter(made_of(day, seconds))
    names = {60: "M1", 300: "M5", 900: "M15"}
    nxt = next(made)
    for order in sorted(orders, key=lambda each: each.opened_at):
        while nxt is not None and nxt.end <= order.opened_at:
            yield _published(b, day, nxt, names[seconds], spread)
            nxt = next(made, None)
        yield b.event("signal_generated", order.opened_at, order.payload(day.symbol))
    while nxt is not None:
        yield _published(b, day, nxt, names[seconds], spread)
        nxt = next(made, None)


def _published(b: PluginBench, day: Day, each: Bar, timeframe: str, spread: float) -> Any:
    prices = {"open": each.open, "high": each.high, "low": each.low, "close": each.close, "volume": 1.0}
    data = {"symbol": day.symbol, "timeframe": timeframe, "timestamp": each.start, "spread": spread, **prices}
    return b.event("market_data.ohlcv", each.end, data)


def test_what_bars_decide_without_a_doubt_is_what_the_quotes_decide(shared_data):
    spread = 0.0001
    day = with_one_spread(read_day(shared_data / "ticks" / EURUSD), spread)
    orders = [each for each in make_orders(day, random.Random(5), 3000) if each.entry is not None]
    oracle = Oracle(day, Fraction(1, 10_000), orders[0])
    wanted = {order.signal_id: oracle.judge(order) for order in orders}
    doubtful = {}
    for seconds in (60, 300, 900):
        b = bench()
        b.feed(bar_events(b, day, orders, seconds, spread))
        sure = [d for d in [wire.data for wire in b.emitted] if not d["ambiguous"] and d["outcome"] in ("WIN", "LOSS")]
        doubtful[seconds] = sum(d["ambiguous"] for d in [wire.data for wire in b.emitted])
        assert len(sure) > 500
        kinds = Counter(each["outcome"] for each in sure)
        assert min(kinds["WIN"], kinds["LOSS"]) > 100
        for got in sure:
            want = wanted[got["signal_id"]]
            if want.outcome == "CANCELLED":  # nobody takes signals back here
                continue
            assert got["outcome"] == want.outcome, (seconds, got, want)
            # in the bar of that quote: at its open, or inside, which is known when it ends
            start = want.closed_at // seconds * seconds
            assert got["closed_at"] in (start, start + seconds)
            at_open = got["closed_at"] == start
            if want.r is not None and got["outcome"] == "WIN":  # at an open beyond it a target pays more
                assert got["r"] == pytest.approx(float(want.r), abs=1e-6) or (at_open and got["r"] > want.r)
            elif want.r is not None:  # inside a bar nobody sees how far beyond the stop the first price was
                assert got["r"] >= float(want.r) - 1e-6
            if got["outcome"] == "WIN" and not at_open:
                assert got["mfe"] <= float(want.mfe or 0) + 1e-9 and got["mae"] <= float(want.mae or 0) + 1e-9
    assert doubtful[60] < doubtful[300] < doubtful[900]

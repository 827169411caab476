"""Whole recorded days with thousands of signals: every outcome is that of a scan over all quotes of its life."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

import tapebus_outcomes
from outcome_days import DAYS, KINDS, MAX_AGE_S, MAX_GAP_S, Day, Oracle, Order, make_orders, read_day, stream
from tapebus.events import Registry
from tapebus.testing import PluginBench
from tapebus_schema.catalog import default_types

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

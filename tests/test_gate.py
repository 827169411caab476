"""The auto-fire gate as a pure function: every rule with its reason, its edges, and what can never happen."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest

from gate_support import RULES, T0, configured, decide, known, quote, view
from tapebus_slots.config import Config
from tapebus_slots.sizing import Quote
from tapebus_slots.view import Account, Held
from tapebus_trading.calibration import Curve
from tapebus_trading.sessions import Hours


def rule(verdict, name):
    (found,) = [each for each in verdict.rules if each.name == name]
    return found


def test_a_signal_that_passes_every_rule_fires_with_the_lots_of_the_worked_table():
    verdict = decide()
    assert verdict.fire and verdict.reasons == ()
    assert (verdict.lots, verdict.risk) == (Decimal("3.33"), Decimal("499.5"))
    assert [each.name for each in verdict.rules] == RULES
    assert all(each.passed for each in verdict.rules)


def stops_level(points):
    return known(own={"EURUSD": {"stops_level": points}})


def mode(word):
    return known(own={"EURUSD": {"trade_mode": word}})


SELL = {"direction": "SELL", "entry": 1.1699, "sl": 1.1714, "tp": 1.1680}
SATURDAY = 1_754_740_800.0

#: What happens, the one rule it trips, the reason reported, and the change that brings it about.
REFUSED = [
    ("auto-fire is off", "auto_fire", "auto_fire_off", {"config": Config()}),
    ("the kill switch is on", "kill_switch", "kill_switch_on", {"known": known(kill_switch=True)}),
    ("a tier nobody described", "tier", "tier_unknown", {"config": configured(tier="X", tiers={"COMMANDER": {}})}),
    ("fired before", "not_fired_before", "already_fired", {"slots": view(fired={"S1"})}),
    ("expired when it was made", "expiry", "signal_expired", {"expires_at": T0}),
    (
        "expired by the time of the quote",
        "expiry",
        "signal_expired",
        {"expires_at": T0 + 1, "quotes": quote(1.1699, 1.17, T0 + 2)},
    ),
    ("the pattern is disabled", "pattern", "pattern_disabled", {"known": known(disabled=["VCB_BREAKOUT"])}),
    ("below the band", "confidence", "confidence_outside_band", {"confidence": 79.9}),
    ("above the band", "confidence", "confidence_outside_band", {"confidence": 89.1}),
    ("no calibration to judge by", "confidence", "not_calibrated", {"config": configured(confidence="calibrated")}),
    (
        "on a Saturday",
        "market",
        "market_closed",
        {
            "config": configured(market_hours=True),
            "at": SATURDAY,
            "quotes": quote(1.1699, 1.17, SATURDAY),
            "account": Account(10_000.0, 10_000.0),
        },
    ),
    (
        "on a holiday",
        "market",
        "market_closed",
        {"config": configured(market_hours=True), "known": known(hours=Hours(frozenset([date(2025, 8, 11)])))},
    ),
    (
        "the broker has not said what the symbol is",
        "specification",
        "specification_missing",
        {"config": configured(require_specification=True)},
    ),
    ("the symbol is not traded", "trade_mode", "trade_disabled", {"known": mode("disabled")}),
    ("the symbol may only be closed", "trade_mode", "close_only", {"known": mode("SYMBOL_TRADE_MODE_CLOSEONLY")}),
    ("the symbol may only be sold", "trade_mode", "short_only", {"known": mode("2")}),
    ("the symbol may only be bought", "trade_mode", "long_only", {"known": mode("long_only"), **SELL}),
    (
        "a level between ticks, refused",
        "price_on_tick",
        "price_off_tick",
        {"config": configured(require_on_tick=True), "tp": 1.172003},
    ),
    ("the stop inside two spreads", "sl_distance", "sl_inside_spread", {"quotes": quote(1.1692, 1.1700)}),
    ("the target inside two spreads", "tp_distance", "tp_inside_spread", {"tp": 1.17015}),
    ("the stop inside the stops level", "sl_distance", "sl_inside_spread", {"known": stops_level("0.0016")}),
    ("the stop nearer to the closing price", "sl_distance", "sl_inside_spread", {"known": stops_level("0.00145")}),
    (
        "the target inside the stops level",
        "tp_distance",
        "tp_inside_spread",
        {"tp": 1.1710, "known": stops_level("0.0011")},
    ),
    ("a signal that waited in a spool", "lateness", "signal_late", {"known": known(lateness=60.1)}),
    ("a signal of an outage of weeks", "lateness", "signal_late", {"known": known(lateness=30 * 86_400.0)}),
    ("a stale quote", "quote_age", "quote_stale", {"quotes": quote(1.1699, 1.17, T0 - 5.1)}),
    ("a quote from the future", "quote_age", "quote_stale", {"quotes": quote(1.1699, 1.17, T0 + 600)}),
    ("a crossed quote", "quote_age", "quote_crossed", {"quotes": quote(1.17001, 1.17)}),
    ("no quote", "quote_age", "quote_missing", {"quotes": {}}),
    ("the heartbeat stopped", "heartbeat_age", "heartbeat_stale", {"account": Account(10_000.0, 10_000.0, T0 - 40.1)}),
    ("all slots are taken", "slots", "no_free_slot", {"slots": view(used=10)}),
    ("more than all slots are taken", "slots", "over_limit", {"slots": view(used=16)}),
    ("no slot at all is allowed", "slots", "no_free_slot", {"slots": view(maximum=0)}),
    (
        "an opposite position",
        "opposite_position",
        "opposite_position",
        {"slots": view([Held("EURUSD", "SELL", None, Decimal(1))])},
    ),
    (
        "the margin of a lot is not there",
        "margin",
        "margin_exceeded",
        {"config": configured(leverage=100), "account": Account(10_000.0, 10_000.0, T0, 11.69)},
    ),
    ("nobody knows the free margin", "margin", "margin_unknown", {"config": configured(leverage=100)}),
    ("too small an account", "sizing", "below_min_lot", {"account": Account(29.0, 29.0, T0)}),
    ("a negative balance", "sizing", "no_risk_budget", {"account": Account(-10.0, -10.0, T0)}),
    ("no risk is allowed", "sizing", "no_risk_budget", {"config": configured(risk_pct=0)}),
]


@pytest.mark.parametrize(("name", "reason", "changes"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_each_rule_refuses_alone_with_its_reason(name, reason, changes):
    verdict = decide(**changes)
    assert not verdict.fire
    assert verdict.reasons == (reason,)
    failed = {each.name for each in verdict.rules if not each.passed}
    assert name in failed and failed <= {name, "sizing"}
    assert [each.name for each in verdict.rules] == RULES


#: What is wrong in more than one way shows all of them.
TOGETHER = [
    ("stop on the wrong side", {"sl": 1.1715}, {"sl_tp_wrong_side", "sl_inside_spread"}),
    ("target on the wrong side", {"tp": 1.1690}, {"sl_tp_wrong_side", "tp_inside_spread"}),
    ("stop at the entry", {"sl": 1.1700}, {"sl_tp_wrong_side", "sl_inside_spread"}),
    ("target at the entry", {"tp": 1.1700}, {"sl_tp_wrong_side", "tp_inside_spread"}),
    ("no stop", {"sl": None}, {"sl_tp_wrong_side", "no_price"}),
    ("no target", {"tp": None}, {"sl_tp_wrong_side"}),
    ("unknown symbol", {"symbol": "ACME"}, {"symbol_unknown", "quote_missing"}),
    ("unknown account", {"account": None}, {"account_unknown"}),
    ("an account without a balance", {"account": Account(None, 5.0, T0)}, {"account_unknown"}),
    (
        "no total risk left",
        {"slots": view([Held("USDJPY", "BUY", None, Decimal(1000))])},
        {"total_risk_exceeded", "currency_risk_exceeded", "no_risk_budget"},
    ),
    (
        "two trades of unknown risk",
        {"slots": view([Held("GBPJPY", "BUY")] * 2)},
        {"total_risk_exceeded", "no_risk_budget"},
    ),
    (
        "too little total risk left",
        {"slots": view([Held("GBPJPY", "BUY", None, Decimal("999.5"))])},
        {"total_risk_exceeded", "below_min_lot"},
    ),
    (
        "everything",
        {
            "config": Config(),
            "known": known(kill_switch=True),
            "confidence": 1.0,
            "quotes": {},
            "account": None,
            "slots": view(used=11),
        },
        {
            "auto_fire_off",
            "kill_switch_on",
            "confidence_outside_band",
            "quote_missing",
            "account_unknown",
            "over_limit",
        },
    ),
]


@pytest.mark.parametrize(("changes", "reasons"), [row[1:] for row in TOGETHER], ids=[row[0] for row in TOGETHER])
def test_what_is_wrong_in_several_ways_names_them_all(changes, reasons):
    assert set(decide(**changes).reasons) == reasons


#: Just on the good side of each limit.
ALLOWED = [
    ("the lower end of the band", {"confidence": 80.0}),
    ("the upper end of the band", {"confidence": 89.0}),
    ("two spreads exactly", {"quotes": quote(1.16925, 1.1700)}),
    ("the stops level from both prices", {"known": stops_level("0.0014")}),
    ("a quote of five seconds", {"quotes": quote(1.1699, 1.17, T0 - 5)}),
    ("no spread at all", {"quotes": quote(1.17, 1.17)}),
    ("a heartbeat of forty seconds", {"account": Account(10_000.0, 10_000.0, T0 - 40)}),
    ("an EA that never sent a heartbeat", {"account": Account(10_000.0, 10_000.0, None)}),
    ("the last slot", {"slots": view(used=9)}),
    ("a position in the same direction", {"slots": view([Held("EURUSD", "BUY", None, Decimal(1))])}),
    ("an opposite position on another symbol", {"slots": view([Held("GBPUSD", "SELL", None, Decimal(1))])}),
    (
        "an opposite position where that is wanted",
        {"config": configured(allow_opposite=True), "slots": view([Held("EURUSD", "SELL", None, Decimal(1))])},
    ),
    ("another pattern is disabled", {"known": known(disabled=["BB_SCALP"])}),
    ("no tier where there are tiers", {"config": configured(tiers={"COMMANDER": {}})}),
    ("a tier that is described", {"config": configured(tier="COMMANDER", tiers={"COMMANDER": {}})}),
    ("it expires later", {"expires_at": T0 + 1}),
    ("a signal of a minute ago", {"known": known(lateness=60.0)}),
    ("a signal of a recording", {"known": known(lateness=30 * 86_400 + 1.0)}),
    ("a signal of a clock that is ahead", {"known": known(lateness=-600.0)}),
    ("a market order", {"entry": None}),
    ("a level between ticks", {"tp": 1.172003}),
    ("noise of floating point", {"config": configured(require_on_tick=True), "sl": 1.1685000000000001}),
    ("a market that is open", {"config": configured(market_hours=True)}),
    ("a symbol that may only be bought", {"known": mode("longonly")}),
    ("a trade mode nobody knows", {"known": mode("request")}),
    (
        "margin for the smallest order",
        {"config": configured(leverage=100), "account": Account(10_000.0, 10_000.0, T0, 11.70)},
    ),
    ("sold", SELL),
]


@pytest.mark.parametrize("changes", [row[1] for row in ALLOWED], ids=[row[0] for row in ALLOWED])
def test_on_the_good_side_of_each_limit_it_fires(changes):
    assert decide(**changes).reasons == ()


@pytest.mark.parametrize(
    ("confidence", "fires"), [(89.0, True), (89.1, False), (89.2, False), (89.3, False), (89.8, False)]
)
def test_of_the_recorded_confidences_only_those_inside_the_closed_band_fire(confidence, fires):
    """The known rule said "80-89 %"; 89.1, 89.2, 89.3 and 89.8 were on record."""
    assert decide(confidence=confidence).fire is fires


def test_a_pattern_may_have_a_band_of_its_own():
    config = configured(patterns={"VCB_BREAKOUT": {"confidence_band": [90, 95]}})
    assert decide(config, confidence=92.0).fire
    assert not decide(config, confidence=85.0).fire
    assert decide(config, confidence=85.0, pattern="BOS_RETEST").fire


CURVE = known(calibration=Curve([(60.0, 40.0), (80.0, 50.0), (90.0, 85.0)]))


@pytest.mark.parametrize(
    ("stated", "found"),
    [(10.0, 40.0), (60.0, 40.0), (70.0, 45.0), (80.0, 50.0), (85.0, 67.5), (90.0, 85.0), (99.0, 85.0)],
)
def test_a_calibrated_confidence_lies_on_the_line_between_two_knots(stated, found):
    assert CURVE.calibrated(stated) == found


def test_the_gate_judges_the_raw_or_the_calibrated_confidence_and_always_shows_both():
    raw = decide(known=CURVE)
    assert raw.fire and (raw.confidence, raw.calibrated) == (85.0, 67.5)
    judged = decide(configured(confidence="calibrated"), known=CURVE)
    assert judged.reasons == ("confidence_outside_band",)
    assert rule(judged, "confidence").actual == 67.5
    assert decide(configured(confidence="calibrated"), known=CURVE, confidence=89.0).fire
    assert decide().calibrated is None


def test_five_percent_in_ten_slots_is_bounded_by_the_total_open_risk():
    """The known setting allowed 50 % of the balance at risk at once; here the second full trade is the last."""
    held, fired = [], 0
    for _ in range(10):
        verdict = decide(
            slots=view(held),
            symbol="XAUUSD",
            entry=3374.5,
            sl=3371.5,
            tp=3380.0,
            quotes={"XAUUSD": Quote(3374.4, 3374.5, T0)},
        )
        fired += verdict.fire
        held += [Held("XAUUSD", "BUY", verdict.lots, verdict.risk)] * verdict.fire
    assert fired == 3
    assert [each.risk for each in held] == [498, 498, 3]
    assert "total_risk_exceeded" in verdict.reasons


def test_the_risk_of_the_slots_held_leaves_less_for_the_next():
    verdict = decide(slots=view([Held("USDJPY", "BUY", None, Decimal(800))]))
    assert verdict.fire and verdict.risk <= 200
    shown = rule(verdict, "total_open_risk")
    assert (shown.limit, shown.actual) == (1000.0, float(800 + verdict.risk))


def test_the_risk_of_a_currency_counts_both_legs_of_a_pair_whatever_their_direction():
    config = configured(max_per_currency_risk_pct=6.0, max_total_open_risk_pct=50.0)
    euro = [Held("EURJPY", "SELL", None, Decimal(400))]
    assert decide(config, slots=view(euro)).risk == Decimal("199.5")  # 600 less 400 of the euro
    dollar = [Held("USDJPY", "BUY", None, Decimal(400)), Held("GBPUSD", "BUY", None, Decimal(100))]
    verdict = decide(config, slots=view(dollar))
    assert verdict.risk == Decimal("99.0")
    assert rule(verdict, "currency_risk").actual == {"EUR": 99.0, "USD": 599.0}
    assert decide(config, slots=view([Held("AUDNZD", "BUY", None, Decimal(900))])).risk == Decimal("499.5")


def test_a_currency_at_its_limit_refuses_by_that_rule_alone():
    config = configured(max_per_currency_risk_pct=6.0, max_total_open_risk_pct=50.0)
    verdict = decide(config, slots=view([Held("EURJPY", "SELL", None, Decimal(600))]))
    assert verdict.reasons == ("currency_risk_exceeded", "no_risk_budget")


def test_a_position_nobody_can_describe_counts_in_every_currency_with_one_full_trade():
    verdict = decide(slots=view([Held("", "")]))
    assert rule(verdict, "currency_risk").actual == {"EUR": 999.5, "USD": 999.5}


def test_every_rule_shows_its_limit_and_what_it_found():
    shown = {each.name: (each.limit, each.actual) for each in decide(known=stops_level("0.0005")).rules}
    assert shown["confidence"] == ([80.0, 89.0], 85.0)
    assert shown["sl_distance"] == (0.0005, 0.0015)
    assert shown["tp_distance"] == (0.0005, 0.002)
    assert shown["slots"] == (10, 0)
    assert shown["quote_age"] == (5.0, 0.0)
    assert shown["heartbeat_age"] == (40.0, 0.0)
    assert shown["total_open_risk"] == (1000.0, 499.5)
    assert shown["sizing"] == (0.01, 3.33)
    assert shown["geometry"] == ("sl < entry < tp", {"entry": 1.17, "sl": 1.1685, "tp": 1.172})


def test_the_mirrored_signal_gets_the_mirrored_verdict():
    """Bought at the ask with the stop below, or sold at the bid with the stop above: the same lots."""
    up = decide(quotes=quote(1.1699, 1.1700))
    down = decide(**SELL)
    assert (up.fire, up.lots, up.risk) == (down.fire, down.lots, down.risk)

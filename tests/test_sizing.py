"""Lot sizes in exact arithmetic: the worked table, the traps of floats, and lots that never exceed the budget."""

from __future__ import annotations

import random
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gate_support import T0, decide, known, view
from tapebus_slots.config import Config
from tapebus_slots.sizing import Cap, Quote, budget, conversion, inward, loss_per_lot, margin_per_lot, outward, size
from tapebus_slots.view import Account, Held
from tapebus_trading.money import floor_to_step
from tapebus_trading.symbols import Registry

SYMBOLS = Registry()
#: Symbols whose facts differ in every way that matters to sizing.
NAMES = ["EURUSD", "USDJPY", "XAUUSD", "XAGUSD", "US30", "BTCUSD"]


# -- the worked table: balance 10 000 USD, 5 % --------------------------------------------------

#: Name, balance, direction, ask, spread, stop distance from the price paid, conversion quotes; raw lots, lots, risk.
WORKED = [
    ("EURUSD", 10_000, "1.17000", "0.0015", {}, "3.33333", "3.33", "499.50"),
    ("USDJPY", 10_000, "148.215", "0.15", {"USDJPY": 148.215}, "4.94050", "4.94", "499.95"),
    ("XAUUSD", 10_000, "3374.56", "3.00", {}, "1.66667", "1.66", "498.00"),
    ("XAGUSD", 10_000, "38.125", "0.05", {}, "2.00000", "2.00", "500.00"),
    ("USDCNH", 10_000, "7.12285", "0.0030", {"USDCNH": 7.12285}, "11.87142", "11.87", "499.94"),
    ("US30", 10_000, "44000.0", "50", {}, "10.00000", "10.0", "500.00"),
    ("GBPJPY", 850.45, "199.400", "0.24", {"USDJPY": 147.7}, "0.26169", "0.26", "42.25"),
]


@pytest.mark.parametrize(("name", "balance", "price", "distance", "rates", "raw", "lots", "risk"), WORKED)
def test_the_worked_table_row_by_row(name, balance, price, distance, rates, raw, lots, risk):
    """Through the whole gate: no spread, so that the price paid is the price of the table."""
    entry = Decimal(price)
    stop = float(entry - Decimal(distance))
    quotes = {pair: Quote(rate, rate, T0) for pair, rate in rates.items()}
    quotes[name] = Quote(float(price), float(price), T0)
    found = decide(
        symbol=name,
        entry=float(price),
        sl=stop,
        tp=float(entry + Decimal(distance)),
        quotes=quotes,
        account=Account(balance, balance, T0),
    )
    assert found.fire, found.reasons
    assert found.lots == Decimal(lots)
    assert found.risk.quantize(Decimal("0.01")) == Decimal(risk)
    assert found.risk <= Decimal(str(balance)) * 5 / 100
    limits = found.plan.limits
    assert (limits.own / found.plan.loss).quantize(Decimal("0.00001")) == Decimal(raw)


def test_the_worked_table_refuses_gold_on_a_balance_of_forty():
    found = decide(**gold(3.00), account=Account(40.0, 40.0, T0))
    assert (found.lots, found.risk, found.plan.sizing.reason) == (0, 0, "below_min_lot")
    assert (found.plan.limits.own / found.plan.loss).quantize(Decimal("0.00001")) == Decimal("0.00667")
    assert found.reasons == ("below_min_lot",)


def test_the_worked_table_refuses_the_recorded_stop_of_a_thousandth_by_its_geometry():
    found = decide(**gold(0.001))
    assert not found.fire and "sl_inside_spread" in found.reasons
    raw = Decimal(500) / loss_per_lot(Decimal("0.001"), SYMBOLS["XAUUSD"], Decimal(1))
    assert raw == 5000, "what the formula alone would have sent"
    assert found.lots < raw


def gold(distance):
    return {
        "symbol": "XAUUSD",
        "entry": 3374.56,
        "sl": 3374.56 - distance,
        "tp": 3380.0,
        "quotes": {"XAUUSD": Quote(3374.36, 3374.56, T0)},
    }


# -- what a lot loses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rate", "value"),
    [
        ("EURUSD", "1", "10.00"),
        ("USDJPY", 1 / Fraction("148.215"), "6.747"),
        ("USDCNH", 1 / Fraction("7.12285"), "1.404"),
        ("XAUUSD", "1", "10.00"),
        ("XAGUSD", "1", "50.00"),
    ],
)
def test_the_value_of_a_pip_in_account_currency(name, rate, value):
    symbol = SYMBOLS[name]
    per_unit = Fraction(rate)
    found = loss_per_lot(symbol.pip, symbol, Decimal(per_unit.numerator) / Decimal(per_unit.denominator))
    assert round(found, len(value.partition(".")[2])) == Decimal(value)


def test_gold_is_valued_at_one_dollar_per_hundredth_and_the_yen_at_its_rate():
    """The known errors: 10 USD per 0.01 of gold, and a constant 9.5 USD a pip for yen pairs."""
    assert loss_per_lot(Decimal("0.01"), SYMBOLS["XAUUSD"], Decimal(1)) == 1
    yen = conversion("JPY", "USD", {"USDJPY": Quote(148.2, 148.2, T0)}, T0, 60)
    assert round(loss_per_lot(Decimal("0.01"), SYMBOLS["GBPJPY"], yen), 2) == Decimal("6.75")


def test_the_brokers_own_tick_value_wins_and_needs_no_conversion_quote():
    own = known(own={"GBPJPY": {"tick_value": "0.68"}})
    quotes = {"GBPJPY": Quote(199.390, 199.400, T0)}
    given = {"symbol": "GBPJPY", "entry": 199.4, "sl": 199.16, "tp": 200.0, "quotes": quotes}
    assert decide(**given).plan.sizing.reason == "no_conversion_rate"
    found = decide(known=own, **given)
    assert found.plan.loss == Decimal("163.20")  # 240 ticks
    assert found.lots == Decimal("3.06")


def test_commission_of_the_round_turn_and_slippage_make_a_lot_dearer():
    costly = Config(auto_fire=True, commission_per_lot=7.0, slippage_per_lot=3.0)
    assert decide().plan.loss == 150
    assert decide(costly).plan.loss == 160
    assert decide(costly).lots == Decimal("3.12")


def test_the_allowed_deviation_counts_as_paid_on_either_side():
    sloppy = Config(auto_fire=True, deviation_points=10.0)
    assert decide(sloppy).plan.loss == 160
    down = {"direction": "SELL", "sl": 1.1714, "tp": 1.1680, "entry": 1.1699}
    assert decide(sloppy, **down).plan.loss == 160


def test_lots_are_sized_from_the_price_paid_not_the_price_hoped_for():
    assert decide(quotes={"EURUSD": Quote(1.17090, 1.17100, T0)}).lots == Decimal("2.00")


@pytest.mark.parametrize(
    ("balance", "equity", "lots"), [(10_000, 10_000, "3.33"), (10_000, 5_000, "1.66"), (5_000, 10_000, "1.66")]
)
def test_the_smaller_of_balance_and_equity_is_the_base(balance, equity, lots):
    assert decide(account=Account(balance, equity, T0)).lots == Decimal(lots)


# -- conversion ---------------------------------------------------------------------------------


def test_a_conversion_takes_the_side_that_makes_the_loss_larger():
    quotes = {"USDJPY": Quote(148.0, 149.0, T0), "GBPUSD": Quote(1.30, 1.31, T0)}
    assert abs(conversion("JPY", "USD", quotes, T0, 60) * 148 - 1) < Decimal("1e-30")
    assert conversion("GBP", "USD", quotes, T0, 60) == Decimal("1.31")


@pytest.mark.parametrize(
    "quote", [Quote(1.30, 1.31, T0 - 61), Quote(1.30, 1.31, T0 + 61), Quote(1.31, 1.30, T0), Quote(0.0, 1.3, T0), None]
)
def test_a_stale_crossed_or_absent_conversion_quote_is_none(quote):
    quotes = {} if quote is None else {"GBPUSD": quote}
    assert conversion("GBP", "USD", quotes, T0, 60) is None


def test_a_conversion_goes_over_the_dollar_where_the_pair_itself_is_not_quoted():
    quotes = {"USDJPY": Quote(150.0, 150.1, T0), "USDPLN": Quote(4.0, 4.01, T0)}
    found = conversion("JPY", "PLN", quotes, T0, 60)
    assert abs(found - Decimal("4.01") / 150) < Decimal("1e-20")


def test_a_conversion_finds_the_pairs_of_a_broker_that_adds_a_suffix():
    quotes = {"GBPJPY.r": Quote(199.39, 199.40, T0), "USDJPY.r": Quote(148.0, 148.0, T0)}
    found = decide(symbol="GBPJPY.r", entry=199.4, sl=199.16, tp=200.0, quotes=quotes)
    assert found.fire and found.lots == Decimal("3.08")


# -- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "step"), [("0.29", "0.01"), ("0.57", "0.01"), ("0.58", "0.01"), ("0.3", "0.1")])
def test_the_float_traps_of_the_step_are_exact(text, step):
    assert floor_to_step(Decimal(text), Decimal(step)) == Decimal(text)
    symbol = msgspec.structs.replace(SYMBOLS["EURUSD"], volume_step=Decimal(step), volume_min=Decimal(step))
    assert size(Decimal(text) * 150, Decimal(150), symbol).lots == Decimal(text)
    assert size(Decimal(text) * 150 - Decimal("1e-9"), Decimal(150), symbol).lots == Decimal(text) - Decimal(step)


def test_every_hundredth_up_to_ten_lots_survives_its_own_budget():
    """What `math.floor(lots / 0.01)` gets wrong for 125 of these."""
    for hundredths in range(1, 1001):
        lots = Decimal(hundredths) / 100
        assert size(lots * 100, Decimal(100), SYMBOLS["EURUSD"]).lots == lots


@pytest.mark.parametrize(("direction", "stop", "sent"), [("BUY", 3371.567, "3371.56"), ("SELL", 3377.552, "3377.56")])
def test_a_stop_between_ticks_is_moved_outwards_before_sizing(direction, stop, sent):
    quotes = {"XAUUSD": Quote(3374.56, 3374.56, T0)}
    target = 3380.0 if direction == "BUY" else 3370.0
    found = decide(symbol="XAUUSD", direction=direction, entry=3374.56, sl=stop, tp=target, quotes=quotes)
    assert found.plan.sl == Decimal(sent)
    assert found.plan.loss == 300  # 3.00 away, not 2.99


def test_a_target_between_ticks_is_moved_inwards():
    assert inward(Decimal("3380.017"), Decimal("0.01"), True) == Decimal("3380.01")
    assert inward(Decimal("3370.017"), Decimal("0.01"), False) == Decimal("3370.02")


# -- minimum and caps ---------------------------------------------------------------------------


def test_below_the_minimum_is_refused_never_lifted():
    """The known error: `max(lot, 0.01)`, which risked more than allowed on the smallest accounts."""
    refused = decide(account=Account(29.99, 29.99, T0))
    assert (refused.lots, refused.plan.sizing.reason) == (0, "below_min_lot")
    assert decide(account=Account(30.0, 30.0, T0)).lots == Decimal("0.01")


def test_the_bus_sends_no_order_below_a_hundredth_although_the_broker_would_take_it():
    small = known(own={"EURUSD": {"volume_min": "0.001", "volume_step": "0.001"}})
    assert decide(known=small, account=Account(45.0, 45.0, T0)).lots == Decimal("0.015")
    assert decide(known=small, account=Account(27.0, 27.0, T0)).plan.sizing.reason == "below_min_lot"


def test_the_brokers_maximum_and_the_configured_one_bound_the_lots():
    assert decide(known=known(own={"EURUSD": {"volume_max": 2}})).lots == 2
    assert decide(Config(auto_fire=True, max_lots=1.5)).lots == Decimal("1.50")


def test_the_volume_limit_leaves_what_is_held_in_the_symbol():
    limited = known(own={"EURUSD": {"volume_limit": 5}})
    held = Held("EURUSD", "BUY", Decimal(4), Decimal(1))
    assert decide(known=limited, slots=view([held])).lots == 1
    full = Held("EURUSD", "BUY", Decimal(5), Decimal(1))
    assert decide(known=limited, slots=view([full])).reasons == ("volume_limit_reached",)


def test_the_margin_of_a_lot_is_the_brokers_or_follows_from_the_leverage():
    symbol = SYMBOLS["EURUSD"]
    assert margin_per_lot(Decimal("1.17"), symbol, Decimal(1), Decimal(100)) == 1170
    own = msgspec.structs.replace(symbol, margin=Decimal(900))
    assert margin_per_lot(Decimal("1.17"), own, None, None) == 900
    assert margin_per_lot(Decimal("1.17"), symbol, Decimal(1), None) is None


def test_free_margin_caps_the_lots_and_orders_not_shown_yet_use_it_too():
    levered = Config(auto_fire=True, leverage=100)
    account = Account(10_000.0, 10_000.0, T0, free_margin=2_000.0)
    assert decide(levered, account=account).lots == Decimal("1.70")  # 1170 a lot
    pending = Held("XAUUSD", "BUY", Decimal(1), Decimal(1), margin=Decimal(1_000))
    assert decide(levered, account=account, slots=view([pending])).lots == Decimal("0.85")


def test_caps_name_themselves_only_where_they_are_what_refuses():
    symbol = SYMBOLS["EURUSD"]
    assert size(Decimal(500), Decimal(150), symbol, [Cap(Decimal(0), "margin_exceeded")]).reason == "margin_exceeded"
    assert size(Decimal(1), Decimal(150), symbol, [Cap(Decimal(5), "margin_exceeded")]).reason == "below_min_lot"


def test_a_signal_without_a_usable_price_or_stop_is_not_sized():
    assert decide(quotes={}, entry=None).plan.sizing.reason == "no_price"
    assert decide(sl=None).plan.sizing.reason == "no_price"


# -- properties, against exact fractions --------------------------------------------------------


class Case:
    """Figures of one case read from drawn bytes: one draw for all of them, which is what makes many cases cheap."""

    def __init__(self, drawn):
        self.left = drawn

    def below(self, bound):
        head, self.left = self.left[:5], self.left[5:]
        assert len(head) == 5, "more is drawn than there is"
        return int.from_bytes(head, "big") % bound

    def decimal(self, bound, places):
        return Decimal(self.below(bound)).scaleb(-places)

    def symbol(self):
        step = Decimal(("0.01", "0.1", "0.001", "1")[self.below(4)])
        name = NAMES[self.below(len(NAMES))]
        return msgspec.structs.replace(SYMBOLS[name], volume_step=step, volume_min=step)


#: Thirteen draws of five bytes.
SIZE = 65
cases = st.binary(min_size=SIZE, max_size=SIZE).map(Case)


def judge_lots(case):
    """Size one case and compare it with exact fractions."""
    symbol, base, open_risk = case.symbol(), case.decimal(10**9, 2), case.decimal(10 ** (2 + case.below(8)), 2)
    risk_pct, rate = case.decimal(1001, 1), case.decimal(10 ** (3 + case.below(4)), 4)
    distance = case.decimal(10 ** (1 + case.below(7)), 5)
    loss = loss_per_lot(distance, symbol, rate)
    cap = Cap(case.decimal(10 ** (1 + case.below(6)), 3), "cap")
    found = size(budget(base * risk_pct / 100, [base / 10 - open_risk]), loss, symbol, [cap])

    limit = min(Fraction(base) * Fraction(risk_pct) / 100, Fraction(base) / 10 - Fraction(open_risk))
    exact_loss = Fraction(distance) * Fraction(symbol.contract) * Fraction(rate)
    assert (Fraction(found.lots) / Fraction(symbol.volume_step)).denominator == 1
    assert Fraction(found.lots) * exact_loss <= max(limit, 0)
    assert found.lots <= min(cap.lots, symbol.volume_max)
    # 0.01 is the least order, also where the step is finer
    least = max(symbol.volume_min, Decimal("0.01"))
    assert found.lots == 0 or found.lots >= least
    assert (found.lots == 0) is (found.reason is not None)
    more = Fraction(found.lots + symbol.volume_step if found.lots else least)
    if exact_loss and more <= min(Fraction(symbol.volume_max), Fraction(cap.lots)):
        assert more * exact_loss > limit * (1 - Fraction(1, 10**20)), "one step more would have fitted"
    return found


def judge_budgets(case):
    symbol = case.symbol()
    loss = loss_per_lot(case.decimal(10 ** (1 + case.below(7)), 5), symbol, Decimal(1))
    low, high = sorted((case.decimal(10**9, 2), case.decimal(10**9, 2)))
    assert size(low, loss, symbol).lots <= size(high, loss, symbol).lots


@settings(max_examples=1500)
@given(cases)
def test_lots_are_exact_multiples_and_never_exceed_the_budget_or_a_cap(case):
    judge_lots(case)


@settings(max_examples=500)
@given(cases)
def test_a_larger_budget_never_means_fewer_lots(case):
    judge_budgets(case)


def test_both_hold_in_ten_thousand_cases_of_a_seed():
    chance = random.Random(20250811)
    reasons = Counter()
    for _ in range(10_000):
        reasons[judge_lots(Case(chance.randbytes(SIZE))).reason] += 1
        judge_budgets(Case(chance.randbytes(SIZE)))
    assert reasons[None] > 3_000 and all(reasons[why] > 100 for why in ("below_min_lot", "no_risk_budget", "cap")), (
        reasons
    )


@settings(max_examples=500)
@given(cases, st.booleans())
def test_a_stop_on_the_grid_is_never_nearer_than_the_signals(case, buy):
    sl = 1 + case.decimal(5 * 10**11, 8)
    rounded = outward(sl, Decimal("0.01"), buy)
    assert rounded % Decimal("0.01") == 0
    assert 0 <= (sl - rounded if buy else rounded - sl) < Decimal("0.01")

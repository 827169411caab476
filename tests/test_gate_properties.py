"""What holds for every verdict of the gate, whatever it is given."""

from __future__ import annotations

import math
import random
from collections import Counter
from decimal import Decimal
from itertools import compress, product

from hypothesis import given, settings
from hypothesis import strategies as st

from gate_support import RICH, RULES, T0, configured, decide, known, quote, signal, view
from tapebus_slots.config import Config
from tapebus_slots.gate import evaluate
from tapebus_slots.sizing import Quote
from tapebus_slots.view import Account, Held
from tapebus_trading.calibration import Curve

ODD = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-308, 1e308, 1e12, 5e-324]


class Chaos:
    """A case of nonsense and sense mixed, read from drawn bytes: the first says how much of it is not the first choice,
    with which alone a signal is fired."""

    def __init__(self, drawn):
        self.bytes = iter(drawn)
        self.wild = (4, 32, 256)[next(self.bytes) % 3]

    def pick(self, choices):
        drawn = next(self.bytes)
        return choices[drawn % len(choices)] if drawn < self.wild else choices[0]

    def figure(self, *usual):
        return self.pick([*usual, *usual, *ODD])

    def case(self):
        symbol = self.pick(["EURUSD", "USDJPY", "XAUUSD", "ACME", ""])
        sig = signal(
            symbol=symbol,
            direction=self.pick(["BUY", "SELL", "BUY", "HOLD"]),
            confidence=self.figure(85.0, 80.0, 89.0, 79.0),
            sl=self.figure(1.1685, 1.1714, 148.0, 3371.5, None),
            tp=self.figure(1.1720, 1.1680, 149.0, 3380.0, None),
            entry=self.figure(1.1700, 148.2, 3374.5, None),
            expires_at=self.figure(None, None, T0 + 60),
        )
        prices = {"EURUSD": (1.1699, 1.17), "USDJPY": (148.2, 148.21), "XAUUSD": (3374.4, 3374.5)}
        quotes = {
            name: Quote(self.figure(bid, bid, ask), self.figure(ask, ask, bid), self.figure(T0, T0, T0 - 4, T0 - 99))
            for name, (bid, ask) in prices.items()
            if self.pick([True, True, False])
        }
        account = self.pick([RICH, None, RICH, "odd"])
        if account == "odd":
            account = Account(*(self.figure(10_000.0, 50.0, None) for _ in range(4)))
        held = [
            Held(
                self.pick(["EURUSD", "USDJPY", "", "ACME"]),
                self.pick(["BUY", "SELL", ""]),
                self.pick([None, Decimal(1), Decimal("0.01")]),
                self.pick([None, Decimal(0), Decimal(400), Decimal(10) ** 12]),
                self.pick([Decimal(0), Decimal(100)]),
            )
            for _ in range(self.pick([0, 0, 1, 3]))
        ]
        slots = view(held, used=self.pick([len(held), 9, 10, 16]), fired=self.pick([(), (), ("S1",)]))
        config = configured(
            auto_fire=self.pick([True, True, False]),
            leverage=self.pick([None, 100]),
            confidence=self.pick(["raw", "calibrated"]),
            commission_per_lot=self.pick([0, 7]),
            deviation_points=self.pick([0, 10]),
            require_on_tick=self.pick([False, True]),
            market_hours=self.pick([False, True]),
        )
        facts = known(
            own=self.pick([{}, {"EURUSD": {"tick_value": 1}}, {"EURUSD": {"stops_level": "0.01", "margin": 500}}]),
            kill_switch=self.pick([False, False, True]),
            disabled=self.pick([(), ("VCB_BREAKOUT",)]),
            calibration=self.pick([None, Curve([(0.0, 80.0), (100.0, 89.0)])]),
        )
        return sig, account, slots, quotes, config, facts


def same(one, other):
    """Equal, also where both are not a number."""
    return repr(one) == repr(other)


def judge(chaos):
    """The verdict on a case, after all that holds for every verdict."""
    sig, account, slots, quotes, config, facts = given_case = chaos.case()
    before = repr((sig, account, slots, quotes, config))
    verdict = evaluate(*given_case)
    assert [each.name for each in verdict.rules] == RULES
    assert verdict.fire is all(each.passed for each in verdict.rules) is (verdict.reasons == ())
    assert set(verdict.reasons) == {each.reason for each in verdict.rules if not each.passed}
    assert before == repr((sig, account, slots, quotes, config)), "nothing given was changed"
    assert same(verdict, evaluate(*given_case)), "the same again"
    if not verdict.fire:
        return verdict
    quoted = quotes[sig.symbol]
    paid = quoted.ask if sig.buy else quoted.bid
    low, high = (sig.sl, sig.tp) if sig.buy else (sig.tp, sig.sl)
    assert low < paid < high and quoted.bid <= quoted.ask and abs(quoted.at - T0) <= 5
    assert config.auto_fire and not facts.kill_switch and sig.pattern not in facts.disabled
    assert slots.used < slots.maximum and sig.signal_id not in slots.fired
    assert 0 < verdict.risk <= Decimal(str(min(account.balance, account.equity or account.balance))) * 5 / 100
    assert verdict.lots % Decimal("0.01") == 0 and Decimal("0.01") <= verdict.lots <= 100
    return verdict


@settings(max_examples=1500)
@given(st.binary(min_size=80, max_size=80).map(Chaos))
def test_the_gate_never_raises_shows_every_rule_fires_iff_no_rule_objects_and_is_pure(chaos):
    judge(chaos)


def test_the_same_holds_in_ten_thousand_cases_of_a_seed_that_fire_or_name_every_rule():
    chance = random.Random(20250811)
    verdicts = [judge(Chaos(chance.randbytes(80))) for _ in range(10_000)]
    assert sum(verdict.fire for verdict in verdicts) > 1_000
    alone = Counter(verdict.reasons[0] for verdict in verdicts if len(verdict.reasons) == 1)
    assert len(alone) > 10, alone
    broken = {rule.name for verdict in verdicts for rule in verdict.rules if not rule.passed}
    assert broken == set(RULES) - {"tier", "lateness", "market", "specification"}, "all that the cases vary"


WRONG = [
    ("config", Config(), "auto_fire_off"),
    ("known", known(kill_switch=True), "kill_switch_on"),
    ("confidence", 89.1, "confidence_outside_band"),
    ("quotes", quote(1.1699, 1.17, T0 - 9), "quote_stale"),
    ("account", Account(10_000.0, 10_000.0, T0 - 99), "heartbeat_stale"),
    ("slots", view(used=12), "over_limit"),
]


def test_one_wrong_thing_never_hides_another():
    for chosen in product([False, True], repeat=len(WRONG)):
        wrong = list(compress(WRONG, chosen))
        assert decide(**{key: value for key, value, _ in wrong}).reasons == tuple(reason for *_, reason in wrong)

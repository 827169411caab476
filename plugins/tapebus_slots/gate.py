"""The auto-fire gate: one pure function from a signal and what is known to a fully explained verdict.

Every rule is evaluated every time, also after one failed and also while auto-fire is off, so that
a verdict always answers "what else would have stopped it?".
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any

from msgspec import Struct

from tapebus_slots.config import Config
from tapebus_slots.sizing import Quote, Sizing, budget, conversion, exact, loss_per_lot, outward, size
from tapebus_slots.symbols import Symbol, lookup


class Signal(Struct, frozen=True):
    """What the gate needs of a signal; ``at`` is its event time, ``entry`` None for a market order."""

    signal_id: str
    symbol: str
    direction: str
    confidence: float
    sl: float | None
    tp: float | None
    entry: float | None
    pattern: str | None
    at: float

    @property
    def buy(self) -> bool:
        return self.direction == "BUY"


class Account(Struct, frozen=True):
    """The account's last known figures; ``heartbeat_at`` is None as long as no heartbeat was ever seen."""

    balance: float | None = None
    equity: float | None = None
    heartbeat_at: float | None = None


class SlotView(Struct, frozen=True):
    """The occupancy the gate decides on, and what is held.

    ``used`` is the larger of the local count (RESERVED and UNKNOWN included) and the broker's;
    ``held`` maps a symbol to the directions held; ``open_risk`` is account currency at risk.
    """

    used: int
    maximum: int
    held: Mapping[str, Collection[str]] = {}
    open_risk: Decimal = Decimal(0)
    unknown_risks: int = 0
    fired: Collection[str] = ()
    kill_switch: bool = False


class Rule(Struct, frozen=True):
    """One rule as evaluated; ``reason`` is the code reported when it did not pass."""

    name: str
    limit: Any
    actual: Any
    passed: bool
    reason: str


class Verdict(Struct, frozen=True):
    """The decision with every rule; ``lots`` and ``risk`` are what sizing allows even when it does not fire."""

    fire: bool
    reasons: tuple[str, ...]
    rules: tuple[Rule, ...]
    lots: Decimal
    risk: Decimal


def evaluate(
    signal: Signal, account: Account | None, slots: SlotView, quotes: Mapping[str, Quote], config: Config
) -> Verdict:
    """Decide on `signal`; pure, and never raises for any figures a broker may send."""
    symbol = lookup(signal.symbol, config.symbols)
    quote = quotes.get(signal.symbol)
    sizing = _size(signal, account, slots, quotes, symbol, config)
    rules = (
        Rule("auto_fire", True, config.auto_fire, config.auto_fire, "auto_fire_off"),
        Rule("kill_switch", False, slots.kill_switch, not slots.kill_switch, "kill_switch_on"),
        _already_fired(signal, slots),
        _confidence(signal, config),
        _geometry(signal, quote),
        *_distances(signal, quote, symbol, config),
        _quote_age(signal, quote, config),
        _occupancy(slots),
        _opposite(signal, slots, config),
        _heartbeat(signal, account, config),
        _account(account),
        Rule(
            "sizing",
            None if symbol is None else float(symbol.volume_min),
            float(sizing.lots),
            sizing.reason is None,
            sizing.reason or "ok",
        ),
    )
    reasons = tuple(rule.reason for rule in rules if not rule.passed)
    return Verdict(not reasons, reasons, rules, sizing.lots, sizing.risk)


def entry_price(signal: Signal, quote: Quote | None) -> float | None:
    """The worst price a market order would open at now: the ask for BUY, the bid for SELL."""
    if quote is not None and _usable(quote):
        return quote.ask if signal.buy else quote.bid
    return signal.entry


def _usable(quote: Quote) -> bool:
    return 0 < quote.bid <= quote.ask < math.inf


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _already_fired(signal: Signal, slots: SlotView) -> Rule:
    seen = signal.signal_id in slots.fired
    return Rule("not_fired_before", False, seen, not seen, "already_fired")


def _confidence(signal: Signal, config: Config) -> Rule:
    low, high = config.band(signal.pattern)
    return Rule(
        "confidence", [low, high], signal.confidence, low <= signal.confidence <= high, "confidence_outside_band"
    )


def _geometry(signal: Signal, quote: Quote | None) -> Rule:
    limit = "sl < entry < tp" if signal.buy else "tp < entry < sl"
    entry = signal.entry if signal.entry else entry_price(signal, quote)
    actual = {"entry": entry, "sl": signal.sl, "tp": signal.tp}
    passed = False
    if _finite(entry) and _finite(signal.sl) and _finite(signal.tp) and signal.direction in ("BUY", "SELL"):
        low, high = (signal.sl, signal.tp) if signal.buy else (signal.tp, signal.sl)
        passed = 0 < low < entry < high  # type: ignore[operator]
    return Rule("geometry", limit, actual, passed, "sl_tp_wrong_side")


def _distances(signal: Signal, quote: Quote | None, symbol: Symbol | None, config: Config) -> tuple[Rule, Rule]:
    """Both levels against the larger of the stops level and a multiple of the spread."""
    usable = quote is not None and _usable(quote)
    spread = exact(quote.ask) - exact(quote.bid) if usable and quote is not None else None
    if spread is None and symbol is not None:
        spread = symbol.typical_spread
    least = None
    if spread is not None:
        least = spread * exact(config.min_spread_multiple)
        if symbol is not None:
            least = max(least, symbol.stops_level)
    out = []
    for name, level, sign in (("sl", signal.sl, -1), ("tp", signal.tp, 1)):
        distance = _distance(signal, quote, level, sign)
        passed = least is not None and distance is not None and distance > 0 and distance >= least
        out.append(
            Rule(
                f"{name}_distance",
                None if least is None else float(least),
                None if distance is None else float(distance),
                passed,
                f"{name}_inside_spread" if least is not None else "symbol_unknown",
            )
        )
    return out[0], out[1]


def _distance(signal: Signal, quote: Quote | None, level: float | None, sign: int) -> Decimal | None:
    """How far `level` lies on its own side, from the signal's entry or today's price, whichever is nearer."""
    if not _finite(level):
        return None
    side = sign if signal.buy else -sign
    prices = [p for p in (signal.entry, entry_price(signal, quote)) if p and math.isfinite(p)]
    if not prices:
        return None
    return min((exact(level) - exact(price)) * side for price in prices)  # type: ignore[arg-type]


def _quote_age(signal: Signal, quote: Quote | None, config: Config) -> Rule:
    if quote is None:
        return Rule("quote_age", config.max_quote_age_s, None, False, "quote_missing")
    if not _usable(quote):
        return Rule("quote_age", "0 < bid <= ask", [quote.bid, quote.ask], False, "quote_crossed")
    age = abs(signal.at - quote.at)
    return Rule("quote_age", config.max_quote_age_s, age, age <= config.max_quote_age_s, "quote_stale")


def _occupancy(slots: SlotView) -> Rule:
    reason = "over_limit" if slots.used > slots.maximum else "no_free_slot"
    return Rule("slots", slots.maximum, slots.used, slots.used < slots.maximum, reason)


def _opposite(signal: Signal, slots: SlotView, config: Config) -> Rule:
    other = "SELL" if signal.buy else "BUY"
    held = sorted(slots.held.get(signal.symbol, ()))
    passed = config.allow_opposite or other not in held
    return Rule("opposite_position", f"no {other}", held, passed, "opposite_position")


def _heartbeat(signal: Signal, account: Account | None, config: Config) -> Rule:
    """An EA that never sent heartbeats is not judged by their age; one that did and stopped is."""
    seen = None if account is None else account.heartbeat_at
    if seen is None:
        return Rule("heartbeat_age", config.heartbeat_max_age_s, None, True, "heartbeat_stale")
    age = abs(signal.at - seen)
    return Rule("heartbeat_age", config.heartbeat_max_age_s, age, age <= config.heartbeat_max_age_s, "heartbeat_stale")


def _account(account: Account | None) -> Rule:
    known = account is not None and _finite(account.balance)
    return Rule("account", "balance known", account.balance if account and known else None, known, "account_unknown")


def _size(
    signal: Signal,
    account: Account | None,
    slots: SlotView,
    quotes: Mapping[str, Quote],
    symbol: Symbol | None,
    config: Config,
) -> Sizing:
    nothing = Decimal(0)

    def refuse(reason: str) -> Sizing:
        return Sizing(nothing, nothing, nothing, nothing, reason)

    if symbol is None:
        return refuse("symbol_unknown")
    if account is None or not _finite(account.balance):
        return refuse("account_unknown")
    quote = quotes.get(signal.symbol)
    entry = entry_price(signal, quote)
    if not _finite(entry) or not _finite(signal.sl):
        return refuse("no_price")
    rate = conversion(symbol.quote, config.account_currency, quotes, signal.at, config.max_conversion_age_s)
    if rate is None:
        return refuse("no_conversion_rate")
    sl = outward(exact(signal.sl), symbol.tick, signal.buy)  # type: ignore[arg-type]
    worst = exact(entry) + exact(config.max_deviation) * (1 if signal.buy else -1)  # type: ignore[arg-type]
    distance = worst - sl if signal.buy else sl - worst
    if distance <= 0:
        return refuse("sl_inside_spread")
    loss = loss_per_lot(distance, symbol, rate, exact(config.commission_per_lot), exact(config.slippage_per_lot))
    balance = exact(account.balance)  # type: ignore[arg-type]
    equity = exact(account.equity) if _finite(account.equity) else balance  # type: ignore[arg-type]
    risk_pct = exact(config.risk_pct)
    # A position whose stop nobody knows is counted as one full trade's risk.
    unknown = max(nothing, min(balance, equity)) * risk_pct / 100 * slots.unknown_risks
    money = budget(
        balance=balance,
        equity=equity,
        risk_pct=risk_pct,
        open_risk=slots.open_risk + unknown,
        max_total_open_risk_pct=exact(config.max_total_open_risk_pct),
    )
    return size(money, loss, symbol, None if config.max_lots is None else exact(config.max_lots))

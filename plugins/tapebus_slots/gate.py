"""The auto-fire gate: one pure function from a signal and what is known to a fully explained verdict.

Every rule is evaluated every time, also after one failed and also while auto-fire is off, so that
a verdict always answers "what else would have stopped it?". A rule that cannot be judged because something
is missing fails with the reason that names what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from msgspec import Struct

from tapebus_slots.config import Config
from tapebus_slots.plan import Plan, plan
from tapebus_slots.sizing import Quote
from tapebus_slots.view import Account, Known, Signal, SlotView, entry_price, finite
from tapebus_trading.money import UP, exact
from tapebus_trading.symbols import Symbol

#: A signal older than this by the clock of the bus is replayed: no spool and no outage keeps one back for so long.
RECORDING_S = 30 * 86_400.0
#: How brokers spell who may open what; a word not listed here permits both.
_TRADE_MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "disabled": ("trade_disabled", ()),
    "0": ("trade_disabled", ()),
    "longonly": ("long_only", ("BUY",)),
    "1": ("long_only", ("BUY",)),
    "shortonly": ("short_only", ("SELL",)),
    "2": ("short_only", ("SELL",)),
    "closeonly": ("close_only", ()),
    "3": ("close_only", ()),
}


class Rule(Struct, frozen=True):
    """One rule as evaluated; ``reason`` is the code reported when it did not pass."""

    name: str
    limit: Any
    actual: Any
    passed: bool
    reason: str


class Verdict(Struct, frozen=True):
    """The decision with every rule; what `plan` sized is there also where the signal is not fired."""

    fire: bool
    reasons: tuple[str, ...]
    rules: tuple[Rule, ...]
    plan: Plan
    confidence: float
    calibrated: float | None

    @property
    def lots(self) -> Decimal:
        return self.plan.sizing.lots

    @property
    def risk(self) -> Decimal:
        """What `lots` lose when the stop is hit, in account currency."""
        return self.plan.sizing.risk


def evaluate(
    signal: Signal,
    account: Account | None,
    slots: SlotView,
    quotes: Mapping[str, Quote],
    config: Config,
    known: Known,
) -> Verdict:
    """Decide on `signal`; pure, and never raises for any figures a broker may send."""
    quote = quotes.get(signal.symbol)
    found = plan(signal, account, slots, quotes, config, known)
    calibrated = known.calibrated(signal.confidence)
    rules = (
        Rule("auto_fire", True, config.auto_fire, config.auto_fire, "auto_fire_off"),
        Rule("kill_switch", False, known.kill_switch, not known.kill_switch, "kill_switch_on"),
        _tier(config),
        _already_fired(signal, slots),
        _expiry(signal, quote),
        _lateness(known, config),
        _pattern(signal, known),
        _confidence(signal, calibrated, config),
        _market(signal, config, known),
        _trade_mode(signal, found.symbol),
        _specification(signal, config, known),
        _geometry(signal, quote),
        _on_tick(signal, found, config),
        _distance(signal, quote, found, config, "sl"),
        _distance(signal, quote, found, config, "tp"),
        _quote_age(signal, quote, config),
        _account(account),
        _heartbeat(signal, account, config),
        _occupancy(slots),
        _opposite(signal, slots, config),
        _total_risk(found),
        _currency_risk(found),
        _margin(found),
        _sizing(found),
    )
    reasons = tuple(dict.fromkeys(rule.reason for rule in rules if not rule.passed))
    return Verdict(not reasons, reasons, rules, found, signal.confidence, calibrated)


# -- what people and statistics allow -----------------------------------------------------------


def _tier(config: Config) -> Rule:
    passed = not config.tiers or not config.tier or config.tier in config.tiers
    return Rule("tier", sorted(config.tiers), config.tier, passed, "tier_unknown")


def _already_fired(signal: Signal, slots: SlotView) -> Rule:
    seen = signal.signal_id in slots.fired
    return Rule("not_fired_before", False, seen, not seen, "already_fired")


def _expiry(signal: Signal, quote: Quote | None) -> Rule:
    now = signal.at if quote is None else max(signal.at, quote.at)
    passed = signal.expires_at is None or now < signal.expires_at
    return Rule("expiry", signal.expires_at, now, passed, "signal_expired")


def _lateness(known: Known, config: Config) -> Rule:
    """What waited in a producer's spool or on the tape came with quotes as old as itself; the market has moved on.

    A recording, told by its age, is judged by its own time alone.
    """
    late = known.lateness
    passed = late is None or late <= config.max_lateness_s or late > RECORDING_S
    return Rule("lateness", config.max_lateness_s, late, passed, "signal_late")


def _pattern(signal: Signal, known: Known) -> Rule:
    disabled = signal.pattern in known.disabled
    return Rule("pattern", "not disabled", signal.pattern, not disabled, "pattern_disabled")


def _confidence(signal: Signal, calibrated: float | None, config: Config) -> Rule:
    """The closed band against the stated confidence, or against the win rate it was found to stand for."""
    band = config.band(signal.pattern)
    judged = signal.confidence if config.confidence == "raw" else calibrated
    if judged is None:
        return Rule("confidence", list(band), None, False, "not_calibrated")
    return Rule("confidence", list(band), judged, band[0] <= judged <= band[1], "confidence_outside_band")


# -- the order's geometry -----------------------------------------------------------------------


def _market(signal: Signal, config: Config, known: Known) -> Rule:
    """The calendar, judged only with ``market_hours``: a fresh quote is the better sign of an open market."""
    if not config.market_hours:
        return Rule("market", None, None, True, "market_closed")
    market = known.hours.market_of(signal.symbol)
    return Rule("market", "open", market, known.hours.is_open(market, signal.at), "market_closed")


def _trade_mode(signal: Signal, symbol: Symbol | None) -> Rule:
    if symbol is None:
        return Rule("trade_mode", signal.direction, None, False, "symbol_unknown")
    word = symbol.trade_mode.lower().removeprefix("symbol_trade_mode_").replace("_", "")
    reason, allowed = _TRADE_MODES.get(word, ("trade_disabled", (signal.direction,)))
    return Rule("trade_mode", signal.direction, symbol.trade_mode or None, signal.direction in allowed, reason)


def _specification(signal: Signal, config: Config, known: Known) -> Rule:
    """The broker's own word, judged only with ``require_specification``; other facts are a fallback."""
    if not config.require_specification:
        return Rule("specification", None, None, True, "specification_missing")
    missing = known.symbols.unsent(signal.symbol, known.broker)
    return Rule("specification", "sent by the broker", missing, not missing, "specification_missing")


def _geometry(signal: Signal, quote: Quote | None) -> Rule:
    limit = "sl < entry < tp" if signal.buy else "tp < entry < sl"
    entry = signal.entry if signal.entry else entry_price(signal, quote)
    actual = {"entry": entry, "sl": signal.sl, "tp": signal.tp}
    passed = False
    if finite(entry) and finite(signal.sl) and finite(signal.tp) and signal.direction in ("BUY", "SELL"):
        low, high = (signal.sl, signal.tp) if signal.buy else (signal.tp, signal.sl)
        passed = 0 < low < entry < high  # type: ignore[operator]
    return Rule("geometry", limit, actual, passed, "sl_tp_wrong_side")


def _on_tick(signal: Signal, found: Plan, config: Config) -> Rule:
    """Whether the levels are prices the broker knows; those that are not are rounded, or refused where so configured.

    What a price lacks to the symbol's digits is noise of floating point and never refused.
    """
    symbol = found.symbol
    if symbol is None:
        return Rule("price_on_tick", None, None, False, "symbol_unknown")
    off = {}
    for name, level in (("entry", signal.entry), ("sl", signal.sl), ("tp", signal.tp)):
        if level and finite(level) and not _near_tick(level, symbol):
            off[name] = level
    return Rule(
        "price_on_tick", float(symbol.tick), off or None, not (off and config.require_on_tick), "price_off_tick"
    )


def _near_tick(level: float, symbol: Symbol) -> bool:
    steps = UP.divide(exact(level), symbol.tick)
    return abs(steps - steps.to_integral_value()) * symbol.tick <= symbol.point * Decimal("1e-6")


def _distance(signal: Signal, quote: Quote | None, found: Plan, config: Config, name: str) -> Rule:
    """One level against the larger of the stops level and a multiple of the spread.

    Measured from the signal's entry or today's price, whichever is nearer; the stops level alone also from the price
    that closes the position, as brokers measure it. The target is the one that would be sent: rounding moved it nearer.
    """
    symbol, rule, reason = found.symbol, f"{name}_distance", f"{name}_inside_spread"
    if symbol is None:
        return Rule(rule, None, None, False, "symbol_unknown")
    level = signal.sl if name == "sl" else found.tp
    side = (-1 if name == "sl" else 1) * (1 if signal.buy else -1)
    prices = [price for price in (signal.entry, entry_price(signal, quote)) if price and finite(price)]
    usable = quote is not None and quote.usable
    spread = exact(quote.ask) - exact(quote.bid) if usable and quote is not None else symbol.typical_spread
    least = max(symbol.stops_level, spread * exact(config.min_spread_multiple))
    if not level or not finite(level) or not prices:
        return Rule(rule, float(least), None, False, "sl_tp_wrong_side" if prices else "no_price")
    distance = min((exact(level) - exact(price)) * side for price in prices)
    passed = distance > 0 and distance >= least
    if passed and usable and quote is not None:
        closing = (exact(level) - exact(quote.bid if signal.buy else quote.ask)) * side
        if closing < symbol.stops_level:
            return Rule(rule, float(symbol.stops_level), float(closing), False, reason)
    return Rule(rule, float(least), float(distance), passed, reason)


def _quote_age(signal: Signal, quote: Quote | None, config: Config) -> Rule:
    if quote is None:
        return Rule("quote_age", config.max_quote_age_s, None, False, "quote_missing")
    if not quote.usable:
        return Rule("quote_age", "0 < bid <= ask", [quote.bid, quote.ask], False, "quote_crossed")
    age = abs(signal.at - quote.at)
    return Rule("quote_age", config.max_quote_age_s, age, age <= config.max_quote_age_s, "quote_stale")


# -- the account and what it holds --------------------------------------------------------------


def _account(account: Account | None) -> Rule:
    known = account is not None and finite(account.balance)
    return Rule("account", "balance known", account.balance if account and known else None, known, "account_unknown")


def _heartbeat(signal: Signal, account: Account | None, config: Config) -> Rule:
    """An EA that never sent heartbeats is not judged by their age; one that did and stopped is."""
    seen = None if account is None else account.heartbeat_at
    if seen is None:
        return Rule("heartbeat_age", config.heartbeat_max_age_s, None, True, "heartbeat_stale")
    age = abs(signal.at - seen)
    return Rule("heartbeat_age", config.heartbeat_max_age_s, age, age <= config.heartbeat_max_age_s, "heartbeat_stale")


def _occupancy(slots: SlotView) -> Rule:
    reason = "over_limit" if slots.used > slots.maximum else "no_free_slot"
    return Rule("slots", slots.maximum, slots.used, slots.used < slots.maximum, reason)


def _opposite(signal: Signal, slots: SlotView, config: Config) -> Rule:
    other = "SELL" if signal.buy else "BUY"
    held = sorted({each.direction for each in slots.held if each.symbol == signal.symbol})
    passed = config.allow_opposite or other not in held
    return Rule("opposite_position", f"no {other}", held, passed, "opposite_position")


def _total_risk(found: Plan) -> Rule:
    if found.limits is None:
        return Rule("total_open_risk", None, None, False, _missing(found))
    limit, after = found.limits.total, UP.add(found.limits.open_risk, found.share)
    return Rule("total_open_risk", float(limit), float(after), after <= limit, "total_risk_exceeded")


def _currency_risk(found: Plan) -> Rule:
    """The risk of all positions that share a currency with the signal's symbol; see `Limits`."""
    if found.limits is None:
        return Rule("currency_risk", None, None, False, _missing(found))
    limit = found.limits.per_currency
    after = {currency: UP.add(risk, found.share) for currency, risk in found.limits.currencies.items()}
    actual = {currency: float(risk) for currency, risk in after.items()}
    return Rule("currency_risk", float(limit), actual, max(after.values()) <= limit, "currency_risk_exceeded")


def _margin(found: Plan) -> Rule:
    """Judged only where the margin of a lot is known: from the broker, or from a configured leverage."""
    if found.margin is None:
        return Rule("margin", None, None, True, "margin_exceeded")
    needed = float(UP.multiply(found.margin, found.lots))
    if found.free_margin is None:
        return Rule("margin", None, needed, False, "margin_unknown")
    limit = float(found.free_margin)
    return Rule("margin", limit, needed, needed <= limit, "margin_exceeded")


def _sizing(found: Plan) -> Rule:
    reason = found.sizing.reason
    least = float(found.least) if found.symbol is not None else None
    return Rule("sizing", least, float(found.sizing.lots), reason is None, reason or "ok")


def _missing(found: Plan) -> str:
    return found.sizing.reason or "account_unknown"

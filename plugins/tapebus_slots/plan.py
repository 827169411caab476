"""What a trade on a signal would risk and how large it may be, worked out before any rule is asked."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from msgspec import Struct, structs

from tapebus_slots.config import Config
from tapebus_slots.sizing import (
    ZERO,
    Cap,
    Quote,
    Sizing,
    budget,
    conversion,
    inward,
    least_lots,
    loss_per_lot,
    margin_per_lot,
    outward,
    percent_of,
    size,
)
from tapebus_slots.view import Account, Known, Signal, SlotView, entry_price, finite, suffix
from tapebus_trading.money import DOWN, UP, exact
from tapebus_trading.symbols import Symbol


class Limits(Struct, frozen=True):
    """The money limits of an account and how much of each the slots held use, in account currency.

    ``currencies`` maps each currency of the signal's symbol to the risk of what is held in it. A position counts with
    its whole risk towards both of its currencies, the base and the quote, whatever its direction: positions that share
    a currency may lose together, and opposite ones are not taken to protect each other.
    """

    own: Decimal
    total: Decimal
    open_risk: Decimal
    per_currency: Decimal
    currencies: Mapping[str, Decimal]

    @property
    def rooms(self) -> list[Decimal]:
        """What the limits besides the trade's own leave."""
        left = [DOWN.subtract(self.per_currency, used) for used in self.currencies.values()]
        return [DOWN.subtract(self.total, self.open_risk), *left]


class Plan(Struct, frozen=True):
    """The trade as it would be sent; ``sizing.reason`` says why there is none. What nobody could work out is None.

    ``sl`` and ``tp`` lie on the symbol's ticks. ``loss`` and ``margin`` are account currency per 1.00 lot, ``least``
    the smallest order; ``free_margin`` is what is left after the orders that the account does not show yet.
    """

    sizing: Sizing
    symbol: Symbol | None = None
    limits: Limits | None = None
    sl: Decimal | None = None
    tp: Decimal | None = None
    least: Decimal = ZERO
    loss: Decimal | None = None
    margin: Decimal | None = None
    free_margin: Decimal | None = None

    @property
    def lots(self) -> Decimal:
        """As sized, or the smallest order where that was refused: what the limits are shown against."""
        return self.sizing.lots or self.least

    @property
    def share(self) -> Decimal:
        """What the trade adds to the risk held; a refused one is taken as no larger than its own limit."""
        if self.sizing.lots or self.limits is None or self.loss is None:
            return self.sizing.risk
        return min(self.limits.own, UP.multiply(self.loss, self.least))


def plan(
    signal: Signal,
    account: Account | None,
    slots: SlotView,
    quotes: Mapping[str, Quote],
    config: Config,
    known: Known,
) -> Plan:
    """Size the trade; pure. The first thing that is missing is named as the reason."""
    symbol = known.symbols.get(signal.symbol, known.broker)
    if symbol is None:
        return Plan(Sizing(reason="symbol_unknown"))
    sl = outward(exact(signal.sl), symbol.tick, signal.buy) if signal.sl and finite(signal.sl) else None
    tp = inward(exact(signal.tp), symbol.tick, signal.buy) if signal.tp and finite(signal.tp) else None
    limits = _limits(account, slots, config, known, symbol)
    found = Plan(Sizing(), symbol, limits, sl, tp, least_lots(symbol))
    if limits is None:
        return _refused(found, "account_unknown")
    entry = entry_price(signal, quotes.get(signal.symbol))
    if entry is None or not finite(entry) or entry <= 0 or sl is None:
        return _refused(found, "no_price")
    side = 1 if signal.buy else -1
    worst = exact(entry) + exact(config.deviation_points) * symbol.point * side
    distance = (worst - sl) * side
    if distance <= 0:
        return _refused(found, "sl_inside_spread")
    rate = conversion(
        symbol.quote,
        config.account_currency,
        quotes,
        signal.at,
        config.max_conversion_age_s,
        suffix(signal.symbol, symbol),
    )
    loss = loss_per_lot(distance, symbol, rate, exact(config.commission_per_lot), exact(config.slippage_per_lot))
    if loss is None:
        return _refused(found, "no_conversion_rate")
    margin = margin_per_lot(worst, symbol, rate, None if config.leverage is None else exact(config.leverage))
    found = structs.replace(found, loss=loss, margin=margin, free_margin=_free_margin(account, slots))
    caps = _caps(signal, slots, config, found)
    return structs.replace(found, sizing=size(budget(limits.own, limits.rooms), loss, symbol, caps))


def _refused(found: Plan, reason: str) -> Plan:
    return structs.replace(found, sizing=Sizing(reason=reason))


def _limits(account: Account | None, slots: SlotView, config: Config, known: Known, symbol: Symbol) -> Limits | None:
    if account is None or not finite(account.balance):
        return None
    balance = exact(account.balance)  # type: ignore[arg-type]
    equity = exact(account.equity) if finite(account.equity) else balance  # type: ignore[arg-type]
    base = max(ZERO, min(balance, equity))
    own = percent_of(base, exact(config.risk_pct))
    # what the broker counts and nobody described is taken for one full trade each, in any currency
    open_risk = UP.multiply(own, Decimal(max(0, slots.used - len(slots.held))))
    currencies = {symbol.base: open_risk, symbol.quote: open_risk}
    for held in slots.held:
        risk = own if held.risk is None else held.risk
        open_risk = UP.add(open_risk, risk)
        theirs = known.symbols.get(held.symbol, known.broker)
        for currency in currencies:
            # a position whose symbol nobody described may be in any currency
            if theirs is None or currency in (theirs.base, theirs.quote):
                currencies[currency] = UP.add(currencies[currency], risk)
    return Limits(
        own,
        percent_of(base, exact(config.max_total_open_risk_pct)),
        open_risk,
        percent_of(base, exact(config.max_per_currency_risk_pct)),
        currencies,
    )


def _free_margin(account: Account | None, slots: SlotView) -> Decimal | None:
    if account is None or not finite(account.free_margin):
        return None
    pending = sum((held.margin for held in slots.held), ZERO)
    return max(ZERO, exact(account.free_margin) - pending)  # type: ignore[arg-type]


def _caps(signal: Signal, slots: SlotView, config: Config, found: Plan) -> list[Cap]:
    """Bounds on the lots besides the budget and the broker's maximum."""
    caps = []
    symbol = found.symbol
    if config.max_lots is not None:
        caps.append(Cap(exact(config.max_lots), "below_min_lot"))
    if found.margin is not None:
        room = ZERO if found.free_margin is None else DOWN.divide(found.free_margin, found.margin)
        caps.append(Cap(room, "margin_unknown" if found.free_margin is None else "margin_exceeded"))
    if symbol is not None and symbol.volume_limit is not None:
        held = sum((each.lots or ZERO for each in slots.held if each.symbol == signal.symbol), ZERO)
        caps.append(Cap(max(ZERO, symbol.volume_limit - held), "volume_limit_reached"))
    return caps

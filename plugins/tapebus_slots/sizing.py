"""Risk-based lot size in exact arithmetic: rounded down to the step, never above the budget.

A lot size below the broker's minimum is refused, never lifted: lifting it would exceed the limit
on exactly the accounts that can bear it least.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

from msgspec import Struct

from tapebus_slots.symbols import Symbol

_UP = Context(prec=34, rounding=ROUND_CEILING)
_DOWN = Context(prec=34, rounding=ROUND_FLOOR)


class Quote(Struct, frozen=True):
    """The last quote of a symbol; ``at`` is its event time in Unix seconds."""

    bid: float
    ask: float
    at: float


class Sizing(Struct, frozen=True):
    """A lot size and what it puts at risk, in account currency; ``reason`` is set when refused (lots 0)."""

    lots: Decimal
    risk: Decimal
    budget: Decimal
    loss_per_lot: Decimal
    reason: str | None = None


def exact(value: float | int | str | Decimal) -> Decimal:
    """The decimal number a person reads in `value`: 0.29 is 0.29, not 0.28999999999999998."""
    return value if isinstance(value, Decimal) else Decimal(str(value))


def loss_per_lot(
    distance: Decimal,
    symbol: Symbol,
    rate: Decimal,
    commission: Decimal = Decimal(0),
    slippage: Decimal = Decimal(0),
) -> Decimal:
    """Account currency lost per 1.00 lot over `distance` (price difference), rounded up.

    `rate` is account currency per unit of the symbol's quote currency; `commission` (round turn) and
    `slippage` are account currency per lot.
    """
    move = _UP.multiply(_UP.multiply(distance, symbol.contract), rate)
    return _UP.add(_UP.add(move, commission), slippage)


def budget(
    *, balance: Decimal, equity: Decimal, risk_pct: Decimal, open_risk: Decimal, max_total_open_risk_pct: Decimal
) -> Decimal:
    """Account currency this trade may lose: its own limit or what is left of the total, never below 0."""
    base = min(balance, equity)
    own = _DOWN.divide(_DOWN.multiply(base, risk_pct), Decimal(100))
    total = _DOWN.divide(_DOWN.multiply(base, max_total_open_risk_pct), Decimal(100))
    return max(Decimal(0), min(own, _DOWN.subtract(total, open_risk)))


def size(money: Decimal, loss: Decimal, symbol: Symbol, max_lots: Decimal | None = None) -> Sizing:
    """The largest lot size whose loss stays within `money`; `loss` is per lot, see `loss_per_lot`."""
    nothing = Decimal(0)
    if loss <= 0:
        return Sizing(nothing, nothing, money, loss, "no_loss_per_lot")
    if money <= 0:
        return Sizing(nothing, nothing, money, loss, "no_risk_budget")
    ceiling = symbol.volume_max if max_lots is None else min(symbol.volume_max, max_lots)
    lots = floor_to_step(min(_DOWN.divide(money, loss), ceiling), symbol.volume_step)
    if lots < symbol.volume_min:
        return Sizing(nothing, nothing, money, loss, "below_min_lot")
    return Sizing(lots, _UP.multiply(lots, loss), money, loss)


def floor_to_step(value: Decimal, step: Decimal) -> Decimal:
    """`value` rounded down to a multiple of `step`."""
    return (value // step) * step


def outward(sl: Decimal, tick: Decimal, buy: bool) -> Decimal:
    """`sl` on the tick grid, moved away from the entry where it must move: rounding never hides risk."""
    steps = (sl / tick).to_integral_value(ROUND_FLOOR if buy else ROUND_CEILING)
    return steps * tick


def conversion(
    quote_currency: str, account_currency: str, quotes: Mapping[str, Quote], now: float, max_age: float
) -> Decimal | None:
    """Account currency per unit of `quote_currency`, on the side that makes a loss larger.

    None when no quote of either pair is younger than `max_age` seconds: sizing then refuses.
    """
    if quote_currency == account_currency:
        return Decimal(1)
    direct = quotes.get(quote_currency + account_currency)
    if direct is not None and now - direct.at <= max_age and direct.ask > 0:
        return exact(direct.ask)
    inverse = quotes.get(account_currency + quote_currency)
    if inverse is not None and now - inverse.at <= max_age and inverse.bid > 0:
        return _UP.divide(Decimal(1), exact(inverse.bid))
    return None

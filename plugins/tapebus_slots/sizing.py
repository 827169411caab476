"""Risk-based lot size in exact arithmetic: rounded down to the step, never above the budget.

A lot size below the broker's minimum is refused, never lifted: lifting it would exceed the limit
on exactly the accounts that can bear it least. Whatever adds to a loss is rounded up, whatever bounds
it is rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from msgspec import Struct

from tapebus_trading.money import DOWN, UP, exact, floor_to_step
from tapebus_trading.symbols import Symbol

ZERO = Decimal(0)
#: The smallest order the bus carries: below it a lot size is refused, whatever the broker would take.
LEAST_ORDER = Decimal("0.01")
#: The largest one it carries, whatever the broker would take.
MOST_ORDER = Decimal(1_000_000)
#: The currency over which a rate is composed where no quote of the pair itself is there.
PIVOT = "USD"


class Quote(Struct, frozen=True):
    """The last quote of a symbol; ``at`` is its event time in Unix seconds."""

    bid: float
    ask: float
    at: float

    @property
    def usable(self) -> bool:
        """Both prices are there and the quote is not crossed."""
        return 0 < self.bid <= self.ask < math.inf


class Sizing(Struct, frozen=True):
    """A lot size and what it puts at risk, in account currency; ``reason`` is set when refused (lots 0)."""

    lots: Decimal = ZERO
    risk: Decimal = ZERO
    reason: str | None = None


class Cap(Struct, frozen=True):
    """A bound on the lots besides the budget; ``reason`` is reported where it leaves less than the minimum."""

    lots: Decimal
    reason: str


def loss_per_lot(
    distance: Decimal,
    symbol: Symbol,
    rate: Decimal | None,
    commission: Decimal = ZERO,
    slippage: Decimal = ZERO,
) -> Decimal | None:
    """Account currency lost per 1.00 lot over `distance` (price difference), rounded up.

    ``distance / tick * tick value`` plus costs. The value of a tick is the broker's where it sent one, else it is
    derived from the contract and `rate`, account currency per unit of the symbol's quote currency; None where
    neither is known. `commission` (round turn) and `slippage` are account currency per lot.
    """
    if symbol.tick_value is not None:
        move = UP.divide(UP.multiply(distance, symbol.tick_value), symbol.tick)
    elif rate is not None:
        move = UP.multiply(UP.multiply(distance, symbol.contract), rate)
    else:
        return None
    return UP.add(UP.add(move, commission), slippage)


def margin_per_lot(price: Decimal, symbol: Symbol, rate: Decimal | None, leverage: Decimal | None) -> Decimal | None:
    """Account currency held back per 1.00 lot opened at `price`, rounded up; None where nobody can tell.

    The broker's own figure wins; else the contract's value over `leverage`.
    """
    if symbol.margin is not None:
        return symbol.margin
    if leverage is None or rate is None:
        return None
    return UP.divide(UP.multiply(UP.multiply(symbol.contract, price), rate), leverage)


def percent_of(base: Decimal, percent: Decimal) -> Decimal:
    """`percent` of `base`, rounded down."""
    return DOWN.divide(DOWN.multiply(base, percent), Decimal(100))


def budget(own: Decimal, rooms: Iterable[Decimal]) -> Decimal:
    """Account currency this trade may lose: `own`, or the smallest of `rooms` other limits leave; never below 0."""
    return max(ZERO, min(own, *rooms))


def size(money: Decimal, loss: Decimal, symbol: Symbol, caps: Iterable[Cap] = ()) -> Sizing:
    """The largest lot size whose loss stays within `money`; `loss` is per lot, see `loss_per_lot`."""
    if loss <= 0:
        return Sizing(reason="no_loss_per_lot")
    if money <= 0:
        return Sizing(reason="no_risk_budget")
    bounds = [
        Cap(DOWN.divide(money, loss), "below_min_lot"),
        Cap(min(symbol.volume_max, MOST_ORDER), "below_min_lot"),
        *caps,
    ]
    tightest = min(bounds, key=lambda cap: cap.lots)
    lots = floor_to_step(tightest.lots, symbol.volume_step)
    if lots < least_lots(symbol):
        return Sizing(reason=tightest.reason)
    return Sizing(lots, UP.multiply(lots, loss))


def least_lots(symbol: Symbol) -> Decimal:
    """The smallest order: the broker's minimum, at least what the bus carries."""
    return max(symbol.volume_min, LEAST_ORDER)


def outward(sl: Decimal, tick: Decimal, buy: bool) -> Decimal:
    """`sl` on the tick grid, moved away from the entry where it must move: rounding never hides risk."""
    return _on_grid(sl, tick, ROUND_FLOOR if buy else ROUND_CEILING)


def inward(tp: Decimal, tick: Decimal, buy: bool) -> Decimal:
    """`tp` on the tick grid, moved towards the entry where it must move: a price that earns it is enough."""
    return _on_grid(tp, tick, ROUND_FLOOR if buy else ROUND_CEILING)


def _on_grid(level: Decimal, tick: Decimal, rounding: str) -> Decimal:
    return UP.multiply(UP.divide(level, tick).to_integral_value(rounding), tick)


def conversion(
    currency: str,
    account_currency: str,
    quotes: Mapping[str, Quote],
    now: float,
    max_age: float,
    suffix: str = "",
) -> Decimal | None:
    """Account currency per unit of `currency`, on the side that makes a loss larger.

    A loss in `currency` must be bought: at the ask of the direct pair, or at the bid of the inverse one. `suffix` is
    what the broker adds to the names of its symbols. Without a quote of the pair the rate goes over `PIVOT`. None where
    a quote that is needed is absent, crossed or more than `max_age` seconds away from `now`: sizing then refuses.
    """

    def rate(bought: str, paid: str) -> Decimal | None:
        if bought == paid:
            return Decimal(1)
        direct = _fresh(quotes, bought + paid, suffix, now, max_age)
        if direct is not None:
            return exact(direct.ask)
        inverse = _fresh(quotes, paid + bought, suffix, now, max_age)
        return None if inverse is None else UP.divide(Decimal(1), exact(inverse.bid))

    found = rate(currency, account_currency)
    if found is not None or PIVOT in (currency, account_currency):
        return found
    first, second = rate(currency, PIVOT), rate(PIVOT, account_currency)
    return None if first is None or second is None else UP.multiply(first, second)


def _fresh(quotes: Mapping[str, Quote], pair: str, suffix: str, now: float, max_age: float) -> Quote | None:
    for name in (pair + suffix, pair):
        quote = quotes.get(name)
        if quote is not None and quote.usable and abs(now - quote.at) <= max_age:
            return quote
    return None

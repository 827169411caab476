"""Exact arithmetic for prices, money and lots: a float is read as the decimal number a person sees in it."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from functools import lru_cache
from typing import TYPE_CHECKING

#: Contexts for a figure that must not come out too small (a loss) or too large (lots, a budget).
UP = Context(prec=34, rounding=ROUND_CEILING)
DOWN = Context(prec=34, rounding=ROUND_FLOOR)


def exact(value: float | int | str | Decimal) -> Decimal:
    """The decimal number a person reads in `value`: 0.29 is 0.29, not 0.28999999999999998."""
    return value if isinstance(value, Decimal) else Decimal(str(value))


if not TYPE_CHECKING:  # which would no longer know the argument
    # one decision asks for the same few prices and settings again and again
    exact = lru_cache(4096, typed=True)(exact)


def floor_to_step(value: Decimal, step: Decimal) -> Decimal:
    """The largest multiple of `step` (> 0) that is not above `value`."""
    return DOWN.multiply(DOWN.divide(value, step).to_integral_value(ROUND_FLOOR), step)


def ceil_to_step(value: Decimal, step: Decimal) -> Decimal:
    """The smallest multiple of `step` (> 0) that is not below `value`."""
    return UP.multiply(UP.divide(value, step).to_integral_value(ROUND_CEILING), step)

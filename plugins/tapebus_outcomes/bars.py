"""Deciding by bars where no quotes are: which bars count, and what one of them proves about a signal.

A bar is the open, high, low and close of the bid over ``[start, end)``; with its spread added it is one of the ask.
The order of decisions: an open beyond a level ends the signal at the open; one level inside the bar ends it there;
of two the stop wins, and the outcome is ambiguous. A bar that a signal was opened in, or runs out in, also has prices
from outside its life: what it cannot tell is never to the signal's favour, and makes the outcome ambiguous.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import msgspec

INF = float("inf")
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
#: MetaTrader's spelling, and the usual one; ``1M`` and ``MN1`` are months, which have no fixed length.
_LETTER_FIRST = re.compile(r"([SMHDW])([1-9]\d{0,4})")
_NUMBER_FIRST = re.compile(r"([1-9]\d{0,4})(s|m|min|h|H|d|D|w|W)")


@lru_cache(256)
def timeframe_s(text: str) -> int | None:
    """The length in seconds of a bar of the timeframe `text` (``M15``, ``15m``, ``1h`` …); None where it has none."""
    found = _LETTER_FIRST.fullmatch(text)
    if found is not None:
        return _UNITS[found[1].lower()] * int(found[2])
    found = _NUMBER_FIRST.fullmatch(text)
    return _UNITS[found[2].lower()] * int(found[1]) if found is not None else None


class Bar(NamedTuple):
    """One finished bar of the bid; times in Unix seconds, ``spread`` as a price, None where it is not said."""

    start: float
    end: float
    open: float
    high: float
    low: float
    close: float
    spread: float | None = None

    def of_side(self, buy: bool, spread: float) -> Bar:
        """The prices that close a BUY; or those that close a SELL, negated, so that one rule serves both."""
        if buy:
            return self
        o, h, low, c = (-(price + spread) for price in self[2:6])
        return Bar(self.start, self.end, o, low, h, c)


def read_bar(data: Any, stamp: float) -> Bar | None:
    """A ``market_data.ohlcv`` payload as `Bar`, begun at `stamp` if it does not say when; None where it is no bar."""
    names = ("timeframe", "open", "high", "low", "close", "timestamp", "spread")
    found: list[Any] = [data.get(name) if type(data) is dict else getattr(data, name, None) for name in names]
    timeframe, *prices, at, spread = found
    length = timeframe_s(str(timeframe))
    if length is None or any(not isinstance(price, (int, float)) for price in prices):
        return None
    o, h, low, c = (float(price) for price in prices)
    if not (0 < low <= o <= h < INF and low <= c <= h):
        return None
    start = float(at) if isinstance(at, (int, float)) and at > 0 else stamp
    return Bar(start, start + length, o, h, low, c, float(spread) if spread is not None else None)


class Covered(msgspec.Struct, array_like=True):
    """What of a symbol's time the bars have covered: the last one used, and the length of the finest."""

    start: float
    end: float
    finest: float
    close: float
    spread: float

    def refuses(self, bar: Bar) -> Literal["", "repeated_bars", "late_bars", "coarser_bars"]:
        """Why `bar` is not to be used: one seen already, one from before it, or a finer timeframe covers it."""
        length = bar.end - bar.start
        if length > self.finest and bar.end - self.end <= 2 * self.finest:
            return "coarser_bars"
        if bar.end > self.end:
            return ""
        return "repeated_bars" if (bar.start, bar.end) == (self.start, self.end) else "late_bars"


class Step(NamedTuple):
    """What a bar did to a signal, prices as in the bar it was made from.

    ``kind`` is empty where it goes on. ``best`` and ``worst`` are the prices that count for its extremes: never more to
    its favour than is sure, and all against it that may have been. ``price`` None: none is known to be of its life.
    """

    kind: Literal["", "stop", "target", "time"]
    price: float | None
    at: float
    best: float | None
    worst: float | None
    doubt: bool = False


def decide(bar: Bar, sl: float | None, tp: float | None, opened_at: float, deadline: float) -> Step:
    """What `bar` did to a BUY with these levels that was open in it; see the top of this module for the order."""
    whole, cut = opened_at <= bar.start, deadline < bar.end
    first = bar.open if whole else None
    if whole and sl is not None and bar.open <= sl:
        return Step("stop", bar.open, bar.start, bar.open, bar.open)
    if whole and tp is not None and bar.open >= tp:
        return Step("target", bar.open, bar.start, bar.open, bar.open)
    stop, target = sl is not None and bar.low <= sl, tp is not None and bar.high >= tp
    at = min(bar.end, deadline)
    if sl is not None and stop:
        proven = not cut and (whole or bar.close <= sl)
        return Step("stop", sl, at, first, sl, target or not proven)
    if tp is not None and target and not cut and (whole or bar.close >= tp):
        return Step("target", tp, at, tp, bar.low)
    if cut:
        return Step("time", first, at, first, bar.low, target)
    best = bar.high if whole else bar.close
    return Step("time" if deadline == bar.end else "", bar.close, at, best, bar.low, target)

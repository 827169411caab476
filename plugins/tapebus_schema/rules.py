"""Rules over several fields. Each takes the typed event and returns a reason, or None when all is well.

They run on the dispatcher thread: no allocation on the good path, no state, no I/O. MetaTrader's 0
for "at market" and "no level" counts as absent.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

#: Seconds by which a duration may differ from the difference of its two times (rounding of producers).
DURATION_TOLERANCE = 0.01


def quote(event: Any) -> str | None:
    """The ask is not below the bid."""
    data = event.data
    return None if data.ask >= data.bid else f"crossed quote: ask {data.ask} is below bid {data.bid}"


def geometry(event: Any) -> str | None:
    """Stop and target on their sides of the entry: BUY sl < entry < tp, SELL tp < entry < sl, strictly.

    Each level that is present is compared with the entry; without an entry nothing is compared.
    """
    data = event.data
    entry = data.entry
    if not entry or data.direction is None:
        return None
    sl, tp = data.sl, data.tp
    if data.direction == "BUY":
        if sl and sl >= entry:
            return f"BUY needs sl < entry, got sl {sl} and entry {entry}"
        if tp and tp <= entry:
            return f"BUY needs entry < tp, got entry {entry} and tp {tp}"
    else:
        if sl and sl <= entry:
            return f"SELL needs entry < sl, got entry {entry} and sl {sl}"
        if tp and tp >= entry:
            return f"SELL needs tp < entry, got tp {tp} and entry {entry}"
    return None


def user(event: Any) -> str | None:
    """A user id in the payload or in the envelope."""
    if event.data.user_id or event.user_id:
        return None
    return "user_id is missing: put it into data or into the envelope"


def bar(event: Any) -> str | None:
    """low <= open, close <= high."""
    data = event.data
    if data.low <= data.open <= data.high and data.low <= data.close <= data.high:
        return None
    return f"bar needs low <= open, close <= high, got o {data.open} h {data.high} l {data.low} c {data.close}"


def book(event: Any) -> str | None:
    """The best ask is not below the best bid."""
    bids, asks = event.data.bids, event.data.asks
    if not bids or not asks or asks[0][0] >= bids[0][0]:
        return None
    return f"crossed book: best ask {asks[0][0]} is below best bid {bids[0][0]}"


def outcome(event: Any) -> str | None:
    """The duration is the difference of the two times (within rounding), and not negative."""
    data = event.data
    if data.closed_at < data.opened_at:
        return f"closed_at {data.closed_at} is before opened_at {data.opened_at}"
    if abs(data.closed_at - data.opened_at - data.duration_s) > DURATION_TOLERANCE:
        return f"duration_s {data.duration_s} is not closed_at - opened_at ({data.closed_at - data.opened_at})"
    return None


def verdict(event: Any) -> str | None:
    """Nothing is fired over a failed rule."""
    if event.data.fire:
        for rule in event.data.rules:
            if not rule.passed:
                return f"fire is true although rule {rule.name!r} failed"
    return None


def pattern(event: Any) -> str | None:
    """wins <= n and low <= win_rate <= high."""
    data = event.data
    if data.wins > data.n:
        return f"wins {data.wins} exceed n {data.n}"
    known = [figure for figure in (data.low, data.win_rate, data.high) if figure is not None]
    if any(left > right for left, right in pairwise(known)):
        return f"needs low <= win_rate <= high, got {data.low}, {data.win_rate}, {data.high}"
    return None

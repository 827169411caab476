"""The record of a signal's end: the payload of ``signal_outcome``."""

from __future__ import annotations

from math import floor
from typing import Any, NamedTuple

from tapebus_outcomes.book import Signal

WIN, LOSS, BREAKEVEN = "WIN", "LOSS", "BREAKEVEN"
TIMEOUT, CANCELLED, UNKNOWN = "TIMEOUT", "CANCELLED", "UNKNOWN"
OUTCOMES = (WIN, LOSS, BREAKEVEN, TIMEOUT, CANCELLED, UNKNOWN)


class End(NamedTuple):
    """How a signal ended: outcome, price (None: none known) and event time.

    ``hole`` is how many seconds no price was known before it, ``level`` the stop or target that was reached and
    ``mode`` what knew the price.
    """

    outcome: str
    price: float | None
    at: float
    hole: float = 0.0
    level: float | None = None
    mode: str | None = None


def tidy(value: float, scale: float = 1e10) -> float:
    """The float nearest to `value` taken to a multiple of 1 / `scale`: 1.1444500000000001 is 1.14445."""
    # the division of two exact numbers is exact to the last bit; round(value, 10) is as well, and costs ten times more
    return floor(value * scale + 0.5) / scale if abs(value) < 1e5 else round(value, 10)


def record(
    signal: Signal, end: End, extremes: tuple[float, float] | None, quotes: int, pip: float, max_gap_s: float
) -> dict[str, Any]:
    """The payload: first what every record has, then the figures that are known of this one.

    `extremes` are the highest and lowest exit-side price of its life, `quotes` how many it has seen.
    """
    sign, entry, price = 1 if signal.buy else -1, signal.entry, end.price
    risk = abs(entry - signal.sl) if entry is not None and signal.sl is not None else 0.0
    result = mfe = mae = None
    if entry is not None and extremes is not None:
        moves = sorted(sign * (each - entry) for each in extremes)
        mfe, mae = tidy(max(moves[1], 0.0)), tidy(min(moves[0], 0.0))
        result = sign * (price - entry) if price is not None else None
    closed_at = max(end.at, signal.opened_at)
    data = {
        "signal_id": signal.signal_id,
        "symbol": signal.symbol,
        "direction": "BUY" if signal.buy else "SELL",
        "pattern_type": signal.pattern_type,
        "confidence": signal.confidence,
        "outcome": end.outcome,
        "exit_price": price,
        "r": tidy(result / risk, 1e6) if result is not None and risk > 0 else None,
        "pips": tidy(result / pip, 1e4) if result is not None else None,
        "mfe": mfe,
        "mae": mae,
        "opened_at": signal.opened_at,
        "closed_at": closed_at,
        "duration_s": closed_at - signal.opened_at,
        "ambiguous": signal.doubt or end.at < signal.opened_at,
        "gap_before_exit": end.hole > max_gap_s,
        "quotes_seen": quotes,
        "fired": signal.fired,
    }
    more = {
        "entry": entry,
        "sl": signal.sl,
        "tp": signal.tp,
        "risk": tidy(risk) if risk > 0 else None,
        "risk_reward": tidy(abs(signal.tp - entry) / risk, 1e6) if risk > 0 and signal.tp and entry else None,
        "mfe_r": tidy(mfe / risk, 1e6) if mfe is not None and risk > 0 else None,
        "mae_r": tidy(mae / risk, 1e6) if mae is not None and risk > 0 else None,
        "mfe_pips": tidy(mfe / pip, 1e4) if mfe is not None else None,
        "mae_pips": tidy(mae / pip, 1e4) if mae is not None else None,
        "slippage": tidy(price - end.level) if price is not None and end.level is not None else None,
        "gap_ms": tidy(max(end.hole, 0.0) * 1000, 1e3) if price is not None else None,
        "mode": end.mode if price is not None else None,
        "bars_seen": signal.bars or None,
    }
    data |= {name: value for name, value in more.items() if value is not None}
    return data

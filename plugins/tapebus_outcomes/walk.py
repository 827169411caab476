"""Taking a signal through a bar of its symbol: its entry where it has none, its extremes, its end."""

from __future__ import annotations

from tapebus_outcomes.bars import Bar, Step, decide
from tapebus_outcomes.book import Signal


def walk(signal: Signal, bar: Bar, spread: float) -> Step | None:
    """What `bar`, part of which `signal` was open in, did to it, in prices that close it.

    None: the entry it got makes no sense with its levels. Changes what the signal keeps of bars. Without an entry it
    enters on the first price after it was opened, the open of a bar or the close of the one it was opened in.
    """
    oriented = bar.of_side(signal.buy, spread)
    sl, tp = _turned(signal.sl, signal.buy), _turned(signal.tp, signal.buy)
    if signal.deadline <= bar.start:
        return Step("time", None, signal.deadline, None, None)
    if signal.entry is None:
        price, at = (bar.open, bar.start) if signal.opened_at <= bar.start else (bar.close, bar.end)
        if at >= signal.deadline:
            return Step("time", None, signal.deadline, None, None)
        signal.entry = price + spread if signal.buy else price
        if not signal.sound():
            return None
        if at == bar.end:  # nothing of this bar is later
            oriented = oriented._replace(open=oriented.close, high=oriented.close, low=oriented.close)
            sl = tp = None
    step = decide(oriented, sl, tp, signal.opened_at, signal.deadline)
    signal.doubt = signal.doubt or step.doubt
    if step.price is None:  # opened and over within the bar: no price of it is known to be from that time
        return step
    signal.bars += 1
    for reached in (_turned(step.best, signal.buy), _turned(step.worst, signal.buy)):
        if reached is not None:
            signal.best = reached if signal.best is None else max(signal.best, reached)
            signal.worst = reached if signal.worst is None else min(signal.worst, reached)
    return step._replace(price=_turned(step.price, signal.buy))


def _turned(price: float | None, buy: bool) -> float | None:
    return price if price is None or buy else -price

"""The open signals of one symbol, arranged so that a quote which changes nothing costs almost nothing.

Three ideas carry the cost:

* *Box.* The bounds of the `Band` (first: bid, second: ask) span the quotes since the last signal was
  opened (the segment). No level of an open signal lies inside, for it would have been hit by
  the quote that widened the box, so a quote inside the box can neither hit a level nor set an extreme.
* *Clearance.* Between the nearest levels, which the tops of the heaps give, a quote that leaves the box reaches none
  of them: it widens the box, and that is all.
* *Suffix extremes.* When a signal is opened the finished segment is folded into four monotonic
  stacks keyed by the quote count at its start. The extreme since any signal's start is the first
  stack entry at or after it, combined with the running segment: a bisect at close, nothing per quote.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

import msgspec

from tapebus.bands import Band
from tapebus_outcomes.bars import INF, Bar, Covered


class Signal(msgspec.Struct, array_like=True, gc=False):
    """One signal being followed. ``order`` is its place among all signals opened, ``start`` the
    symbol's quote count at that moment, ``entry`` None until the first price gives it.

    Of the ``bars`` it has seen it keeps the ``best`` and ``worst`` exit-side price, and the ``doubt`` one has left.
    ``cancelled``: its deadline is the time it was taken back, and the bar of that time is still to come."""

    order: int
    signal_id: str
    symbol: str
    buy: bool
    pattern_type: str
    confidence: float | None
    entry: float | None
    sl: float | None
    tp: float | None
    opened_at: float
    deadline: float
    start: int
    fired: bool = False
    live: bool = True
    best: float | None = None
    worst: float | None = None
    bars: int = 0
    doubt: bool = False
    cancelled: bool = False

    def sound(self) -> bool:
        """Whether stop, entry and target lie in the order the direction asks for, as far as they are known."""
        prices = [price for price in (self.sl, self.entry, self.tp) if price is not None]
        in_order = prices if self.buy else prices[::-1]
        return all(a <= b for a, b in pairwise(in_order)) and not (self.sl is not None and self.sl == self.tp)


class Quote(msgspec.Struct, gc=False):
    """The last good quote of a symbol."""

    bid: float
    ask: float


class Saved(msgspec.Struct, array_like=True):
    """The part of a book that changes with quotes, as stored; infinities stand for an empty box."""

    quotes: int
    time: float
    bid: float
    ask: float
    box: tuple[float, float, float, float]
    segment: int
    covered: Covered | None = None
    by_bars: bool = False


class Extremes:
    """Maxima of segments by start, kept only while a later segment does not reach them."""

    __slots__ = ("keys", "values")

    def __init__(self, keys: list[int] | None = None, values: list[float] | None = None) -> None:
        self.keys = keys or []
        self.values = values or []

    def push(self, key: int, value: float) -> None:
        keys, values = self.keys, self.values
        while values and values[-1] <= value:
            values.pop()
            keys.pop()
        keys.append(key)
        values.append(value)

    def since(self, key: int, running: float) -> float:
        """The maximum of `running` and of every segment that starts at `key` or later."""
        at = bisect_left(self.keys, key)
        return max(running, self.values[at]) if at < len(self.keys) else running

    def forget_before(self, key: int) -> None:
        at = bisect_left(self.keys, key)
        del self.keys[:at], self.values[:at]


Level = tuple[float, int, Signal]


class Book(Band):
    """Quotes and open signals of one symbol.

    The heaps hold ``(key, order, signal)`` with finished signals deleted lazily; falling levels are
    stored negated. Minima are kept as maxima of negated prices. Not thread-safe.
    """

    __slots__ = (
        "ask_ceiling",
        "ask_floor",
        "bid_ceiling",
        "bid_floor",
        "by_bars",
        "covered",
        "heaps",
        "members",
        "pending",
        "saved_quotes",
        "segment",
        "stacks",
        "stacks_changed",
        "symbol",
    )

    def __init__(self, symbol: str, time: float) -> None:
        self.symbol = symbol
        self.seen = 0
        self.saved_quotes = -1
        self.time = time
        self.last: Any = Quote(0.0, 0.0)
        self.segment = 0
        #: The open signals by their order.
        self.members: dict[int, Signal] = {}
        self.covered: Covered | None = None
        #: The last price is that of a bar. The next quote is looked at, whatever it is.
        self.by_bars = False
        #: Order: BUY stop, SELL stop, BUY target, SELL target.
        self.heaps: tuple[list[Level], list[Level], list[Level], list[Level]] = ([], [], [], [])
        self.pending: list[Signal] = []
        #: Order: highest bid, lowest bid, highest ask, lowest ask.
        self.stacks = (Extremes(), Extremes(), Extremes(), Extremes())
        self.stacks_changed = False
        self._clear()
        self._idle()

    def _clear(self) -> None:
        """Note how far bid and ask may go without reaching a level: stops of BUY, of SELL, targets of BUY, of SELL."""
        buy_stops, sell_stops, buy_targets, sell_targets = self.heaps
        self.bid_floor = -buy_stops[0][0] if buy_stops else -INF
        self.ask_ceiling = sell_stops[0][0] if sell_stops else INF
        self.bid_ceiling = buy_targets[0][0] if buy_targets else INF
        self.ask_floor = -sell_targets[0][0] if sell_targets else -INF
        if self.by_bars:
            self.bid_floor = INF

    def _idle(self) -> None:
        """Nothing is open: every quote is inside the box."""
        self.low_first = self.low_second = -INF
        self.high_first = self.high_second = INF

    def open(self, signal: Signal) -> None:
        """Follow `signal` from the next quote on."""
        self._next_segment()
        if self.covered is not None and self.time >= self.covered.end:
            self.by_bars = False  # quotes came while nobody looked
        self.track(signal)

    def _next_segment(self) -> None:
        """Fold what the quotes of the running segment reached into the stacks and begin a new one."""
        if self.members and self.seen > self.segment:
            for stack, value in zip(
                self.stacks, (self.high_first, -self.low_first, self.high_second, -self.low_second), strict=True
            ):
                stack.push(self.segment, value)
            self.stacks_changed = True
        if not self.members or self.seen > self.segment:
            self.segment = self.seen
            self.low_first = self.low_second = INF
            self.high_first = self.high_second = -INF
        self.saved_quotes = -1

    def take_bar(self, bar: Bar, spread: float) -> None:
        """Prices are known until the end of `bar`; what it did to the signals is settled."""
        if self.members:
            self._next_segment()
        finest = min(bar.end - bar.start, self.covered.finest if self.covered is not None else INF)
        self.covered = Covered(bar.start, bar.end, finest, bar.close, spread)
        self.by_bars = True
        self.saved_quotes = -1
        self._clear()

    @property
    def known_until(self) -> float:
        """The time of the last price, or of the first signal where there was none."""
        return max(self.time, self.covered.end) if self.covered is not None else self.time

    def exit_price(self, buy: bool) -> float:
        """The last price that would have closed a signal; needs a quote or a bar."""
        if self.by_bars and self.covered is not None:
            return self.covered.close if buy else self.covered.close + self.covered.spread
        return float(self.last.bid if buy else self.last.ask)

    def patience(self, deadline: float) -> float:
        """Seconds after `deadline` for which its end waits, because a bar may still tell of the time before it."""
        if not self.by_bars or self.covered is None or deadline <= self.covered.end:
            return 0.0
        return 2 * (self.covered.end - self.covered.start)

    def track(self, signal: Signal) -> None:
        """Put the levels of `signal` into the heaps."""
        self.members[signal.order] = signal
        if signal.entry is None:
            self.pending.append(signal)
        stop, target = (0, 2) if signal.buy else (1, 3)
        if signal.sl is not None:
            heappush(self.heaps[stop], (-signal.sl if signal.buy else signal.sl, signal.order, signal))
        if signal.tp is not None:
            heappush(self.heaps[target], (signal.tp if signal.buy else -signal.tp, signal.order, signal))
        self._clear()

    def clears(self, bid: float, ask: float) -> bool:
        """Whether a good quote reaches no level, so that it only widens the running segment; False where it may."""
        if self.pending:
            return False
        return self.bid_floor < bid < self.bid_ceiling and self.ask_floor < ask < self.ask_ceiling

    def hits(self, bid: float, ask: float) -> list[tuple[Signal, bool]]:
        """The signals whose level this quote reaches, stops first; True marks a target.

        A signal may come twice (stop and target on one quote): the first one decides.
        """
        found: list[tuple[Signal, bool]] = []
        for index, reach in enumerate((-bid, ask, bid, -ask)):
            heap = self.heaps[index]
            while heap and (heap[0][0] <= reach or not heap[0][2].live):
                signal = heappop(heap)[2]
                if signal.live:
                    found.append((signal, index > 1))
        self._clear()
        return found

    def extremes(self, signal: Signal) -> tuple[float, float] | None:
        """Highest and lowest exit-side price since `signal` was opened, by quotes and bars; None where none came."""
        known = [price for price in (signal.best, signal.worst) if price is not None]
        if self.seen == signal.start:
            return (max(known), min(known)) if known else None
        if signal.buy:
            high, low, top, bottom = self.stacks[0], self.stacks[1], self.high_first, self.low_first
        else:
            high, low, top, bottom = self.stacks[2], self.stacks[3], self.high_second, self.low_second
        highest, lowest = high.since(signal.start, top), -low.since(signal.start, -bottom)
        return (max(highest, *known), min(lowest, *known)) if known else (highest, lowest)

    def close(self, signal: Signal) -> None:
        """Stop following `signal`; drops what no open signal needs any more."""
        signal.live = False
        del self.members[signal.order]
        if not self.members:
            for heap in self.heaps:
                heap.clear()
            for stack in self.stacks:
                stack.forget_before(self.seen + 1)
            self.pending.clear()
            self.stacks_changed = True
            self.saved_quotes = -1
            self._clear()
            self._idle()
            return
        for heap in self.heaps:
            if len(heap) > 2 * len(self.members) + 64:
                heap[:] = [level for level in heap if level[2].live]
                heapify(heap)
        self._clear()

    def saved(self) -> Saved:
        box = (self.low_first, self.high_first, self.low_second, self.high_second)
        return Saved(self.seen, self.time, self.last.bid, self.last.ask, box, self.segment, self.covered, self.by_bars)

    def restore(self, saved: Saved, stacks: list[tuple[list[int], list[float]]]) -> None:
        self.seen = self.saved_quotes = saved.quotes
        self.time, self.last, self.segment = saved.time, Quote(saved.bid, saved.ask), saved.segment
        self.low_first, self.high_first, self.low_second, self.high_second = saved.box
        self.covered, self.by_bars = saved.covered, saved.by_bars
        if stacks:
            first, second, third, fourth = (Extremes(keys, values) for keys, values in stacks)
            self.stacks = (first, second, third, fourth)

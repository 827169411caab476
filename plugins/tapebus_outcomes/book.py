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
from typing import Any

import msgspec

from tapebus.bands import Band

INF = float("inf")


class Signal(msgspec.Struct, array_like=True, gc=False):
    """One signal being followed. ``order`` is its place among all signals opened, ``start`` the
    symbol's quote count at that moment, ``entry`` None until the first quote gives it."""

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
        "count",
        "heaps",
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
        self.count = 0
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

    def _idle(self) -> None:
        """Nothing is open: every quote is inside the box."""
        self.low_first = self.low_second = -INF
        self.high_first = self.high_second = INF

    def open(self, signal: Signal) -> None:
        """Follow `signal` from the next quote on."""
        if self.count and self.seen > self.segment:
            for stack, value in zip(
                self.stacks, (self.high_first, -self.low_first, self.high_second, -self.low_second), strict=True
            ):
                stack.push(self.segment, value)
            self.stacks_changed = True
        if not self.count or self.seen > self.segment:
            self.segment = self.seen
            self.low_first = self.low_second = INF
            self.high_first = self.high_second = -INF
        self.saved_quotes = -1
        self.track(signal)

    def track(self, signal: Signal) -> None:
        """Put the levels of `signal` into the heaps."""
        self.count += 1
        if signal.entry is None:
            self.pending.append(signal)
        stop, target = (0, 2) if signal.buy else (1, 3)
        if signal.sl is not None:
            heappush(self.heaps[stop], (-signal.sl if signal.buy else signal.sl, signal.order, signal))
        if signal.tp is not None:
            heappush(self.heaps[target], (signal.tp if signal.buy else -signal.tp, signal.order, signal))
        self._clear()

    def stretch(self, bid: float, ask: float) -> bool:
        """Take a good quote that reaches no level into the running segment; False where it may reach one."""
        if self.pending or not (self.bid_floor < bid < self.bid_ceiling and self.ask_floor < ask < self.ask_ceiling):
            return False
        if bid < self.low_first:
            self.low_first = bid
        if bid > self.high_first:
            self.high_first = bid
        if ask < self.low_second:
            self.low_second = ask
        if ask > self.high_second:
            self.high_second = ask
        return True

    def widen(self, bid: float, ask: float) -> None:
        """Take a good quote into the running segment."""
        if not self.count:
            return
        self.low_first = min(self.low_first, bid)
        self.high_first = max(self.high_first, bid)
        self.low_second = min(self.low_second, ask)
        self.high_second = max(self.high_second, ask)

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

    def extremes(self, signal: Signal) -> tuple[float, float]:
        """Highest and lowest exit-side price since `signal` was opened; needs at least one quote."""
        if signal.buy:
            high, low, top, bottom = self.stacks[0], self.stacks[1], self.high_first, self.low_first
        else:
            high, low, top, bottom = self.stacks[2], self.stacks[3], self.high_second, self.low_second
        return high.since(signal.start, top), -low.since(signal.start, -bottom)

    def close(self, signal: Signal) -> None:
        """Stop following `signal`; drops what no open signal needs any more."""
        signal.live = False
        self.count -= 1
        if not self.count:
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
            if len(heap) > 2 * self.count + 64:
                heap[:] = [level for level in heap if level[2].live]
                heapify(heap)
        self._clear()

    def saved(self) -> Saved:
        box = (self.low_first, self.high_first, self.low_second, self.high_second)
        return Saved(self.seen, self.time, self.last.bid, self.last.ask, box, self.segment)

    def restore(self, saved: Saved, stacks: list[tuple[list[int], list[float]]]) -> None:
        self.seen = self.saved_quotes = saved.quotes
        self.time, self.last, self.segment = saved.time, Quote(saved.bid, saved.ask), saved.segment
        self.low_first, self.high_first, self.low_second, self.high_second = saved.box
        if stacks:
            first, second, third, fourth = (Extremes(keys, values) for keys, values in stacks)
            self.stacks = (first, second, third, fourth)

"""Following every signal to its end, by event time and in bus order."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any

import msgspec

from tapebus.bands import Bands
from tapebus.consumer import Context
from tapebus_outcomes.bars import INF, Bar, read_bar
from tapebus_outcomes.book import Book, Quote, Saved, Signal
from tapebus_outcomes.record import BREAKEVEN, CANCELLED, LOSS, TIMEOUT, UNKNOWN, WIN, End, record, tidy
from tapebus_outcomes.settings import Settings
from tapebus_outcomes.walk import walk
from tapebus_trading.symbols import Registry

_SIGNALS = ("signal_generated", "signal_expired", "fire_command", "trade_executed", "trade_confirmed")
_SPECIFICATION = "symbol_specification"
_PRICES = {"tick": ("market_data",), "bar": ("market_data.ohlcv",), "auto": ("market_data", "market_data.ohlcv")}
_NOT_FIRED = frozenset(("FAILED", "REJECTED", "ERROR", "CANCELLED"))

_encode = msgspec.msgpack.encode
_decode_signal = msgspec.msgpack.Decoder(Signal).decode
_decode_book = msgspec.msgpack.Decoder(Saved).decode
_decode_stacks = msgspec.msgpack.Decoder(list[tuple[list[int], list[float]]]).decode
_decode_closed = msgspec.msgpack.Decoder(tuple[int, str]).decode
_decode_specifications = msgspec.msgpack.Decoder(dict[str, dict[str, str]]).decode


class Totals(msgspec.Struct):
    """Counters kept over restarts; ``ended`` by outcome."""

    opened: int = 0
    closed: int = 0
    duplicates: int = 0
    crossed: int = 0
    invalid: int = 0
    ended: dict[str, int] = {}
    ambiguous: int = 0
    gaps: int = 0
    bars: int = 0
    repeated_bars: int = 0
    late_bars: int = 0
    coarser_bars: int = 0
    unfinished_bars: int = 0
    invalid_bars: int = 0


_decode_totals = msgspec.msgpack.Decoder(Totals).decode


def _field(data: Any, name: str) -> Any:
    """A payload field, whether the type is registered or a plain ``dict``; None where absent."""
    return data.get(name) if type(data) is dict else getattr(data, name, None)


def _level(data: Any, name: str) -> float | None:
    """A price of a signal, without what float arithmetic added to it; MetaTrader writes 0 where there is none."""
    price = _field(data, name)
    return tidy(price) if price else None


class Tracker:
    """All books, one clock of deadlines and the counters. Used on the consumer's thread only.

    Keys of ``context.state``: ``t`` totals, ``o:<order>`` an open signal, ``b:<symbol>`` and
    ``s:<symbol>`` a book and its stacks, ``c:<n>`` a ring of the ids of finished signals, ``y`` what brokers sent
    of their symbols.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.settings = Settings.of(context.config)
        self.topics = (*_SIGNALS, _SPECIFICATION, *_PRICES[self.settings.mode])
        self.symbols = Registry(context.shared, self.settings.symbols, "plugins.outcomes.symbols")
        #: By symbol: a pip, half a point, the spread where nobody has shown one.
        self._figures: dict[str, tuple[float, float, float]] = {}
        self.books: dict[str, Book] = {}
        self.open: dict[str, Signal] = {}
        self.closed: dict[str, None] = {}
        self.totals = Totals()
        self._ring: dict[int, str] = {}
        self._deadlines: list[tuple[float, int, int, Signal]] = []
        self._pushes = 0
        self._deadline = INF
        self._quiet = Bands(self.books, "symbol", "bid", "ask")
        self._dirty: dict[int, Signal] = {}
        self._new_closed: dict[int, str] = {}
        self._totals_changed = False
        self._specified = False
        self._restore()
        self._quiet.until = self._deadline

    # -- events ---------------------------------------------------------------------------------

    def handle(self, batch: Any) -> None:
        """Take one batch. A quote inside its book's box is passed over; one that reaches no level only widens it."""
        quiet, books, events = self._quiet, self.books, iter(batch)
        while (event := quiet.skip(events)) is not None:
            if type(event) is quiet.event and event.timestamp < self._deadline:
                data = event.data
                book, bid, ask = books[data.symbol], data.bid, data.ask
                if 0 < bid <= ask < INF and book.clears(bid, ask):
                    book.take(bid, ask, event.timestamp, data)
                    continue
            self._take(event)
            quiet.until = self._deadline

    def _take(self, event: Any) -> None:
        kind, data = event.event_type, event.data
        if kind in ("fire_command", "trade_executed", "trade_confirmed"):
            self._mark_fired(event, data)
            return
        if kind == "market_data":
            if self._quiet.event is None:
                self._quiet.learn(event)
            self._expire(event)
            book = self.books.get(_field(data, "symbol"))
            if book is not None:
                self._quote(book, event, float(_field(data, "bid")), float(_field(data, "ask")))
        elif kind == "market_data.ohlcv":
            self._bar(event, data)
            self._expire(event)
        elif kind == "signal_generated":
            self._open(event, data)
        elif kind == "signal_expired":
            signal = self.open.get(_field(data, "signal_id"))
            if signal is not None:
                self._cancel(signal, event)
        elif kind == _SPECIFICATION:
            self.symbols.specify(data)
            self._figures.clear()
            self._specified = True

    def _open(self, event: Any, data: Any) -> None:
        signal_id, symbol = _field(data, "signal_id"), _field(data, "symbol")
        direction = str(_field(data, "direction") or "").upper()
        self._totals_changed = True
        if not signal_id or not symbol or direction not in ("BUY", "SELL"):
            self.totals.invalid += 1
            return
        if signal_id in self.open or signal_id in self.closed:
            self.totals.duplicates += 1
            return
        expires = _field(data, "expires_at")
        time = event.timestamp
        book = self._book(symbol, time)
        self.totals.opened += 1
        signal = Signal(
            order=self.totals.opened,
            signal_id=signal_id,
            symbol=symbol,
            buy=direction == "BUY",
            pattern_type=_field(data, "pattern_type") or "",
            confidence=_field(data, "confidence"),
            entry=_level(data, "entry"),
            sl=_level(data, "sl"),
            tp=_level(data, "tp"),
            opened_at=time,
            deadline=expires if isinstance(expires, (int, float)) else time + self.settings.max_age_s,
            start=book.seen,
            # a bar that reaches into its life has come already
            doubt=book.by_bars and book.covered is not None and book.covered.end > time,
        )
        self.open[signal_id] = signal
        self._dirty[signal.order] = signal
        book.open(signal)
        self._look_at(signal.deadline, signal)
        if not signal.sound():
            self._end(signal, End(UNKNOWN, None, time), event)

    def _book(self, symbol: str, time: float) -> Book:
        book = self.books.get(symbol)
        if book is None:
            book = self.books[symbol] = Book(symbol, time)
            self._of(symbol)  # looked up now rather than on the quote that ends a signal
        return book

    def _quote(self, book: Book, event: Any, bid: float, ask: float) -> None:
        if not 0 < bid <= ask < INF:
            self.totals.crossed += 1
            self._totals_changed = True
            return
        time = event.timestamp
        hole = time - book.known_until
        if book.by_bars:
            self._settle(book, event)
            book.by_bars = False
        book.take(bid, ask, time, Quote(bid, ask))
        if book.pending:
            self._enter(book, event, bid, ask)
        at_level = self.settings.tp_fill == "level"
        for signal, target in book.hits(bid, ask):
            if not signal.live:
                continue
            price = bid if signal.buy else ask
            level = signal.tp if target else signal.sl
            exit_price = level if target and at_level else price
            self._end(
                signal, End(self._verdict(signal, exit_price, target), exit_price, time, hole, level, "tick"), event
            )

    def _enter(self, book: Book, event: Any, bid: float, ask: float) -> None:
        """Give the signals without an entry the entry side of their first quote."""
        pending, book.pending = book.pending, []
        for signal in pending:
            if signal.live and signal.entry is None:
                signal.entry = ask if signal.buy else bid
                self._dirty[signal.order] = signal
                if not signal.sound():
                    self._end(signal, End(UNKNOWN, None, event.timestamp), event)

    # -- bars -----------------------------------------------------------------------------------

    def _bar(self, event: Any, data: Any) -> None:
        totals, stamp = self.totals, event.timestamp
        bar, symbol = read_bar(data, stamp), _field(data, "symbol")
        if bar is None or not symbol:
            totals.invalid_bars += 1
            self._totals_changed = True
            return
        book = self._book(symbol, bar.start)
        if self.settings.mode == "auto" and book.seen and book.time >= bar.start:
            return  # quotes have decided, or will
        self._totals_changed = True
        if stamp != bar.start and stamp < bar.end - self.settings.clock_skew_s:
            totals.unfinished_bars += 1
        elif book.covered is not None and (reason := book.covered.refuses(bar)):
            setattr(totals, reason, getattr(totals, reason) + 1)
        else:
            totals.bars += 1
            spread = self._spread(book, bar)
            hole = bar.start - book.known_until
            for signal in list(book.members.values()):
                if bar.end > signal.opened_at:
                    self._walk(signal, bar, spread, hole, event)
            book.take_bar(bar, spread)

    def _spread(self, book: Book, bar: Bar) -> float:
        """The spread of `bar`: its own, else the last one known, else what is typical of the symbol."""
        if bar.spread is not None:
            return bar.spread
        if book.by_bars and book.covered is not None:
            return book.covered.spread
        return float(book.last.ask - book.last.bid) if book.seen else self._of(book.symbol)[2]

    def _walk(self, signal: Signal, bar: Bar, spread: float, hole: float, event: Any) -> None:
        step = walk(signal, bar, spread)
        self._dirty[signal.order] = signal
        if step is None:
            self._end(signal, End(UNKNOWN, None, max(bar.start, signal.opened_at)), event)
        elif step.kind == "time":
            self._end_by_time(signal, event, step.price)
        elif step.kind:
            target = step.kind == "target"
            verdict = self._verdict(signal, step.price, target)
            level = signal.tp if target else signal.sl
            self._end(signal, End(verdict, step.price, step.at, hole, level, "bar"), event)

    def _mark_fired(self, event: Any, data: Any) -> None:
        if str(_field(data, "status") or "").upper() in _NOT_FIRED:
            return
        for signal_id in (_field(data, "signal_id"), _field(data, "fire_id"), event.correlation_id):
            signal = self.open.get(signal_id) if signal_id else None
            if signal is not None:
                if not signal.fired:
                    signal.fired = True
                    self._dirty[signal.order] = signal
                return

    # -- ends -----------------------------------------------------------------------------------

    def _expire(self, event: Any) -> None:
        """End the signals whose deadline the time of the market has reached, at their deadline."""
        heap, now = self._deadlines, event.timestamp
        while heap and (heap[0][0] <= now or not heap[0][3].live):
            signal = heappop(heap)[3]
            if not signal.live:
                continue
            due = signal.deadline + self.books[signal.symbol].patience(signal.deadline)
            if due > now:
                self._look_at(due, signal)
            else:
                self._end_by_time(signal, event)
        self._deadline = heap[0][0] if heap else INF

    def _look_at(self, due: float, signal: Signal) -> None:
        """Ask at `due` whether the deadline of `signal` ends it."""
        self._pushes += 1
        heappush(self._deadlines, (due, signal.order, self._pushes, signal))
        self._deadline = self._deadlines[0][0]

    def _settle(self, book: Book, event: Any) -> None:
        """End the signals that waited for a bar, now that a quote from after their deadline has come first."""
        for signal in list(book.members.values()):
            if signal.deadline <= event.timestamp:
                self._end_by_time(signal, event)

    def _cancel(self, signal: Signal, event: Any) -> None:
        """End a signal that was taken back; where bars decide, once they have told of the time before."""
        if event.timestamp < signal.deadline:
            signal.cancelled, signal.deadline = True, event.timestamp
        wait = self.books[signal.symbol].patience(signal.deadline)
        if not wait:
            self._end_by_time(signal, event)
            return
        self._dirty[signal.order] = signal
        self._look_at(signal.deadline + wait, signal)

    def _end_by_time(self, signal: Signal, event: Any, price: float | None = None) -> None:
        """End at the deadline without a level: at `price`, else at the last one seen, or without one."""
        book, at = self.books[signal.symbol], signal.deadline
        hole = at - book.known_until if price is None else 0.0
        mode = "bar" if price is not None or book.by_bars else "tick"
        if price is None and (book.seen > signal.start or signal.bars):
            price = book.exit_price(signal.buy)
        outcome = CANCELLED if signal.cancelled else TIMEOUT if price is not None else UNKNOWN
        self._end(signal, End(outcome, price, at, hole, None, mode), event)

    def _verdict(self, signal: Signal, price: float | None, target: bool) -> str:
        if price is not None and signal.entry is not None:
            risk = abs(signal.entry - signal.sl) if signal.sl is not None else 0.0
            if tidy(abs(price - signal.entry)) < max(
                self._of(signal.symbol)[1], tidy(self.settings.breakeven_r * risk)
            ):
                return BREAKEVEN
        return WIN if target else LOSS

    def _of(self, name: str) -> tuple[float, float, float]:
        found = self._figures.get(name)
        if found is None:
            symbol = self.symbols[name]
            found = self._figures[name] = float(symbol.pip), float(symbol.point) / 2, float(symbol.typical_spread)
        return found

    def _end(self, signal: Signal, end: End, event: Any) -> None:
        book = self.books[signal.symbol]
        quotes = book.seen - signal.start
        data = record(signal, end, book.extremes(signal), quotes, self._of(signal.symbol)[0], self.settings.max_gap_s)
        self.context.emit(
            "signal_outcome", data, cause=event, timestamp=event.timestamp, correlation_id=signal.signal_id
        )
        self._forget(signal, book, data)

    def _forget(self, signal: Signal, book: Book, data: dict[str, Any]) -> None:
        book.close(signal)
        del self.open[signal.signal_id]
        self._dirty[signal.order] = signal
        slot = self.totals.closed % self.settings.remember
        self.closed.pop(self._ring.get(slot, ""), None)
        self._ring[slot] = self._new_closed[slot] = signal.signal_id
        self.closed[signal.signal_id] = None
        self.totals.closed += 1
        ended, outcome = self.totals.ended, data["outcome"]
        ended[outcome] = ended.get(outcome, 0) + 1
        self.totals.ambiguous += data["ambiguous"]
        self.totals.gaps += data["gap_before_exit"]
        self._totals_changed = True
        if len(self._deadlines) > 2 * len(self.open) + 64:
            self._deadlines = [each for each in self._deadlines if each[3].live]
            heapify(self._deadlines)
            self._deadline = self._deadlines[0][0] if self._deadlines else INF

    # -- state ----------------------------------------------------------------------------------

    def save(self) -> None:
        """Write what changed since the last call: signals, books that saw a quote, ids, counters."""
        state = self.context.state
        for order, signal in self._dirty.items():
            if signal.live:
                state[f"o:{order}"] = _encode(signal)
            else:
                state.pop(f"o:{order}", None)
        for name, book in self.books.items():
            if book.seen != book.saved_quotes:
                state[f"b:{name}"] = _encode(book.saved())
                book.saved_quotes = book.seen
            if book.stacks_changed:
                state[f"s:{name}"] = _encode([(stack.keys, stack.values) for stack in book.stacks])
                book.stacks_changed = False
        for slot, signal_id in self._new_closed.items():
            state[f"c:{slot}"] = _encode((slot, signal_id))
        if self._totals_changed:
            state["t"] = _encode(self.totals)
        if self._specified:
            state["y"] = _encode(self.symbols.specifications())
            self._specified = False
        self._dirty.clear()
        self._new_closed.clear()
        self._totals_changed = False

    def _restore(self) -> None:
        state = self.context.state
        signals: list[Signal] = []
        for key in list(state):
            if key == "t":
                self.totals = _decode_totals(state[key])
            elif key == "y":
                self.symbols.restore(_decode_specifications(state[key]))
            elif key.startswith("b:"):
                book = self.books[key[2:]] = Book(key[2:], 0.0)
                stacks = state.get(f"s:{key[2:]}")
                book.restore(_decode_book(state[key]), _decode_stacks(stacks) if stacks else [])
            elif key.startswith("o:"):
                signals.append(_decode_signal(state[key]))
            elif key.startswith("c:"):
                slot, signal_id = _decode_closed(state[key])
                self._ring[slot] = signal_id
                self.closed[signal_id] = None
        for signal in sorted(signals, key=lambda each: each.order):
            self.open[signal.signal_id] = signal
            self.books[signal.symbol].track(signal)
            self._look_at(signal.deadline, signal)

    # -- figures --------------------------------------------------------------------------------

    def metrics(self) -> dict[str, int | float | str]:
        """Counters over everything followed so far; every signal is open or in exactly one of the ends."""
        totals, ended = self.totals, self.totals.ended
        return {
            "open": len(self.open),
            "opened": totals.opened,
            "resolved": sum(ended.get(outcome, 0) for outcome in (WIN, LOSS, BREAKEVEN)),
            "wins": ended.get(WIN, 0),
            "losses": ended.get(LOSS, 0),
            "breakevens": ended.get(BREAKEVEN, 0),
            "timeouts": ended.get(TIMEOUT, 0),
            "cancelled": ended.get(CANCELLED, 0),
            "unknown": ended.get(UNKNOWN, 0),
            "ambiguous": totals.ambiguous,
            "after_gaps": totals.gaps,
            "duplicates": totals.duplicates,
            "invalid": totals.invalid,
            "crossed_quotes": totals.crossed,
            "bars": totals.bars,
            "repeated_bars": totals.repeated_bars,
            "late_bars": totals.late_bars,
            "coarser_bars": totals.coarser_bars,
            "unfinished_bars": totals.unfinished_bars,
            "invalid_bars": totals.invalid_bars,
        }

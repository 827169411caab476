"""Following every signal to its end, by event time and in bus order."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

import msgspec

from tapebus.bands import Bands
from tapebus.consumer import Context
from tapebus_outcomes.book import INF, Book, Quote, Saved, Signal
from tapebus_outcomes.settings import Settings
from tapebus_outcomes.stats import BREAKEVEN, CANCELLED, LOSS, TIMEOUT, UNKNOWN, WIN, Tally, table
from tapebus_outcomes.symbols import Symbols

TOPICS = ("signal_generated", "signal_expired", "market_data", "fire_command", "trade_executed", "trade_confirmed")
_NOT_FIRED = frozenset(("FAILED", "REJECTED", "ERROR", "CANCELLED"))
_MAX_PATTERNS = 1000

_encode = msgspec.msgpack.encode
_decode_signal = msgspec.msgpack.Decoder(Signal).decode
_decode_book = msgspec.msgpack.Decoder(Saved).decode
_decode_stacks = msgspec.msgpack.Decoder(list[tuple[list[int], list[float]]]).decode
_decode_closed = msgspec.msgpack.Decoder(tuple[int, str]).decode
Hit = tuple[Any, float, bool]


class Totals(msgspec.Struct):
    """Counters kept over restarts."""

    opened: int = 0
    closed: int = 0
    duplicates: int = 0
    crossed: int = 0
    invalid: int = 0
    patterns: dict[str, Tally] = {}


_decode_totals = msgspec.msgpack.Decoder(Totals).decode


def _field(data: Any, name: str) -> Any:
    """A payload field, whether the type is registered or a plain ``dict``; None where absent."""
    return data.get(name) if type(data) is dict else getattr(data, name, None)


class Tracker:
    """All books, one clock of deadlines and the counters. Used on the consumer's thread only.

    Keys of ``context.state``: ``t`` totals, ``o:<order>`` an open signal, ``b:<symbol>`` and
    ``s:<symbol>`` a book and its stacks, ``c:<n>`` a ring of the ids of finished signals.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.settings = Settings.of(context.config)
        self.symbols = Symbols(self.settings.symbols)
        self.books: dict[str, Book] = {}
        self.open: dict[str, Signal] = {}
        self.closed: dict[str, None] = {}
        self.totals = Totals()
        self._ring: dict[int, str] = {}
        self._deadlines: list[tuple[float, int, Signal]] = []
        self._deadline = INF
        self._quiet = Bands(self.books, "symbol", "bid", "ask")
        self._dirty: dict[int, Signal] = {}
        self._new_closed: dict[int, str] = {}
        self._totals_changed = False
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
                if 0 < bid <= ask < INF and book.stretch(bid, ask):
                    book.seen += 1
                    book.time, book.last = event.timestamp, data
                    continue
            self._take(event)
            quiet.until = self._deadline

    def _take(self, event: Any) -> None:
        kind, data = event.event_type, event.data
        if kind in ("fire_command", "trade_executed", "trade_confirmed"):
            self._mark_fired(event, data)
            return
        if event.timestamp >= self._deadline:
            self._expire(event)
        if kind == "market_data":
            if self._quiet.event is None:
                self._quiet.learn(event)
            book = self.books.get(_field(data, "symbol"))
            if book is not None:
                self._quote(book, event, float(_field(data, "bid")), float(_field(data, "ask")))
        elif kind == "signal_generated":
            self._open(event, data)
        elif kind == "signal_expired":
            signal = self.open.get(_field(data, "signal_id"))
            if signal is not None:
                self._end_by_time(signal, CANCELLED, event.timestamp, event)

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
        book = self.books.get(symbol)
        if book is None:
            book = self.books[symbol] = Book(symbol, time)
        self.totals.opened += 1
        signal = Signal(
            order=self.totals.opened,
            signal_id=signal_id,
            symbol=symbol,
            buy=direction == "BUY",
            pattern_type=_field(data, "pattern_type") or "",
            confidence=_field(data, "confidence"),
            entry=_field(data, "entry"),
            sl=_field(data, "sl"),
            tp=_field(data, "tp"),
            opened_at=time,
            deadline=expires if isinstance(expires, (int, float)) else time + self.settings.max_age_s,
            start=book.seen,
        )
        self.open[signal_id] = signal
        self._dirty[signal.order] = signal
        book.open(signal)
        heappush(self._deadlines, (signal.deadline, signal.order, signal))
        self._deadline = self._deadlines[0][0]
        if not _sound(signal):
            self._end(signal, UNKNOWN, None, time, event, gap=False)

    def _quote(self, book: Book, event: Any, bid: float, ask: float) -> None:
        if not 0 < bid <= ask < INF:
            self.totals.crossed += 1
            self._totals_changed = True
            return
        time = event.timestamp
        gap = time - book.time > self.settings.max_gap_s
        book.seen += 1
        book.time, book.last = time, Quote(bid, ask)
        book.widen(bid, ask)
        if book.pending:
            self._enter(book, event, bid, ask)
        at_level = self.settings.tp_fill == "level"
        for signal, target in book.hits(bid, ask):
            if not signal.live:
                continue
            price = bid if signal.buy else ask
            level = signal.tp if target else signal.sl
            exit_price = level if target and at_level else price
            self._end(signal, self._verdict(signal, exit_price, target), exit_price, time, event, gap=gap)

    def _enter(self, book: Book, event: Any, bid: float, ask: float) -> None:
        """Give the signals without an entry the entry side of their first quote."""
        pending, book.pending = book.pending, []
        for signal in pending:
            if not signal.live:
                continue
            signal.entry = ask if signal.buy else bid
            self._dirty[signal.order] = signal
            if not _sound(signal):
                self._end(signal, UNKNOWN, None, event.timestamp, event, gap=False)

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
        """End the signals whose deadline this event's time has reached, at their deadline."""
        heap = self._deadlines
        while heap and (heap[0][0] <= event.timestamp or not heap[0][2].live):
            signal = heappop(heap)[2]
            if signal.live:
                self._end_by_time(signal, TIMEOUT, signal.deadline, event)
        self._deadline = heap[0][0] if heap else INF

    def _end_by_time(self, signal: Signal, outcome: str, at: float, event: Any) -> None:
        """End without a level: at the last price seen, or without a price when none was."""
        book = self.books[signal.symbol]
        price = None
        if book.seen > signal.start:
            price = book.last.bid if signal.buy else book.last.ask
        elif outcome == TIMEOUT:
            outcome = UNKNOWN
        self._end(signal, outcome, price, at, event, gap=at - book.time > self.settings.max_gap_s)

    def _verdict(self, signal: Signal, price: float | None, target: bool) -> str:
        if price is not None and signal.entry is not None:
            result = price - signal.entry if signal.buy else signal.entry - price
            if abs(result) < self.symbols[signal.symbol].point / 2:
                return BREAKEVEN
        return WIN if target else LOSS

    def _end(self, signal: Signal, outcome: str, price: float | None, at: float, event: Any, *, gap: bool) -> None:
        book = self.books[signal.symbol]
        symbol = self.symbols[signal.symbol]
        entry, seen = signal.entry, book.seen - signal.start
        r = pips = mfe = mae = None
        if entry is not None and seen:
            high, low = book.extremes(signal)
            up, down = (high - entry, low - entry) if signal.buy else (entry - low, entry - high)
            mfe, mae = round(max(up, 0.0), 10), round(min(down, 0.0), 10)
            if price is not None:
                result = price - entry if signal.buy else entry - price
                pips = round(result / symbol.pip, 4)
                risk = abs(entry - signal.sl) if signal.sl is not None else 0.0
                r = round(result / risk, 6) if risk > 0 else None
        closed_at = max(at, signal.opened_at)
        data = {
            "signal_id": signal.signal_id,
            "symbol": signal.symbol,
            "direction": "BUY" if signal.buy else "SELL",
            "pattern_type": signal.pattern_type,
            "confidence": signal.confidence,
            "outcome": outcome,
            "exit_price": price,
            "r": r,
            "risk_reward": _planned(signal),
            "pips": pips,
            "mfe": mfe,
            "mae": mae,
            "opened_at": signal.opened_at,
            "closed_at": closed_at,
            "duration_s": closed_at - signal.opened_at,
            "ambiguous": at < signal.opened_at,
            "gap_before_exit": gap,
            "quotes_seen": seen,
            "fired": signal.fired,
        }
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
        patterns = self.totals.patterns
        pattern = signal.pattern_type
        if pattern not in patterns and len(patterns) >= _MAX_PATTERNS:
            pattern = "(other)"
        patterns.setdefault(pattern, Tally()).add(data)
        self._totals_changed = True
        if len(self._deadlines) > 2 * len(self.open) + 64:
            self._deadlines = [each for each in self._deadlines if each[2].live]
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
        self._dirty.clear()
        self._new_closed.clear()
        self._totals_changed = False

    def _restore(self) -> None:
        state = self.context.state
        signals: list[Signal] = []
        for key in list(state):
            if key == "t":
                self.totals = _decode_totals(state[key])
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
            self._deadlines.append((signal.deadline, signal.order, signal))
        heapify(self._deadlines)
        self._deadline = self._deadlines[0][0] if self._deadlines else INF

    # -- figures --------------------------------------------------------------------------------

    def pattern_table(self) -> list[dict[str, Any]]:
        """One row per pattern over everything followed so far, open signals included."""
        tallies = {name: msgspec.structs.replace(tally) for name, tally in self.totals.patterns.items()}
        for signal in self.open.values():
            tallies.setdefault(signal.pattern_type, Tally()).add({"outcome": None, "fired": signal.fired})
        return table(tallies)

    def metrics(self) -> dict[str, int | float | str]:
        """Counters over everything followed so far."""
        tallies = self.totals.patterns.values()
        return {
            "open": len(self.open),
            "opened": self.totals.opened,
            "resolved": sum(each.wins + each.losses + each.breakevens for each in tallies),
            "wins": sum(each.wins for each in tallies),
            "losses": sum(each.losses for each in tallies),
            "timeouts": sum(each.timeouts for each in tallies),
            "cancelled": sum(each.cancelled for each in tallies),
            "unknown": sum(each.unknown for each in tallies),
            "duplicates": self.totals.duplicates,
            "invalid": self.totals.invalid,
            "crossed_quotes": self.totals.crossed,
        }


def _sound(signal: Signal) -> bool:
    """Whether stop, entry and target lie in the order the direction asks for, as far as they are known."""
    prices = [price for price in (signal.sl, signal.entry, signal.tp) if price is not None]
    in_order = prices if signal.buy else prices[::-1]
    return all(a <= b for a, b in pairwise(in_order)) and not (signal.sl is not None and signal.sl == signal.tp)


def _planned(signal: Signal) -> float | None:
    """What the target pays in multiples of the stop distance; None where a price is missing or nothing is at risk."""
    entry, sl, tp = signal.entry, signal.sl, signal.tp
    if entry is None or not sl or not tp or entry == sl:
        return None
    return round(abs(tp - entry) / abs(entry - sl), 6)

"""The two processes that trade: a signal generator and a terminal that fills, watches and closes positions."""

from __future__ import annotations

import itertools
import math
import random
import time
from typing import Any

from msgspec import Struct

from tapebus import Publisher
from tapebus_demo.child import Order, Parent, Subscription, report

#: Pattern and its target distance as a multiple of the stop distance.
PATTERNS = {
    "ORDER_BLOCK_BOUNCE": 1.5,
    "FAIR_VALUE_GAP_FILL": 1.5,
    "LIQUIDITY_SWEEP_REVERSAL": 1.5,
    "VCB_BREAKOUT": 1.2,
    "KALMAN_QUICKFIRE": 0.8,
    "BB_SCALP": 0.7,
}
#: Seconds a signal is good for.
LIFETIME_S = 5.0
#: Every so many signals one has its stop inside the spread, and every so many fires one is refused.
BAD_STOP_EVERY, REFUSE_EVERY = 17, 9
BAD_STOP = "STOP_INSIDE_SPREAD"
TERMINAL, USER, BALANCE = "demo-terminal", "demo-user", 10_000.0


class Track:
    """The last quote of one symbol and how much its price moves."""

    def __init__(self) -> None:
        self.bid = self.ask = 0.0
        self._at = 0.0
        self._square = self._gap = 0.0

    def quote(self, bid: float, ask: float, at: float) -> None:
        if self._at:
            # Moves and gaps are averaged apart: their single ratios run wild when two quotes come together.
            move = (bid + ask - self.bid - self.ask) / 2
            self._square += 0.05 * (move * move - self._square)
            self._gap += 0.05 * (max(0.0, at - self._at) - self._gap)
        self.bid, self.ask, self._at = bid, ask, at

    def stop_distance(self) -> float:
        """The usual move of a quarter of a second, but never within the noise of the spread."""
        per_second = self._square / self._gap if self._gap > 0 else 0.0
        return max(4 * (self.ask - self.bid), 0.5 * math.sqrt(per_second))


def generate_signals(order: Order, parent: Parent) -> None:
    """Signals drawn at random from a seed: a pattern has no edge here, whatever its interval may suggest."""
    draw = random.Random(order.seed)
    feed = Subscription(order.feed, "market_data")
    tracks: dict[str, Track] = {}
    with Publisher("demo-signals", order.endpoint) as publisher:
        if parent.wait_for_go():
            due = time.monotonic() + 0.8
            for n in itertools.count(1):
                while (left := due - time.monotonic()) > 0 and not parent.gone:
                    _watch(feed.receive(min(left, 0.02)), tracks)
                    parent.wait(0.0)
                if parent.gone:
                    break
                due += draw.uniform(0.5, 1.5) / order.amount
                if tracks:
                    signal = _signal(n, order.seed, draw, tracks)
                    publisher.publish("signal_generated", signal, signal["signal_id"])
        publisher.flush(5.0)
        report(publisher.stats())
    feed.close()


def _watch(envelopes: list[dict[str, Any]], tracks: dict[str, Track]) -> None:
    for envelope in envelopes:
        data = envelope["data"]
        if data["ask"] >= data["bid"]:
            tracks.setdefault(data["symbol"], Track()).quote(data["bid"], data["ask"], envelope["timestamp"])


def _signal(n: int, seed: int, draw: random.Random, tracks: dict[str, Track]) -> dict[str, Any]:
    symbol = draw.choice(sorted(tracks))
    track = tracks[symbol]
    pattern = draw.choice(list(PATTERNS))
    buy = draw.random() < 0.5
    entry, sign = (track.ask, 1) if buy else (track.bid, -1)
    stop = track.stop_distance()
    target = max(PATTERNS[pattern] * stop, 2.5 * (track.ask - track.bid))
    if n % BAD_STOP_EVERY == 0:
        # Under a name of its own: in multiples of so small a stop every result is huge.
        stop, pattern = 0.5 * (track.ask - track.bid), BAD_STOP
    return {
        "signal_id": f"DEMO_{seed}_{n:04d}",
        "symbol": symbol,
        "direction": "BUY" if buy else "SELL",
        "confidence": round(draw.uniform(72.0, 95.0), 1),
        "pattern_type": pattern,
        "entry": entry,
        "sl": round(entry - sign * stop, 6),
        "tp": round(entry + sign * target, 6),
        "expires_at": time.time() + LIFETIME_S,
    }


class Held(Struct):
    """A position the terminal holds."""

    fire_id: str
    ticket: int
    symbol: str
    direction: str
    volume: float
    open_price: float
    sl: float
    tp: float
    open_time: float

    def reached(self, price: float) -> str:
        """``SL_HIT`` or ``TP_HIT`` when `price`, of the side that closes, is there; else empty."""
        sign = 1 if self.direction == "BUY" else -1
        if sign * (price - self.sl) <= 0:
            return "SL_HIT"
        return "TP_HIT" if sign * (price - self.tp) >= 0 else ""


class Terminal:
    """Answers fires, closes positions at stop and target, and reports complete snapshots."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._tracks: dict[str, Track] = {}
        self._held: dict[int, Held] = {}
        self._correlation: dict[int, str | None] = {}
        self._fires = 0
        self.balance = BALANCE

    def take(self, envelope: dict[str, Any]) -> None:
        data = envelope["data"]
        if envelope["event_type"] == "fire_command":
            self._fire(data, envelope.get("correlation_id"))
        elif data["ask"] >= data["bid"]:
            _watch([envelope], self._tracks)
            for held in [each for each in self._held.values() if each.symbol == data["symbol"]]:
                price = data["bid"] if held.direction == "BUY" else data["ask"]
                if reason := held.reached(price):
                    self._close(held, price, reason)

    def _fire(self, data: dict[str, Any], correlation: str | None) -> None:
        self._fires += 1
        track = self._tracks.get(data["symbol"])
        common = {"fire_id": data["fire_id"], "symbol": data["symbol"], "target_uuid": TERMINAL}
        if track is None or self._fires % REFUSE_EVERY == 0:
            answer = {**common, "status": "REJECTED", "retcode": 10019, "message": "not enough money (simulated)"}
            self._publisher.publish("trade_executed", answer, correlation, user_id=USER)
            return
        ticket = 5_000_000 + self._fires
        price = track.ask if data["direction"] == "BUY" else track.bid
        held = Held(
            data["fire_id"],
            ticket,
            data["symbol"],
            data["direction"],
            data["lot"],
            price,
            data["sl"],
            data["tp"],
            time.time(),
        )
        self._held[ticket], self._correlation[ticket] = held, correlation
        answer = {**common, "ticket": ticket, "position_id": ticket, "direction": held.direction, "volume": held.volume}
        answer |= {"price": price, "status": "FILLED", "retcode": 10009, "execution_time": held.open_time}
        self._publisher.publish("trade_executed", answer, correlation, user_id=USER)

    def _close(self, held: Held, price: float, reason: str) -> None:
        del self._held[held.ticket]
        risk = abs(held.open_price - held.sl) or 1.0
        moved = price - held.open_price if held.direction == "BUY" else held.open_price - price
        profit = round(0.01 * BALANCE * moved / risk, 2)
        self.balance = round(self.balance + profit, 2)
        data = {
            "ticket": held.ticket,
            "position_id": held.ticket,
            "fire_id": held.fire_id,
            "symbol": held.symbol,
            "volume": held.volume,
            "close_price": price,
            "profit": profit,
            "reason": reason,
            "target_uuid": TERMINAL,
        }
        self._publisher.publish("position_closed", data, self._correlation.pop(held.ticket), user_id=USER)

    def heartbeat(self) -> None:
        """The account with every open position; the gate knows the account from here."""
        names = ("fire_id", "ticket", "symbol", "direction", "volume", "open_price", "open_time")
        positions = [
            {name: getattr(held, name) for name in names} | {"position_id": held.ticket} for held in self._held.values()
        ]
        account = {"target_uuid": TERMINAL, "balance": self.balance, "equity": self.balance}
        data = {**account, "open_positions": len(positions), "positions": positions}
        self._publisher.publish("ea_heartbeat", data, user_id=USER)


def run_terminal(order: Order, parent: Parent) -> None:
    """The simulated broker's side, fed by the live feed like any other subscriber."""
    feed = Subscription(order.feed, "market_data", "fire_command")
    with Publisher(TERMINAL, order.endpoint) as publisher:
        terminal = Terminal(publisher)
        if parent.wait_for_go():
            beat = 0.0
            while not parent.wait(0.0):
                if time.monotonic() >= beat:
                    terminal.heartbeat()
                    beat = time.monotonic() + 0.5
                for envelope in feed.receive(0.02):
                    terminal.take(envelope)
        publisher.flush(5.0)
        report(publisher.stats())
    feed.close()

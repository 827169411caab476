"""An hour of a trading desk against a running bus: quotes, signals, and two terminals that answer the orders.

    TAPEBUS_PLUGINS_SLOTS_MAX_LATENESS_S=1e12 tapebus run --config tapebus.toml   # in one terminal, on a fresh tape
    python day.py                                                                 # in another

Everything has the time of a recorded morning, so the commands on the page "The trading desk" show the same figures
each time; the variable lets the gate fire signals that are that late.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import zmq

from tapebus import Publisher

START = datetime(2026, 11, 17, 8, tzinfo=UTC).timestamp()
FEED = os.environ.get("TAPEBUS_LISTEN_FEED", "tcp://127.0.0.1:5570")
PATIENCE_S = 10.0
#: Terminal -> balance; who trades there stands in tapebus.toml.
BALANCES = {"NORTH_1": 10_000.0, "SOUTH_1": 5_000.0, "SOUTH_2": 2_000.0}
MARKET = {
    "EURUSD": (1.08500, 1.08512),
    "XAGUSD": (31.200, 31.220),
    "XAUUSD": (2650.10, 2650.40),
    "GBPUSD": (1.26800, 1.26815),
    "USDJPY": (154.300, 154.312),
}


class Feed:
    """What the bus publishes, as a bridge to a terminal hears it."""

    def __init__(self, publisher: Publisher) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self.socket.connect(FEED)
        self.socket.subscribe(b"")
        for _ in range(int(PATIENCE_S * 10)):  # a subscription takes a moment; what was sent before it is not heard
            publisher.publish("system_health", {"component": "desk", "status": "starting"}, timestamp=START - 1)
            if self.socket.poll(timeout=100):
                return
        raise SystemExit(f"nothing is heard at {FEED}: does the bus run?")

    def until(self, topic: str, number: int) -> Iterator[dict[str, Any]]:
        """Events until the `number`-th of type `topic`."""
        while number:
            if not self.socket.poll(timeout=int(PATIENCE_S * 1000)):
                raise SystemExit(f"no {topic} within {PATIENCE_S:g} s: does tapebus.toml belong to this bus?")
            event = json.loads(self.socket.recv_multipart()[1])
            number -= event["event_type"] == topic
            yield event


class Desk:
    """The morning: a clock, prices, and the positions each terminal holds."""

    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher
        self.feed = Feed(publisher)
        self.now = START
        self.tickets = 1000
        self.held: dict[str, list[dict[str, Any]]] = {terminal: [] for terminal in BALANCES}
        self.profit = dict.fromkeys(BALANCES, 0.0)

    def say(self, topic: str, data: dict[str, Any], **envelope: Any) -> None:
        self.publisher.publish(topic, data, timestamp=self.now, **envelope)

    def at(self, minutes: float, **moved: tuple[float, float]) -> None:
        """Go on to `minutes` after the start: prices first, then each terminal's heartbeat."""
        self.now = START + minutes * 60
        MARKET.update(moved)
        for symbol, (bid, ask) in MARKET.items():
            self.say("market_data", {"symbol": symbol, "bid": bid, "ask": ask})
        for terminal, balance in BALANCES.items():
            money = balance + self.profit[terminal]
            body = {"target_uuid": terminal, "balance": money, "equity": money, "positions": self.held[terminal]}
            self.say("ea_heartbeat", {**body, "open_positions": len(self.held[terminal])})

    def signal(self, name: str, side: str, confidence: float, pattern: str, entry: float, sl: float, tp: float) -> None:
        """Publish a signal, wait for the verdict of each user it is judged for, and let the terminals answer."""
        symbol = name.partition("_")[0]
        levels = {"entry": entry, "sl": sl, "tp": tp}
        body = {"signal_id": name, "symbol": symbol, "direction": side, "confidence": confidence}
        self.say("signal_generated", {**body, "pattern_type": pattern, **levels}, correlation_id=name)
        heard = list(self.feed.until("gate_verdict", 2))
        fires = sum(each["data"]["fire"] for each in heard if each["event_type"] == "gate_verdict")
        orders = [each["data"] for each in heard if each["event_type"] == "fire_command"]
        if len(orders) < fires:
            rest = self.feed.until("fire_command", fires - len(orders))
            orders += [each["data"] for each in rest if each["event_type"] == "fire_command"]
        for order in orders:
            self.answer(order)

    def answer(self, order: dict[str, Any]) -> None:
        """What a terminal makes of an order; SOUTH_1 has no money for dollar-yen."""
        terminal = order["target_uuid"]
        body = {"fire_id": order["fire_id"], "signal_id": order["signal_id"], "target_uuid": terminal}
        self.now += 0.25
        if order["symbol"] == "USDJPY" and terminal == "SOUTH_1":
            refused = {"status": "REJECTED", "retcode": 10019, "message": "not enough money"}
            self.say("trade_executed", {**body, **refused}, correlation_id=order["fire_id"])
            self.wait("slot_released")
            return
        self.tickets += 1
        bid, ask = MARKET[order["symbol"]]
        price = ask if order["direction"] == "BUY" else bid
        filled = {"symbol": order["symbol"], "direction": order["direction"], "volume": order["lot"]}
        body |= {**filled, "ticket": self.tickets, "price": price, "status": "FILLED"}
        self.say("trade_executed", body, correlation_id=order["fire_id"])
        self.held[terminal].append({**filled, "ticket": self.tickets, "open_price": price, "fire_id": order["fire_id"]})
        self.wait("slot_opened")

    def close(self, symbol: str, reason: str, price: float, profits: dict[str, float]) -> None:
        """Each terminal closes what it holds of `symbol` at `price`, with the profit its statement shows."""
        for terminal, profit in profits.items():
            gone = next(each for each in self.held[terminal] if each["symbol"] == symbol)
            self.held[terminal].remove(gone)
            self.profit[terminal] += profit
            body = {key: gone[key] for key in ("ticket", "symbol", "volume", "fire_id")}
            body |= {"close_price": price, "profit": profit, "reason": reason, "target_uuid": terminal}
            self.say("position_closed", body, correlation_id=gone["fire_id"])
            self.wait("slot_released")

    def wait(self, topic: str) -> None:
        """Wait for one event, so that everything comes in the same order each time."""
        list(self.feed.until(topic, 1))


def play(publisher: Publisher) -> None:
    desk = Desk(publisher)
    desk.at(0)
    desk.signal("EURUSD_1", "BUY", 84.0, "SWEEP", 1.08512, 1.08312, 1.08912)
    desk.at(2)
    desk.signal("XAGUSD_1", "BUY", 90.0, "SWEEP", 31.220, 31.020, 31.620)
    desk.at(4)
    desk.signal("XAUUSD_1", "BUY", 86.0, "BREAKOUT", 2650.40, 2650.20, 2655.40)
    desk.at(6)
    desk.wait("signal_outcome")  # its stop is closer than the spread: the next quote is a loss
    desk.signal("GBPUSD_1", "SELL", 91.0, "BREAKOUT", 1.26800, 1.27000, 1.26400)
    desk.at(20, EURUSD=(1.08915, 1.08927))
    desk.wait("signal_outcome")
    desk.close("EURUSD", "TP", 1.08915, {"NORTH_1": 403.0, "SOUTH_1": 100.75})
    desk.at(22)
    desk.signal("USDJPY_1", "SELL", 82.0, "BREAKOUT", 154.300, 154.500, 153.900)
    desk.at(40, XAGUSD=(31.010, 31.030))
    desk.wait("signal_outcome")
    desk.close("XAGUSD", "SL", 31.010, {"NORTH_1": -210.0, "SOUTH_1": -52.5})
    desk.at(45)
    desk.say("user_action", {"action": "kill_switch_on", "user_id": "7001"})
    desk.wait("alert")
    desk.signal("EURUSD_2", "BUY", 85.0, "SWEEP", 1.08927, 1.08727, 1.09327)
    desk.at(46)
    if not publisher.flush(timeout=PATIENCE_S):
        raise SystemExit("the bus does not take events any more")


if __name__ == "__main__":
    with Publisher(source="desk") as publisher:
        play(publisher)

"""``python -m tapebus_demo.producer ORDER``: one process that publishes to the bus, and nothing else."""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import zmq

from tapebus import Publisher
from tapebus.replay import Recording
from tapebus_demo.child import Order, Parent, report
from tapebus_demo.market import INSTRUMENTS, Market, Quote
from tapebus_demo.probe import TOPIC
from tapebus_demo.trading import generate_signals, run_terminal

#: Seconds between two rounds of the market process; each round carries one probe.
ROUND_S = 0.005
#: Every so many simulated quotes one is crossed (ask below bid), which real feeds do as well.
CROSSED_EVERY = 3000
#: Events in flight at which the burst waits: well below the capacity of a publisher, so none is dropped.
WINDOW = 32_768
#: Every so many messages of the unsequenced process one is no JSON at all.
BROKEN_EVERY = 25


def publish_market(order: Order, parent: Parent) -> None:
    """Quotes at the pace of the order, or of a recording pressed into ``seconds``, with probes in between."""
    due = _recorded(order) if order.ticks else _simulated(order)
    with Publisher("demo-market", order.endpoint) as publisher:
        if not parent.wait_for_go():
            return
        began = time.monotonic()
        crossed = 0
        for n in itertools.count():
            if parent.wait_until(began + n * ROUND_S):
                break
            for quote in due(time.monotonic() - began):
                crossed += quote.ask < quote.bid
                publisher.publish("market_data", quote._asdict())
            publisher.publish(TOPIC, {"n": n})
        publisher.flush(5.0)
        report({**publisher.stats(), "crossed": crossed})


def _simulated(order: Order) -> Callable[[float], Iterator[Quote]]:
    market, sent = Market(order.seed), 0

    def due(elapsed: float) -> Iterator[Quote]:
        nonlocal sent
        while sent < elapsed * order.amount:
            sent += 1
            quote = market.next()
            yield quote if sent % CROSSED_EVERY else Quote(quote.symbol, quote.ask, quote.bid)

    return due


def _recorded(order: Order) -> Callable[[float], Iterator[Quote]]:
    """The quotes of a recording, its whole span pressed into ``seconds``; stamped with the time they are sent."""
    records = [each for each in Recording(Path(order.ticks)) if each.event_type == "market_data"]
    first = records[0].timestamp if records else 0.0
    speed = max(1e-9, (records[-1].timestamp - first) / order.seconds) if records else 1.0
    place = 0

    def due(elapsed: float) -> Iterator[Quote]:
        nonlocal place
        while place < len(records) and records[place].timestamp - first <= elapsed * speed:
            data = records[place].data
            place += 1
            yield Quote(data["symbol"], data["bid"], data["ask"])

    return due


def publish_burst(order: Order, parent: Parent) -> None:
    """``amount`` quotes as fast as they go, made before so that only publishing is measured."""
    market = Market(order.seed)
    quotes = [market.next() for _ in range(order.amount)]
    with Publisher("demo-burst", order.endpoint) as publisher:
        publisher.publish("system_health", {"component": "demo-burst", "status": "started"})
        publisher.flush(5.0)
        if not parent.wait_for_go():
            return
        began = time.monotonic()
        publish = publisher.publish
        for n, (symbol, bid, ask) in enumerate(quotes):
            if n % 1024 == 0:
                while publisher.stats()["in_flight"] > WINDOW:
                    if parent.wait(0.001):
                        return
            publish("market_data", {"symbol": symbol, "bid": bid, "ask": ask})
        done = publisher.flush(20.0)
        ended = time.monotonic()
        report({**publisher.stats(), "began": began, "ended": ended, "done": done})


def publish_unsequenced(order: Order, parent: Parent) -> None:
    """A program that knows nothing of tapebus: plain JSON through a PUSH socket, now and then broken."""
    draw = random.Random(order.seed)
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(order.endpoint)
    sent = broken = 0
    if parent.wait_for_go():
        while not parent.wait(1.0 / order.amount):
            if (sent + broken + 1) % BROKEN_EVERY == 0:
                socket.send(b'{"event_type": "user_action", "data": {')
                broken += 1
                continue
            symbol = draw.choice(INSTRUMENTS).symbol
            data = {"action": "view_chart", "user_id": str(draw.randint(1, 40)), "details": {"symbol": symbol}}
            event = {"event_type": "user_action", "timestamp": time.time(), "source": "demo-webapp", "data": data}
            socket.send(json.dumps(event).encode())
            sent += 1
    socket.close()
    context.term()
    report({"published": sent, "broken": broken})


ROLES: dict[str, Callable[[Order, Parent], None]] = {
    "market": publish_market,
    "signals": generate_signals,
    "terminal": run_terminal,
    "webapp": publish_unsequenced,
    "burst": publish_burst,
}


def main() -> None:
    order = msgspec.json.decode(sys.argv[1], type=Order)
    ROLES[order.role](order, Parent())


if __name__ == "__main__":
    main()

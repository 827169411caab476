"""The events of the benchmarks and the processes that send them."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

SYMBOLS = (
    *("EURUSD", "GBPUSD", "USDJPY", "XAUUSD", "USDCNH", "AUDUSD", "NZDUSD", "USDCAD"),
    *("EURJPY", "GBPJPY", "EURAUD", "XAGUSD", "USDCHF", "EURGBP", "AUDJPY", "USDMXN"),
)
DISTINCT = 5000
#: Events a producer keeps in flight at most, so that nothing is dropped for want of memory.
WINDOW = 40_000


def mix(seed: int) -> list[tuple[str, dict[str, Any], str | None]]:
    """``(event_type, data, correlation_id)``: 90 % quotes, 0.2 % signals, the rest user actions."""
    draw = random.Random(seed)
    out: list[tuple[str, dict[str, Any], str | None]] = []
    for i in range(DISTINCT):
        symbol = SYMBOLS[i % len(SYMBOLS)]
        bid = round(1.1 + draw.random() / 100, 5)
        kind = draw.random()
        if kind < 0.9:
            quote = {"symbol": symbol, "bid": bid, "ask": round(bid + 0.0002, 5), "volume": i % 50}
            out.append(("market_data", quote, None))
        elif kind < 0.902:
            name = f"BENCH_{seed}_{i}"
            signal = {"signal_id": name, "symbol": symbol, "direction": "BUY", "confidence": 85.0}
            levels = {"pattern_type": "KALMAN_QUICKFIRE", "entry": 1.1, "sl": 0.9, "tp": 1.3}
            out.append(("signal_generated", {**signal, **levels}, name))
        else:
            out.append(("user_action", {"user_id": f"u{i % 10}", "action": "click"}, None))
    return out


def publisher(endpoint: str, count: int, seed: int) -> None:
    """`count` events through `tapebus.Publisher`, acknowledged."""
    from tapebus import Publisher

    events = mix(seed)
    pub = Publisher("bench", endpoint)
    sent = 0
    while sent < count:
        event_type, data, correlation_id = events[sent % DISTINCT]
        if pub.publish(event_type, data, correlation_id):
            sent += 1
        if sent % 1000 == 0:
            while pub.stats()["in_flight"] > WINDOW:
                pub.flush(0.002)
    done = pub.flush(120.0) and not pub.stats()["dropped"]
    pub.close()
    sys.exit(0 if done else "the publisher lost events")


def push(endpoint: str, count: int, seed: int, as_json: bool) -> None:
    """`count` single-event frames through a plain PUSH socket."""
    import msgspec
    import zmq

    frames = []
    for event_type, data, correlation_id in mix(seed):
        event = {"event_type": event_type, "timestamp": time.time(), "source": "bench", "data": data}
        if correlation_id is not None:
            event["correlation_id"] = correlation_id
        frames.append(json.dumps(event).encode() if as_json else msgspec.msgpack.encode(event))
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 10_000)
    socket.connect(endpoint)
    for i in range(count):
        socket.send(frames[i % DISTINCT])
    socket.close()
    zmq.Context.instance().term()


def paced(endpoint: str, count: int) -> None:
    """One event a millisecond; prints the cost of the publish calls in µs as JSON."""
    from tapebus import Publisher

    costs = {}
    with Publisher("bench", endpoint) as pub:
        pub.publish("user_action", {"user_id": "u", "action": "warm"})
        pub.flush(5.0)
        spent = []
        for _ in range(count):
            begun = time.perf_counter()
            pub.publish("user_action", {"user_id": "u", "action": "paced"})
            spent.append(time.perf_counter() - begun)
            time.sleep(0.001)
        pub.flush(5.0)
        costs["paced"] = sorted(spent)
        spent = []
        for _ in range(20):
            for _ in range(1000):
                begun = time.perf_counter()
                pub.publish("user_action", {"user_id": "u", "action": "burst"})
                spent.append(time.perf_counter() - begun)
            pub.flush(5.0)
        costs["burst"] = sorted(spent)
    sys.stdout.write(json.dumps({k: [v[int(len(v) * q)] * 1e6 for q in (0.5, 0.99, 0.999)] for k, v in costs.items()}))


if __name__ == "__main__":
    kind, endpoint, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if kind == "publisher":
        publisher(endpoint, count, os.getpid())
    elif kind == "paced":
        paced(endpoint, count)
    else:
        push(endpoint, count, os.getpid(), kind == "json")

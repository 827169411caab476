"""A process that sends, and tells in one JSON line what became of it.

``traffic.py paced|flood ENDPOINT SOURCE SECONDS RATE BYTES`` publishes through a `Publisher`, at RATE events per
second or flat out; ``push`` sends frames of BYTES bytes flat out to the fire-and-forget port. Begins when a line
comes on standard input.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import zmq

from tapebus import Publisher


def quote(n: int, size: int) -> dict[str, Any]:
    return {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2, "volume": float(n), "note": "x" * size}


def paced(publisher: Publisher, seconds: float, rate: int, size: int) -> tuple[int, float]:
    """How many were sent, and how many of them were acknowledged per second after the first third."""
    pause = threading.Event()
    began = time.monotonic()
    sent = early = 0
    early_at = 0.0
    while (passed := time.monotonic() - began) < seconds:
        while sent < passed * rate:
            sent += 1
            publisher.publish("market_data", quote(sent, size))
        if not early_at and passed > seconds / 3:
            early, early_at = publisher.stats()["acked"], passed
        pause.wait(0.002)
    return sent, (publisher.stats()["acked"] - early) / (time.monotonic() - began - early_at)


def flood(publisher: Publisher, seconds: float, size: int) -> int:
    ends = time.monotonic() + seconds
    sent = 0
    payload = quote(0, size)
    while time.monotonic() < ends:
        for _ in range(100):
            publisher.publish("market_data", payload)
        sent += 100
    return sent


def through_publisher(kind: str, endpoint: str, source: str, seconds: float, rate: int, size: int) -> dict[str, Any]:
    with Publisher(source, endpoint=endpoint) as publisher:
        assert publisher.publish("market_data", quote(0, size)) and publisher.flush(30.0)
        sys.stdin.readline()
        began = time.monotonic()
        acked_per_s = 0.0
        if kind == "flood":
            sent = flood(publisher, seconds, size)
        else:
            sent, acked_per_s = paced(publisher, seconds, rate, size)
        passed = time.monotonic() - began
        publisher.flush(120.0)
        return {"sent": sent, "seconds": passed, "acked_per_s": acked_per_s, **publisher.stats()}


def through_push(endpoint: str, source: str, seconds: float, size: int) -> dict[str, Any]:
    event = {"event_type": "market_data", "timestamp": 1.7e9, "source": source, "data": quote(0, 0)}
    frame = json.dumps(event | {"note": "x" * max(0, size - 200)}).encode()
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.linger = 60_000
        socket.connect(endpoint)
        socket.send(frame)
        sys.stdin.readline()
        began = time.monotonic()
        sent, longest = 1, 0.0
        while (now := time.monotonic()) - began < seconds:
            socket.send(frame)
            longest = max(longest, time.monotonic() - now)
            sent += 1
        return {"sent": sent, "seconds": time.monotonic() - began, "longest_send_s": longest, "bytes": len(frame)}


if __name__ == "__main__":
    kind, endpoint, source = sys.argv[1:4]
    seconds, rate, size = float(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])
    if kind == "push":
        result = through_push(endpoint, source, seconds, size)
    else:
        result = through_publisher(kind, endpoint, source, seconds, rate, size)
    print(json.dumps(result))

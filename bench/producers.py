"""The processes that send the events of a benchmark: ``python -m bench.producers KIND ENDPOINT COUNT``."""

from __future__ import annotations

import json
import os
import sys
import time

from bench.load import DISTINCT, envelope, laps, mix

#: Events a producer keeps in flight at most, so that nothing is dropped for want of memory.
WINDOW = 40_000


def publisher(endpoint: str, count: int, seed: int) -> None:
    """`count` events through `tapebus.Publisher`, acknowledged."""
    from tapebus import Publisher

    events = mix(seed, min(count, DISTINCT))
    pub = Publisher("bench", endpoint)
    for sent, (event_type, data, correlation_id) in enumerate(laps(events, count), 1):
        while not pub.publish(event_type, data, correlation_id):
            pub.flush(0.002)
        if sent % 1000 == 0:
            while pub.stats()["in_flight"] > WINDOW:
                pub.flush(0.002)
    done = pub.flush(120.0)
    pub.close()
    sys.exit(0 if done else "the publisher lost events")


def push(endpoint: str, count: int, seed: int, as_json: bool) -> None:
    """`count` single-event frames through a plain PUSH socket."""
    import msgspec
    import zmq

    encode = (lambda event: json.dumps(event).encode()) if as_json else msgspec.msgpack.encode
    frames = [encode(envelope(event)) for event in mix(seed, min(count, DISTINCT))]
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 10_000)
    socket.connect(endpoint)
    for i in range(count):
        socket.send(frames[i % len(frames)])
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

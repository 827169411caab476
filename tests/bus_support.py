"""Parts of tests that run a bus: an embedded one, small plugins, plain ZeroMQ clients, waiting with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

from tapebus import Config, Consumer, Publisher, Runtime, Tape, hookimpl

#: Seconds: an upper bound for a loaded machine, never a claim about speed.
PATIENCE = 30.0


def wait_until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """The first true value of `condition`; fails naming `what` when there is none."""
    pause = threading.Event()
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        pause.wait(0.005)
    pytest.fail(f"waited in vain for {what}")


def plugin(*consumers: Consumer, **hooks: Any) -> Any:
    """A plugin made of ready consumers."""

    @hookimpl
    def tapebus_register_consumers(context: Any) -> list[Consumer]:
        return list(consumers)

    return SimpleNamespace(tapebus_register_consumers=tapebus_register_consumers, **hooks)


class Seen:
    """A handler that notes ``(bus_seq, event)`` of all it gets."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __call__(self, batch: Any) -> None:
        for event in batch:
            self.events.append(event)

    @property
    def seqs(self) -> list[int]:
        return [event.bus_seq for event in self.events]


class Embedded:
    """A `Runtime` in this process with its own ports, and clients for it."""

    def __init__(self, config: Config, plugins: list[tuple[str, Any]]) -> None:
        self.config = config
        self.data_dir = config.data_dir
        self.feed, self.ingest = config.listen.feed, config.listen.ingest
        self.acked = config.acked_endpoints[0]
        self.runtime = Runtime(config, plugins)

    def start(self) -> Embedded:
        self.runtime.start()
        return self

    def stop(self) -> None:
        self.runtime.stop()

    def publisher(self, source: str = "test", **options: Any) -> Publisher:
        return Publisher(source, endpoint=self.acked, **options)

    def publish(self, count: int, first: int = 0, event_type: str = "market_data") -> None:
        """`count` quotes whose volume is their number from `first`; returns when they are on the tape."""
        with self.publisher() as publisher:
            for n in range(first, first + count):
                assert publisher.publish(event_type, quote(n), timestamp=1_700_000_000.0 + n)
            assert publisher.flush(PATIENCE)

    def consumer(self, name: str) -> Any:
        return next(each for each in self.runtime.stats()["consumers"] if each["name"] == name)

    def tape(self) -> Tape:
        return Tape.open(self.data_dir)

    def request(self, command: str, **arguments: Any) -> Any:
        from tapebus.control import request

        return request(self.config, {"cmd": command, **arguments}, timeout=PATIENCE)


def quote(n: int) -> dict[str, Any]:
    return {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2, "volume": float(n)}


@contextmanager
def pushing(endpoint: str) -> Iterator[Callable[[bytes], None]]:
    """A plain PUSH client; ``send(frame)``."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.LINGER, int(PATIENCE * 1000))
        socket.setsockopt(zmq.SNDTIMEO, int(PATIENCE * 1000))
        socket.connect(endpoint)
        yield socket.send


@contextmanager
def listening(runtime: Runtime | None, endpoint: str, *prefixes: bytes) -> Iterator[Any]:
    """A plain SUB client whose subscriptions the bus has seen (asked of `runtime` where there is one)."""
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 1_000_000)
        socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
        for prefix in prefixes:
            socket.subscribe(prefix)
        socket.connect(endpoint)
        if runtime is not None:
            wait_until(lambda: set(prefixes) <= set(runtime.feed._subscriptions), "the feed to know the subscriptions")
        yield socket


def feed_messages(socket: Any, count: int) -> list[tuple[str, dict[str, Any]]]:
    """The next `count` messages as (topic, event)."""
    found = []
    for _ in range(count):
        try:
            topic, body = socket.recv_multipart()
        except zmq.Again:
            pytest.fail(f"the feed fell silent after {len(found)} of {count} messages")
        found.append((topic.decode(), msgspec.json.decode(body)))
    return found

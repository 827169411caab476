"""Beside every attack: an honest producer, and the proof that each of its events is on the tape once and in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bus_support import PATIENCE, quote
from tapebus import Publisher, Tape


class Honest(threading.Thread):
    """Publishes quotes whose volume counts from 0 until it is told to end; `published` of them in the end."""

    def __init__(self, endpoint: str, pace_s: float) -> None:
        super().__init__(name="honest", daemon=True)
        self.published = 0
        self.refused = 0
        self.flushed = False
        self._endpoint = endpoint
        self._pace = pace_s
        self.ended = threading.Event()

    def run(self) -> None:
        with Publisher("honest", endpoint=self._endpoint) as publisher:
            while not self.ended.wait(self._pace):
                for _ in range(10):
                    stamp = 1_700_000_000.0 + self.published
                    if publisher.publish("market_data", quote(self.published), timestamp=stamp):
                        self.published += 1
                    else:
                        self.refused += 1
            self.flushed = publisher.flush(PATIENCE)


@contextmanager
def honest(bus: Any, pace_s: float = 0.005) -> Iterator[Honest]:
    """An `Honest` producer for the time of the block; afterwards all it published is acknowledged."""
    producer = Honest(bus.acked, pace_s)
    producer.start()
    try:
        yield producer
    finally:
        producer.ended.set()
        producer.join(2 * PATIENCE)
    assert producer.flushed and producer.refused == 0
    assert producer.published


def in_order(bus: Any, published: int) -> None:
    """All events of the honest producer are on the tape, each once, in order."""
    with Tape.open(bus.data_dir) as tape:
        volumes = [each.data.volume for each in tape.read(topics=["market_data"]) if each.source == "honest"]
    assert volumes == list(range(published))

"""The latency probe: an extra plugin of the demo's runtime, and its event type."""

from __future__ import annotations

import time
from typing import Any

from msgspec import Struct

from tapebus.consumer import Consumer, Context
from tapebus.events import EventType
from tapebus.hookspecs import hookimpl

TOPIC = "demo.probe"


class Probe(Struct, frozen=True):
    """A numbered event whose only purpose is its way through the bus."""

    n: int


class LatencyProbe:
    """Notes now - timestamp of each probe; both clocks are this machine's, so the difference is the latency."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @hookimpl
    def tapebus_register_event_types(self) -> list[EventType]:
        return [EventType(TOPIC, Probe, doc="measures publish to plugin")]

    @hookimpl
    def tapebus_register_consumers(self, context: Context) -> list[Consumer]:
        return [Consumer(name="latency", topics=(TOPIC,), handler=self._handle)]

    def _handle(self, batch: Any) -> None:
        now = time.time()
        for event in batch:
            self.seconds.append(now - event.timestamp)

    def percentile(self, fraction: float) -> float | None:
        """The latency in milliseconds that `fraction` of the probes did not exceed (nearest rank)."""
        ordered = sorted(self.seconds)
        if not ordered:
            return None
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] * 1e3

"""Plugins that the benchmarks add to a bus: they count, check, measure, emit or are slow."""

from __future__ import annotations

import time
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import msgspec
from bench.load import digest_seen

from tapebus import Consumer, hookimpl
from tapebus.events import EventType

SENT = ("market_data", "signal_generated", "user_action")
#: Whether a consumer can ask for events before they are on disk.
EARLY = "deliver" in Consumer.__struct_fields__


class Stage(msgspec.Struct, frozen=True, gc=False):
    """What the middle of a pipeline emits for a quote."""

    number: int
    bid: float


class Probe:
    """One plugin with one consumer; `figures` is what it tells the harness."""

    topics: tuple[str, ...] = SENT
    types: tuple[EventType, ...] = ()

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        self.options = options

    def consumers(self, context: Any) -> list[Consumer]:
        return [Consumer(name=self.name, topics=self.topics, handler=self.handle, **self.options)]

    def handle(self, batch: Any) -> None:
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        return {}


class Tally(Probe):
    """Count and digest of each producer's events."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.seen: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def handle(self, batch: Any) -> None:
        for event in batch:
            if event.source.startswith("bench"):
                seen = self.seen[event.source]
                seen[0] += 1
                seen[1] = digest_seen(seen[1], event)

    def figures(self) -> dict[str, Any]:
        return {"seen": self.seen}


class Quotes(Probe):
    """A small plugin as there are many: looks at each quote and keeps a figure."""

    topics = ("market_data",)

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.count, self.highest = 0, 0.0

    def handle(self, batch: Any) -> None:
        highest = self.highest
        for event in batch:
            self.count += 1
            bid = event.data.bid
            if bid > highest:
                highest = bid
        self.highest = highest

    def figures(self) -> dict[str, Any]:
        return {"count": self.count}


class Latency(Probe):
    """Seconds from `publish` to the handler, by the one clock of the machine."""

    topics = ("user_action",)

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.seconds: list[float] = []

    def handle(self, batch: Any) -> None:
        now = time.time()
        self.seconds += [now - event.timestamp for event in batch]

    def figures(self) -> dict[str, Any]:
        return {"seconds": self.seconds}


class Slow(Probe):
    """Takes a millisecond for each event, on a thread of its own."""

    topics = ("market_data",)
    count = 0

    def handle(self, batch: Any) -> None:
        for _ in batch:
            time.sleep(0.001)
            self.count += 1

    def figures(self) -> dict[str, Any]:
        return {"count": self.count}


class Emitter(Probe):
    """The first half of a pipeline: emits an event for every quote."""

    topics = ("market_data",)
    types = (EventType("bench_stage", Stage),)

    def consumers(self, context: Any) -> list[Consumer]:
        self.context, self.count = context, 0
        return super().consumers(context)

    def handle(self, batch: Any) -> None:
        emit = self.context.emit
        for event in batch:
            self.count += 1
            emit("bench_stage", Stage(self.count, event.data.bid), cause=event)


class Staged(Probe):
    """The second half: every stage must come once, in order."""

    topics = ("bench_stage",)

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.count = self.disorder = 0

    def handle(self, batch: Any) -> None:
        for event in batch:
            self.count += 1
            self.disorder += event.data.number != self.count

    def figures(self) -> dict[str, Any]:
        return {"count": self.count, "disorder": self.disorder}


class Diamond(Probe):
    """Four consumers: `left` and `right` after `top`, `bottom` after both; each notes who it ran ahead of."""

    def consumers(self, context: Any) -> list[Consumer]:
        self.at = dict.fromkeys(("top", "left", "right", "bottom"), 0)
        self.counts = dict.fromkeys(self.at, 0)
        self.ahead = 0
        before = {"top": (), "left": ("top",), "right": ("top",), "bottom": ("left", "right")}
        # registered upside down, so that the order can only come from `after`
        return [
            Consumer(name=name, topics=SENT, handler=self._handler(name, before[name]), after=before[name])
            for name in reversed(before)
        ]

    def _handler(self, name: str, before: tuple[str, ...]) -> Any:
        def handle(batch: Any) -> None:
            last = 0
            for event in batch:
                last = event.bus_seq
                self.counts[name] += 1
            self.at[name] = last
            self.ahead += any(self.at[each] < last for each in before)

        return handle

    def figures(self) -> dict[str, Any]:
        return {"counts": self.counts, "ahead": self.ahead}


KINDS = {kind.__name__.lower(): kind for kind in (Tally, Quotes, Latency, Slow, Emitter, Staged, Diamond)}


def plugin(probe: Probe) -> Any:
    """`probe` as what the bus takes for a plugin."""

    @hookimpl
    def tapebus_register_consumers(context: Any) -> list[Consumer]:
        return probe.consumers(context)

    @hookimpl
    def tapebus_register_event_types() -> list[EventType]:
        return list(probe.types)

    return SimpleNamespace(
        tapebus_register_consumers=tapebus_register_consumers,
        tapebus_register_event_types=tapebus_register_event_types,
    )

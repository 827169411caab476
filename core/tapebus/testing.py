"""Helpers for tests of plugins: feed typed events to one plugin without sockets, threads or disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from tapebus.consumer import Consumer, covers
from tapebus.events import Event, Registry, Wire, derive


class ListBatch(list[Any]):
    """A batch made of a plain list."""

    @property
    def first_seq(self) -> int:
        return self[0].bus_seq if self else 0

    @property
    def last_seq(self) -> int:
        return self[-1].bus_seq if self else 0


class RecordingContext:
    """A `tapebus.consumer.Context` that records what the plugin emits in ``emitted`` (as `Wire`)."""

    def __init__(
        self,
        name: str,
        config: dict[str, Any] | None = None,
        data_dir: Path = Path("."),
        shared: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.config = config or {}
        self.shared = shared or {}
        self.data_dir = data_dir
        self.log = logging.getLogger(f"tapebus.{name}")
        self.state: dict[str, bytes] = {}
        self.emitted: list[Wire] = []
        #: What `figures` tells; for the test to set.
        self.told: dict[str, Any] = {}

    def figures(self) -> dict[str, Any]:
        return self.told

    def emit(
        self,
        event_type: str,
        data: Any,
        *,
        cause: Event | None = None,
        timestamp: float | None = None,
        correlation_id: str | None = None,
        user_id: str | None = None,
        priority: str | None = None,
    ) -> None:
        plain = msgspec.to_builtins(data)
        self.emitted.append(
            derive(
                self.name,
                event_type,
                plain,
                now=0.0,
                cause=cause,
                timestamp=timestamp,
                correlation_id=correlation_id,
                user_id=user_id,
                priority=priority,
            )
        )


class PluginBench:
    """Runs the consumers of one plugin module over events given as plain dicts.

    ``restart()`` throws the plugin's memory away and builds it again from the saved state, as a
    crash does; what was emitted before stays in ``emitted``.
    """

    def __init__(self, plugin: Any, registry: Registry, config: dict[str, Any] | None = None, **context: Any) -> None:
        self.plugin = plugin
        self.registry = registry
        self.context = RecordingContext(context.pop("name", plugin.__name__), config, **context)
        self.seq = 0
        self.restart()

    @property
    def emitted(self) -> list[Wire]:
        return self.context.emitted

    def restart(self) -> None:
        self.consumers: list[Consumer] = self.plugin.tapebus_register_consumers(context=self.context)
        if hasattr(self.plugin, "tapebus_start"):
            self.plugin.tapebus_start(context=self.context)

    def event(self, event_type: str, timestamp: float, data: dict[str, Any], **envelope: Any) -> Any:
        """One typed event with the next ``bus_seq``."""
        self.seq += 1
        fields = {"event_type": event_type, "timestamp": timestamp, "source": "test", "data": data}
        wire = {**fields, **envelope, "@bus_seq": self.seq}
        return msgspec.convert(wire, self.registry.classes[event_type])

    def feed(self, events: Iterable[Any]) -> None:
        """Hand one batch to each consumer that asked for the types in it, then save."""
        events = list(events)
        for consumer in self.consumers:
            wanted = ListBatch(e for e in events if covers(consumer.topics, e.event_type))
            if wanted:
                consumer.handler(wanted)
            if consumer.save is not None:
                consumer.save()

    def tick(self, now: float) -> None:
        for consumer in self.consumers:
            if consumer.on_tick is not None:
                consumer.on_tick(now)

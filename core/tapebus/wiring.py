"""Build the consumers of all plugins: contexts, order, fences and the threads they run on."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pluggy

from tapebus import plugins
from tapebus._ring import Ring
from tapebus._topics import Topics
from tapebus.config import Config
from tapebus.consumer import Consumer
from tapebus.deadline import within
from tapebus.errors import PluginError
from tapebus.fence import Fence, PluginContext
from tapebus.store import StoreReader, Unit

if TYPE_CHECKING:
    from tapebus.supervisor import ProcessConsumer


def identity(name: str) -> bytes:
    """The producer id of something inside the bus, or of a way in that does not number its events."""
    return name.encode()[:16].ljust(16, b"\0")


class Wiring:
    """Every plugin's context and every consumer's fence, inline ones in the order they run."""

    def __init__(
        self,
        manager: pluggy.PluginManager,
        config: Config,
        ring: Ring,
        store: StoreReader | None,
        figures: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.contexts: dict[str, PluginContext] = {}
        self.inline: list[Fence] = []
        self.threads: list[Fence] = []
        self.processes: list[tuple[str, Consumer, int]] = []
        #: Plugins that live in processes of their own: all but their registration is called there.
        self.apart: set[str] = set()
        #: Where consumers without a cursor begin; to be written down before the first event comes.
        self.beginnings: list[Unit] = []
        self._ring = ring
        saved = store.cursors() if store is not None else {}
        last_seq = store.last_seq() if store is not None else 0
        first_seq = store.first_seq() if store is not None else 1
        for name, plugin in manager.list_name_plugin():
            if plugin is None:
                continue
            state = store.state(name) if store is not None else {}
            context = PluginContext(
                name, config.plugin(name), config.data_dir, state, time.time, config.shared, figures
            )
            self.contexts[name] = context
            consumers = within(
                config.bus.start_s,
                f"plugin {name!r}: tapebus_register_consumers",
                partial(plugins.call_one, manager, "tapebus_register_consumers", name, context=context),
            )
            consumers = consumers or []
            _check_modes(name, consumers)
            for consumer in consumers:
                consumer.faults = consumer.faults.changed_by(config.faults(name), name)
                unit = saved.get(consumer.name)
                if unit is None:
                    unit = Unit(consumer.name, last_seq if consumer.start == "now" else 0)
                    self.beginnings.append(unit)
                cursor = max(unit.cursor, first_seq - 1)
                if consumer.mode == "process":
                    self.processes.append((name, consumer, cursor))
                    self.apart.add(name)
                    continue
                fence = self._fence(name, consumer, context, cursor, unit.ahead)
                (self.inline if consumer.mode == "inline" else self.threads).append(fence)
        names = [fence.consumer.name for fence in (*self.inline, *self.threads)]
        for each in names:
            if names.count(each) > 1:
                raise PluginError(f"two consumers are called {each!r}: rename one")
        self.inline = in_order(self.inline)

    def _fence(self, plugin: str, consumer: Consumer, context: PluginContext, cursor: int, ahead: list[int]) -> Fence:
        producer = self._ring.producer(identity(f"plugin:{plugin}"), 0, plugin, sequenced=False)

        def send(unit: Unit, frame: bytes) -> None:
            self._ring.inject(frame, producer, unit)

        return Fence(consumer, plugin, context, cursor, ahead, send)

    @property
    def fences(self) -> list[Fence]:
        return [*self.inline, *self.threads]


def rehearse(config: Config) -> None:
    """Do what a start does with the enabled plugins and their tables, without a store and without starting anything.

    Raises what the start would raise. Plugins are told to stop again.
    """
    manager = plugins.load(config.plugins.enabled)
    plugins.registry(manager, config.plugin)
    wiring = None
    try:
        wiring = Wiring(manager, config, Ring(Topics(), 2), None)
    finally:
        for name, context in wiring.contexts.items() if wiring is not None else ():
            plugins.call_one(manager, "tapebus_stop", name, context=context)


def _check_modes(plugin: str, consumers: list[Consumer]) -> None:
    if len({consumer.mode for consumer in consumers}) > 1:
        raise PluginError(f"plugin {plugin!r} mixes consumer modes: its state and emitted events belong to one thread")
    for consumer in consumers:
        if consumer.deliver == "early" and (consumer.mode != "thread" or consumer.lanes):
            raise PluginError(f"consumer {consumer.name!r}: deliver='early' needs mode='thread' and no lanes")


def in_order(fences: list[Fence]) -> list[Fence]:
    """Sort so that each consumer runs after those its ``after`` names; names that are not loaded do not matter.

    Raises `PluginError` on a cycle.
    """
    remaining = list(fences)
    done: list[Fence] = []
    while remaining:
        waiting = {fence.consumer.name for fence in remaining} | {fence.plugin for fence in remaining}
        ready = [
            fence
            for fence in remaining
            if not (set(fence.consumer.after) & (waiting - {fence.plugin, fence.consumer.name}))
        ]
        if not ready:
            names = ", ".join(sorted(fence.consumer.name for fence in remaining))
            raise PluginError(f"after= of these consumers forms a cycle: {names}; remove one of them")
        done.append(ready[0])
        remaining.remove(ready[0])
    return done


def figures(fence: Fence | ProcessConsumer, last_seq: int, lag_ms: float) -> dict[str, Any]:
    """One row of ``consumers`` in the statistics."""
    return {
        "name": fence.consumer.name,
        "plugin": fence.plugin,
        "mode": fence.consumer.mode,
        "deliver": fence.consumer.deliver,
        "cursor": fence.cursor,
        "lag_events": max(0, last_seq - fence.cursor),
        "lag_ms": round(lag_ms, 3),
        "handled": fence.handled,
        "errors": fence.errors,
        "state": fence.state,
        "over_budget": fence.over_budget,
        "last_error": fence.last_error,
        "breaker": {
            "state": "closed" if fence.breaker.state == "running" else fence.breaker.state,
            "reason": fence.breaker.reason,
            "opened": fence.breaker.opened,
            "retry_in_s": round(fence.breaker.retry_in, 3),
        },
        "hanging": fence.hanging,
        "restarts": getattr(fence, "restarts", 0),
        "history": [list(each) for each in fence.breaker.history],
    }

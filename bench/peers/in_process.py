"""Ways to hand an object to five handlers without leaving the process: no socket, no decode, no storage, no fence.

They are here because they are what an event bus for trading is often compared with; what they measure is a fifth of
the work. All take the same events, decoded into typed objects beforehand, and the cheapest handler there is: it
appends the event to a list, which is then compared with what was sent, object by object. One handler that raises ends
the delivery to the others, or the thread, in all of them.

The calls of nautilus_trader, blinker and pluggy return when the handlers have run. SimpleQueue and vn.py hand over to
another thread of the process.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import msgspec
from bench.load import DISTINCT, envelope, laps, mix
from bench.peers.peer import Kind, Peer, Skipped, check_handlers, decoder

HANDLERS = 5
_END = None


def _events(count: int) -> list[Any]:
    decode, encode = decoder(), msgspec.msgpack.encode
    return [decode(encode(envelope(event))) for event in laps(mix(1, min(count, DISTINCT)), count)]


class InProcess(Peer):
    """A way to hand events over; `_deliver` does it and returns when all of them are handled."""

    kind: ClassVar[Kind] = "in-process"
    promise = "none: an event is in memory, and what raises or hangs holds up the rest"
    package: ClassVar[str] = ""
    module: ClassVar[str] = ""
    #: What `throughput` reports beside the number of handlers.
    how: ClassVar[str] = ""

    @property
    def version(self) -> str:
        self._module()
        return f"{self.package} {version(self.package)}"

    def _module(self) -> Any:
        try:
            version(self.package)
        except PackageNotFoundError:
            raise Skipped(f"the Python package {self.package} is not installed (make bench does)") from None
        try:
            return import_module(self.module)
        except ImportError as error:
            raise Skipped(f"{self.package} cannot be imported here: {error}") from None

    def _prepare(self, handlers: list[Callable[[Any], Any]]) -> Callable[[list[Any]], None]:
        """A function that delivers all events it is given to all `handlers`; raises `Skipped`."""
        raise NotImplementedError

    def _events_of(self, handled: list[Any]) -> list[Any]:
        """The events that a handler had, where it gets them in something else."""
        return handled

    def throughput(self, count: int) -> dict[str, Any]:
        handled: list[list[Any]] = [[] for _ in range(HANDLERS)]
        deliver = self._prepare([each.append for each in handled])
        events = _events(count)
        begun = time.perf_counter()
        deliver(events)
        seconds = time.perf_counter() - begun
        check_handlers([self._events_of(each) for each in handled], events)
        return {
            "events_per_s": round(count / seconds),
            "checked": "every object at every handler, in order",
            "settings": {"handlers": HANDLERS, "how": self.how},
        }


class SimpleQueue(InProcess):
    """The queue of the standard library between two threads."""

    name = "simplequeue"
    how = "one thread puts, another gets and calls the handlers"

    @property
    def version(self) -> str:
        import platform

        return f"Python {platform.python_version()}"

    def _prepare(self, handlers: list[Callable[[Any], Any]]) -> Callable[[list[Any]], None]:
        between: queue.SimpleQueue[Any] = queue.SimpleQueue()
        get, put = between.get, between.put

        def run() -> None:
            while (event := get()) is not _END:
                for handle in handlers:
                    handle(event)

        def deliver(events: list[Any]) -> None:
            thread = threading.Thread(target=run)
            thread.start()
            for event in events:
                put(event)
            put(_END)
            thread.join()

        return deliver


class Pluggy(InProcess):
    """A hook call with five implementations."""

    name, package, module = "pluggy", "pluggy", "pluggy"
    how = "one hook call an event"

    def _prepare(self, handlers: list[Callable[[Any], Any]]) -> Callable[[list[Any]], None]:
        pluggy = self._module()
        spec, impl = pluggy.HookspecMarker("bench"), pluggy.HookimplMarker("bench")

        class Specs:
            @spec
            def on_event(self, event: Any) -> None:
                """One event."""

        class Plugin:
            def __init__(self, handle: Callable[[Any], Any]) -> None:
                self.handle = handle

            @impl
            def on_event(self, event: Any) -> None:
                self.handle(event)

        manager = pluggy.PluginManager("bench")
        manager.add_hookspecs(Specs)
        for each in handlers:
            manager.register(Plugin(each))

        def deliver(events: list[Any]) -> None:
            call = manager.hook.on_event
            for event in events:
                call(event=event)

        return deliver


class Blinker(InProcess):
    """A named signal a type of event, five receivers each."""

    name, package, module = "blinker", "blinker", "blinker"
    how = "one signal a type, receivers held strongly"

    def _prepare(self, handlers: list[Callable[[Any], Any]]) -> Callable[[list[Any]], None]:
        blinker = self._module()
        signals: dict[str, Any] = {}

        def deliver(events: list[Any]) -> None:
            for event in events:
                signals[event.event_type].send(event)

        for name in ("market_data", "signal_generated", "user_action"):
            signals[name] = blinker.Signal()
            for each in handlers:
                signals[name].connect(each, weak=False)
        return deliver


class Nautilus(InProcess):
    """The message bus of nautilus_trader, compiled."""

    name, package, module = "nautilus-messagebus", "nautilus_trader", "nautilus_trader.common.component"
    how = "publish to a topic a type, five subscriptions each, a test clock, no database"

    def _prepare(self, handlers: list[Callable[[Any], Any]]) -> Callable[[list[Any]], None]:
        component = self._module()
        identifiers = import_module("nautilus_trader.model.identifiers")
        bus = component.MessageBus(trader_id=identifiers.TraderId("BENCH-001"), clock=component.TestClock())
        for topic in ("market_data", "signal_generated", "user_action"):
            for each in handlers:
                bus.subscribe(topic, each)

        def deliver(events: list[Any]) -> None:
            publish = bus.publish
            for event in events:
                publish(event.event_type, event)

        return deliver


class VnPy(InProcess):
    """The event engine of vn.py (VeighNa); its package is installed without what its user interface needs."""

    name, package, module = "vnpy-eventengine", "vnpy", "vnpy.event"
    how = "its own thread calls the handlers of a type"

    def _prepare(self, handlers: list[Callable[[Any], Any]]) -> Callable[[list[Any]], None]:
        event_module = self._module()
        engine, wrap = event_module.EventEngine(), event_module.Event
        for name in ("market_data", "signal_generated", "user_action"):
            for each in handlers:
                engine.register(name, each)
        done = threading.Event()
        engine.register("end", lambda _: done.set())

        def deliver(events: list[Any]) -> None:
            engine.start()
            try:
                for event in events:
                    engine.put(wrap(event.event_type, event))
                engine.put(wrap("end"))
                done.wait()
            finally:
                self._engine = engine

        return deliver

    def _events_of(self, handled: list[Any]) -> list[Any]:
        return [wrapped.data for wrapped in handled]

    def throughput(self, count: int) -> dict[str, Any]:
        try:
            return super().throughput(count)
        finally:
            # outside the clock: its threads look only once a second whether they should end
            engine = self.__dict__.pop("_engine", None)
            if engine is not None:
                engine.stop()


PEERS = [SimpleQueue(), Pluggy(), Blinker(), Nautilus(), VnPy()]

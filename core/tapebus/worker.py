"""The child of a ``process`` consumer: reads the tape by a cursor of its own, and may die at any time.

Started by `tapebus.supervisor` as ``python -m tapebus.worker``; its orders come as one JSON line on
standard input (no secret in argv), its reports go as JSON lines to standard output. It never holds the
write lock of the tape: state, cursor and the events it emitted live in a store of its own, committed
together, and the events are then published as those of a durable producer, so that a kill between
commit and acknowledgement neither loses nor doubles one.
"""

from __future__ import annotations

import ctypes
import os
import resource
import secrets
import select
import signal
import sys
import time
from typing import Any

import msgspec

from tapebus import plugins
from tapebus.config import Config
from tapebus.consumer import Consumer
from tapebus.errors import PluginError
from tapebus.events import DeadLetter
from tapebus.failpoints import failpoint
from tapebus.fence import Fence, PluginContext
from tapebus.publisher import Publisher
from tapebus.store import Commit, Unit
from tapebus.tape import Tape
from tapebus.wiring import identity

#: Keys of the worker's own state that are not the plugin's: emitted events by number, and the epoch.
_OUT, _EPOCH, _NEXT = "\x00out:", "\x00epoch", "\x00next"
MAX_BATCH = 256
IDLE_S = 1.0
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


class Orders(msgspec.Struct):
    """What the supervisor tells the child."""

    config: Config
    plugin: str
    consumer: str
    endpoint: str
    start: int
    memory_bytes: int = 0


class Outlet:
    """Emitted events on their way to the bus: durable here first, forgotten once the bus has them."""

    def __init__(self, store: Any, orders: Orders) -> None:
        self._store = store
        self._namespace = orders.plugin
        kept = {k: v for k, v in store.state(orders.plugin).items() if k.startswith("\x00")}
        self._changes: dict[str, bytes | None] = {}
        if _EPOCH not in kept:
            kept[_EPOCH] = self._changes[_EPOCH] = (secrets.randbits(63) | 1).to_bytes(8, "big")
        waiting = {int(k.removeprefix(_OUT)): v for k, v in kept.items() if k.startswith(_OUT)}
        self._next = int.from_bytes(kept.get(_NEXT, b"\1"), "big")
        first = min(waiting, default=self._next)
        self._oldest = first
        self.publisher = Publisher(
            orders.plugin,
            orders.endpoint,
            _identity=(identity(f"worker:{orders.consumer}"), int.from_bytes(kept[_EPOCH], "big"), first),
        )
        for number in sorted(waiting):
            self.publisher.outbox.append(waiting[number])
        self.publisher.flush(0.0)

    def commit(self, unit: Unit, frame: bytes) -> None:
        """Make the unit durable together with what it emits, then publish."""
        events = [bytes(raw) for raw in msgspec.msgpack.decode(frame, type=list[msgspec.Raw])] if frame else []
        for raw in events:
            self._changes[f"{_OUT}{self._next:020d}"] = raw
            self._next += 1
        if events:
            self._changes[_NEXT] = self._next.to_bytes(8, "big")
        pending = self.publisher.outbox.first_pending
        for number in range(self._oldest, pending):
            self._changes[f"{_OUT}{number:020d}"] = None
        self._oldest = max(self._oldest, pending)
        unit.namespace = self._namespace
        unit.state = {**unit.state, **self._changes}
        self._changes = {}
        failpoint("worker.before_commit")
        self._store.commit(Commit(units=[unit]))
        failpoint("worker.after_commit")
        for raw in events:
            while not self.publisher.outbox.append(raw):
                # the bus is away and the memory is full: wait, what was emitted is durable
                self.publisher.flush(IDLE_S)
        if events:
            self.publisher.flush(0.0)
        failpoint("worker.published")


class Worker:
    """One consumer in this process; everything runs on the main thread."""

    def __init__(self, orders: Orders) -> None:
        config = orders.config
        self._manager = plugins.load([orders.plugin, *_needed(config, orders.plugin)])
        directory = config.data_dir / "workers" / orders.consumer
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._store = self._manager.hook.tapebus_open_store(data_dir=directory, config={}, readonly=False)
        saved = self._store.cursors().get(orders.consumer)
        self._outlet = Outlet(self._store, orders)
        state = {k: v for k, v in self._store.state(orders.plugin).items() if not k.startswith("\x00")}
        context = PluginContext(orders.plugin, config.plugin(orders.plugin), config.data_dir, state, time.time)
        self._context = context
        self._consumer = self._find(orders)
        cursor = saved.cursor if saved is not None else orders.start
        self.fence = Fence(self._consumer, orders.plugin, context, cursor, [], self._outlet.commit, self._bury)
        self._tape = Tape.open(config.data_dir)

    def _find(self, orders: Orders) -> Consumer:
        found: list[Consumer] = (
            plugins.call_one(self._manager, "tapebus_register_consumers", orders.plugin, context=self._context) or []
        )
        for consumer in found:
            if consumer.name == orders.consumer:
                return consumer
        raise PluginError(f"plugin {orders.plugin!r} registers no consumer {orders.consumer!r} in its own process")

    def _bury(self, letter: DeadLetter) -> None:
        _report({"dead": msgspec.to_builtins(letter)})

    def run(self) -> None:
        """Deliver until standard input ends."""
        plugins.call_one(self._manager, "tapebus_start", self._context.name, context=self._context)
        failpoint("worker.started")
        self._progress()
        while not _told_to_stop():
            self.fence.tick(time.monotonic())
            if not self._deliver():
                self.fence.close_unit()
                next(self._tape.follow(self.fence.cursor, idle_timeout=IDLE_S), None)
            self._progress()
        failpoint("worker.stopping")
        self.fence.close_unit(force=True)
        self._outlet.publisher.close(timeout=1.0)
        plugins.call_one(self._manager, "tapebus_stop", self._context.name, context=self._context)
        self._tape.close()
        self._store.close()

    def _deliver(self) -> bool:
        fence = self.fence
        last = self._tape.last_seq
        if not fence.ready or fence.cursor >= last:
            return False
        events = list(self._tape.read(fence.cursor, topics=list(self._consumer.topics), limit=MAX_BATCH))
        events = [event for event in events if event.bus_seq <= last]
        fence.offer(events, events[-1].bus_seq if len(events) == MAX_BATCH else last)
        return True

    def _progress(self) -> None:
        fence = self.fence
        _report(
            {
                "cursor": fence.cursor,
                "handled": fence.handled,
                "errors": fence.errors,
                "state": fence.state,
                "last_error": fence.last_error,
            }
        )


def _needed(config: Config, plugin: str) -> list[str]:
    """The other plugins a worker loads: those that define event types or the store."""
    return [name for name in ("schema", "store") if name in config.plugins.enabled and name != plugin]


def _report(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def _told_to_stop() -> bool:
    ready, _, _ = select.select([0], [], [], 0)
    return bool(ready) and not os.read(0, 4096)


def main() -> None:
    """Follow the orders on standard input."""
    # the parent decides when to stop; a terminal's or PM2's SIGINT reaches the whole tree
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1 << 20)
        if not piece:
            return
        line += piece
    orders = msgspec.json.decode(line, type=Orders)
    if orders.memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (orders.memory_bytes, orders.memory_bytes))
    Worker(orders).run()


if __name__ == "__main__":
    main()

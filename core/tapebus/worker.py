"""The child of a ``process`` consumer: reads the tape by a cursor of its own, and may die at any time.

Started by `tapebus.supervisor` as ``python -m tapebus.worker``; its orders come as one JSON line on
standard input (no secret in argv), its reports go as JSON lines to standard output. It never holds the
write lock of the tape: state, cursor and the events it emitted live in a store of its own, committed
together, and the events are then published as those of a durable producer, so that a kill between
commit and acknowledgement neither loses nor doubles one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import secrets
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from tapebus import plugins, trust, wire
from tapebus._outbox import MAX_EVENT
from tapebus.config import Config
from tapebus.consumer import Consumer
from tapebus.errors import PluginError, StoreFull, TapebusError
from tapebus.events import DeadLetter, Event
from tapebus.failpoints import failpoint
from tapebus.fence import Fence, PluginContext
from tapebus.publisher import Publisher
from tapebus.statistics import Ask
from tapebus.store import Commit, Unit
from tapebus.tape import Tape
from tapebus.threads import show_name
from tapebus.wiring import identity

#: Keys of the worker's own state that are not the plugin's: emitted events by number, the epoch, settled letters.
_OUT, _EPOCH, _NEXT, _SETTLED = "\x00out:", "\x00epoch", "\x00next", "\x00settled:"
MAX_BATCH = 256
IDLE_S = 1.0
#: Longest wait for the bus to take some of what was emitted, and for room on the disk, before the next look.
FEED_S, REGAIN_S = 0.25, 0.5
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
#: How a child ends whose plugin wants more memory than it may have.
EXIT_MEMORY = 70
#: Reports of a handler's progress per deadline.
PULSES = 5
MAX_FILES = 1024
_ENCODE = next(code for code, name in wire.PLACES.items() if name == "client.encode")


class Orders(msgspec.Struct):
    """What the supervisor tells the child."""

    config: Config
    plugin: str
    consumer: str
    endpoint: str
    start: int
    parent: int
    #: Deliver one by one up to here, so that an event that ends the process can be told from its batch.
    careful_to: int = 0
    skip: list[int] = []


class Outlet:
    """Emitted events on their way to the bus: durable here first, forgotten once the bus has them.

    Each has its number for good. The publisher gets them in that order, as many as its memory holds; the rest
    waits in `backlog`. `rest` waits for at most so many seconds and is False once the worker is told to stop.
    """

    def __init__(self, store: Any, orders: Orders, rest: Callable[[float], bool]) -> None:
        self._store = store
        self._rest = rest
        self._namespace = orders.plugin
        kept = {k: v for k, v in store.state(orders.plugin).items() if k.startswith("\x00")}
        self._changes: dict[str, bytes | None] = {}
        if _EPOCH not in kept:
            kept[_EPOCH] = self._changes[_EPOCH] = (secrets.randbits(63) | 1).to_bytes(8, "big")
        self.settled = {int(k.removeprefix(_SETTLED)) for k in kept if k.startswith(_SETTLED)}
        waiting = {int(k.removeprefix(_OUT)): v for k, v in kept.items() if k.startswith(_OUT)}
        self._next = int.from_bytes(kept.get(_NEXT, b"\1"), "big")
        first = min(waiting, default=self._next)
        self._oldest = first
        self.publisher = Publisher(
            orders.plugin,
            orders.endpoint,
            _identity=(identity(f"worker:{orders.consumer}"), int.from_bytes(kept[_EPOCH], "big"), first),
        )
        self.backlog = deque(waiting[number] for number in sorted(waiting))
        self.feed()

    def feed(self) -> bool:
        """Hand to the publisher what it has room for; whether that was all."""
        outbox = self.publisher.outbox
        fed = len(self.backlog)
        while self.backlog:
            if len(self.backlog[0]) > MAX_EVENT:
                # its number goes to the bus all the same, as that of a dropped event
                outbox.drop(_ENCODE)
            elif not outbox.offer(self.backlog[0]):
                break
            self.backlog.popleft()
        if fed > len(self.backlog):
            self.publisher.flush(0.0)
        return not self.backlog

    def wait(self) -> None:
        """Wait a moment for the bus to take what the publisher holds."""
        self.publisher.flush(FEED_S)

    def commit(self, unit: Unit, frame: bytes) -> None:
        """Make the unit durable together with what it emits, then publish."""
        events = [bytes(raw) for raw in msgspec.msgpack.decode(frame, type=list[msgspec.Raw])] if frame else []
        for raw in events:
            self._changes[f"{_OUT}{self._next:020d}"] = raw
            self._next += 1
        if events:
            self._changes[_NEXT] = self._next.to_bytes(8, "big")
        # a bus that has lost its past makes the publisher count anew; here the numbers go on
        pending = self.publisher.outbox.first_pending + self.publisher.outbox.renumbered
        for number in range(self._oldest, pending):
            self._changes[f"{_OUT}{number:020d}"] = None
        self._oldest = max(self._oldest, pending)
        for letter in unit.dead:
            _report({"dead": msgspec.to_builtins(letter)})
        for number in unit.settled:
            self._changes[f"{_SETTLED}{number}"] = b""
            self.settled.add(number)
        unit.namespace = self._namespace
        unit.state = {**unit.state, **self._changes}
        self._changes = {}
        failpoint("worker.before_commit")
        self._write(Commit(units=[unit]))
        if unit.settled:
            _report({"settled": unit.settled})
        failpoint("worker.after_commit")
        self.backlog.extend(events)
        self.feed()
        failpoint("worker.published")

    def _write(self, commit: Commit) -> None:
        """Commit, as soon as there is room; told to stop meanwhile, end: the next life does the unit again."""
        told = False
        while True:
            try:
                self._store.commit(commit)
                break
            except StoreFull as error:
                if not told:
                    _report({"excuse": f"waits for room: {error}"})
                    told = True
                if not self._rest(REGAIN_S):
                    sys.exit(0)
        if self._store.shortage:
            self._store.regain()


class Worker:
    """One consumer in this process; everything runs on the main thread."""

    def __init__(self, orders: Orders) -> None:
        config = orders.config
        self._orders = orders
        trust.enforce(config.plugins.trusted)
        self._manager = plugins.load([orders.plugin, *needed(config, orders.plugin)], deadline_s=config.bus.start_s)
        directory = config.data_dir / "workers" / orders.consumer
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._store = self._manager.hook.tapebus_open_store(data_dir=directory, config={}, readonly=False)
        saved = self._store.cursors().get(orders.consumer)
        self._again: deque[tuple[int, int]] = deque()
        self._outlet = Outlet(self._store, orders, self._obey)
        state = {k: v for k, v in self._store.state(orders.plugin).items() if not k.startswith("\x00")}
        context = PluginContext(
            orders.plugin, config.plugin(orders.plugin), config.data_dir, state, time.time, config.shared
        )
        self._context = context
        self._consumer = self._find(orders)
        if saved is None:
            # from now on "now" is this moment, however often the process or the bus are started again
            saved = Unit(orders.consumer, orders.start)
            self._outlet.commit(saved, b"")
        ahead = [*saved.ahead, *orders.skip]
        self.fence = Fence(
            self._consumer, orders.plugin, context, saved.cursor, ahead, self._outlet.commit, _end_without_memory
        )
        self._tape = Tape.open(config.data_dir)

    def _find(self, orders: Orders) -> Consumer:
        found: list[Consumer] = (
            plugins.call_one(self._manager, "tapebus_register_consumers", orders.plugin, context=self._context) or []
        )
        for consumer in found:
            if consumer.name == orders.consumer:
                consumer.faults = consumer.faults.changed_by(orders.config.faults(orders.plugin), orders.plugin)
                return consumer
        raise PluginError(f"plugin {orders.plugin!r} registers no consumer {orders.consumer!r} in its own process")

    def run(self) -> None:
        """Deliver until standard input ends."""
        plugins.call_one(self._manager, "tapebus_start", self._context.name, context=self._context)
        failpoint("worker.started")
        self._progress(first=True)
        threading.Thread(target=self._pulse, name="tapebus-pulse", daemon=True).start()
        while self._obey(0.0):
            if self._outlet.feed():
                self._work()
            else:
                # durable already; nothing more is taken on before the bus has taken some of it
                self._outlet.wait()
            self._progress()
        failpoint("worker.stopping")
        self.fence.close_unit(force=True)
        self._outlet.publisher.close(timeout=1.0)
        plugins.call_one(self._manager, "tapebus_stop", self._context.name, context=self._context)
        self._tape.close()
        self._store.close()

    def _work(self) -> None:
        self.fence.tick(time.monotonic())
        if self._again and self._ready:
            self._settle()
        elif not self._deliver():
            self.fence.close_unit()
            self._idle()

    @property
    def _ready(self) -> bool:
        return self.fence.ready and not self._outlet.backlog

    def _idle(self) -> None:
        fence = self.fence
        if fence.ready:
            next(self._tape.follow(fence.cursor, idle_timeout=IDLE_S), None)
        else:
            self._obey(min(fence.breaker.retry_in or IDLE_S, IDLE_S))

    def _deliver(self) -> bool:
        fence = self.fence
        last = self._tape.last_seq
        if not self._ready or fence.cursor >= last:
            return False
        events = list(self._tape.read(fence.cursor, topics=list(self._consumer.topics), limit=MAX_BATCH))
        events = [event for event in events if event.bus_seq <= last]
        horizon = events[-1].bus_seq if len(events) == MAX_BATCH else last
        while events and events[0].bus_seq <= self._orders.careful_to and self._ready:
            event = events.pop(0)
            self._hand_over([event], event.bus_seq)
            # the supervisor forgets what to skip below the cursor it is told, which must be on disk then
            fence.close_unit(force=True)
            self._progress()
        if self._ready:
            self._hand_over(events, horizon)
        return True

    def _hand_over(self, events: list[Any], last_seq: int) -> None:
        """Deliver, having said which events are in hand."""
        if events:
            _report({"trying": (events[0].bus_seq, events[-1].bus_seq), "type": events[0].event_type})
        self.fence.offer(events, last_seq)

    def _settle(self) -> None:
        number, seq = self._again.popleft()
        if number in self._outlet.settled:
            _report({"settled": [number]})
            return
        _report({"settling": number})
        self.fence.redeliver([DeadLetter("", "", bus_seq=seq, id=number)])
        self.fence.settle(self._fetch)

    def _fetch(self, seq: int) -> Event | None:
        event: Event | None = next(self._tape.read(after=seq - 1, limit=1), None)
        return event if event is not None and event.bus_seq == seq else None

    def _obey(self, timeout: float) -> bool:
        """Take orders that came on the way within `timeout` seconds; False at their end."""
        if not select.select([_orders_fd], [], [], timeout)[0]:
            return True
        line = _read_line()
        for number, seq in msgspec.json.decode(line)["again"] if line else ():
            if (number, seq) not in self._again:
                self._again.append((number, seq))
        return bool(line)

    def _pulse(self) -> None:
        """Report where the handler is while it moves; silence is what the supervisor kills for."""
        show_name()
        pause = threading.Event()
        doing, last, told, ask = self.fence.doing, None, None, Ask()
        while not pause.wait(self._consumer.faults.deadline_s / PULSES):
            now = doing.progress
            if not now[0] or now != last:
                event: Any = doing.event
                _report({"at": event.bus_seq, "type": event.event_type} if event is not None else {"at": 0})
            last = now
            tell = {
                name: ask(f"tapebus_{name}", self._manager, self._context.name, self._context) or {}
                for name in ("health", "metrics")
            }
            if tell != told:
                told = tell
                _report(tell)

    def _progress(self, first: bool = False) -> None:
        fence = self.fence
        _report(
            {
                "first": first,
                "cursor": fence.cursor,
                "handled": fence.handled,
                "errors": fence.errors,
                "over_budget": fence.over_budget,
                "state": fence.state,
                "reason": fence.breaker.reason,
                "opened": fence.breaker.opened,
                "last_error": fence.last_error,
            }
        )


def needed(config: Config, plugin: str) -> list[str]:
    """The other plugins a worker loads: those that define event types or the store."""
    return [name for name in ("schema", "store") if name in config.plugins.enabled and name != plugin]


#: Where orders come from and reports go to: not 0 and 1, which belong to whatever the plugin prints or reads.
_orders_fd = _reports_fd = -1
_reporting = threading.Lock()


def _report(message: dict[str, Any]) -> None:
    data = msgspec.json.encode(message) + b"\n"
    with _reporting:
        while data:
            data = data[os.write(_reports_fd, data) :]


def _read_line() -> bytes:
    """The next line of orders; empty at their end."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(_orders_fd, 1)
        if not piece:
            return b""
        line += piece
    return line


def _keep_the_pipes() -> None:
    global _orders_fd, _reports_fd
    _orders_fd, _reports_fd = os.dup(0), os.dup(1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)


def _confine(parent: int) -> None:
    """Give up what a plugin does not need, and die with the bus."""
    # the parent decides when to stop; a terminal's or PM2's SIGINT reaches the whole tree
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # a fork forgets it; what the plugin starts by exec instead ends with the process group
        os.register_at_fork(after_in_child=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
        # should the system run out of memory, rather this process than the bus
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
        if os.getppid() != parent:
            os._exit(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = MAX_FILES if most == resource.RLIM_INFINITY else min(MAX_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))


def _limit_memory(megabytes: int) -> None:
    """Bound private memory; the tape, which is mapped shared and may be large, does not count."""
    if megabytes:
        resource.setrlimit(resource.RLIMIT_DATA, (megabytes << 20, megabytes << 20))


def _end_without_memory(error: BaseException) -> None:
    # no fault of the event in hand: what leaks is gone with the process, and the cursor is kept
    if isinstance(error, MemoryError):
        os._exit(EXIT_MEMORY)


def main() -> None:
    """Follow the orders on standard input."""
    _keep_the_pipes()
    line = _read_line()
    if not line:
        return
    orders = msgspec.json.decode(line, type=Orders)
    _confine(orders.parent)
    try:
        worker = Worker(orders)
        _limit_memory(worker.fence.consumer.faults.memory_mb)
        worker.run()
    except MemoryError as error:
        _end_without_memory(error)
        raise
    except Exception as error:
        # the plugin is behind its fence: what gets here is never the fault of the event in hand
        with contextlib.suppress(OSError):
            _report({"excuse": f"failed: {type(error).__name__}: {error}"[:300]})
        if not isinstance(error, TapebusError):
            raise
        sys.exit(f"tapebus: consumer {orders.consumer}: {error}")


if __name__ == "__main__":
    main()

"""The fence around a consumer: catches, counts, times, opens the breaker, and closes units of work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import msgspec

from tapebus._decode import Batch
from tapebus.consumer import Consumer
from tapebus.events import DeadLetter, Event, derive
from tapebus.failpoints import failpoint
from tapebus.store import Unit

_encode = msgspec.msgpack.Encoder().encode
#: How often the cursor of a consumer without effects is written down, in seconds.
CURSOR_INTERVAL = 1.0


class State(MutableMapping[str, bytes]):
    """A plugin's durable key-value state: read from memory, written with the next unit of work."""

    def __init__(self, values: dict[str, bytes]) -> None:
        self._values = values
        self.changes: dict[str, bytes | None] = {}

    def __getitem__(self, key: str) -> bytes:
        return self._values[key]

    def __setitem__(self, key: str, value: bytes) -> None:
        self._values[key] = self.changes[key] = bytes(value)

    def __delitem__(self, key: str) -> None:
        del self._values[key]
        self.changes[key] = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class PluginContext:
    """What a plugin works through; see `tapebus.consumer.Context`. Used on the plugin's own thread only."""

    def __init__(
        self, name: str, config: dict[str, Any], data_dir: Path, state: dict[str, bytes], clock: Callable[[], float]
    ) -> None:
        self.name = name
        self.config = config
        self.data_dir = data_dir
        self.log = logging.getLogger(f"tapebus.{name}")
        self.state = State(state)
        self.emitted: list[bytes] = []
        self._clock = clock

    def emit(
        self,
        event_type: str,
        data: dict[str, Any] | msgspec.Struct,
        *,
        cause: Event | None = None,
        timestamp: float | None = None,
        correlation_id: str | None = None,
        user_id: str | None = None,
        priority: str | None = None,
    ) -> None:
        """Publish a derived event with the unit of work that is open."""
        wire = derive(
            self.name,
            event_type,
            data,
            now=self._clock(),
            cause=cause,
            timestamp=timestamp,
            correlation_id=correlation_id,
            user_id=user_id,
            priority=priority,
        )
        self.emitted.append(_encode(wire))

    def take(self) -> tuple[bytes, dict[str, bytes | None]]:
        """What was emitted (one batch frame, empty for nothing) and changed since the last unit."""
        frame = b""
        if self.emitted:
            frame = b"\xdd" + len(self.emitted).to_bytes(4, "big") + b"".join(self.emitted)
            self.emitted = []
        changes, self.state.changes = self.state.changes, {}
        return frame, changes


class Fence:
    """Runs one consumer. Every method is called on the consumer's own thread, except the readers of figures."""

    def __init__(
        self,
        consumer: Consumer,
        plugin: str,
        context: PluginContext,
        cursor: int,
        ahead: list[int],
        send_unit: Callable[[Unit, bytes], None],
        bury: Callable[[DeadLetter], None],
    ) -> None:
        self.consumer = consumer
        self.plugin = plugin
        self.context = context
        self.cursor = cursor
        self.ahead = set(ahead)
        self._send_unit = send_unit
        self._bury = bury
        self.handled = 0
        self.errors = 0
        self.over_budget = 0
        self.last_error = ""
        self.state = "running"
        self.history: list[tuple[float, str]] = []
        self._seen = self._failed = 0
        self._retry_s = consumer.faults.retry_s
        self._retry_at = 0.0
        self._saved_cursor = cursor
        self._saved_at = time.monotonic()
        self._next_tick = time.monotonic() + consumer.tick if consumer.tick else 0.0

    # -- delivery --------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether events may be offered now; moves an open breaker to half-open when its time has come."""
        if self.state == "open" and time.monotonic() >= self._retry_at:
            self._become("half-open")
        return self.state in ("running", "half-open")

    def offer(self, events: list[Event], last_seq: int) -> None:
        """Deliver the `events` above the cursor, then move the cursor to `last_seq`, or to where the breaker opened."""
        if self.cursor >= last_seq:
            return
        if events and (self.ahead or events[0].bus_seq <= self.cursor):
            events = [e for e in events if e.bus_seq > self.cursor and e.bus_seq not in self.ahead]
        done = self._handle(events)
        if done < len(events):
            last_seq = events[done - 1].bus_seq
        self.cursor = last_seq
        if self.ahead:
            self.ahead = {seq for seq in self.ahead if seq > last_seq}
        self.close_unit()

    def offer_ahead(self, events: list[Event]) -> None:
        """Deliver urgent events that overtake the backlog; they are remembered until the cursor passes them."""
        events = [e for e in events if e.bus_seq > self.cursor and e.bus_seq not in self.ahead]
        if events:
            # the cursor stays: below these are events that still wait for their turn
            self.ahead.update(e.bus_seq for e in events[: self._handle(events)])
            self.close_unit()

    def _handle(self, events: list[Event]) -> int:
        """Call the handler, charging each exception to its event.

        How many were dealt with, handled or buried: all of them unless the breaker opened.
        """
        done = 0
        while done < len(events):
            batch = Batch(events[done : done + 1] if self.state == "half-open" else events[done:])
            begun = time.perf_counter()
            try:
                self.consumer.handler(batch)
            except BaseException as error:  # a plugin's SystemExit must not end the bus either
                bad = max(batch.position - 1, 0)
                done += bad + 1
                if not self._charge(batch.events[bad], error, bad):
                    break
                continue
            if (time.perf_counter() - begun) * 1e3 > self.consumer.budget_ms:
                self.over_budget += 1
            self._count(len(batch), 0)
            if self.state == "half-open":
                self._retry_s = self.consumer.faults.retry_s
                self._become("running")
            done += len(batch)
        return done

    def _count(self, good: int, bad: int) -> None:
        self.handled += good
        self._seen += good + bad
        self._failed += bad
        if self._seen >= 2 * self.consumer.faults.window:
            self._seen //= 2
            self._failed //= 2

    def _charge(self, event: Event, error: BaseException, before: int) -> bool:
        self.errors += 1
        self.last_error = f"{type(error).__name__}: {error}"[:300]
        if self.errors == 1 or self.errors % 1000 == 0:
            self.context.log.exception("consumer %s failed on bus_seq %d", self.consumer.name, event.bus_seq)
        self._bury(
            DeadLetter(
                place=f"plugin.{self.plugin}",
                reason="error",
                detail=self.last_error,
                bus_seq=event.bus_seq,
                event_type=event.event_type,  # type: ignore[attr-defined]
                at=time.time(),
            )
        )
        self._count(before, 1)
        faults = self.consumer.faults
        if self.state != "half-open" and self._failed <= faults.error_ratio * max(faults.window, self._seen):
            return True
        self._seen = self._failed = 0
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(self._retry_s * 2, faults.retry_max_s)
        self._become("open")
        return False

    def _become(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self.history = [*self.history[-19:], (time.time(), state)]
            if state == "open":
                self.context.log.warning(
                    "consumer %s: breaker open after %d errors, last: %s",
                    self.consumer.name,
                    self.errors,
                    self.last_error,
                )

    def pause(self) -> None:
        self._become("paused")

    def resume(self) -> None:
        """Continue after a pause or an open breaker, from the cursor."""
        self._seen = self._failed = 0
        self._become("running")

    # -- timers and units of work ----------------------------------------------------------------

    def tick(self, now: float) -> float | None:
        """Run ``on_tick`` when it is due (`now` is monotonic); seconds until the next one, or None."""
        if not self._next_tick or self.consumer.on_tick is None:
            return None
        if now >= self._next_tick:
            self._next_tick = now + self.consumer.tick
            try:
                self.consumer.on_tick(time.time())
            except BaseException as error:
                self.errors += 1
                self.last_error = f"on_tick: {type(error).__name__}: {error}"[:300]
                self.context.log.exception("consumer %s failed in on_tick", self.consumer.name)
            self.close_unit()
        return max(0.0, self._next_tick - now)

    @property
    def unsaved(self) -> bool:
        """Whether the cursor has moved since it was last written down."""
        return self.cursor != self._saved_cursor

    def close_unit(self, force: bool = False) -> None:
        """Send what was emitted and changed, with the cursor it belongs to, to be committed together."""
        context = self.context
        effects = bool(context.emitted or context.state.changes)
        if not effects:
            now = time.monotonic()
            if self.cursor == self._saved_cursor or not (force or now - self._saved_at >= CURSOR_INTERVAL):
                return
        if self.consumer.save is not None:
            try:
                self.consumer.save()
            except BaseException as error:
                self.errors += 1
                self.last_error = f"save: {type(error).__name__}: {error}"[:300]
                context.log.exception("consumer %s failed in save", self.consumer.name)
                return
        failpoint("fence.before_unit")
        frame, changes = context.take()
        self._saved_cursor = self.cursor
        self._saved_at = time.monotonic()
        self._send_unit(
            Unit(self.consumer.name, self.cursor, sorted(self.ahead), self.plugin if changes else "", changes), frame
        )
        failpoint("fence.after_unit")

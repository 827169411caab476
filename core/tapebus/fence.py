"""The fence around a consumer: catches, counts, times, drives the breaker, and closes units of work."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import msgspec

from tapebus._decode import Batch
from tapebus.breaker import Breaker
from tapebus.consumer import Consumer
from tapebus.events import ERROR, DeadLetter, Event, derive
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
        self,
        name: str,
        config: dict[str, Any],
        data_dir: Path,
        state: dict[str, bytes],
        clock: Callable[[], float],
        shared: dict[str, Any] | None = None,
        figures: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.name = name
        #: See `tapebus.consumer.Context.figures`.
        self.figures = figures
        self.config = config
        self.shared = shared or {}
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


class Doing:
    """What a thread does in somebody else's code right now; written by that thread, read by the watchdog."""

    __slots__ = ("batch", "calls", "thread", "what")

    def __init__(self) -> None:
        self.what = ""
        self.batch: Batch | None = None
        self.calls = 0
        self.thread = 0

    def begin(self, what: str, batch: Batch | None = None) -> None:
        self.thread = threading.get_ident()
        self.batch = batch
        self.calls += 1
        self.what = what

    def end(self) -> None:
        self.what = ""
        self.batch = None

    @property
    def progress(self) -> tuple[str, int, int]:
        """Differs from what it was as long as there is any progress."""
        batch = self.batch
        return self.what, self.calls, batch.position if batch is not None else 0

    @property
    def event(self) -> Event | None:
        """The event being worked on."""
        batch = self.batch
        if batch is None or not batch.position or batch.exhausted:
            return None
        return batch.events[batch.position - 1]  # type: ignore[no-any-return]


class Fence:
    """Runs one consumer. Every method is called on the consumer's own thread, except the readers of figures,
    `pause`, `resume` and `redeliver`.
    """

    def __init__(
        self,
        consumer: Consumer,
        plugin: str,
        context: PluginContext,
        cursor: int,
        ahead: list[int],
        send_unit: Callable[[Unit, bytes], None],
        fatal: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.consumer = consumer
        self.plugin = plugin
        self.context = context
        self.cursor = cursor
        self.ahead = set(ahead)
        self.breaker = Breaker(consumer.faults)
        self.doing = Doing()
        #: Set by the watchdog while the consumer stands still.
        self.hanging = ""
        #: Whether the watchdog has put it aside: an open breaker then keeps ``on_tick`` back as well.
        self.aside = False
        self.handled = 0
        self.errors = 0
        self.over_budget = 0
        self.last_error = ""
        self._send_unit = send_unit
        self._fatal = fatal
        self._dead: list[DeadLetter] = []
        self._settled: list[int] = []
        self._again: deque[DeadLetter] = deque()
        self._save_failed = False
        #: Wakes the consumer's thread; set by whoever runs it.
        self.wake: Callable[[], None] = lambda: None
        self._saved_cursor = cursor
        self._saved_at = time.monotonic()
        self._next_tick = time.monotonic() + consumer.tick if consumer.tick else 0.0

    # -- delivery --------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        return "hanging" if self.hanging else self.breaker.state

    @property
    def ready(self) -> bool:
        """Whether events may be offered now; moves an open breaker to half-open when its time has come."""
        return self.breaker.ready

    def offer(self, events: list[Event], last_seq: int, *, close: bool = True) -> None:
        """Deliver the `events` above the cursor, then move the cursor to `last_seq`, or to where the breaker opened.

        With ``close=False`` the caller closes the unit of work, after the next ones.
        """
        if self.cursor >= last_seq:
            return
        if events and (self.ahead or events[0].bus_seq <= self.cursor):
            events = [e for e in events if e.bus_seq > self.cursor and e.bus_seq not in self.ahead]
        done = self._handle(events)
        if done < len(events):
            last_seq = events[done].bus_seq - 1
        self.cursor = max(self.cursor, last_seq)
        if self.ahead:
            self.ahead = {seq for seq in self.ahead if seq > last_seq}
        if close:
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
            half_open = self.breaker.state == "half-open"
            batch = Batch(events[done : done + 1] if half_open else events[done:])
            # before the call: the list is the handler's, who may take events out of it
            count = len(batch)
            error = self._call(batch)
            if error is None:
                self.handled += count
                self.breaker.good(count)
                self.breaker.succeeded()
                done += count
                continue
            if not batch.position:
                self._note(f"consumer {self.consumer.name} failed before its first event", error)
                self.breaker.trip(f"the handler failed before it looked at an event: {self.last_error}")
                break
            # after the end of the iteration nobody can tell which of its events were dealt with
            good = 0 if batch.exhausted else batch.position - 1
            bad = batch.events[good : batch.position]
            done += batch.position
            if not self._charge(good, bad, error):
                break
        return done

    def _call(self, batch: Batch) -> BaseException | None:
        """Call the handler with `batch`; what it raised."""
        doing = self.doing
        begun = time.perf_counter()
        doing.begin("handler", batch)
        try:
            self.consumer.handler(batch)
        except BaseException as error:  # a plugin's SystemExit must not end the bus either
            self._fatal(error)
            return error
        finally:
            doing.end()
        if (time.perf_counter() - begun) * 1e3 > self.consumer.budget_ms:
            self.over_budget += 1
        return None

    def _charge(self, good: int, bad: list[Event], error: BaseException) -> bool:
        """Bury the `bad` events, which come after `good` ones; whether the consumer may go on."""
        self._note(f"consumer {self.consumer.name} failed on bus_seq {bad[0].bus_seq}", error, len(bad))
        self._dead += [self.letter(event, ERROR, self.last_error) for event in bad]
        self.handled += good
        self.breaker.good(good)
        if self.breaker.bad(len(bad), self.last_error):
            return True
        self.context.log.warning("consumer %s: breaker open: %s", self.consumer.name, self.breaker.reason)
        return False

    def letter(self, event: Event, reason: str, detail: str) -> DeadLetter:
        """The dead letter of an `event` this consumer could not handle."""
        return DeadLetter(
            place=f"plugin.{self.plugin}",
            reason=reason,
            detail=detail,
            bus_seq=event.bus_seq,
            event_type=event.event_type,  # type: ignore[attr-defined]
            at=time.time(),
            consumer=self.consumer.name,
        )

    def _note(self, what: str, error: BaseException, count: int = 1) -> None:
        self.last_error = f"{type(error).__name__}: {error}"[:300]
        # the first one in full, then one of a thousand: a broken plugin must not fill the disk with its log
        if self.errors == 0 or self.errors // 1000 != (self.errors + count) // 1000:
            self.context.log.error("%s", what, exc_info=error)
        self.errors += count

    def pause(self) -> None:
        """Offer nothing until `resume`; the call of a handler that is running goes on."""
        self.breaker.pause()

    def resume(self) -> None:
        """Continue after a pause or an open breaker, from the cursor."""
        self.breaker.resume()
        self.wake()

    # -- dead letters once more --------------------------------------------------------------------

    def redeliver(self, letters: list[DeadLetter]) -> None:
        """Ask for these dead letters to be handled once more; from any thread, done by `settle`."""
        waiting = {each.id for each in self._again}
        self._again.extend(each for each in letters if each.id not in waiting)
        self.wake()

    @property
    def asked_again(self) -> bool:
        return bool(self._again)

    def settle(self, fetch: Callable[[int], Event | None]) -> None:
        """Handle what was asked for again. A letter goes with the unit of work that handled its event; where the
        event fails again, a new letter takes its place.
        """
        while self._again:
            letter = self._again.popleft()
            event = fetch(letter.bus_seq)
            if event is None:
                self.last_error = f"bus_seq {letter.bus_seq} is no longer on the tape, or no longer decodes"
                self._dead.append(msgspec.structs.replace(letter, id=0, at=time.time(), detail=self.last_error))
            elif (error := self._call(Batch([event]))) is not None:
                self._note(f"consumer {self.consumer.name} failed again on bus_seq {letter.bus_seq}", error)
                self._dead.append(self.letter(event, ERROR, self.last_error))
            else:
                self.handled += 1
            self._settled.append(letter.id)
            self.close_unit()

    # -- timers and units of work ----------------------------------------------------------------

    def tick(self, now: float) -> float | None:
        """Run ``on_tick`` when it is due (`now` is monotonic); seconds until the next one, or None."""
        on_tick = self.consumer.on_tick
        if not self._next_tick or on_tick is None:
            return None
        if self.aside and self.breaker.state == "open":
            return None
        if now >= self._next_tick:
            self._next_tick = now + self.consumer.tick
            self._guarded("on_tick", lambda: on_tick(time.time()))
            self.close_unit()
        return max(0.0, self._next_tick - now)

    def _guarded(self, what: str, call: Callable[[], None]) -> bool:
        self.doing.begin(what)
        try:
            call()
        except BaseException as error:
            self._fatal(error)
            self._note(f"consumer {self.consumer.name} failed in {what}", error)
            self.last_error = f"{what}: {self.last_error}"[:300]
            return False
        finally:
            self.doing.end()
        return True

    @property
    def unsaved(self) -> bool:
        """Whether the cursor has moved since it was last written down."""
        return self.cursor != self._saved_cursor

    def close_unit(self, force: bool = False) -> None:
        """Send what was emitted, changed and buried, with the cursor it belongs to, to be committed together."""
        context = self.context
        if not (context.emitted or context.state.changes or self._dead or self._settled):
            now = time.monotonic()
            if self.cursor == self._saved_cursor or not (force or now - self._saved_at >= CURSOR_INTERVAL):
                return
        if self._save_failed and not self.ready and not force:
            return
        self._save_failed = self.consumer.save is not None and not self._guarded("save", self.consumer.save)
        if self._save_failed:
            # the unit stays open: what was handled since is handled again after a crash
            if self.ready:
                self.breaker.trip(self.last_error)
            return
        failpoint("fence.before_unit")
        frame, changes = context.take()
        self._saved_cursor = self.cursor
        self._saved_at = time.monotonic()
        namespace = self.plugin if changes else ""
        unit = Unit(self.consumer.name, self.cursor, sorted(self.ahead), namespace, changes, self._dead, self._settled)
        self._dead, self._settled = [], []
        self._send_unit(unit, frame)
        failpoint("fence.after_unit")

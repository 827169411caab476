"""Notices code of a plugin that comes no further, names it, and ends a bus that cannot go on.

Runs on the timer of the control thread, which needs nothing of the dispatcher. Python cannot end a thread: an
inline consumer that hangs holds up dispatch until it returns or the bus ends
(docs/decisions/0008-a-hanging-consumer-is-put-aside.md). Ingest, tape and acknowledgements go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from tapebus.deadline import stack_of
from tapebus.errors import TapebusError
from tapebus.events import TIMEOUT
from tapebus.fence import Doing, Fence
from tapebus.store import StoreReader, Unit

if TYPE_CHECKING:
    from tapebus.runtime import Runtime

log = logging.getLogger("tapebus.watchdog")
#: The namespace that says which consumers to put aside at the next start; no plugin can have it.
NAMESPACE = "tapebus:watchdog"
#: Looks per deadline.
LOOKS = 5
#: Longest time a consumer is put aside.
ASIDE_MAX_S = 3600.0


class Aside(msgspec.Struct):
    """Why a consumer was put aside, and how many times in a row."""

    reason: str
    at: float
    times: int = 1


class Watched:
    """One thread in code of a plugin: how long it has shown no progress, by the looks taken at it."""

    def __init__(self, doing: Doing, deadline_s: float, fence: Fence | None) -> None:
        self.doing = doing
        self.deadline_s = deadline_s
        self.fence = fence
        self.idle_s = 0.0
        self._last = doing.progress

    @property
    def name(self) -> str:
        if self.fence is None:
            return self.doing.what
        return f"plugin {self.fence.plugin}: consumer {self.fence.consumer.name}"

    def look(self, passed: float) -> None:
        """Take note of the progress since the last look, `passed` seconds ago."""
        now = self.doing.progress
        self.idle_s = self.idle_s + passed if now[0] and now == self._last else 0.0
        self._last = now


class Watchdog:
    """Used by the control thread only."""

    def __init__(
        self, runtime: Runtime, tell_tape: Callable[[Unit], None], fail: Callable[[BaseException], None]
    ) -> None:
        self._runtime = runtime
        self._tell_tape = tell_tape
        self._fail = fail
        dispatcher = runtime.dispatcher
        self._inline = [Watched(f.doing, f.consumer.faults.deadline_s, f) for f in runtime.wiring.inline]
        deadlines = [each.deadline_s for each in self._inline]
        self._inline.append(Watched(dispatcher.doing, max(deadlines, default=5.0), None))
        threads = [Watched(f.doing, f.consumer.faults.deadline_s, f) for f in runtime.wiring.threads]
        self._watched = [*self._inline, *threads]
        self._every_s = min(each.deadline_s for each in self._watched) / LOOKS
        self._looked_at = time.monotonic()
        self._reported: set[int] = set()
        self._put_aside: Unit | None = None
        self._end: TapebusError | None = None
        self._told = False

    def look(self) -> float:
        """Look at every thread when it is time; seconds until it is again."""
        now = time.monotonic()
        passed = now - self._looked_at
        if passed >= self._every_s:
            self._looked_at = now
            for each in self._watched:
                # a bus that was stopped as a whole for a minute has not been hanging for one
                each.look(min(passed, 2 * self._every_s))
                self._judge(each)
            self._end_the_bus()
        return max(0.0, self._looked_at + self._every_s - now)

    def _judge(self, each: Watched) -> None:
        if each.idle_s >= each.deadline_s and id(each) not in self._reported:
            self._reported.add(id(each))
            self._report(each)
        elif not each.idle_s and id(each) in self._reported:
            self._reported.discard(id(each))
            self._mark(each, "")
            log.warning("%s goes on", each.name)

    def _report(self, each: Watched) -> None:
        event = each.doing.event
        at = f" at bus_seq {event.bus_seq}" if event is not None else ""
        what = f"{each.doing.what} has come no further for {each.deadline_s:g} s{at}"
        log.error("%s: %s; its thread stands here:\n%s", each.name, what, stack_of(each.doing.thread))
        self._mark(each, what)
        fence = each.fence
        self._runtime.publish(
            "alert",
            {
                "name": f"hanging.{fence.consumer.name if fence is not None else 'rules'}",
                "severity": "critical",
                "message": f"{each.name}: {what}",
            },
        )

    def _mark(self, each: Watched, what: str) -> None:
        if each.fence is not None:
            each.fence.hanging = what

    def _end_the_bus(self) -> None:
        """After ``bus.hang_exit_s`` put the consumer that holds up dispatch aside, durably, then end."""
        if self._end is None:
            limit = self._runtime.config.bus.hang_exit_s
            stuck = next((each for each in self._inline if limit and each.idle_s >= max(limit, each.deadline_s)), None)
            if stuck is not None:
                self._prepare_the_end(stuck)
        elif not self._told and self._written_down():
            self._told = True
            self._fail(self._end)

    def _prepare_the_end(self, stuck: Watched) -> None:
        self._end = TapebusError(
            f"{stuck.name} holds up dispatch for {stuck.idle_s:.0f} s; ending to start again with it put aside "
            "(bus.hang_exit_s)"
        )
        store = self._runtime.store
        if stuck.fence is not None and store is not None:
            self._put_aside = put_aside(store, stuck.fence)
            self._tell_tape(self._put_aside)

    def _written_down(self) -> bool:
        unit, store = self._put_aside, self._runtime.store
        return unit is None or store is None or store.state(NAMESPACE).items() >= unit.state.items()


def put_aside(store: StoreReader, fence: Fence) -> Unit:
    """What makes the next start open the breaker of `fence`, and skip the event it hangs on as a dead letter."""
    kept = store.state(NAMESPACE).get(fence.consumer.name)
    times = msgspec.json.decode(kept, type=Aside).times + 1 if kept is not None else 1
    aside = Aside(fence.hanging or f"{fence.doing.what} came no further", time.time(), times)
    event = fence.doing.event
    dead = [] if event is None else [fence.letter(event, TIMEOUT, aside.reason)]
    ahead = sorted({*fence.ahead, *(each.bus_seq for each in dead)})
    state: dict[str, bytes | None] = {fence.consumer.name: msgspec.json.encode(aside)}
    return Unit(fence.consumer.name, fence.cursor, ahead, NAMESPACE, state, dead)


def restore(store: StoreReader | None, fences: list[Fence], tell_tape: Callable[[Unit], None]) -> None:
    """Open the breakers of the consumers that were put aside; they close, and are forgotten, like any other."""
    kept = store.state(NAMESPACE) if store is not None else {}
    for fence in fences:
        found = kept.get(fence.consumer.name)
        if found is None:
            continue
        aside = msgspec.json.decode(found, type=Aside)
        wait = min(fence.consumer.faults.retry_max_s * 2 ** (aside.times - 1), ASIDE_MAX_S)
        fence.breaker.trip(f"put aside by the watchdog: {aside.reason}", wait)
        fence.aside = True
        fence.breaker.on_running = _forget(fence, tell_tape)
        log.warning("consumer %s is put aside for %.0f s: %s", fence.consumer.name, wait, aside.reason)


def _forget(fence: Fence, tell_tape: Callable[[Unit], None]) -> Callable[[], None]:
    def forget() -> None:
        fence.aside = False
        # a namespace without a cursor of its own: the consumer's stays what it is
        tell_tape(Unit(NAMESPACE, fence.cursor, namespace=NAMESPACE, state={fence.consumer.name: None}))

    return forget

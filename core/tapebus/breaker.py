"""The circuit breaker of one consumer: closed while it works, open while it does not, half-open to try again."""

from __future__ import annotations

import time
from collections.abc import Callable

from tapebus.consumer import FaultPolicy

#: Transitions that are remembered.
HISTORY = 20


class Breaker:
    """Counts failures by a `FaultPolicy`. Driven by the consumer's thread; `pause` and `resume` by any.

    ``state`` is ``running`` (closed), ``open``, ``half-open`` or ``paused``; ``history`` holds the last changes as
    ``(unix time, state, reason)``.
    """

    def __init__(self, policy: FaultPolicy) -> None:
        self.policy = policy
        self.state = "running"
        self.reason = ""
        self.history: list[tuple[float, str, str]] = []
        self.opened = 0
        #: Seconds until the next try after the next opening, and when the running pause ends (monotonic).
        self.retry_s = policy.retry_s
        self.retry_at = 0.0
        #: Called once when the breaker closes next.
        self.on_running: Callable[[], None] | None = None
        self._seen = self._failed = self._in_a_row = 0

    @property
    def ready(self) -> bool:
        """Whether an event may be offered now; an open breaker whose time has come becomes half-open."""
        if self.state == "open" and time.monotonic() >= self.retry_at:
            self.become("half-open", "trying one event")
        return self.state in ("running", "half-open")

    @property
    def retry_in(self) -> float:
        """Seconds until an open breaker tries again; 0 in any other state."""
        return max(0.0, self.retry_at - time.monotonic()) if self.state == "open" else 0.0

    def good(self, count: int) -> None:
        """`count` events were handled."""
        if count:
            self._in_a_row = 0
            self._count(count, 0)

    def succeeded(self) -> None:
        """A call of the handler came back; ends the trial of a half-open breaker."""
        if self.state == "half-open":
            self.retry_s = self.policy.retry_s
            self._forget()
            self.become("running", "the trial succeeded")

    def bad(self, count: int, why: str) -> bool:
        """`count` events failed; whether the consumer may go on."""
        self._in_a_row += count
        self._count(0, count)
        policy = self.policy
        if self.state == "half-open":
            self.trip(f"the trial failed: {why}")
        elif self._in_a_row >= policy.consecutive:
            self.trip(f"{self._in_a_row} events in a row failed, last: {why}")
        elif self._failed > policy.error_ratio * max(policy.window, self._seen):
            self.trip(f"{self._failed} of {max(policy.window, self._seen)} events failed, last: {why}")
        else:
            return True
        return False

    def trip(self, why: str, retry_s: float | None = None) -> None:
        """Open now, for `retry_s` seconds, else for as long as it is this time's turn."""
        self._forget()
        self.opened += 1
        wait = self.retry_s if retry_s is None else retry_s
        self.retry_at = time.monotonic() + wait
        self.retry_s = min(self.retry_s * 2, self.policy.retry_max_s)
        self.become("open", why)

    def pause(self) -> None:
        self.become("paused", "asked for")

    def resume(self) -> None:
        self._forget()
        self.retry_s = self.policy.retry_s
        self.become("running", "asked for")

    def become(self, state: str, reason: str) -> None:
        if state != self.state:
            self.state = state
            self.reason = reason
            self.history = [*self.history[1 - HISTORY :], (time.time(), state, reason)]
            if state == "running" and self.on_running is not None:
                call, self.on_running = self.on_running, None
                call()

    def _count(self, good: int, bad: int) -> None:
        self._seen += good + bad
        self._failed += bad
        if self._seen >= 2 * self.policy.window:
            self._seen //= 2
            self._failed //= 2

    def _forget(self) -> None:
        self._seen = self._failed = self._in_a_row = 0

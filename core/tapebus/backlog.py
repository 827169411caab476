"""The queue between two threads of the bus: bounded, and backed by the tape.

When it overflows it forgets its content and the taker continues from the tape, so that a slow
taker costs nobody memory and loses nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol


class Item(Protocol):
    """Consecutive events; `weight` is what counts against the capacity of the queue, 0 for what only moves a cursor."""

    first_seq: int
    last_seq: int
    weight: int


class Backlog:
    """One giver, one taker. `load(after)` yields the items above a sequence number from the tape.

    With ``load=None`` (no store) `put` waits for room instead; with ``lossy`` it drops the oldest
    and counts them in ``lost``. ``on_tape()`` is the last sequence number `load` can find, where
    `put_early` hands over what is not there yet.
    """

    def __init__(
        self,
        capacity: int,
        cursor: int,
        last_seq: int,
        load: Callable[[int], Iterator[Any]] | None,
        *,
        lossy: bool = False,
        on_tape: Callable[[], int] | None = None,
    ) -> None:
        self._items: deque[Any] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._capacity = capacity
        self._weight = 0
        self._load = load
        self._lossy = lossy
        self._on_tape: Callable[[], int] = on_tape if on_tape is not None else lambda: self.last_seq
        self._from_tape: Iterator[Any] | None = None
        self._goal = cursor
        self.cursor = cursor
        self.last_seq: int = last_seq
        self.lapped = load is not None and cursor < last_seq
        self.lost = 0
        self.closed = False
        self._woken = False

    def put(self, item: Any) -> None:
        """Hand over the next item; called by the giver in order, after it is durable."""
        with self._changed:
            self.last_seq = item.last_seq
            if self.lapped:
                self._changed.notify()
                return
            while self._weight >= self._capacity and not self.closed:
                if self._lossy:
                    dropped = self._items.popleft()
                    self._weight -= dropped.weight
                    self.lost += dropped.last_seq - dropped.first_seq + 1
                elif self._load is None:
                    self._changed.wait()
                else:
                    self._items.clear()
                    self._weight = 0
                    self.lapped = True
                    break
            if not self.lapped:
                if not item.weight and self._items and not self._items[-1].weight:
                    # or a taker that hangs would let them pile up without ever reaching the capacity
                    self._items[-1].last_seq = item.last_seq
                else:
                    self._items.append(item)
                    self._weight += item.weight
            self._changed.notify()

    def give_way(self, weight: int, seconds: float) -> None:
        """Wait until no more than `weight` is queued, for at most so many seconds; a lapped taker is not waited for."""
        with self._changed:
            self._changed.wait_for(lambda: self._weight <= weight or self.lapped or self.closed, seconds)

    def put_early(self, item: Any) -> bool:
        """Hand over the next item before it is durable; False, and nothing done, where it is to be `put` after that."""
        with self._changed:
            if self.lapped or (self._load is not None and self._weight >= self._capacity):
                return False
        self.put(item)
        return True

    @property
    def _ahead_of_tape(self) -> bool:
        """Whether what comes next is to be read from the tape, and is not there yet."""
        return self.lapped and self._from_tape is None and self._on_tape() <= self.cursor < self.last_seq

    def get(self, timeout: float | None) -> Any | None:
        """The next item, or None when there is none within `timeout` seconds or the queue is closed."""
        with self._changed:
            if (self._ahead_of_tape if self.lapped else not self._items) and not self.closed and not self._woken:
                self._changed.wait(timeout)
            self._woken = False
            if not self.lapped:
                if not self._items:
                    return None
                item = self._items.popleft()
                self._weight -= item.weight
                self.cursor = item.last_seq
                self._changed.notify()
                return item
            if self._ahead_of_tape:
                return None
        return self._next_from_tape()

    def _next_from_tape(self) -> Any | None:
        assert self._load is not None
        if self._from_tape is None:
            self._goal = min(self.last_seq, self._on_tape())
            self._from_tape = self._load(self.cursor)
        for item in self._from_tape:
            # sealing may merge blocks while they are read, so the same events can come again
            if item.last_seq > self.cursor:
                self.cursor = item.last_seq
                return item
        self._from_tape = None
        # what was on the tape when reading began has been read; the rest up to there is a hole
        self.cursor = max(self.cursor, self._goal)
        with self._changed:
            # nothing was queued while lapped, so being level with the giver means having missed nothing
            if self.cursor >= self.last_seq:
                self.lapped = False
        return None

    def urgent(self) -> list[Any]:
        """Queued items that hold HIGH or CRITICAL events, beyond the one to be taken next."""
        with self._changed:
            return [item for item in list(self._items)[1:] if item.urgent] if len(self._items) > 1 else []

    def rewind(self, cursor: int) -> None:
        """Go back to `cursor` and continue from the tape; called by the taker."""
        with self._changed:
            if self._load is None:
                return
            self._items.clear()
            self._weight = 0
            self._from_tape = None
            self.cursor = cursor
            self.lapped = True

    def wake(self) -> None:
        """Let the taker's `get` return, the running one or the next."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let `get` return what is left and then None at once."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    @property
    def drained(self) -> bool:
        with self._changed:
            return not self._items and not self.lapped

    @property
    def ended(self) -> bool:
        """Whether `get` gives nothing any more: closed, and what is left, if anything, did not get to the tape."""
        with self._changed:
            return self.closed and (self._ahead_of_tape if self.lapped else not self._items)

    @property
    def lag(self) -> int:
        return max(0, self.last_seq - self.cursor)

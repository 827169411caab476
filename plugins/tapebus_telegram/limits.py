"""Telegram's rate limits, kept as exact sliding windows on a monotonic clock."""

from __future__ import annotations

from collections import deque

PER_CHAT = (1, 1.0)  # messages, seconds
PER_GROUP = (20, 60.0)  # chats with a negative id: groups, supergroups and channels
OVERALL = (25, 1.0)  # Telegram names about 30; the rest is kept for other programs of the same bot
LONGEST_S = 60.0


class Window:
    """At most `limit` calls in any interval of `seconds`.

    A token bucket of the same figures would let twice as many through around a pause.
    """

    __slots__ = ("_times", "limit", "seconds")

    def __init__(self, limit: int, seconds: float) -> None:
        self.limit = limit
        self.seconds = seconds
        self._times: deque[float] = deque(maxlen=limit)

    def ready_at(self) -> float:
        """The monotonic time from which one more call is allowed."""
        return self._times[0] + self.seconds if len(self._times) == self.limit else float("-inf")

    def take(self, now: float) -> None:
        self._times.append(now)


class Limits:
    """All windows of one bot; edits count like messages.

    `take` gets the time at which a call was over, which is never before the server counted it: however long the
    way to the server takes, the server sees no less time between two calls than was kept here. Not thread-safe.
    """

    def __init__(self) -> None:
        self._overall = Window(*OVERALL)
        self._chats: dict[int | str, list[Window]] = {}

    def _windows(self, chat: int | str) -> list[Window]:
        windows = self._chats.get(chat)
        if windows is None:
            windows = [Window(*PER_CHAT)]
            # "@name" can only be a public channel or supergroup.
            if isinstance(chat, str) or chat < 0:
                windows.append(Window(*PER_GROUP))
            self._chats[chat] = windows
        return windows

    def ready_at(self, chat: int | str) -> float:
        return max([self._overall.ready_at(), *(window.ready_at() for window in self._windows(chat))])

    def take(self, chat: int | str, now: float) -> None:
        self._overall.take(now)
        for window in self._windows(chat):
            window.take(now)

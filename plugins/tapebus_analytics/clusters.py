"""Repeats of a signal counted once: they are one opinion about one market, not many trades.

A signal is a repeat when one of the same symbol, pattern and direction came at most ``width`` seconds before it, itself
a repeat or not. That is decided when the signal comes, for the first of a cluster to *end* is the one whose nearer
level was reached, which would favour losses wherever the stop is nearer than the target.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

#: Signals whose end is awaited, and clusters remembered; the oldest are forgotten.
MOST_OPEN, MOST_CLUSTERS = 20_000, 10_000


class Clusters:
    """Which signals count; ``width`` 0 counts all. ``changed`` collects the keys of `saved` that need writing."""

    def __init__(self, width: float) -> None:
        self.width = width
        self._last: dict[str, float] = {}
        # a plain dict would look for its first entry among all that were removed before
        self._open: OrderedDict[str, tuple[float, bool]] = OrderedDict()
        self.changed: set[str] = set()

    def signal(self, signal_id: str, kind: str, at: float) -> None:
        """A signal of `kind` (see `kind_of`) came at `at`, event time; one seen already changes nothing."""
        if not self.width or signal_id in self._open:
            return
        self._open[signal_id] = (at, self._first(kind, at))
        self.changed.add(f"s:{signal_id}")
        if len(self._open) > MOST_OPEN:
            oldest, _ = self._open.popitem(last=False)
            self.changed.add(f"s:{oldest}")

    def outcome(self, signal_id: str, kind: str, opened_at: float) -> bool:
        """Whether this outcome counts; one whose signal was never seen is placed by when it was opened."""
        if not self.width:
            return True
        known = self._open.pop(signal_id, None)
        if known is None:
            return self._first(kind, opened_at)
        self.changed.add(f"s:{signal_id}")
        return known[1]

    def _first(self, kind: str, at: float) -> bool:
        before = self._last.get(kind)
        self._last[kind] = at
        self.changed.add(f"k:{kind}")
        if len(self._last) > MOST_CLUSTERS:
            self._forget(at)
        return before is None or at - before > self.width

    def _forget(self, now: float) -> None:
        """Drop what no signal can repeat any more, or else the older half."""
        by_age = sorted(self._last, key=lambda kind: self._last[kind])
        past = [kind for kind in by_age if now - self._last[kind] > self.width] or by_age[: MOST_CLUSTERS // 2]
        for kind in past:
            del self._last[kind]
            self.changed.add(f"k:{kind}")

    def saved(self, key: str) -> tuple[float, bool] | None:
        """The value behind one changed key; None where it is to be removed."""
        name = key[2:]
        if key[0] == "s":
            return self._open.get(name)
        at = self._last.get(name)
        return None if at is None else (at, True)

    def restore(self, values: dict[str, tuple[float, bool]]) -> None:
        """Take up what was saved, by key."""
        for key, (at, counted) in sorted(values.items(), key=lambda item: item[1][0]):
            if key[0] == "s":
                self._open[key[2:]] = (at, counted)
            else:
                self._last[key[2:]] = at


def kind_of(data: Any) -> str:
    """What a signal repeats: symbol, pattern and direction of a payload."""
    return f"{data.symbol} {data.pattern_type} {data.direction}"

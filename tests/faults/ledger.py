"""The ledger: what producers wrote down outside the bus, compared event by event with what is on the tape.

A producer (`producers.py`) appends a line before it publishes and a line when it learns that events are
acknowledged, to a file that no fault touches. `Checker` reads the tape of the bus and says what became of them::

    checker = Checker(bus.data_dir, [producer.ledger for producer in producers])
    checker.read_on()                      # what is new on the tape since the last call
    verdict = checker.verdict(bus.stats()) # the statistics are optional
    assert not verdict.wrong, verdict

Every event can be made again from its source and number (`event_of`), so all of its content is compared.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tapebus import Tape

EPOCH = 1_700_000_000.0


def event_of(source: str, n: int) -> tuple[str, dict[str, Any], float, str]:
    """Event number `n` of `source`: type, data, timestamp, correlation id. Two types, sizes from 100 to 900 bytes."""
    digest = zlib.crc32(b"%b %d" % (source.encode(), n))
    at, correlation = EPOCH + n / 1024, f"{source}/{n}"
    if n % 10 == 0:
        filler = "x" * (digest % 700 if n % 100 == 0 else digest % 40)
        data: dict[str, Any] = {"user_id": source, "action": "count", "details": {"digest": digest, "filler": filler}}
        return "user_action", data, at, correlation
    bid = 1.0 + digest % 4096 / 4096
    return "market_data", {"symbol": "EURUSD", "bid": bid, "ask": bid + 1 / 4096, "volume": float(n)}, at, correlation


def matches(event: Any, source: str, n: int) -> bool:
    """Whether a decoded event is `event_of(source, n)` in every part."""
    event_type, data, at, correlation = event_of(source, n)
    return (
        event.event_type == event_type
        and event.timestamp == at
        and event.correlation_id == correlation
        and all(getattr(event.data, name) == value for name, value in data.items())
    )


class Ledger:
    """One producer's file, read on as it grows. Lines are written whole; a half line at the end waits."""

    def __init__(self, file: Path, source: str) -> None:
        self.file = file
        self.source = source
        self._offset = 0
        #: The highest number the producer was about to publish.
        self.intended = 0
        #: Ranges of numbers ``publish`` answered False to.
        self.dropped: list[tuple[int, int]] = []
        #: So many of the events that were not dropped are acknowledged, in their order.
        self.acked = 0
        #: When the producer learned of that, by the monotonic clock.
        self.acked_at = 0.0
        #: The last line: ``publisher.stats()`` and the times of ``publish``; None while the producer lives.
        self.end: dict[str, Any] | None = None

    def read_on(self) -> Ledger:
        """Take in what was written since the last call."""
        if not self.file.exists():
            return self
        with self.file.open("rb") as file:
            file.seek(self._offset)
            whole, _, _ = file.read().rpartition(b"\n")
        for line in whole.splitlines():
            word, _, rest = line.decode().partition(" ")
            if word == "publish":
                self.intended = int(rest)
            elif word == "acked":
                count, at = rest.split()
                self.acked, self.acked_at = int(count), float(at)
            elif word == "dropped":
                first, last = rest.split()
                self.dropped.append((int(first), int(last)))
            else:
                self.end = json.loads(rest)
        self._offset += len(whole) + 1 if whole else 0
        return self

    def acked_number(self) -> int:
        """The number of the last acknowledged event: dropped ones have numbers as well."""
        number = self.acked
        for first, last in self.dropped:
            if first > number:
                break
            number += last - first + 1
        return number


class Writer:
    """The producer's side of a ledger: whole lines to a file opened for appending, no buffer to lose."""

    def __init__(self, file: str) -> None:
        self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def line(self, *words: Any) -> None:
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())


@dataclass
class Verdict:
    """Counts of events. Everything under `WRONG` must be 0."""

    acked: int = 0
    stored: int = 0
    #: Acknowledged and not on the tape.
    lost: int = 0
    duplicate: int = 0
    reordered: int = 0
    #: On the tape and never published, or not as it was published.
    phantom: int = 0
    rejected: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    #: What the books of bus and producers leave open once all producers have ended.
    unexplained: int = 0
    #: Numbers that are not on the tape although a higher one is, and were not dropped.
    holes: int = 0
    #: Triggers without their derived event, and derived events too many.
    underived: int = 0
    overderived: int = 0
    #: The first few findings, for people.
    examples: list[str] = field(default_factory=list)

    WRONG = ("lost", "duplicate", "reordered", "phantom", "unexplained", "holes", "underived", "overderived")

    @property
    def wrong(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.WRONG if getattr(self, name)}

    def figures(self) -> dict[str, Any]:
        """What belongs into the figures of a test."""
        named = ("acked", "stored", "lost", "duplicate", "reordered", "phantom", "rejected", "unexplained")
        return {**{name: getattr(self, name) for name in named}, "dropped": sum(self.dropped.values())}


class _Stream:
    """The events of one source as they stand on the tape."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.seen = bytearray(1 << 16)
        self.last = self.stored = self.duplicate = self.reordered = self.foreign = 0

    def take(self, event: Any) -> str:
        """Note one event; what is wrong with it, empty when nothing is."""
        source, _, number = (event.correlation_id or "").rpartition("/")
        n = int(number) if number.isdecimal() else 0
        if source != self.ledger.source or n < 1 or not matches(event, source, n):
            self.foreign += 1
            return f"phantom {event}"
        if n >= len(self.seen):
            self.seen.extend(bytes(max(len(self.seen), n)))
        if self.seen[n]:
            self.duplicate += 1
            return f"duplicate {source}/{n} at bus_seq {event.bus_seq}"
        self.seen[n] = 1
        self.stored += 1
        before, self.last = self.last, max(self.last, n)
        if n < before:
            self.reordered += 1
            return f"reordered {source}/{n} at bus_seq {event.bus_seq} after {before}"
        return ""

    def count(self, first: int, last: int) -> int:
        """How many of the numbers `first` to `last` are on the tape."""
        return self.seen.count(1, first, last + 1)

    def missing(self, first: int, last: int) -> int:
        """How many of the numbers `first` to `last` are neither on the tape nor dropped."""
        absent = max(0, last - first + 1) - self.count(first, last)
        for low, high in self.ledger.dropped:
            low, high = max(low, first), min(high, last)
            if low <= high:
                absent -= high - low + 1 - self.count(low, high)
        return absent


class Checker:
    """Reads a tape once, front to back, however often it is asked; `derived` maps a derived type to its trigger.

    A derived event names its trigger in ``causation_id``; triggers count from the first event on.
    """

    def __init__(self, data_dir: Path, ledgers: Iterable[Ledger], derived: dict[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self.streams: dict[str, _Stream] = {}
        for ledger in ledgers:
            self.add(ledger)
        self.seq = 0
        self.examples: list[str] = []
        self._derived = derived or {}
        self._triggers: dict[str, set[int]] = {trigger: set() for trigger in self._derived.values()}
        self._causes: dict[str, list[int]] = {kind: [] for kind in self._derived}

    def add(self, ledger: Ledger) -> None:
        """Expect events of one more producer, none of which was read yet."""
        self.streams[ledger.source] = _Stream(ledger)

    def read_on(self) -> int:
        """Take in what is new on the tape; how many events that was, of anybody."""
        begun = self.seq
        with Tape.open(self.data_dir) as tape:
            for event in tape.read(self.seq):
                if event.bus_seq <= self.seq:
                    self._note(f"duplicate bus_seq {event.bus_seq}")
                self.seq = event.bus_seq
                stream = self.streams.get(event.source)
                if stream is not None:
                    self._note(stream.take(event))
                if self._derived:
                    self._derive(event)
        return self.seq - begun

    def _note(self, found: str) -> None:
        if found and len(self.examples) < 5:
            self.examples.append(found)

    def _derive(self, event: Any) -> None:
        if event.event_type in self._triggers:
            self._triggers[event.event_type].add(event.bus_seq)
        if event.event_type in self._causes:
            self._causes[event.event_type].append(int(event.causation_id.removeprefix("bus:")))

    def underived(self) -> int:
        """How many triggers still wait for their derived event."""
        return sum(len(self._triggers[trigger] - set(self._causes[kind])) for kind, trigger in self._derived.items())

    def verdict(self, stats: dict[str, Any] | None = None) -> Verdict:
        """Compare what was read with the ledgers, and with the bus's own books where `stats` is given."""
        found = Verdict(examples=self.examples)
        for stream in self.streams.values():
            self._judge(stream, found)
        for kind, trigger in self._derived.items():
            found.overderived += len(self._causes[kind]) - len(set(self._causes[kind]) & self._triggers[trigger])
        if all(stream.ledger.end is not None for stream in self.streams.values()):
            found.underived = self.underived()
        if stats is not None:
            found.unexplained += self._books(stats)
        return found

    def _judge(self, stream: _Stream, found: Verdict) -> None:
        ledger = stream.ledger.read_on()
        dropped = sum(last - first + 1 for first, last in ledger.dropped)
        found.acked += ledger.acked
        found.stored += stream.stored
        found.duplicate += stream.duplicate
        found.reordered += stream.reordered
        refused = sum(stream.count(*each) for each in ledger.dropped)
        never = stream.stored - stream.count(1, ledger.intended)
        found.phantom += stream.foreign + refused + never
        found.lost += stream.missing(1, ledger.acked_number())
        found.holes += stream.missing(1, stream.last)
        if ledger.end is None:
            return
        stats = ledger.end
        rejected = sum(stats["rejected"].values())
        found.rejected += rejected
        for place, count in stats["dropped"].items():
            found.dropped[place] = found.dropped.get(place, 0) + count
        booked = stats["acked"] + rejected + sum(stats["dropped"].values()) + stats["in_flight"]
        found.unexplained += abs(ledger.intended - booked) + abs(dropped - sum(stats["dropped"].values()))
        if not stats["in_flight"]:
            found.unexplained += abs(stream.stored - stats["acked"])

    def _books(self, stats: dict[str, Any]) -> int:
        """What the bus's books leave open: of each account, and of each source against the tape."""
        wrong = abs(stats["bus"]["unexplained"])
        for source, stream in self.streams.items():
            books = [book for book in stats["producers"] if book["source"] == source]
            for book in books:
                parts = book["stored"] + book["rejected"] + book["dropped"] + book["in_flight"]
                wrong += abs(book["highest_seq"] - parts)
            wrong += abs(sum(book["stored"] for book in books) - stream.stored)
        return wrong

"""The books: what became of every event that was given a number, exact, and with nothing unexplained.

Per producer ``highest_seq = stored + rejected + dropped + in_flight``. The same account is read from a running
bus and from the tape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from msgspec import Struct

from tapebus.places import LEGACY
from tapebus.store import Gap, ProducerBook

#: The first letters of counters that are kept on the tape without an account.
REJECTED, DROPPED, DEAD = "rejected.", "dropped.", "dead."
UNSEQUENCED = LEGACY[1].name
#: The account into which those of producers long gone are added up.
FINISHED = b"finished".ljust(16, b"\0")
#: Seconds without an event after which a producer is long gone.
GONE_S = 30 * 86400.0
#: With more accounts than this, those long gone are added up although their events are still on the tape.
MANY = 10_000


class Account(Struct):
    """One line of the books; every figure counts events.

    ``sequenced`` tells producers that number their events from ways in that do not; what the latter were refused
    is counted together, in the line called ``legacy.unsequenced``.
    """

    producer_id: str
    source: str
    highest_seq: int = 0
    stored: int = 0
    rejected: dict[str, int] = {}
    dropped: dict[str, int] = {}
    in_flight: int = 0
    unexplained: int = 0
    sequenced: bool = True
    seen_at: float = 0.0
    gaps: list[Gap] = []
    connected: bool = False


class Summary(Struct):
    """The sum over all accounts. ``stray`` events are on the tape and in no account, or the other way round."""

    producers: int = 0
    published: int = 0
    stored: int = 0
    rejected: int = 0
    dropped: int = 0
    in_flight: int = 0
    unexplained: int = 0
    stray: int = 0

    @property
    def closed(self) -> bool:
        """Whether every event is accounted for."""
        return not self.unexplained and not self.stray

    def line(self) -> str:
        """One line for people."""
        text = (
            f"books: {self.producers:,} producer{'s' * (self.producers != 1)}, {self.published:,} published = "
            f"{self.stored:,} stored + {self.rejected:,} rejected + {self.dropped:,} dropped + "
            f"{self.in_flight:,} in flight, unexplained {self.unexplained:,}"
        )
        return f"{text}; {abs(self.stray):,} on the tape differ from the accounts" if self.stray else text


def account(book: ProducerBook, connected: bool = False) -> Account:
    """The line of a producer; epoch 0 marks what does not number its events."""
    accounted = book.stored + sum(book.rejected.values()) + sum(book.dropped.values())
    return Account(
        producer_id=readable(book.producer_id),
        source=book.source,
        highest_seq=max(book.highest_seq, book.watermark),
        stored=book.stored,
        rejected=dict(book.rejected),
        dropped=dict(book.dropped),
        in_flight=max(0, book.highest_seq - book.watermark),
        unexplained=book.watermark - accounted,
        sequenced=book.epoch != 0,
        seen_at=book.seen_at,
        gaps=list(book.gaps),
        connected=connected,
    )


def unsequenced(counters: dict[str, int]) -> Account:
    """What senders that do not number their events had refused and shed; what is on the tape is in their own lines."""
    rejected, dropped = part(counters, REJECTED), part(counters, DROPPED)
    return Account(
        producer_id=UNSEQUENCED,
        source=UNSEQUENCED,
        highest_seq=sum(rejected.values()) + sum(dropped.values()),
        rejected=rejected,
        dropped=dropped,
        sequenced=False,
    )


def summary(accounts: Iterable[Account], last_seq: int) -> Summary:
    """The sum of `accounts`, which must be all of them; the tape has numbered ``last_seq`` events."""
    found = Summary(stray=last_seq)
    for each in accounts:
        found.producers += each.producer_id != UNSEQUENCED
        found.published += each.highest_seq
        found.stored += each.stored
        found.rejected += sum(each.rejected.values())
        found.dropped += sum(each.dropped.values())
        found.in_flight += each.in_flight
        found.unexplained += each.unexplained
        found.stray -= each.stored
    return found


def counted_by_source(
    blocks: Iterable[Any], raw_events: Callable[[Any], Iterable[bytes]], progress: Callable[[int], None]
) -> dict[str, int]:
    """How many events on the tape name each source, read from their raw bytes; ``""`` where they name none."""
    as_json, as_msgpack = msgspec.json.Decoder(_Named), msgspec.msgpack.Decoder(_Named)
    found: dict[str, int] = {}
    for block in blocks:
        for raw in raw_events(block):
            try:
                source = (as_msgpack if raw[0] >= 0x80 else as_json).decode(raw).source
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, IndexError):
                source = ""
            found[source] = found.get(source, 0) + 1
        progress(block.last_seq)
    return found


class _Named(Struct):
    source: str = ""


def fold(
    accounts: list[ProducerBook], first_seq: int, old_seq: int, many: int = MANY
) -> tuple[list[ProducerBook], list[ProducerBook]]:
    """The accounts to go on with, and those that were added up into the one called `FINISHED`.

    An account is what a resent event is recognised by. It may go when it has not changed since the tape ended at
    `old_seq`, which is `GONE_S` ago, and all its events have fallen out of retention (`first_seq` is the oldest on
    the tape): then no event can come to be on the tape twice. Beyond `many` accounts, silence with nothing in flight
    is enough.
    """
    crowded = len(accounts) > many
    kept: list[ProducerBook] = []
    gone: list[ProducerBook] = []
    total = ProducerBook(FINISHED, 0, "finished")
    for each in accounts:
        silent = each.epoch != 0 and each.last_bus_seq <= old_seq
        settled = each.last_bus_seq < first_seq or (crowded and each.highest_seq <= each.watermark)
        if each.producer_id == FINISHED:
            total = msgspec.structs.replace(each, rejected=dict(each.rejected), dropped=dict(each.dropped))
        elif silent and settled and old_seq:
            gone.append(each)
        else:
            kept.append(each)
    for each in gone:
        total.watermark += each.watermark
        total.highest_seq += max(each.highest_seq, each.watermark)
        total.stored += each.stored
        for sums, more in ((total.rejected, each.rejected), (total.dropped, each.dropped)):
            for name, count in more.items():
                sums[name] = sums.get(name, 0) + count
        total.seen_at = max(total.seen_at, each.seen_at)
    return ([*kept, total] if total.watermark or total.highest_seq else kept), gone


def readable(producer_id: bytes) -> str:
    """The name of a way in or a plugin, the hexadecimal digits of any other producer."""
    text = producer_id.rstrip(b"\0")
    named = text in (b"bus", b"ingest", b"finished") or text.startswith((b"plugin:", b"source:"))
    return text.decode() if named else producer_id.hex()


def part(counters: dict[str, int], prefix: str) -> dict[str, int]:
    """The counters whose name begins with `prefix`, without it."""
    return {key.removeprefix(prefix): count for key, count in counters.items() if key.startswith(prefix)}

"""What the core asks of a store: one transaction per commit, short reads from any process.

The store is a plugin (hook ``tapebus_open_store``); without one the bus still runs and an
acknowledgement means *dispatched*. A `Block` is opaque to the store except for its header fields:
it compresses and checksums ``payload`` and keeps the ``corr`` run as an index.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from tapebus.events import DeadLetter

#: Ranges of lost numbers that one account names.
MAX_GAPS = 64


class Block(Struct, gc=False):
    """Consecutive events in the raw bytes they arrived in, packed by ``tapebus.blocks``.

    ``topics`` has bit ``topic_id % 64`` set for each event type inside; times are Unix seconds.
    ``corr`` is a sorted run of 8-byte entries (hash of the correlation id, offset from
    ``first_seq``), see `tapebus.blocks.find_corr`.
    """

    first_seq: int
    count: int
    min_time: float
    max_time: float
    min_received: float
    max_received: float
    topics: int
    payload: bytes
    corr: bytes = b""
    #: How many of its events have priority HIGH or CRITICAL; not kept on the tape.
    urgent: int = 0

    @property
    def last_seq(self) -> int:
        return self.first_seq + self.count - 1

    @property
    def weight(self) -> int:
        """Bytes in memory."""
        return len(self.payload) + len(self.corr)


class Gap(Struct, array_like=True):
    """Numbers of one producer that are not on the tape: from ``first`` to ``last``, lost or refused at ``place``.

    ``at`` is when the bus was told, in Unix seconds.
    """

    first: int
    last: int
    place: str
    at: float = 0.0

    def __len__(self) -> int:
        return self.last - self.first + 1


class ProducerBook(Struct):
    """The durable account of one producer, ``(producer_id, epoch)``; every figure counts events.

    ``highest_seq = watermark + in flight`` and ``watermark = stored + rejected + dropped``, where
    ``watermark`` is the last sequence number accounted for: what a resend is compared with. ``gaps`` names
    the newest `MAX_GAPS` ranges of what was lost or refused; the sums above count all of them. ``last_bus_seq``
    is where the tape ended when the account last changed, ``seen_at`` when that was.
    """

    producer_id: bytes
    epoch: int
    source: str = ""
    watermark: int = 0
    stored: int = 0
    highest_seq: int = 0
    rejected: dict[str, int] = {}
    dropped: dict[str, int] = {}
    seen_at: float = 0.0
    gaps: list[Gap] = []
    last_bus_seq: int = 0

    def note_gap(self, gap: Gap) -> None:
        """Add a range at the end; one that continues the last makes it longer."""
        newest = self.gaps[-1] if self.gaps else None
        if newest is not None and newest.place == gap.place and newest.last + 1 == gap.first:
            self.gaps[-1] = Gap(newest.first, gap.last, gap.place, gap.at)
        else:
            self.gaps = [*self.gaps[1 - MAX_GAPS :], gap]


class Unit(Struct):
    """One consumer's unit of work: its cursor and the state that belongs to exactly that cursor.

    ``ahead`` lists the sequence numbers above ``cursor`` that were already handled (priority lanes).
    ``state`` maps a key to its new bytes, or to ``None`` for a deleted key. ``dead`` are dead letters that
    belong to the cursor, and ``settled`` the ids of dead letters it has dealt with; the tape thread moves both into
    the commit.
    """

    consumer: str
    cursor: int
    ahead: list[int] = []
    namespace: str = ""
    state: dict[str, bytes | None] = {}
    dead: list[DeadLetter] = []
    settled: list[int] = []
    #: Accounts that go; what they counted is in another one of the same commit.
    forgotten: list[ProducerBook] = []


class Commit(Struct):
    """Everything that becomes durable together. Blocks are gapless and in bus order."""

    blocks: list[Block] = []
    producers: list[ProducerBook] = []
    units: list[Unit] = []
    dead: list[DeadLetter] = []
    topics: dict[int, str] = {}
    counters: dict[str, int] = {}
    #: Ids of dead letters that go.
    settled: list[int] = []
    #: Accounts that go; what they counted is in another one of the same commit.
    forgotten: list[ProducerBook] = []


_PROCESS = uuid.uuid4().hex
_STARTED = time.monotonic()


def boot_id() -> str:
    """What `steady_clock` counts from: this boot of the machine, or this process where that cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return _PROCESS


def steady_clock() -> float:
    """Seconds since `boot_id` began, on a clock that nobody can set; suspends count where the system tells."""
    if hasattr(time, "CLOCK_BOOTTIME") and Path("/proc/sys/kernel/random/boot_id").exists():
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic() - _STARTED


class StoreReader(Protocol):
    """Read access; usable in any process while another one writes. Every call is one short transaction."""

    def last_seq(self) -> int: ...
    def first_seq(self) -> int:
        """The oldest sequence number still kept (retention removes whole blocks), 1 on an empty tape."""

    def topics(self) -> dict[int, str]: ...
    def counters(self) -> dict[str, int]: ...
    def holes(self) -> list[tuple[int, int]]:
        """Inclusive ranges of sequence numbers whose events damage has taken from the tape."""

    def lost_events(self) -> int:
        """How many events that is, since the tape began."""

    def verify(self) -> list[str]:
        """Read everything and compare it with its checksums; what is wrong, as sentences. Not while a bus writes."""

    def blocks(
        self,
        after: int = 0,
        *,
        topic_ids: Iterable[int] | None = None,
        since: float | None = None,
        until: float | None = None,
        reverse: bool = False,
    ) -> Iterator[Block]:
        """Blocks that may hold events with ``bus_seq > after`` matching the filters, in order; holes are skipped.

        With `topic_ids` the events of other types may be without their bytes.
        """

    def blocks_of(self, correlation_id: str) -> Iterator[tuple[Block, list[int]]]:
        """Blocks with the offsets of events that probably carry this correlation id (a hash match).

        Events at other offsets may be without their bytes.
        """

    def producers(self) -> list[ProducerBook]: ...
    def books(self) -> tuple[int, list[ProducerBook], dict[str, int]]:
        """`last_seq`, `producers` and `counters` of one moment."""

    def cursors(self) -> dict[str, Unit]: ...
    def state(self, namespace: str) -> dict[str, bytes]: ...
    def dead(self, after: int = 0, limit: int | None = None) -> Iterator[DeadLetter]: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Store(StoreReader, Protocol):
    """Write access, by one thread of one process; holds the lock on the data directory.

    ``shortage`` says why room is short, "" while it is not: commits then live on a reserve, and no more
    should be let in than must be. ``notices`` are sentences about what had to be done to open the tape.
    """

    shortage: str

    @property
    def notices(self) -> list[str]: ...

    def commit(self, commit: Commit) -> None:
        """Make `commit` durable before returning (commit and fsync).

        Raises `StoreFull` when disk or map are full (nothing was written, try again later) and
        `StoreError` on an I/O error (nothing may be acknowledged any more).
        """

    def regain(self) -> bool:
        """Try to take the reserve back; True when there is room again and ``shortage`` is over."""

    def suspect(self, reason: str) -> None:
        """Let the next start look at the whole tape before it is opened; from any thread."""

    def maintain(self, now: float) -> float:
        """Do one bounded piece of upkeep (sealing, retention, reader check); how much the rest presses.

        0 when nothing waits, 1 when it has time, 2 when it should get twice as much of the writer's, and so on.
        `now` is what `steady_clock` shows.
        """

    def older(self, seconds: float) -> int:
        """The sequence number up to which everything has certainly been on the tape for `seconds`, or for as long as
        the tape keeps anything; 0 for nothing."""

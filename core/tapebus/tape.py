"""Reading the tape from any process, while the bus runs or after it stopped."""

from __future__ import annotations

import ctypes
import os
import select
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

from tapebus import books
from tapebus._topics import MOST_NUMBERED
from tapebus.blocks import BlockView
from tapebus.codec import Codec
from tapebus.consumer import covers
from tapebus.errors import StoreError
from tapebus.events import DeadLetter, Event
from tapebus.plugins import load, registry
from tapebus.store import Block, StoreReader

#: A follower looks at the tape at least this often; inotify wakes it at once where there is one.
FALLBACK_S = 0.1
#: The notice of a write may come just before the write can be read.
SETTLE_S = 0.002


class Tape:
    """Read-only access to the events of one data directory.

    Open it with `Tape.open` and close it, or use it as a context manager. Every call takes short
    transactions, so a slow reader hinders nobody. One thread at a time; not across a fork.
    """

    def __init__(self, reader: StoreReader, codec: Codec, data_dir: Path) -> None:
        self._reader = reader
        self._codec = codec
        self._data_dir = data_dir
        self._closed = False

    @classmethod
    def open(cls, data_dir: str | os.PathLike[str], *, plugins: Iterable[Any] = ("schema", "store")) -> Tape:
        """Open the tape in `data_dir`.

        `plugins` are names or modules: one of them opens the store, the others give events their
        types; an event of a type nobody registered is a `GenericEvent`. Raises `StoreError` where
        there is no tape, or one written by a newer version.
        """
        chosen = list(plugins)
        manager = load(
            [each for each in chosen if isinstance(each, str)],
            [(getattr(each, "__name__", repr(each)), each) for each in chosen if not isinstance(each, str)],
        )
        path = Path(data_dir)
        reader = manager.hook.tapebus_open_store(data_dir=path, config={}, readonly=True)
        if reader is None:
            raise StoreError(f"{path}: no enabled plugin opens a store: add 'store' to the plugins")
        return cls(reader, Codec(registry(manager)), path)

    def __enter__(self) -> Tape:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the tape; iterators over it end with `StoreError`. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._reader.close()

    @property
    def last_seq(self) -> int:
        """The newest ``bus_seq`` on the tape, 0 when it is empty."""
        return self._reader.last_seq()

    @property
    def first_seq(self) -> int:
        """The oldest ``bus_seq`` still kept."""
        return self._reader.first_seq()

    def stats(self) -> dict[str, Any]:
        """Figures about the tape, sizes in bytes."""
        return self._reader.stats()

    def state(self, plugin: str) -> dict[str, bytes]:
        """What `plugin` keeps in ``context.state``, as of the last commit; empty where it keeps nothing.

        All keys are of one moment. A plugin whose consumers run as processes keeps its state in a store of its own,
        which this does not read.
        """
        return self._reader.state(plugin)

    def accounts(self) -> tuple[list[books.Account], int]:
        """The books as of the last commit, and the newest ``bus_seq`` of the same moment."""
        last_seq, found, counters = self._reader.books()
        accounts = [books.account(each) for each in found if each.epoch or each.watermark]
        return [*accounts, books.unsequenced(counters)], last_seq

    def count_by_source(
        self, last_seq: int, progress: Callable[[int], None] = lambda seq: None
    ) -> tuple[dict[str, int], list[range]]:
        """How many events up to `last_seq` name each source, and what of ``bus_seq`` was not there to be counted.

        Every event is read from the tape; retention may remove some before and some after that. `progress` is told
        the last ``bus_seq`` counted. Raises `CorruptError` where stored bytes are damaged.
        """
        counted = 0
        absent: list[range] = []

        def raw_events(block: Block) -> Iterator[bytes]:
            nonlocal counted
            view = BlockView(block.payload, block.first_seq)
            # blocks may be merged while we read: what was counted must not count again
            first, before, counted = max(block.first_seq, counted + 1), counted, min(block.last_seq, last_seq)
            if first > before + 1:
                absent.append(range(before + 1, first))
            return (view.raw(seq) for seq in range(first, counted + 1))

        blocks = takewhile(lambda block: block.first_seq <= last_seq, self._reader.blocks())
        found = books.counted_by_source(blocks, raw_events, progress)
        if counted < last_seq:
            absent.append(range(counted + 1, last_seq + 1))
        return found, absent

    @property
    def holes(self) -> list[tuple[int, int]]:
        """Inclusive ranges of ``bus_seq`` that damage has taken from the tape; reading passes over them."""
        return self._reader.holes()

    def verify(self) -> list[str]:
        """Compare everything on the tape with its checksums; what is wrong. Only while no bus runs on it."""
        return self._reader.verify()

    def raw(self, bus_seq: int) -> bytes:
        """The bytes of one event as published, whether or not they decode; empty where it is not kept."""
        block = next(iter(self._reader.blocks(bus_seq - 1)), None)
        if block is None or not block.first_seq <= bus_seq <= block.last_seq:
            return b""
        return BlockView(block.payload, block.first_seq).raw(bus_seq)

    def dead_letters(self, after: int = 0, limit: int | None = None) -> Iterator[DeadLetter]:
        """Dead letters with an id above `after`, oldest first."""
        return self._reader.dead(after, limit)

    def events_at(self, seqs: Iterable[int]) -> dict[int, Any]:
        """The events at these places, by ``bus_seq``; what is no longer on the tape is left out."""
        found: dict[int, Any] = {}
        names = self._reader.topics()
        wanted = sorted(set(seqs))
        while wanted:
            block = next(iter(self._reader.blocks(wanted[0] - 1)), None)
            if block is None:
                break
            here = [seq - block.first_seq for seq in wanted if block.first_seq <= seq <= block.last_seq]
            events = self._codec.events(block, names, 0, block.last_seq, among=here)
            found.update({event.bus_seq: event for event in events})
            wanted = [seq for seq in wanted if seq > block.last_seq]
        return found

    def watch(self) -> Watch:
        """Something whose ``wait(seconds)`` returns when the store is written to; use it as a context manager."""
        return Watch(self._data_dir / "tape")

    def read(
        self,
        after: int = 0,
        topics: Iterable[str] | None = None,
        since: float | None = None,
        until: float | None = None,
        correlation_id: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
        last: int | None = None,
    ) -> Iterator[Any]:
        """Typed events with ``bus_seq > after`` in bus order, newest first if `reverse`.

        The iteration ends at what was the newest event when it began. `topics` are exact,
        ``prefix.*`` or ``*``. `since` and `until` are event times in Unix seconds, ``since <= t < until``.
        With `last` only the newest so many of all that match; they are held in memory. `limit` is the greatest number
        of events. Raises `CorruptError` where stored bytes are damaged.
        """
        chosen = _as_list(topics)
        backwards = reverse or last is not None
        found = self._read(after, self.last_seq, chosen, since, until, correlation_id, backwards)
        if last is not None:
            newest = list(_first(found, last))
            found = iter(newest if reverse else newest[::-1])
        yield from found if limit is None else _first(found, limit)

    def follow(
        self,
        after: int | None = None,
        topics: Iterable[str] | None = None,
        *,
        poll: float = FALLBACK_S,
        idle_timeout: float | None = None,
    ) -> Iterator[Any]:
        """Events as they reach the disk: blocks while there is none. `after` defaults to the newest one.

        Waiting sleeps in the kernel until the store is written to, at most `poll` seconds at a time.
        The iteration ends when nothing new came for `idle_timeout` seconds, never by default.
        """
        chosen = _as_list(topics)
        place = self.last_seq if after is None else after
        quiet_since = time.monotonic()
        with self.watch() as watch:
            woken = False
            while True:
                horizon = self.last_seq
                if horizon > place:
                    yield from self._read(place, horizon, chosen, None, None, None, False)
                    place, woken, quiet_since = horizon, False, time.monotonic()
                    continue
                if idle_timeout is not None and time.monotonic() - quiet_since >= idle_timeout:
                    return
                woken = watch.wait(SETTLE_S if woken else poll) and not woken

    def _read(
        self,
        after: int,
        horizon: int,
        topics: list[str] | None,
        since: float | None,
        until: float | None,
        correlation_id: str | None,
        reverse: bool,
    ) -> Iterator[Event]:
        """Matching events with ``after < bus_seq <= horizon``."""
        names = self._reader.topics()
        wanted = None if topics is None else {number for number, name in names.items() if covers(topics, name)}
        full = topics is not None and len(names) >= MOST_NUMBERED
        if wanted is not None and full:
            wanted.add(0)  # holds every type that came too late for a number
        elif wanted is not None and not wanted:
            return
        low, high = after, horizon
        for block, among in self._blocks(after, wanted, since, until, correlation_id, reverse):
            if block.first_seq > high:
                if reverse:
                    continue
                return
            for event in self._codec.events(block, names, low, high, wanted, among, reverse):
                if (
                    (since is None or event.timestamp >= since)
                    and (until is None or event.timestamp < until)
                    and (correlation_id is None or event.correlation_id == correlation_id)
                    and (not full or covers(topics or (), event.event_type))  # type: ignore[attr-defined]
                ):
                    yield event
            # Blocks may be merged while we read: what was handed out must not come again.
            if reverse:
                high = min(high, block.first_seq - 1)
            else:
                low = max(low, block.last_seq)

    def _blocks(
        self,
        after: int,
        wanted: set[int] | None,
        since: float | None,
        until: float | None,
        correlation_id: str | None,
        reverse: bool,
    ) -> Iterator[tuple[Block, list[int] | None]]:
        """Blocks that may hold what matches, and the offsets in them where it can only be, if these are known."""
        if correlation_id is None:
            for block in self._reader.blocks(after, topic_ids=wanted, since=since, until=until, reverse=reverse):
                yield block, None
            return
        found = ((block, among) for block, among in self._reader.blocks_of(correlation_id) if block.last_seq > after)
        yield from reversed(list(found)) if reverse else found


def _first(events: Iterator[Any], count: int) -> Iterator[Any]:
    """The first `count` of `events`, without looking for one more."""
    return islice(events, max(0, count))


def _as_list(topics: Iterable[str] | None) -> list[str] | None:
    if topics is None:
        return None
    return [topics] if isinstance(topics, str) else list(topics)


class Watch:
    """Waits until a file in a directory is written to: inotify on Linux, plain waiting elsewhere."""

    _MODIFY = 0x2

    def __init__(self, directory: Path) -> None:
        self._fd = -1
        self._poll: select.poll | None = None
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if self._fd >= 0 and libc.inotify_add_watch(self._fd, os.fsencode(directory), self._MODIFY) >= 0:
                self._poll = select.poll()
                self._poll.register(self._fd, select.POLLIN)
        except (OSError, AttributeError):
            self._poll = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds; True when something was written."""
        if self._poll is None:
            time.sleep(timeout)
            return False
        if not self._poll.poll(timeout * 1000):
            return False
        os.read(self._fd, 65536)
        return True

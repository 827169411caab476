"""The dispatcher thread: decodes each block once and fans its events out to all consumers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tapebus._decode import split
from tapebus.backlog import Backlog
from tapebus.blocks import BlockView
from tapebus.codec import Codec, Fault
from tapebus.consumer import covers
from tapebus.events import Event
from tapebus.failpoints import failpoint
from tapebus.fence import Doing, Fence
from tapebus.judge import Judge
from tapebus.store import Block, StoreReader
from tapebus.threads import show_name

#: Bytes of undispatched blocks kept in memory; beyond it dispatch continues from the tape.
BACKLOG_BYTES = 32 << 20
#: Seconds between two notes to consumers with their own thread that all there was is of no interest to them.
PASS_S = 0.02
#: Bytes that count as one event in the capacity of a queue of decoded events.
EVENT_BYTES = 512


class Slice:
    """A stretch of the tape and what was decoded of it: all its events, None where one failed, or those one
    consumer asked for.
    """

    __slots__ = ("events", "first_seq", "last_seq", "urgent", "view", "weight")

    def __init__(self, events: list[Any], view: BlockView, first_seq: int, last_seq: int, urgent: bool = False) -> None:
        self.events = events
        self.view = view
        self.first_seq = first_seq
        self.last_seq = last_seq
        # large events count for several, or a queue of them would hold any amount of memory
        size = len(view.payload) * len(events) // max(1, view.count)
        self.weight = max(len(events), size // EVENT_BYTES)
        self.urgent = urgent


#: The view of a stretch that holds nothing for its consumer.
NOTHING = BlockView(bytes(24), 0)


class Outlet(Protocol):
    """A consumer with a thread of its own, as the dispatcher sees it."""

    fence: Fence

    def offer(self, piece: Slice) -> None: ...


class FanOut:
    """Which topics go to which of a few consumers: for each topic number the numbers of their groups."""

    def __init__(self, codec: Codec, topics: list[tuple[str, ...]]) -> None:
        self._codec = codec
        self._groups: list[tuple[str, ...]] = list(dict.fromkeys(topics))
        self._index = [self._groups.index(each) for each in topics]
        self._routes: list[tuple[int, ...]] = [()]

    def _route(self, name: str) -> tuple[int, ...]:
        return tuple(g for g, topics in enumerate(self._groups) if covers(topics, name))

    def split(self, piece: Slice) -> list[list[Event]]:
        """One list of events for each consumer, in the order the topics were given."""
        topics = self._codec.topics
        if len(self._routes) <= len(topics):
            self._routes += [self._route(name) for name in topics.after(len(self._routes) - 1).values()]
        start = piece.first_seq - piece.view.first_seq
        groups = split(piece.events, piece.view, start, self._routes, len(self._groups), self._route)
        return [groups[g] for g in self._index]


class Dispatcher(threading.Thread):
    """Owns the inline consumers. `deliver` is called by the tape thread, everything else runs here."""

    def __init__(
        self,
        codec: Codec,
        fences: list[Fence],
        store: StoreReader | None,
        cursor: int,
        last_seq: int,
        *,
        max_batch: int,
        judge: Judge,
        fail: Callable[[BaseException], None],
        outlets: Sequence[Outlet] = (),
    ) -> None:
        super().__init__(name="tapebus-dispatch", daemon=True)
        self.codec = codec
        self.fences = fences
        self.store = store
        self._outlets = outlets
        self._held: list[list[Event]] = [[] for _ in outlets]
        self.feed: Any = None
        self._max_batch = max_batch
        self.judge = judge
        self._units: list[Fence | Judge] = [*fences, judge]
        self._fail = fail
        everybody = [*fences, *(outlet.fence for outlet in outlets)]
        self._fan = FanOut(codec, [tuple(fence.consumer.topics) for fence in everybody])
        self._lanes = [fence for fence in fences if fence.consumer.lanes]
        load = (lambda after: store.blocks(after)) if store is not None else None
        self.backlog = Backlog(BACKLOG_BYTES, cursor, last_seq, load)
        #: Decoding runs the rules of plugins.
        self.doing = Doing()
        for fence in fences:
            fence.wake = self.backlog.wake
        #: The last sequence number all live consumers have been offered.
        self.done_seq = cursor
        self._passed_seq = cursor
        self._pass_at = 0.0
        self._overtaken = 0

    def deliver(self, block: Block) -> None:
        """Take over a block that has just been committed."""
        self.backlog.put(block)

    def run(self) -> None:
        show_name()
        try:
            while True:
                timeout = self._tick()
                lagging = self._feed_lagging()
                block = self.backlog.get(0.0 if lagging else timeout)
                if block is not None:
                    failpoint("dispatch.before_block")
                    self._overtake()
                    self._dispatch(block)
                    failpoint("dispatch.after_block")
                elif self.backlog.ended:
                    break
                elif not lagging and not self.backlog.lapped:
                    self._rest()
            self._pass_at = 0.0
            self._done_with(self.done_seq)
            for each in self._units:
                each.close_unit(force=True)
        except BaseException as error:
            self._fail(error)

    def _tick(self) -> float | None:
        """Run what is due; seconds until something else is, None for nothing to wait for."""
        now = time.monotonic()
        for fence in self.fences:
            if fence.asked_again and fence.ready:
                fence.settle(lambda seq: event_at(self.codec, self.store, seq))
        waits = [wait for fence in self.fences if (wait := fence.tick(now)) is not None]
        waits += [fence.breaker.retry_in for fence in self.fences if not fence.ready and fence.breaker.state == "open"]
        waits += [0.25 for fence in self.fences if fence.unsaved]
        if self.judge.unsaved:
            waits.append(0.25)
        if self._outlets and self._passed_seq < self.done_seq:
            waits.append(max(0.0, self._pass_at - now))
        return min(waits, default=None)

    def _rest(self) -> None:
        self._done_with(self.done_seq)
        for each in self._units:
            if each.unsaved:
                each.close_unit()

    def _dispatch(self, block: Block) -> None:
        view = BlockView(block.payload, block.first_seq)
        for start in range(0, view.count, self._max_batch):
            # a call each, so that the events of one are freed, still warm, before the next are made
            self._dispatch_piece(view, start, min(start + self._max_batch, view.count), block.urgent > 0)
        # once a block, as far as they are few: to wake a thread for each event costs more than the event
        self._hand_over(view, block.last_seq, block.urgent > 0, 1)
        for each in self._units:
            # once a block: what a burst changes again and again is written down once
            each.close_unit()
        self._done_with(block.last_seq)

    def _done_with(self, last_seq: int) -> None:
        """Everybody has been offered what is up to `last_seq`; says so to those for whom it held nothing, by and by."""
        self.done_seq = last_seq
        now = time.monotonic()
        if self._passed_seq < last_seq and now >= self._pass_at:
            for outlet in self._outlets:
                outlet.offer(Slice([], NOTHING, self._passed_seq + 1, last_seq))
            self._passed_seq, self._pass_at = last_seq, now + PASS_S

    def _dispatch_piece(self, view: BlockView, start: int, stop: int, urgent: bool) -> None:
        self.doing.begin("rules of event types")
        events, faults = self.codec.decode(view, start, stop)
        self.doing.end()
        first, last = view.first_seq + start, view.first_seq + stop - 1
        self.judge.judge(faults, view, first, last)
        piece = Slice(events, view, first, last, urgent)
        if self.feed is not None:
            self.feed.offer(self._with_quarantined(piece, faults))
        lists = self._fan.split(piece)
        for held, wanted in zip(self._held, lists[len(self.fences) :], strict=True):
            held += wanted
        self._hand_over(view, last, urgent, self._max_batch)
        for fence, wanted in zip(self.fences, lists, strict=False):
            # without a store there is nothing to catch up from: such a consumer goes on with what comes
            if (fence.cursor + 1 >= first or self.store is None) and fence.ready:
                fence.offer(wanted, last, close=False)

    def _hand_over(self, view: BlockView, last_seq: int, urgent: bool, least: int) -> None:
        """Give consumers with their own thread what is held for them of this block, where it is so much."""
        for i, held in enumerate(self._held):
            if len(held) >= least:
                self._outlets[i].offer(Slice(held, view, held[0].bus_seq, last_seq, urgent))
                self._held[i] = []

    def _with_quarantined(self, piece: Slice, faults: list[Fault]) -> Slice:
        """What the feed repeats: also the events that break a rule and are only kept from consumers."""
        types = self.codec.registry.types
        events = piece.events
        for fault in faults:
            name = fault.event.event_type if fault.event is not None else ""  # type: ignore[attr-defined]
            if name in types and types[name].policy == "quarantine":
                events = list(events) if events is piece.events else events
                events[fault.index] = fault.event
        return piece if events is piece.events else Slice(events, piece.view, piece.first_seq, piece.last_seq)

    def _overtake(self) -> None:
        """Hand urgent events of the backlog to the consumers that let them overtake."""
        if not self._lanes:
            return
        for block in self.backlog.urgent():
            if block.first_seq <= self._overtaken:
                continue
            self._overtaken = block.last_seq
            view = BlockView(block.payload, block.first_seq)
            for seq in view.urgent():
                i = seq - block.first_seq
                events, _ = self.codec.decode(view, i, i + 1)
                for fence in self._lanes:
                    if events[0] is not None and fence.ready and covers(fence.consumer.topics, events[0].event_type):  # type: ignore[attr-defined]
                        fence.offer_ahead(list(filter(None, events)))

    def _feed_lagging(self) -> bool:
        """Give consumers that stood behind an open breaker a little of the tape; True while one lags."""
        lagging = False
        for fence in self.fences:
            if self.store is None or fence.cursor >= self.backlog.cursor or not fence.ready:
                continue
            block = next(iter(self.store.blocks(fence.cursor)), None)
            if block is None:
                continue
            topics = fence.consumer.topics
            for piece in pieces_of(self.codec, block, fence.cursor, self._max_batch):
                if piece.last_seq > self.backlog.cursor or not fence.ready:
                    break
                fence.offer([e for e in piece.events if e is not None and covers(topics, e.event_type)], piece.last_seq)
            lagging = lagging or (fence.ready and fence.cursor < self.backlog.cursor)
        return lagging


def pieces_of(codec: Codec, block: Block, after: int, max_batch: int) -> Iterator[Slice]:
    """The events of a `block` of the tape above `after`, decoded, in slices of at most `max_batch`."""
    view = BlockView(block.payload, block.first_seq)
    for start in range(max(0, after + 1 - block.first_seq), view.count, max_batch):
        stop = min(start + max_batch, view.count)
        events, _ = codec.decode(view, start, stop)
        yield Slice(events, view, block.first_seq + start, block.first_seq + stop - 1)


def event_at(codec: Codec, store: StoreReader | None, seq: int) -> Event | None:
    """The event with this sequence number, read from the tape; None where it is not there or does not decode."""
    block = next(iter(store.blocks(seq - 1)), None) if store is not None else None
    if block is None or not block.first_seq <= seq <= block.last_seq:
        return None
    i = seq - block.first_seq
    events, _ = codec.decode(BlockView(block.payload, block.first_seq), i, i + 1)
    found: Event | None = events[0]
    return found

"""Consumers with a thread of their own: they see decoded events, at their own pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tapebus.backlog import Backlog
from tapebus.codec import Codec
from tapebus.dispatcher import FanOut, Slice, event_at, pieces_of
from tapebus.failpoints import failpoint
from tapebus.fence import Fence
from tapebus.store import Block, StoreReader
from tapebus.threads import show_name

#: Bytes of blocks that wait for an early consumer; beyond it, it continues from the tape.
EARLY_BYTES = 8 << 20


class ThreadConsumer(threading.Thread):
    """Runs one fenced consumer; when it falls behind its queue it continues from the tape."""

    def __init__(
        self,
        fence: Fence,
        codec: Codec,
        store: StoreReader | None,
        last_seq: int,
        max_batch: int,
        fail: Callable[[BaseException], None],
    ) -> None:
        super().__init__(name=f"tapebus-{fence.consumer.name}", daemon=True)
        self.fence = fence
        self._codec = codec
        self._store = store
        self._max_batch = max_batch
        self._fan = FanOut(codec, [tuple(fence.consumer.topics)])
        self._overtaken = 0
        self._fail = fail
        self._bell = threading.Event()
        fence.wake = self._wake
        self.backlog = self._backlog(last_seq)

    def _backlog(self, last_seq: int) -> Backlog:
        load = self._load if self._store is not None else None
        return Backlog(self.fence.consumer.capacity, self.fence.cursor, last_seq, load)

    def _load(self, after: int) -> Iterator[Slice]:
        assert self._store is not None
        for block in self._store.blocks(after):
            yield from self._slices(block, after)

    def _slices(self, block: Block, after: int) -> Iterator[Slice]:
        """What this consumer asked for of the events of a `block` above `after`, decoded here."""
        for piece in pieces_of(self._codec, block, after, self._max_batch):
            yield Slice(self._fan.split(piece)[0], piece.view, piece.first_seq, piece.last_seq)

    def _taken(self, piece: Any) -> Iterable[Slice]:
        """What the backlog gave, as slices."""
        return (piece,)

    def offer(self, piece: Slice) -> None:
        """Take the next slice of what this consumer asked for; called by the dispatcher."""
        if piece.last_seq > self.backlog.last_seq:
            self.backlog.put(piece)

    def run(self) -> None:
        show_name()
        try:
            self._run()
        except BaseException as error:
            self._fail(error)

    def _run(self) -> None:
        fence = self.fence
        while True:
            self._bell.clear()
            if fence.asked_again and fence.ready:
                fence.settle(lambda seq: event_at(self._codec, self._store, seq))
            wait = fence.tick(time.monotonic())
            if not fence.ready:
                if self.backlog.closed:
                    break
                if fence.breaker.state == "open":
                    wait = min(wait, fence.breaker.retry_in) if wait is not None else fence.breaker.retry_in
                self._bell.wait(wait)
                continue
            if fence.unsaved:
                wait = min(wait, 0.25) if wait is not None else 0.25
            piece = self.backlog.get(wait)
            if piece is None:
                if self.backlog.ended:
                    break
                fence.close_unit()
                continue
            failpoint("outlet.before_slice")
            if fence.consumer.lanes:
                self._overtake()
            for part in self._taken(piece):
                fence.offer(part.events, part.last_seq)
                if fence.cursor < part.last_seq:
                    # the breaker opened inside the slice: take the rest again from the tape, later
                    self._rewind()
                    break
        fence.close_unit(force=True)

    def _wake(self) -> None:
        self._bell.set()
        self.backlog.wake()

    def _rewind(self) -> None:
        self.backlog.rewind(self.fence.cursor)

    def _overtake(self) -> None:
        for piece in self.backlog.urgent():
            if piece.first_seq <= self._overtaken:
                continue
            self._overtaken = piece.last_seq
            urgent = set(piece.view.urgent())
            self.fence.offer_ahead([event for event in piece.events if event.bus_seq in urgent])

    def stop(self) -> None:
        self.backlog.close()
        self._bell.set()


class EarlyConsumer(ThreadConsumer):
    """Takes the blocks from the tape thread before their commit, and decodes them itself.

    What it emits and how far it has come still commit after the events they follow from, for these are in the
    ring before. When it falls behind, it continues from the tape like everybody.
    """

    #: The last sequence number that is on disk; written by the tape thread.
    _on_disk = 0

    def _backlog(self, last_seq: int) -> Backlog:
        self._on_disk = last_seq
        load = self._load if self._store is not None else None
        return Backlog(EARLY_BYTES, self.fence.cursor, last_seq, load, on_tape=lambda: self._on_disk)

    def _taken(self, piece: Any) -> Iterable[Slice]:
        return (piece,) if isinstance(piece, Slice) else self._slices(piece, self.fence.cursor)

    def offer_early(self, block: Block) -> bool:
        """Take a block that is about to be committed; False where it is to be had from the tape."""
        return self.backlog.put_early(block)

    def settle(self, block: Block, taken: bool) -> None:
        """A block is on disk; `taken` is what `offer_early` said of it."""
        self._on_disk = block.last_seq
        if not taken:
            self.backlog.put(block)
        elif self.backlog.lapped:
            self.backlog.wake()

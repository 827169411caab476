"""Consumers with a thread of their own: they see decoded events, at their own pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from tapebus.backlog import Backlog
from tapebus.codec import Codec
from tapebus.dispatcher import FanOut, Slice, event_at, pieces_of
from tapebus.failpoints import failpoint
from tapebus.fence import Fence
from tapebus.store import StoreReader
from tapebus.threads import show_name


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
        self.backlog = Backlog(
            fence.consumer.capacity, fence.cursor, last_seq, self._load if store is not None else None
        )

    def _load(self, after: int) -> Iterator[Slice]:
        assert self._store is not None
        for block in self._store.blocks(after):
            for piece in pieces_of(self._codec, block, after, self._max_batch):
                yield Slice(self._fan.split(piece)[0], piece.view, piece.first_seq, piece.last_seq)

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
                if self.backlog.closed and self.backlog.drained:
                    break
                fence.close_unit()
                continue
            failpoint("outlet.before_slice")
            if fence.consumer.lanes:
                self._overtake()
            fence.offer(piece.events, piece.last_seq)
            if fence.cursor < piece.last_seq:
                # the breaker opened inside the slice: take the rest again from the tape, later
                self._rewind()
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

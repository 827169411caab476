"""`Publisher`: what a program publishes events through."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import threading
import time
import uuid
import weakref
from types import TracebackType
from typing import Any

from tapebus import wire
from tapebus._outbox import Emitter, Outbox
from tapebus._sender import Sender, after_fork
from tapebus.errors import UsageError

_EXIT_BUDGET_S = 0.2  # the most that atexit may add to the life of a process

_publishers: weakref.WeakSet[Publisher] = weakref.WeakSet()


class Publisher(Emitter):
    """Publishes events of one `source` to the bus; thread-safe, fork-safe, and never in the way of its caller.

    Nothing is connected until the first `publish`. Events wait in memory, at most `capacity_events` of them and
    `capacity_bytes`, until the bus has them on disk; what does not fit is counted in ``stats()["dropped"]``.
    An event leaves at once when nothing is in flight, else after `batch_size` events, `batch_timeout_ms`, or
    the answer to what is in flight, whichever comes first. Leaving a ``with`` block flushes for at most 1 s.
    """

    def __init__(
        self,
        source: str,
        endpoint: str | None = None,
        batch_size: int = 100,
        batch_timeout_ms: float = 100,
        capacity_events: int = 65536,
        capacity_bytes: int = 16 << 20,
        *,
        _identity: tuple[bytes, int, int] | None = None,
    ) -> None:
        if not isinstance(source, str) or not 0 < len(source) <= 100:
            raise UsageError(f"Publisher(source={source!r}): a name of 1 to 100 characters is needed")
        if batch_size < 1 or batch_timeout_ms < 0 or capacity_events < 1 or capacity_bytes < 1:
            raise UsageError("Publisher: batch_size and the capacities must be at least 1, batch_timeout_ms at least 0")
        self.endpoint = endpoint or os.environ.get("TAPEBUS_ENDPOINT") or wire.DEFAULT_ENDPOINT
        self.batch_size, self.batch_timeout_ms = batch_size, batch_timeout_ms
        producer_id, epoch, first_seq = _identity or (uuid.uuid4().bytes, random.SystemRandom().getrandbits(64), 1)
        self._identity = (producer_id, epoch)
        self._setup(source, Outbox(capacity_events, capacity_bytes, first_seq))
        self._starting = threading.Lock()
        self._sender: Sender | None = None
        _publishers.add(self)

    def _start(self, wait: bool = False) -> None:
        # publish() must not wait for another thread that is starting the sender already.
        if not self._starting.acquire(blocking=wait):
            return
        try:
            if self._sender is None and not self.closed:
                sender = Sender(
                    self.outbox,
                    self.source,
                    self.endpoint,
                    self.batch_size,
                    self.batch_timeout_ms / 1000,
                    self._identity,
                )
                sender.thread.start()
                self._sender, self.wake_fd = sender, sender.writer
        finally:
            self._starting.release()

    def _after_fork(self) -> None:
        """In the child: another producer with empty books; the parent's thread, socket and events stay its own."""
        self._starting = threading.Lock()
        after_fork(self._sender)
        self._sender, self.wake_fd = None, -1
        self._identity = (uuid.uuid4().bytes, random.SystemRandom().getrandbits(64))
        self.outbox.reset(1)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait at most `timeout` seconds; ``True`` when everything published before the call is on disk."""
        if self.outbox.first_pending >= self.outbox.next_seq:
            return True
        target = self.outbox.next_seq + self.outbox.renumbered
        if self._sender is None:
            self._start(wait=True)
        return self._sender is not None and self._sender.wait_for(target, timeout)

    def stats(self) -> dict[str, Any]:
        """The books of this process: ``published == acked + sum(dropped) + sum(rejected) + in_flight``, exactly."""
        sender = self._sender
        with sender.progress if sender is not None else contextlib.nullcontext():
            published, waiting, dropped = self.outbox.books()
            return {
                "published": published,
                "acked": sender.acked_events if sender else 0,
                "dropped": dropped,
                "rejected": dict(sender.rejected) if sender else {},
                "in_flight": waiting,
                "connected": sender.connected if sender else False,
                "durable": sender.durable if sender else False,
                "producer_id": (sender.producer_id if sender else self._identity[0]).hex(),
            }

    def close(self, timeout: float = 0.0) -> None:
        """Flush for at most `timeout` seconds, then say goodbye; what is left counts as ``client.exit_abandoned``."""
        if self.closed:
            return
        if timeout > 0:
            self.flush(timeout)
        self.closed = True
        self.wake_fd = -1
        sender = self._sender
        if sender is not None:
            sender.stop()
            sender.thread.join(_EXIT_BUDGET_S / 2)
            with sender.progress:
                self.outbox.abandon()
        else:
            self.outbox.abandon()

    def __del__(self) -> None:
        # Nobody can publish any more, but what was published still goes out.
        sender: Sender | None = getattr(self, "_sender", None)
        if sender is not None and not self.closed:
            sender.leave()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(timeout=1.0)


def _at_fork() -> None:
    after_fork()
    for publisher in list(_publishers):
        publisher._after_fork()


def _at_exit() -> None:
    deadline = time.monotonic() + _EXIT_BUDGET_S
    for publisher in list(_publishers):
        sender = publisher._sender
        # Waiting for a bus that is not there would only delay the exit; a script that has only just begun to
        # publish cannot know yet.
        hope = sender is not None and (sender.connected or sender.born_at + _EXIT_BUDGET_S > time.monotonic())
        publisher.close(max(0.0, deadline - time.monotonic()) / 2 if hope else 0.0)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_at_fork)

"""`Publisher`: what a program publishes events through."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import uuid
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tapebus import spool as spools
from tapebus import wire
from tapebus._emitter import Emitter
from tapebus._outbox import Outbox
from tapebus._sender import Sender, after_fork
from tapebus.errors import UsageError
from tapebus.security import is_loopback

if TYPE_CHECKING:
    from tapebus.curve import Keys

_LONGEST_LINGER_MS = 60_000
_EXIT_BUDGET_S = 0.2  # the most that atexit may add to the life of a process

_log = logging.getLogger("tapebus.publisher")
_publishers: weakref.WeakSet[Publisher] = weakref.WeakSet()


def _milliseconds(name: str, variable: str, given: float | None) -> float:
    text = os.environ.get(variable, "0") if given is None else given
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= _LONGEST_LINGER_MS:
        what = f"{variable}={text!r}" if given is None else f"Publisher({name}={given!r})"
        raise UsageError(f"{what}: 0 to {_LONGEST_LINGER_MS} milliseconds are possible")
    return value


class Publisher(Emitter):
    """Publishes events of one `source` to the bus; thread-safe, fork-safe, and never in the way of its caller.

    Nothing is connected until the first `publish`, unless a predecessor left a spool. Events wait, at most
    `capacity_events` of them and `capacity_bytes`, until the bus has them on disk; what does not fit is counted
    in ``stats()["dropped"]``.
    An event leaves at once when nothing is in flight, else after `batch_size` events, `batch_timeout_ms`, or
    the answer to what is in flight, whichever comes first. With `linger_ms` less than a full batch leaves only so
    long after the one before: fewer frames and wake-ups for later events. Leaving a ``with`` block flushes for at
    most 1 s.

    `spool` says what they survive meanwhile: ``"memory"`` nothing, ``"crash"`` the death of this process,
    ``"power"`` also a power cut, less the last `spool_sync_ms`. The files lie in `spool_dir`. Where there can be
    no spool the publisher says so in the log and in ``stats()["spool"]``, and keeps the events in memory. Defaults:
    ``TAPEBUS_ENDPOINT``, ``TAPEBUS_SPOOL``, ``TAPEBUS_SPOOL_DIR``, ``TAPEBUS_LINGER_MS``, then
    ``tcp://127.0.0.1:5572``, memory, ``tapebus/spool`` in the user's state directory, and 0.

    A bus on another machine asks for a key: `key`, else ``TAPEBUS_KEY``, is the file that ``tapebus keygen
    NAME --server BUS.key`` has written; an unusable one raises `ConfigError` here and nowhere later.
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
        key: str | os.PathLike[str] | None = None,
        spool: str | None = None,
        spool_dir: str | os.PathLike[str] | None = None,
        spool_sync_ms: float = 50,
        linger_ms: float | None = None,
        _identity: tuple[bytes, int, int] | None = None,
    ) -> None:
        if not isinstance(source, str) or not 0 < len(source) <= 100:
            raise UsageError(f"Publisher(source={source!r}): a name of 1 to 100 characters is needed")
        if batch_size < 1 or batch_timeout_ms < 0 or capacity_events < 1 or capacity_bytes < 1:
            raise UsageError("Publisher: batch_size and the capacities must be at least 1, batch_timeout_ms at least 0")
        self._linger_s = _milliseconds("linger_ms", "TAPEBUS_LINGER_MS", linger_ms) / 1000
        self._spool_mode = spool or os.environ.get("TAPEBUS_SPOOL") or "memory"
        if self._spool_mode not in spools.MODES or spool_sync_ms < 1:
            raise UsageError(
                f"Publisher(spool={self._spool_mode!r}): must be one of {', '.join(spools.MODES)}, "
                "and spool_sync_ms at least 1"
            )
        self._spool_dir = spool_dir
        self._sync_s = spool_sync_ms / 1000 if self._spool_mode == "power" else 0.0
        self.endpoint = endpoint or os.environ.get("TAPEBUS_ENDPOINT") or wire.DEFAULT_ENDPOINT
        self.batch_size, self.batch_timeout_ms = batch_size, batch_timeout_ms
        self._capacity = capacity_events, capacity_bytes
        self._keys: Keys | None = None
        if chosen := key or os.environ.get("TAPEBUS_KEY"):
            from tapebus.curve import client_keys

            self._keys = client_keys(chosen) if key or not is_loopback(self.endpoint) else None
        self._starting = threading.Lock()
        self._start_failed = False
        self._sender: Sender | None = None
        self._orphans: list[spools.Spool] = []
        self._adopted = 0
        self._setup(source, Outbox(*self._capacity, _identity[2] if _identity else 1))
        self._kept = _identity is not None
        self._identity = _identity[:2] if _identity else (uuid.uuid4().bytes, spools.new_epoch())
        self._spool: spools.Spool | None = None
        self._opening = threading.Lock()
        if self._spool_mode != "memory" and not _identity:
            self._make_spool()
        _publishers.add(self)
        if self._orphans:
            self._start()

    def _open(self) -> None:
        """Move into a spool of its own, and take over those that died with their process."""
        with self._opening:
            if self.unopened:
                self._make_spool()
                self.unopened = False

    def _make_spool(self) -> None:
        try:
            directory = Path(self._spool_dir).absolute() if self._spool_dir else spools.default_directory()
            new = spools.create(
                directory, self.source, self.endpoint, *self._capacity, spools.new_epoch(), self._sync_s > 0
            )
        except spools.SpoolError as error:
            _log.warning("no spool for %s, its events are kept in memory only: %s", self.source, error)
            self._sync_s = 0.0
            return
        self._spool, self._identity = new, new.identity
        self._setup(self.source, new.outbox)
        self._orphans = list(
            spools.orphans(
                directory,
                lambda facts: facts.source == self.source and spools.same_endpoint(facts.endpoint, self.endpoint),
            )
        )
        for orphan in self._orphans:
            count = orphan.outbox.waiting
            _log.info("%s: %d events of a predecessor, %d torn", orphan.path, count, orphan.torn)
            self._adopted += count

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
                    spool=self._spool,
                    sync_s=self._sync_s,
                    orphans=self._orphans,
                    keys=self._keys,
                    kept=self._kept,
                    linger_s=self._linger_s,
                )
                sender.thread.start()
                self._sender, self.wake_fd = sender, sender.writer
        except (OSError, RuntimeError) as error:
            # neither files nor threads to be had now: the events are kept, and the next call tries again
            if not self._start_failed:
                self._start_failed = True
                _log.warning("%s cannot connect yet, its events wait: %s", self.source, error)
        finally:
            self._starting.release()

    def _after_fork(self) -> None:
        """In the child: another producer with empty books; the parent's thread, socket and events stay its own."""
        self._starting, self._opening = threading.Lock(), threading.Lock()
        after_fork(self._sender)
        self._sender, self.wake_fd = None, -1
        self._identity, self._kept = (uuid.uuid4().bytes, spools.new_epoch()), False
        self._orphans, self._adopted = [], 0
        if self._spool is None:
            self.outbox.reset(1)
        else:
            # The file is the parent's. Another is made when there is something to put into it.
            self._spool = None
            self._setup(self.source, Outbox(*self._capacity))
            self.unopened = True

    def _confirm(self, number: int, timeout: float) -> bool:
        if self._sender is None:
            self._start(wait=True)
        sender = self._sender
        if sender is None or not sender.wait_for(number + 1, timeout):
            return False
        return sender.durable and not sender.refused(number)

    @property
    def local(self) -> bool:
        """Whether the bus is on this machine and asks for no key."""
        return self._keys is None and is_loopback(self.endpoint)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait at most `timeout` seconds; ``True`` when everything published before the call is on disk.

        What a predecessor left in its spool counts as published before the call.
        """
        inherits = bool(self._orphans) and (self._sender is None or self._sender.inherits)
        if self.outbox.first_pending >= self.outbox.next_seq and not inherits:
            return True
        target = self.outbox.next_seq + self.outbox.renumbered
        if self._sender is None:
            self._start(wait=True)
        return self._sender is not None and self._sender.wait_for(target, timeout)

    def stats(self) -> dict[str, Any]:
        """The books of this process: ``published == acked + sum(dropped) + sum(rejected) + in_flight``, exactly."""
        sender = self._sender
        with sender.progress if sender is not None else contextlib.nullcontext():
            published, waiting, acked, dropped = self.outbox.books()
            return {
                "published": published,
                "acked": acked,
                "dropped": dropped,
                "rejected": dict(sender.rejected) if sender else {},
                "in_flight": waiting,
                "connected": sender.connected if sender else False,
                "durable": sender.durable if sender else False,
                "forgotten": sender.forgotten if sender else 0,
                "adopted": self._adopted,
                "spool": self._survives(),
                "producer_id": (sender.producer_id if sender else self._identity[0]).hex(),
            }

    def _survives(self) -> str:
        if self._spool is None:
            return "memory"
        return "crash" if self._sender is not None and not self._sender.syncer.sync_s else self._spool_mode

    def close(self, timeout: float = 0.0) -> None:
        """Flush for at most `timeout` seconds, then say goodbye.

        What is left stays in the spool, or counts as ``client.exit_abandoned`` where there is none.
        """
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
        with sender.progress if sender is not None else contextlib.nullcontext():
            if self._spool is not None:
                self._spool.release()
            else:
                self.outbox.abandon()

    def __del__(self) -> None:
        # Nobody can publish any more, but what was published still goes out.
        sender: Sender | None = getattr(self, "_sender", None)
        spool: spools.Spool | None = getattr(self, "_spool", None)
        if sender is not None and not self.closed:
            sender.leave()
        elif sender is None and spool is not None:
            spool.release()

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

"""The thread of a Publisher that talks to the bus: one connection at a time, resending until acknowledged."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket as sockets
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from tapebus import wire
from tapebus._blocks import crc32c
from tapebus._outbox import Outbox
from tapebus.failpoints import failpoint
from tapebus.spool import Spool, Syncer, new_epoch
from tapebus.threads import show_name

if TYPE_CHECKING:
    from tapebus.curve import Keys

_log = logging.getLogger("tapebus.publisher")

_NEVER = 2**64 - 1
_PING_S = 3.0
_RETRY_MIN_S, _RETRY_MAX_S = 1.0, 30.0
#: Descriptors that must be free before libzmq starts its two threads; it takes six.
_CONTEXT_FDS = 12
_BODY_ROOM = wire.MAX_FRAME - wire.HEAD.size - wire.S_BATCH.size

_contexts: list[zmq.Context[Any]] = []  # this process's own, once made
_inherited: list[object] = []  # what a parent owns: kept alive in the child so that nothing here ever closes it


def after_fork(sender: Sender | None = None) -> None:
    """In the child: leave the parent's context, and `sender` if given, untouched for ever."""
    _inherited.extend(_contexts)
    _contexts.clear()
    _inherited.append(sender)


def _context() -> zmq.Context[Any]:
    if not _contexts:
        _have_descriptors()
        context: zmq.Context[Any] = zmq.Context()
        # libzmq starts its threads with the first socket
        context.socket(zmq.DEALER).close()
        _contexts.append(context)
    return _contexts[0]


def _have_descriptors() -> None:
    """Raises `OSError` where the process may open too few files: while it starts, libzmq ends a process for that."""
    taken: list[int] = []
    try:
        while len(taken) < _CONTEXT_FDS:
            taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    finally:
        for fd in taken:
            os.close(fd)


def _wake_pair() -> tuple[int, int]:
    """Two non-blocking descriptors, to read and to write; the same one twice where eventfd exists."""
    if hasattr(os, "eventfd"):
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return fd, fd
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    return reader, writer


class Sender:
    """Drains one outbox over one connection at a time; everything but the requests runs on its own thread.

    A connection that may hold stale frames is never repaired: it is closed with its queue and a fresh one
    begins with HELLO, so what the bus receives is always the tail after its own durable_seq, in order.
    """

    pid = -1  # until there are descriptors to close

    def __init__(
        self,
        outbox: Outbox,
        source: str,
        endpoint: str,
        batch: int = 100,
        linger_s: float = 0.1,
        ident: tuple[bytes, int] = (b"", 0),
        *,
        spool: Spool | None = None,
        sync_s: float = 0.0,
        orphans: Sequence[Spool] = (),
        keys: Keys | None = None,
        kept: bool = False,
    ) -> None:
        self._keys = keys
        #: Whoever publishes has the events on a disk of its own, and sends what is left in its next life.
        self._kept = kept
        self.outbox, self.source, self.endpoint = outbox, source, endpoint
        self.batch_size, self.batch_timeout = batch, linger_s
        self.producer_id, self.epoch = ident
        self.spool, self.orphans = spool, list(orphans)
        self.syncer = Syncer(spool, sync_s)
        self.acked_events = 0
        self.forgotten = 0
        self.rejected: dict[str, int] = {}
        self.connected = False
        self.durable = False
        self.progress = threading.Condition()
        self.flushing = 0
        self.stopping = self.leaving = self.ended = False
        self._then: Callable[[], None] = lambda: None
        self.born_at = time.monotonic()
        self.reader, self.writer = _wake_pair()
        self.pid = os.getpid()
        self.thread = threading.Thread(target=self.run, name=f"tapebus-sender-{source}", daemon=True)
        self._ahead: Sender | None = None  # while an orphan is emptied
        self._refused: deque[tuple[int, int]] = deque(maxlen=1000)  # ranges, counted from the first event ever
        self._sock: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._in_flight: deque[tuple[int, int, int]] = deque()  # last seq, events, bytes of each frame sent
        self._greeted = False  # HELLO is sent
        self._sent = 0  # the last number on the wire
        self._credit = (0, 0)
        self._instance = 0
        self._retry_s = _RETRY_MIN_S
        self._not_before = self._progress_at = self._heard_at = self._sent_at = 0.0

    # -- asked for by other threads

    def wake(self) -> None:
        # A full pipe or a counter at its limit wakes as well.
        with contextlib.suppress(BlockingIOError):
            os.write(self.writer, b"\1\0\0\0\0\0\0\0")

    def wait_for(self, seq: int, timeout: float) -> bool:
        """Whether everything before `seq` is acknowledged within `timeout` seconds.

        `seq` counts from the first event ever, whatever has been renumbered since.
        """
        with self.progress:
            self.flushing += 1
            self.wake()
            try:
                return self.progress.wait_for(
                    lambda: self.outbox.first_pending + self.outbox.renumbered >= seq, timeout
                )
            finally:
                self.flushing -= 1

    def stop(self) -> None:
        self.stopping = True
        if (ahead := self._ahead) is not None:
            ahead.stop()
        self.wake()

    def refused(self, seq: int) -> bool:
        """Whether the bus refused `seq`, counted as in `wait_for`, lately."""
        with self.progress:
            return any(first <= seq <= last for first, last in self._refused)

    def leave(self) -> None:
        """Stop as soon as nothing is waiting any more."""
        self.leaving = True
        self.wake()

    def __del__(self) -> None:
        # Not closed by the thread: until nobody refers to this object, its numbers must not be reused.
        if os.getpid() == self.pid:
            for fd in {self.reader, self.writer}:
                os.close(fd)

    # -- the thread

    def run(self) -> None:
        """Empty the orphans, each under its own name, then the outbox, until asked to stop."""
        show_name()
        while self.orphans and not self.stopping:
            try:
                ahead = empty(self.orphans[0], self.endpoint, self.wake)
                ahead.thread.start()
            except (OSError, RuntimeError) as error:
                _log.warning("cannot send what a predecessor left, trying again: %s", error)
                self._postpone(self._retry_s)
                self._pause()
                continue
            self._ahead = ahead
            self.orphans.pop(0)
            while not (ahead.ended or self.stopping):
                self._rest(_PING_S)
            ahead.stop()
        while not self.stopping:
            try:
                self._open()
                self._session()
            except Exception as error:
                # Whatever it is, the events are kept and the next connection may fare better.
                _log.warning("connection to %s failed, trying again: %s", self.endpoint, error)
                self._postpone(self._retry_s)
            finally:
                self._close()
            self._pause()
        if self.spool is not None and (self.leaving or not self.outbox.waiting):
            self.spool.release()
        self.ended = True
        self._then()

    def _open(self) -> None:
        sock: zmq.Socket[bytes] = _context().socket(zmq.DEALER)
        self._sock = sock
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),
            (zmq.SNDTIMEO, 0),
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 250),
            (zmq.CONNECT_TIMEOUT, 1000),
            (zmq.HEARTBEAT_IVL, 1000),
            (zmq.HEARTBEAT_TIMEOUT, 5000),
            (zmq.HANDSHAKE_IVL, 3000),
            (zmq.MAXMSGSIZE, wire.MAX_FRAME),
        ):
            sock.setsockopt(option, value)
        if self._keys is not None:
            from tapebus.curve import as_client

            as_client(sock, self._keys)
        self._monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        sock.connect(self.endpoint)
        self._in_flight.clear()
        self._greeted = False
        self._credit = (0, 0)
        self._heard_at = self._sent_at = self._progress_at = time.monotonic()

    def _close(self) -> None:
        self._set_connected(False)
        if self._sock is not None:
            if self._monitor is not None:
                self._sock.disable_monitor()
            # A goodbye may need a moment to leave; nothing else may be sent late.
            self._sock.close(linger=20 if self.stopping and self._greeted else 0)
        self._sock = self._monitor = None

    def _pause(self) -> None:
        """Sleeps until the next connection is due, or somebody asks to stop."""
        while not self.stopping and (left := self._not_before - time.monotonic()) > 0:
            self._rest(left)

    def _rest(self, seconds: float) -> None:
        """Waits for at most so long, or until somebody rings; the disk is not forgotten meanwhile."""
        self.outbox.wake_at = _NEVER
        seconds = min(seconds, self.syncer.due_in())
        if self.outbox.next_seq <= self.outbox.wake_at:
            zmq.select([self.reader], [], [], seconds)
        self.outbox.wake_at = _NEVER
        self._drain_wakes()
        self.syncer.tend()

    def _postpone(self, seconds: float) -> None:
        self._not_before = time.monotonic() + seconds * random.uniform(0.75, 1.25)
        self._retry_s = min(self._retry_s * 2, _RETRY_MAX_S)

    def _set_connected(self, connected: bool) -> None:
        if connected != self.connected:
            self.connected = connected
            _log.info("%s %s", "connected to" if connected else "disconnected from", self.endpoint)

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.reader, 4096)

    def _session(self) -> None:
        """One connection, until it is no longer worth keeping."""
        assert self._sock is not None and self._monitor is not None
        poller = zmq.Poller()
        poller.register(self.reader, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._sock, zmq.POLLIN | zmq.POLLOUT)
        while not self.stopping:
            if self.connected:
                self._pump()
            if self.leaving and self.outbox.first_pending >= self.outbox.next_seq:
                self.stopping = True
                break
            self._arm()
            sync_ms = self.syncer.due_in() * 1000
            ready = dict(poller.poll(int(min(self._sleep_ms(), max(1.0, sync_ms)))))
            self.outbox.wake_at = _NEVER
            self.syncer.tend()
            if self.reader in ready:
                self._drain_wakes()
            if self._monitor in ready:
                self._postpone(0.02)
                self._retry_s = _RETRY_MIN_S
                return
            events = ready.get(self._sock, 0)
            if not self._greeted and events & zmq.POLLOUT:
                self._hello()
                poller.modify(self._sock, zmq.POLLIN)
            if events & zmq.POLLIN and not self._receive():
                return
            if self._is_stuck():
                self._postpone(0.0)
                return
        if self._greeted:
            failpoint("sender.before_bye")
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        if self.connected and self.spool is None and not self._kept and self._sent < self._highest():
            # What never left is lost with this process. What is on its way may still arrive, so it is not told of.
            self._send(wire.GAP, wire.S_GAP.pack(self._sent + 1, self._highest(), self._highest(), wire.ABANDONED))
        self._send(wire.BYE, b"")

    def _arm(self) -> None:
        """Tells publish() from which number on there will be something to do at once."""
        if not self.connected or time.monotonic() < self._not_before:
            return
        if not self._in_flight:
            if self._credit[0]:
                self.outbox.wake_at = self._sent + 1
        elif self._has_credit():
            self.outbox.wake_at = self._sent + self.batch_size

    def _sleep_ms(self) -> float:
        now = time.monotonic()
        if self.outbox.next_seq > self.outbox.wake_at:
            return 0
        wait = self._retry_s if self._greeted else _PING_S
        if self.connected:
            wait = min(wait, _PING_S)
            if self._in_flight and self._has_credit():
                wait = min(wait, self.batch_timeout)
            if now < self._not_before:
                wait = min(wait, self._not_before - now)
        return max(1.0, wait * 1000)

    def _is_stuck(self) -> bool:
        """No answer to a HELLO, no progress on what is in flight, or credit withheld for long."""
        now = time.monotonic()
        if not self._greeted:
            return False
        if not self.connected or self._in_flight:
            return now - self._progress_at > self._retry_s and now >= self._not_before
        if self._sent_at > self._heard_at:
            return now - self._sent_at > max(self._retry_s, _PING_S)
        return False

    # -- frames out

    def _send(self, kind: int, rest: bytes) -> bool:
        assert self._sock is not None
        try:
            self._sock.send(wire.HEAD.pack(kind, 0, wire.VERSION, self.producer_id, self.epoch) + rest, zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._sent_at = time.monotonic()
        return True

    def _highest(self) -> int:
        return self.outbox.next_seq - 1

    def _hello(self) -> None:
        failpoint("sender.before_hello")
        about = {"source": self.source, "pid": os.getpid(), "host": sockets.gethostname(), "version": wire.VERSION}
        if self._send(wire.HELLO, wire.S_HELLO.pack(self._highest()) + msgspec.msgpack.encode(about)):
            self._greeted = True
            self._progress_at = time.monotonic()

    def _has_credit(self) -> bool:
        events, size = self._credit
        return sum(f[1] for f in self._in_flight) < events and sum(f[2] for f in self._in_flight) < size

    def _pump(self) -> None:
        """Sends what batching and credit allow; says PING when there has been nothing to say for a while."""
        now = time.monotonic()
        if now < self._not_before:
            return
        while self._sent < self._highest():
            pending = self._highest() - self._sent
            hold = self._in_flight and pending < self.batch_size and not self.flushing
            if hold and now - self._sent_at < self.batch_timeout:
                return
            gap = self.outbox.gap_at(self._sent + 1)
            if gap is not None:
                first, last, place = gap
                if not self._send(wire.GAP, wire.S_GAP.pack(first, last, self._highest(), place)):
                    break
                self._note_sent(last, 0, 0)
            elif not self._send_batch():
                break
        if not self._in_flight and now - self._sent_at >= _PING_S:
            self._send(wire.PING, wire.S_HELLO.pack(self._highest()))

    def _send_batch(self) -> bool:
        events = self._credit[0] - sum(f[1] for f in self._in_flight)
        size = self._credit[1] - sum(f[2] for f in self._in_flight)
        if events <= 0 or size <= 0:
            return False
        if not self._in_flight:
            # An event larger than the credit must still be able to leave, alone.
            first_only, _ = self.outbox.build_batch(self._sent + 1, 1, _BODY_ROOM)
            size = max(size, len(first_only))
        base = self._sent + 1
        body, n = self.outbox.build_batch(base, min(events, wire.MAX_BATCH_EVENTS), min(size, _BODY_ROOM))
        failpoint("sender.before_send")
        if not n or not self._send(wire.BATCH, wire.S_BATCH.pack(base, n, crc32c(body), self._highest()) + body):
            return False
        failpoint("sender.after_send")
        self._note_sent(base + n - 1, n, len(body))
        return True

    def _note_sent(self, last: int, events: int, size: int) -> None:
        if not self._in_flight:
            self._progress_at = time.monotonic()
        self._sent = last
        self._in_flight.append((last, events, size))

    # -- frames in

    def _receive(self) -> bool:
        """Handles every frame that is here; ``False``: this connection is finished."""
        assert self._sock is not None
        while True:
            try:
                frame = self._sock.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            if len(frame) < wire.HEAD.size or self._sock.getsockopt(zmq.RCVMORE):
                continue
            kind, _, version, producer_id, epoch = wire.HEAD.unpack_from(frame)
            if version != wire.VERSION or producer_id != self.producer_id or epoch != self.epoch:
                continue
            self._heard_at = time.monotonic()
            handle = self._HANDLERS.get(kind)
            if handle is None:
                continue
            try:
                if not handle(self, frame[wire.HEAD.size :]):
                    return False
            except struct.error:
                _log.warning("the bus at %s sent a truncated frame of type %d", self.endpoint, kind)
                self._postpone(self._retry_s)
                return False

    def _on_welcome(self, rest: bytes) -> bool:
        failpoint("sender.on_welcome")
        instance, durable_seq, events, size, durable = wire.S_WELCOME.unpack_from(rest)
        if self._instance not in (0, instance):
            _log.info("another bus answers at %s", self.endpoint)
        self._instance, self._credit, self.durable = instance, (events, size), bool(durable)
        self._in_flight.clear()
        missing = self.outbox.first_pending - 1 - durable_seq
        if missing > 0:
            # The bus has lost its past, or has no store: numbers it would never accept start anew.
            _log.warning("the bus at %s does not know %d events that were acknowledged before", self.endpoint, missing)
            self.forgotten += missing
            self.epoch = new_epoch()
            self.outbox.renumber(self.epoch)
            self._postpone(0.0)
            return False
        self._acknowledge(durable_seq, [])
        self._sent = self.outbox.first_pending - 1
        self._progress_at = time.monotonic()
        self._set_connected(True)
        return True

    def _on_ack(self, rest: bytes) -> bool:
        failpoint("sender.on_ack")
        durable_seq, events, size, n_rejects = wire.S_ACK.unpack_from(rest)
        at = wire.S_ACK.size
        rejects = [wire.S_REJECT.unpack_from(rest, at + i * wire.S_REJECT.size) for i in range(n_rejects)]
        self._credit = (events, size)
        self._acknowledge(durable_seq, rejects)
        failpoint("sender.after_ack")
        return True

    def _acknowledge(self, durable_seq: int, rejects: list[tuple[int, int, int]]) -> None:
        first = self.outbox.first_pending
        durable_seq = min(durable_seq, self._highest())
        if durable_seq < first:
            return
        with self.progress:
            freed = self.outbox.ack(durable_seq)
            for low, high, reason in rejects:
                refused = min(min(high, durable_seq) - max(low, first) + 1, freed)
                if refused > 0:
                    past = self.outbox.renumbered
                    self._refused.append((max(low, first) + past, min(high, durable_seq) + past))
                    name = wire.REASONS.get(reason, f"ingest.{reason}")
                    self.rejected[name] = self.rejected.get(name, 0) + refused
                    freed -= refused
            self.acked_events += freed
            self.progress.notify_all()
        while self._in_flight and self._in_flight[0][0] <= durable_seq:
            self._in_flight.popleft()
        self._sent = max(self._sent, durable_seq)
        self._progress_at = time.monotonic()
        self._retry_s = _RETRY_MIN_S

    def _on_nack(self, rest: bytes) -> bool:
        expected, code = wire.S_NACK.unpack_from(rest)
        if code == wire.NACK_BUSY and self.connected:
            self._not_before = time.monotonic() + random.uniform(0.05, 0.1)
        elif not self.connected or time.monotonic() >= self._not_before:
            self._postpone(0.05 * self._retry_s)
            return False
        # Refusals of what was behind a refused frame arrive during the pause and change nothing.
        self._in_flight.clear()
        self._sent = max(expected, self.outbox.first_pending) - 1
        return True

    def _on_bye(self, rest: bytes) -> bool:
        self._acknowledge(wire.S_HELLO.unpack_from(rest)[0], [])
        self._postpone(0.2)
        return False

    def _on_pong(self, rest: bytes) -> bool:
        return True

    _HANDLERS = {
        wire.WELCOME: _on_welcome,
        wire.ACK: _on_ack,
        wire.NACK: _on_nack,
        wire.BYE: _on_bye,
        wire.PONG: _on_pong,
    }


def empty(spool: Spool, endpoint: str, then: Callable[[], None] = lambda: None) -> Sender:
    """A sender for an orphaned `spool`, not started: it ends, and calls `then`, when all is acknowledged."""
    sender = Sender(spool.outbox, spool.facts.source, endpoint, ident=spool.identity, spool=spool)
    sender.leaving = True
    sender._then = then
    return sender

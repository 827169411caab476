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
from tapebus._line import Line
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
        batch_s: float = 0.1,
        ident: tuple[bytes, int] = (b"", 0),
        *,
        spool: Spool | None = None,
        sync_s: float = 0.0,
        orphans: Sequence[Spool] = (),
        keys: Keys | None = None,
        kept: bool = False,
        linger_s: float = 0.0,
    ) -> None:
        self._keys = keys
        #: Whoever publishes has the events on a disk of its own, and sends what is left in its next life.
        self._kept = kept
        self.outbox, self.source, self.endpoint = outbox, source, endpoint
        self.producer_id, self.epoch = ident
        self.spool, self.orphans = spool, list(orphans)
        #: Something of a predecessor is not on the bus's disk yet.
        self.inherits = bool(self.orphans)
        self.syncer = Syncer(spool, sync_s)
        self.forgotten = 0
        self.rejected: dict[str, int] = {}
        self.connected = False
        self.durable = False
        self.progress = threading.Condition()
        self.stopping = self.leaving = self.ended = False
        self._then: Callable[[], None] = lambda: None
        self.born_at = time.monotonic()
        self.reader, self.writer = _wake_pair()
        self.line = Line(outbox, self.reader, batch, batch_s, linger_s)
        self.pid = os.getpid()
        self.thread = threading.Thread(target=self.run, name=f"tapebus-sender-{source}", daemon=True)
        self._ahead: Sender | None = None  # while an orphan is emptied
        self._refused: deque[tuple[int, int]] = deque(maxlen=1000)  # ranges, counted from the first event ever
        self._sock: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._greeted = False  # HELLO is sent
        self._instance = 0
        self._retry_s = _RETRY_MIN_S

    # -- asked for by other threads

    def wake(self) -> None:
        """Make the thread look at what has been asked of it."""
        self.line.called = True
        # A full pipe or a counter at its limit wakes as well.
        with contextlib.suppress(BlockingIOError):
            os.write(self.writer, b"\1\0\0\0\0\0\0\0")

    def wait_for(self, seq: int, timeout: float) -> bool:
        """Whether everything before `seq` is acknowledged within `timeout` seconds.

        `seq` counts from the first event ever, whatever has been renumbered since.
        """
        with self.progress:
            self.line.flushing += 1
            self.wake()
            try:
                return self.progress.wait_for(
                    lambda: self.outbox.first_pending + self.outbox.renumbered >= seq and not self.inherits, timeout
                )
            finally:
                self.line.flushing -= 1

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
        with self.progress:
            self.inherits = self.stopping and self.inherits
            self.progress.notify_all()
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
        for spool in self.orphans:
            spool.release()
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
        self._greeted = False
        self.line.attach(sock, self._monitor, self.producer_id, self.epoch)

    def _close(self) -> None:
        self._set_connected(False)
        self.line.detach()
        if self._sock is not None:
            if self._monitor is not None:
                self._sock.disable_monitor()
            # A goodbye may need a moment to leave; nothing else may be sent late.
            self._sock.close(linger=20 if self.stopping and self._greeted else 0)
        self._sock = self._monitor = None

    def _pause(self) -> None:
        """Sleeps until the next connection is due, or somebody asks to stop."""
        while not self.stopping and (left := self.line.not_before - time.monotonic()) > 0:
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

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.reader, 4096)
        self.line.called = False

    def _postpone(self, seconds: float) -> None:
        self.line.not_before = time.monotonic() + seconds * random.uniform(0.75, 1.25)
        self._retry_s = min(self._retry_s * 2, _RETRY_MAX_S)

    def _set_connected(self, connected: bool) -> None:
        if connected != self.connected:
            self.connected = connected
            _log.info("%s %s", "connected to" if connected else "disconnected from", self.endpoint)

    def _session(self) -> None:
        """One connection, until it is no longer worth keeping."""
        if not self._introduce():
            return
        line = self.line
        while not self._is_over():
            self._keep_alive()
            wait = min(self._retry_s, _PING_S, self.syncer.due_in())
            came = line.carry(max(0.001, wait), once=self.syncer.sync_s > 0)
            self.syncer.tend()
            if line.progressed:
                self._note_progress()
            if came is False:
                self._lose_peer()
                return
            if isinstance(came, bytes) and not self._receive(came):
                return
            if self._is_stuck():
                self._postpone(0.0)
                return
        failpoint("sender.before_bye")
        self._say_goodbye()

    def _introduce(self) -> bool:
        """Says HELLO as soon as there is somebody to hear it; ``False``: it came to nothing."""
        assert self._sock is not None and self._monitor is not None
        poller = zmq.Poller()
        poller.register(self.reader, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._sock, zmq.POLLOUT)
        while not self._is_over():
            ready = dict(poller.poll(max(1, int(min(_PING_S, self.syncer.due_in()) * 1000))))
            self.outbox.wake_at = _NEVER
            self.syncer.tend()
            if self.reader in ready:
                self._drain_wakes()
            if self._monitor in ready:
                self._lose_peer()
                return False
            if self._sock in ready and self._hello():
                return True
        return False

    def _is_over(self) -> bool:
        if self.leaving and self.outbox.first_pending >= self.outbox.next_seq:
            self.stopping = True
        return self.stopping

    def _lose_peer(self) -> None:
        self._postpone(0.02)
        self._retry_s = _RETRY_MIN_S

    def _say_goodbye(self) -> None:
        sent, highest = self.outbox.sent, self._highest()
        if self.connected and self.spool is None and not self._kept and sent < highest:
            # What never left is lost with this process. What is on its way may still arrive, so it is not told of.
            self.line.say(wire.GAP, wire.S_GAP.pack(sent + 1, highest, highest, wire.ABANDONED))
        self.line.say(wire.BYE)

    def _keep_alive(self) -> None:
        """Says PING when there has been nothing to say for a while."""
        line, now = self.line, time.monotonic()
        if self.connected and not line.in_flight and now >= max(line.sent_at + _PING_S, line.not_before):
            line.say(wire.PING, wire.S_HELLO.pack(self._highest()))

    def _is_stuck(self) -> bool:
        """No answer to a HELLO, no progress on what is in flight, or credit withheld for long."""
        line, now = self.line, time.monotonic()
        if not self.connected or line.in_flight:
            return now - line.progress_at > self._retry_s and now >= line.not_before
        if line.sent_at > line.heard_at:
            return now - line.sent_at > max(self._retry_s, _PING_S)
        return False

    def _highest(self) -> int:
        return self.outbox.next_seq - 1

    def _hello(self) -> bool:
        failpoint("sender.before_hello")
        about = {"source": self.source, "pid": os.getpid(), "host": sockets.gethostname(), "version": wire.VERSION}
        self._greeted = self.line.say(wire.HELLO, wire.S_HELLO.pack(self._highest()) + msgspec.msgpack.encode(about))
        self.line.progress_at = time.monotonic()
        return self._greeted

    # -- frames in, those that `Line` leaves to others

    def _receive(self, frame: bytes) -> bool:
        """Handles a frame; ``False``: this connection is finished."""
        kind = frame[0]
        handle = self._HANDLERS.get(kind)
        if handle is None:
            return True
        try:
            return handle(self, frame[wire.HEAD.size :])
        except struct.error:
            _log.warning("the bus at %s sent a truncated frame of type %d", self.endpoint, kind)
            self._postpone(self._retry_s)
            return False

    def _on_welcome(self, rest: bytes) -> bool:
        failpoint("sender.on_welcome")
        instance, durable_seq, events, size, durable = wire.S_WELCOME.unpack_from(rest)
        if self._instance not in (0, instance):
            _log.info("another bus answers at %s", self.endpoint)
        self._instance, self.durable = instance, bool(durable)
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
        self.outbox.rewind(self.outbox.first_pending - 1)
        self.line.set_credit(events, size)
        self.line.progress_at = time.monotonic()
        self._set_connected(True)
        return True

    def _on_ack(self, rest: bytes) -> bool:
        durable_seq, events, size, n_rejects = wire.S_ACK.unpack_from(rest)
        at = wire.S_ACK.size
        rejects = [wire.S_REJECT.unpack_from(rest, at + i * wire.S_REJECT.size) for i in range(n_rejects)]
        self.line.set_credit(events, size)
        self._acknowledge(durable_seq, rejects)
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
                    self.outbox.note_refused(refused)
                    freed -= refused
        self.line.progress_at = time.monotonic()
        self._note_progress()

    def _note_progress(self) -> None:
        self.line.progressed = False
        self._retry_s = _RETRY_MIN_S
        if self.line.flushing:
            with self.progress:
                self.progress.notify_all()

    def _on_nack(self, rest: bytes) -> bool:
        expected, code = wire.S_NACK.unpack_from(rest)
        if code == wire.NACK_BUSY and self.connected:
            self.line.not_before = time.monotonic() + random.uniform(0.05, 0.1)
        elif not self.connected or time.monotonic() >= self.line.not_before:
            self._postpone(0.05 * self._retry_s)
            return False
        # Refusals of what was behind a refused frame arrive during the pause and change nothing.
        self.outbox.rewind(max(expected, self.outbox.first_pending) - 1)
        return True

    def _on_bye(self, rest: bytes) -> bool:
        self._acknowledge(wire.S_HELLO.unpack_from(rest)[0], [])
        self._postpone(0.2)
        return False

    _HANDLERS = {
        wire.WELCOME: _on_welcome,
        wire.ACK: _on_ack,
        wire.NACK: _on_nack,
        wire.BYE: _on_bye,
    }


def empty(spool: Spool, endpoint: str, then: Callable[[], None] = lambda: None) -> Sender:
    """A sender for an orphaned `spool`, not started: it ends, and calls `then`, when all is acknowledged."""
    sender = Sender(spool.outbox, spool.facts.source, endpoint, ident=spool.identity, spool=spool)
    sender.leaving = True
    sender._then = then
    return sender

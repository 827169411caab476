"""The live feed: an XPUB socket that repeats events as they were published, for whoever subscribed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from tapebus._scan import JSON_FLAG
from tapebus.backlog import Backlog
from tapebus.dispatcher import Slice
from tapebus.errors import ConfigError, TapebusError
from tapebus.security import granted, is_loopback
from tapebus.threads import show_name

if TYPE_CHECKING:
    from tapebus.curve import Door
from tapebus.failpoints import failpoint

#: Events waiting for the feed thread; beyond it the oldest are dropped, which a subscriber sees by ``bus_seq``.
CAPACITY = 65_536
#: Bytes of a subscription; topics are shorter.
MAX_SUBSCRIPTION = 1024


class Feed(threading.Thread):
    """Lossy by nature: a slow subscriber loses messages at its high-water mark and slows nobody.

    `allowed` gives, for the frame of a subscription, the event types its sender may read, None for all.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        prefix: str,
        hwm: int,
        allowed: Callable[[Any], Sequence[str] | None] | None = None,
        door: Door | None = None,
    ) -> None:
        super().__init__(name="tapebus-feed", daemon=True)
        self._prefix = f"{prefix}." if prefix else ""
        self.backlog = Backlog(CAPACITY, 0, 0, None, lossy=True)
        self._socket = context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, hwm)
        self._socket.setsockopt(zmq.XPUB_VERBOSER, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, 3000)
        self._allowed = allowed
        if allowed is not None:
            # a subscription then counts only once it is granted
            self._socket.setsockopt(zmq.XPUB_MANUAL, 1)
        if door is not None:
            door.guard(self._socket, "subscribe")
        bind(self._socket, endpoint, "listen.feed")
        self._subscriptions: dict[bytes, int] = {}
        self._bell_read, self._bell_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.sent = 0
        self.unsent = 0
        self.seen_seq = 0

    def offer(self, piece: Slice) -> None:
        """Take a slice when somebody listens; called by the dispatcher, never blocks."""
        # after a restart, or when a consumer lags, dispatch reads again what the feed has repeated already
        if self._subscriptions and piece.last_seq > self.seen_seq:
            self.seen_seq = piece.last_seq
            self.backlog.put(piece)
            self._ring()

    def _ring(self) -> None:
        try:
            os.write(self._bell_write, b"x")
        except BlockingIOError:
            pass  # the pipe is full of rings already

    def run(self) -> None:
        show_name()
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell_read, zmq.POLLIN)
        while not self.backlog.closed:
            ready = dict(poller.poll())
            if self._socket in ready:
                self._read_subscriptions()
            if self._bell_read in ready:
                os.read(self._bell_read, 65536)
            while (piece := self.backlog.get(0.0)) is not None:
                failpoint("feed.before_send")
                self._send(piece)
                failpoint("feed.after_send")

    def _read_subscriptions(self) -> None:
        while True:
            try:
                frame = self._socket.recv(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            message = frame.bytes
            if not message or message[0] > 1:
                continue
            if self._allowed is not None:
                self._grant(frame, message[0] == 1, message[1:])
            topic = message[1:]
            count = self._subscriptions.get(topic, 0) + (1 if message[0] else -1)
            subscriptions = dict(self._subscriptions)
            if count > 0:
                subscriptions[topic] = count
            else:
                subscriptions.pop(topic, None)
            self._subscriptions = subscriptions

    def _grant(self, frame: Any, wanted: bool, topic: bytes) -> None:
        """Subscribe the sender of `frame` to what it may read of `topic`, or unsubscribe it."""
        assert self._allowed is not None
        option = zmq.SUBSCRIBE if wanted else zmq.UNSUBSCRIBE
        # at the end of a connection its subscriptions are taken back without one
        for each in granted(topic, self._prefix, self._allowed(frame)):
            self._socket.setsockopt(option, each)

    def _send(self, piece: Slice) -> None:
        wanted = tuple(self._subscriptions)
        for event in piece.events:
            if event is None:
                continue
            topic = (self._prefix + event.event_type).encode()
            if topic.startswith(wanted):
                try:
                    self._socket.send_multipart((topic, as_published(event, piece)), zmq.DONTWAIT)
                    self.sent += 1
                except (ValueError, TypeError, zmq.ZMQError):
                    # valid where it counts, but with something JSON cannot say: the gap shows by its bus_seq
                    self.unsent += 1

    def discard(self) -> None:
        """Release the socket and the bell; for a thread that has ended or never started."""
        self._socket.close(0)
        if self._bell_read >= 0:
            os.close(self._bell_read)
            os.close(self._bell_write)
            self._bell_read = self._bell_write = -1

    def stop(self) -> None:
        """Send what is queued and end; the caller joins the thread."""
        self.backlog.close()
        if self.is_alive():
            self._ring()


def as_published(event: Any, piece: Slice) -> bytes:
    """The event as JSON in the spelling it was published in, with ``bus_seq`` added."""
    seq = event.bus_seq
    raw = piece.view.raw(seq)
    if piece.view.flags(seq) & JSON_FLAG:
        body: bytes = raw.rstrip()[:-1].rstrip()
    else:
        body = msgspec.json.encode(msgspec.msgpack.decode(raw))[:-1]
    return b'%b,"bus_seq":%d}' % (body, seq)


def bind(socket: Any, endpoint: str, key: str) -> None:
    """Bind, or say in one line which port is taken. What is not guarded must have become loopback."""
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise TapebusError(
            f"{key}: cannot listen on {endpoint}: {error.strerror}; stop the other program or configure another port"
        ) from None
    found = socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
    if not is_loopback(found) and socket.getsockopt(zmq.MECHANISM) != zmq.CURVE:
        socket.unbind(found)
        raise ConfigError(f"{key}: {endpoint} is {found}, beyond this machine; write the address in numbers")

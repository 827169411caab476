"""A producer that speaks the acknowledged protocol by hand, so that it can repeat, shuffle and break what it sends."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from bus_support import PATIENCE, quote
from tapebus import wire
from tapebus.blocks import crc32c


def encoded(source: str, first: int, last: int) -> list[bytes]:
    """Quotes `first` to `last` whose volume is their number."""
    events = (
        {"event_type": "market_data", "timestamp": 1.7e9 + n, "source": source, "data": quote(n)}
        for n in range(first, last + 1)
    )
    return [msgspec.msgpack.encode(each) for each in events]


class Peer:
    """One producer; `events` are its numbered events, encoded. `connect` begins a session on a fresh connection."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, name: str, events: list[bytes]) -> None:
        self._context, self._endpoint = context, endpoint
        self.name, self.events = name, events
        self.id, self.epoch = name.encode().ljust(16, b"."), 7
        self.socket: Any = None
        #: What the bus has said last: the number up to which all is acknowledged, and the refusals since `connect`.
        self.durable = 0
        self.nacks: list[tuple[int, int]] = []
        self.rejects: list[tuple[int, int, int]] = []
        self.welcomed = False
        self.pongs = 0

    def frame(self, kind: int, body: bytes = b"", epoch: int | None = None) -> bytes:
        return wire.HEAD.pack(kind, 0, wire.VERSION, self.id, self.epoch if epoch is None else epoch) + body

    def send(self, kind: int, body: bytes = b"", epoch: int | None = None) -> None:
        self.socket.send(self.frame(kind, body, epoch))

    def drop(self) -> None:
        """End the connection without a word."""
        if self.socket is not None:
            self.socket.close(0)
            self.socket = None

    def connect(self) -> int:
        """Begin a session; what the bus has of this producer."""
        self.drop()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.SNDTIMEO, int(PATIENCE * 1000))
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self.socket.connect(self._endpoint)
        self.welcomed, self.nacks = False, []
        self.send(wire.HELLO, wire.S_HELLO.pack(0) + msgspec.msgpack.encode({"source": self.name}))
        self.hear(lambda: self.welcomed)
        return self.durable

    def batch(self, first: int, last: int, crc: int | None = None, epoch: int | None = None) -> None:
        """Send events `first` to `last`."""
        body = b"\xdd" + struct.pack(">I", last - first + 1) + b"".join(self.events[first - 1 : last])
        head = wire.S_BATCH.pack(first, last - first + 1, crc32c(body) if crc is None else crc, last)
        self.send(wire.BATCH, head + body, epoch)

    def gap(self, first: int, last: int, place: int = 2) -> None:
        self.send(wire.GAP, wire.S_GAP.pack(first, last, last, place))

    def hear(self, until: Callable[[], bool]) -> None:
        """Take in answers until a condition holds."""
        while not until():
            assert self.socket.poll(int(PATIENCE * 1000)), f"{self.name}: the bus does not answer"
            self._take(self.socket.recv())

    def listen(self) -> None:
        """Take in what has been answered so far."""
        while self.socket.poll(0):
            self._take(self.socket.recv())

    def _take(self, answer: bytes) -> None:
        kind, body = answer[0], answer[wire.HEAD.size :]
        if kind == wire.WELCOME:
            _, self.durable, *_ = wire.S_WELCOME.unpack(body)
            self.welcomed = True
        elif kind == wire.ACK:
            durable, _, _, count = wire.S_ACK.unpack_from(body)
            assert durable >= self.durable, "an acknowledgement went back"
            self.durable = durable
            self.rejects += list(wire.S_REJECT.iter_unpack(body[wire.S_ACK.size :]))
            assert count == (len(body) - wire.S_ACK.size) // wire.S_REJECT.size
        elif kind == wire.NACK:
            self.nacks.append(wire.S_NACK.unpack(body))
        elif kind == wire.PONG:
            self.pongs += 1

    def finish(self, last: int, step: int = 500) -> None:
        """Send all up to `last` that the bus does not have yet, in order, until it acknowledges it."""
        while self.durable < last:
            self.nacks.clear()
            first = self.durable + 1
            self.batch(first, min(last, first + step - 1))
            self.hear(lambda first=first: self.durable >= first or bool(self.nacks))

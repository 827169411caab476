"""A small bus on a ROUTER socket that keeps its books in memory and can be told to misbehave."""

from __future__ import annotations

import random
import threading

import msgspec
import zmq

from tapebus import wire
from tapebus.blocks import crc32c

PATIENCE_S = 15.0


class Bus(threading.Thread):
    """An honest bus by default: stores in order, deduplicates by watermark, acknowledges what it stored."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*", hw: dict | None = None, events: dict | None = None) -> None:
        super().__init__(daemon=True)
        self.hw = {} if hw is None else hw
        self.events = {} if events is None else events
        self.gaps: list[tuple[int, int, int]] = []
        self.credit = (4096, 1 << 20)
        self.busy = self.bad_sequence = self.bad_crc = self.unknown = self.bye = self.mute = 0
        self.reject: set[int] = set()
        self.frames = 0
        self.stopping = threading.Event()
        self.changed = threading.Condition()
        self.greetings: list[dict] = []
        self.context = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.router.bind(endpoint)
        self.endpoint = self.router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.instance = random.getrandbits(63) + 1
        self.clients: dict[bytes, tuple[bytes, int]] = {}
        self.start()

    def run(self) -> None:
        granted = self.credit
        while not self.stopping.is_set():
            if granted != self.credit:
                granted = self.credit
                for client, key in self.clients.items():
                    self.ack(client, key, [])
            if self.router.poll(10):
                client, frame = self.router.recv_multipart()
                with self.changed:
                    self.handle(client, frame)
                    self.changed.notify_all()
        self.router.close(0)
        self.context.term()

    def say(self, client: bytes, key: tuple[bytes, int], kind: int, rest: bytes) -> None:
        self.router.send_multipart([client, wire.HEAD.pack(kind, 0, wire.VERSION, *key) + rest])

    def ack(self, client: bytes, key: tuple[bytes, int], rejects: list[int]) -> None:
        rest = wire.S_ACK.pack(self.hw[key], *self.credit, len(rejects))
        self.say(client, key, wire.ACK, rest + b"".join(wire.S_REJECT.pack(seq, seq, 3) for seq in rejects))

    def handle(self, client: bytes, frame: bytes) -> None:
        kind, _, _, *key = wire.HEAD.unpack_from(frame)
        key, rest = tuple(key), frame[wire.HEAD.size :]
        self.frames += 1
        if self.mute > 0:
            self.mute -= 1
            return
        if kind == wire.HELLO:
            self.greetings.append(msgspec.msgpack.decode(rest[wire.S_HELLO.size :]))
            self.hw.setdefault(key, 0)
            self.events.setdefault(key, {})
            self.clients[client] = key
            self.say(client, key, wire.WELCOME, wire.S_WELCOME.pack(self.instance, self.hw[key], *self.credit, 1))
        elif client not in self.clients:
            self.say(client, key, wire.NACK, wire.S_NACK.pack(0, wire.NACK_UNKNOWN))
        elif kind == wire.BATCH:
            self.batch(client, key, rest)
        elif kind == wire.GAP:
            first, last, _, place = wire.S_GAP.unpack(rest)
            assert first <= self.hw[key] + 1
            self.gaps.append((first, last, place))
            self.hw[key] = max(self.hw[key], last)
            self.ack(client, key, [])
        elif kind == wire.PING:
            self.say(client, key, wire.PONG, b"")

    def batch(self, client: bytes, key: tuple[bytes, int], rest: bytes) -> None:
        base, n, crc, _ = wire.S_BATCH.unpack_from(rest)
        body = rest[wire.S_BATCH.size :]
        assert crc32c(body) == crc and body[:5] == b"\xdd" + n.to_bytes(4, "big")
        if self.busy > 0:
            self.busy -= 1
            self.say(client, key, wire.NACK, wire.S_NACK.pack(self.hw[key] + 1, wire.NACK_BUSY))
        elif self.bad_crc > 0:
            self.bad_crc -= 1
            self.say(client, key, wire.NACK, wire.S_NACK.pack(self.hw[key] + 1, wire.NACK_CRC))
        elif self.unknown > 0:
            self.unknown -= 1
            del self.clients[client]
            self.say(client, key, wire.NACK, wire.S_NACK.pack(0, wire.NACK_UNKNOWN))
        elif self.bye > 0:
            # the last that a bus that stops says to a producer whose batch it no longer takes
            self.bye -= 1
            del self.clients[client]
            self.say(client, key, wire.BYE, wire.S_HELLO.pack(self.hw[key]))
        elif base > self.hw[key] + 1 or self.bad_sequence > 0:
            self.bad_sequence -= 1
            self.say(client, key, wire.NACK, wire.S_NACK.pack(self.hw[key] + 1, wire.NACK_SEQUENCE))
        else:
            rejects = []
            for seq, event in enumerate(msgspec.msgpack.decode(body), base):
                if seq > self.hw[key]:
                    self.hw[key] = seq
                    if seq in self.reject:
                        rejects.append(seq)
                    else:
                        self.events[key][seq] = event
            self.ack(client, key, rejects)

    def wait_for(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S)

    def stored(self) -> list[int]:
        return [event["data"]["i"] for events in self.events.values() for _, event in sorted(events.items())]

    def kill(self) -> None:
        self.stopping.set()
        self.join()

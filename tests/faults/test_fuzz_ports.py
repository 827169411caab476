"""Damaged frames against the ports of a running bus, with honest producers beside: all of it is on the books."""

from __future__ import annotations

import random
import struct
import time
from typing import Any

import msgspec
import zmq
from frames import Frames, event, made_up, recorded
from hostile import honest, in_order

from bus_support import listening, pushing, wait_until
from tapebus import Tape, wire
from tapebus._scan import scan
from tapebus._topics import Topics
from tapebus.blocks import crc32c
from tapebus.codec import Codec
from tapebus.plugins import load, registry

#: Frames under way before the bus is asked how far it is: the port has a bounded queue.
WINDOW = 5000
KEEP_ALL = "[plugins.store]\nmax_dead = 100000000"


def typed_topics() -> Topics:
    codec = Codec(registry(load(["schema"])))
    codec.register_topics()
    return codec.topics


def oversize(frame: bytes) -> bool:
    return len(frame) > wire.MAX_FRAME


def odd_sizes() -> list[bytes]:
    """Empty, tiny, as large as may be, a little larger, and with too many events."""
    small = b'{"event_type":"a"}'
    return [
        b"", b"{", b"\x80", b"\0", b"\xef\xbb\xbf{}", b"[]", b"\x90", b" ",
        small + b" " * (wire.MAX_FRAME - len(small)),
        small + b" " * (wire.MAX_FRAME - len(small) + 1),
        bytes(wire.MAX_FRAME + 64),
        b"[" + b",".join([small] * 4096) + b"]",
        b"[" + b",".join([small] * 4097) + b"]",
    ]  # fmt: skip


def test_every_frame_pushed_is_on_the_tape_as_sent_or_counted_and_kept(make_bus, size, chance, figures, shared_data):
    bus = make_bus(["schema", "store"], KEEP_ALL).start()
    mix = Frames(chance, made_up() + recorded(shared_data))
    total = size(4_000, 200_000, 2_000_000)
    topics = typed_topics()
    pieces: list[bytes] = []
    refused: list[bytes] = []
    started = time.monotonic()

    def accounted(stats: Any) -> int:
        return sum(stats["bus"]["rejected"].values()) + frames_stored(stats)

    def frames_stored(stats: Any) -> int:
        # the account counts events; the frames they came in are known here
        stored = next((each["stored"] for each in stats["producers"] if each["source"] == "unsequenced"), 0)
        return sum(1 for end in ends if end <= stored)

    ends: list[int] = []
    frames = odd_sizes()
    while len(frames) < total:
        frames.append(mix.next())
    # somebody listens, so that all that is delivered is also encoded for the feed
    with honest(bus) as producer, pushing(bus.ingest) as push, listening(None, bus.feed, b""):
        for n, frame in enumerate(frames):
            push(frame)
            found = "oversize" if oversize(frame) else scan(topics, frame)
            if isinstance(found, str):
                refused.append(frame)
            else:
                pieces += [frame[each["offset"] : each["offset"] + each["size"]] for each in found]
                ends.append(len(pieces))
            if n % WINDOW == WINDOW - 1:
                bus.wait_for(lambda stats, n=n: accounted(stats) >= n + 1 - WINDOW, "to follow")
        stats = bus.wait_for(lambda stats: accounted(stats) == len(frames), "to account for every frame")
    rejected = stats["bus"]["rejected"]
    big = sum(map(oversize, frames))
    assert rejected == {"ingest.malformed": len(refused) - big, "ingest.oversize": big}
    assert stats["bus"]["dropped"] == {} and stats["bus"]["unexplained"] == 0
    bus.wait_for(lambda stats: all(c["cursor"] >= stats["bus"]["last_seq"] for c in stats["consumers"]), "to hand out")
    assert bus.stop() == 0
    with Tape.open(bus.data_dir) as tape:
        own = {"honest", "tapebus"}
        found = [each.raw for each in tape.read() if each.source not in own]
        kept = [letter.raw for letter in tape.dead_letters() if letter.place == "ingest"]
    assert found == pieces
    in_order(bus, producer.published)
    # a burst may leave samples behind, never counts
    assert kept == [frame[: 64 << 10] for frame in refused] or (len(refused) > 10_000 and len(kept) <= len(refused))
    figures.update(
        frames=len(frames),
        events=len(pieces),
        refused=len(refused),
        kept=len(kept),
        dead_letters=sum(stats["bus"]["dead_letters"].values()),
        honest=producer.published,
        frames_per_s=round(len(frames) / (time.monotonic() - started)),
        rss_mb=round(stats["bus"]["rss_bytes"] / 1e6),
    )


class Odd:
    """A peer that knows the protocol and breaks it, on one connection; what it counts as stored is its own account."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, chance: random.Random) -> None:
        self.chance = chance
        self.id, self.epoch = chance.randbytes(16), chance.getrandbits(63) | 1
        self.next_seq = 1
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndtimeo = 10_000
        self.socket.connect(endpoint)

    def frame(self) -> bytes:
        chance = self.chance
        kind = chance.choices((1, 2, 3, 4, 5, 16, 99), (10, 60, 8, 5, 1, 2, 2))[0]
        version = wire.VERSION if chance.random() < 0.95 else chance.getrandbits(16)
        head = wire.HEAD.pack(kind, chance.choice((0, 0, 0, 255)), version, self.id, self.epoch)
        highest = chance.choice((0, 1, self.next_seq, 1 << 40))
        if kind == wire.HELLO:
            about = chance.choice(({"source": "odd"}, {}, {"source": 5}, [], None, {"source": "x" * 9999}, b"\xc1"))
            return head + wire.S_HELLO.pack(highest) + msgspec.msgpack.encode(about)
        if kind == wire.BATCH:
            n = chance.choice((1, 1, 2, 3, 0, 4097, 0xFFFFFFFF))
            events = [event("odd", {"n": self.next_seq + i}) for i in range(min(n, 3))]
            body = b"\xdd" + struct.pack(">I", n) + b"".join(map(msgspec.msgpack.encode, events))
            if chance.random() < 0.3:
                body = body[: chance.randrange(len(body) + 1)] + chance.randbytes(chance.randrange(4))
            crc = crc32c(body) if chance.random() < 0.9 else 7
            base = chance.choice((self.next_seq, self.next_seq, self.next_seq, 1, 0, self.next_seq + 5, 2**64 - 1))
            if base == self.next_seq and crc != 7 and 0 < n < 4:
                self.next_seq += n
            return head + wire.S_BATCH.pack(base, n, crc, highest) + body
        if kind == wire.GAP:
            first, last = self.next_seq, self.next_seq + chance.choice((0, 1, 9))
            first, last = chance.choice(((first, last), (first, last), (last, first), (0, 2**64 - 1), (5, 2**63)))
            place = chance.choice((1, 2, 3, 4, 0, 255))
            if (first, place) <= (self.next_seq, 4) and place and last < self.next_seq + 10:
                self.next_seq = max(self.next_seq, last + 1)
            return head + wire.S_GAP.pack(first, last, highest, place)
        return head + chance.randbytes(chance.choice((0, 7, 8, 9, 100)))

    def send(self) -> None:
        chance, frame = self.chance, self.frame()
        match chance.randrange(20):
            case 0:
                frame = frame[: chance.randrange(len(frame) + 1)]
            case 1:
                place = chance.randrange(len(frame))
                frame = frame[:place] + chance.randbytes(1) + frame[place + 1 :]
            case 2:
                self.socket.send_multipart([frame] * chance.choice((2, 3, 50)))
                return
        self.socket.send(frame)
        while self.socket.poll(3 if chance.random() < 0.1 else 0):
            answer = self.socket.recv()
            assert answer[0] in (wire.WELCOME, wire.ACK, wire.NACK, wire.PONG), answer
            if answer[0] == wire.NACK:
                expected, _ = wire.S_NACK.unpack_from(answer, wire.HEAD.size)
                self.next_seq = expected or self.next_seq


def test_peers_that_break_the_protocol_harm_nobody_and_their_books_close(make_bus, size, chance, figures):
    bus = make_bus(["schema", "store"], KEEP_ALL).start()
    total = size(4_000, 200_000, 2_000_000)
    sent = peers = 0
    with honest(bus) as producer, zmq.Context() as context:
        while sent < total:
            odd = Odd(context, bus.acked, chance)
            peers += 1
            for _ in range(min(400, total - sent)):
                odd.send()
                sent += 1
            odd.socket.send(wire.HEAD.pack(wire.HELLO, 0, wire.VERSION, odd.id, odd.epoch) + wire.S_HELLO.pack(0))
            wait_until(lambda odd=odd: _answered(odd.socket), "an answer to a sound HELLO after all that")
            odd.socket.close()
    stats = bus.wait_for(lambda stats: stats["bus"]["last_seq"] == stats["bus"]["received"], "to write what it has")
    assert bus.stop() == 0
    with Tape.open(bus.data_dir) as tape:
        odd_events = sum(1 for each in tape.read() if each.source not in ("honest", "tapebus"))
    books = [book for book in stats["producers"] if book["source"] not in ("honest", "tapebus")]
    assert sum(book["stored"] for book in books) == odd_events > 0
    for book in stats["producers"]:
        assert book["unexplained"] == 0
        assert book["highest_seq"] == book["stored"] + book["rejected"] + book["dropped"] + book["in_flight"]
    in_order(bus, producer.published)
    figures.update(
        frames=sent,
        peers=peers,
        stored=odd_events,
        rejected=stats["bus"]["rejected"],
        dropped=stats["bus"]["dropped"],
        honest=producer.published,
        rss_mb=round(stats["bus"]["rss_bytes"] / 1e6),
    )


def _answered(socket: Any) -> bool:
    while socket.poll(10):
        if socket.recv()[0] == wire.WELCOME:
            return True
    return False

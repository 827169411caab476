"""Reception over real sockets: fire and forget, wrapped sources, and the acknowledged protocol by hand."""

from __future__ import annotations

import json
import struct
import threading

import msgspec
import pytest
import zmq

from bus_support import wait_until
from tapebus import wire
from tapebus._ingest import Ingest
from tapebus._ring import Ring
from tapebus._topics import Topics
from tapebus.blocks import BlockView, crc32c

PATIENCE_MS = 10_000
ID = b"p" * 16
INSTANCE = 77


def event(n: int = 0, kind: str = "a") -> dict:
    return {"event_type": kind, "timestamp": 1.5, "source": "t", "data": {"n": n}}


class Bench:
    """An ingest thread with one PULL and one ROUTER socket; the test plays the tape thread."""

    def __init__(self, entries=1024, wide=64, max_frame=4096, **source):
        self.zmq = zmq.Context()
        self.ring = Ring(Topics(), entries)
        self.legacy = self.ring.producer(b"legacy".ljust(16), 0, "legacy", sequenced=False)
        self.ingest = Ingest(self.ring, INSTANCE, True, max_frame)
        self.samples: list[tuple[bytes, str]] = []
        self.sampled = threading.Event()
        self.ingest.samples = self._sample
        self.pull, self.router = self.zmq.socket(zmq.PULL), self.zmq.socket(zmq.ROUTER)
        for each in (self.pull, self.router):
            each.linger = 0
            each.rcvhwm = wide
        port = self.pull.bind_to_random_port("tcp://127.0.0.1")
        acked = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.ingest.add(self.pull, self.legacy, **source)
        self.ingest.add(self.router, router=True)
        self.push, self.dealer = self.zmq.socket(zmq.PUSH), self.zmq.socket(zmq.DEALER)
        for each in (self.push, self.dealer):
            each.linger = 0
        self.push.connect(f"tcp://127.0.0.1:{port}")
        self.dealer.connect(f"tcp://127.0.0.1:{acked}")
        self.dealer.rcvtimeo = PATIENCE_MS
        self.thread = threading.Thread(target=self.ingest.run, daemon=True)
        self.thread.start()

    def _sample(self, frame, reason):
        self.samples.append((frame, reason))
        self.sampled.set()

    def close(self):
        self.ingest.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.zmq.destroy(linger=0)

    def raws(self, count: int) -> list[bytes]:
        """The raw bytes of the next `count` events, in order."""
        found: list[bytes] = []
        while len(found) < count:
            assert self.ring.wait(PATIENCE_MS), f"only {len(found)} of {count} events arrived"
            packed = self.ring.pack()
            if packed is not None and packed[0] is not None:
                block = packed[0]
                view = BlockView(block.payload, block.first_seq)
                found += [view.raw(block.first_seq + i) for i in range(block.count)]
                self.ring.acknowledge(packed[2])
        return found

    def commit(self) -> None:
        assert self.ring.wait(PATIENCE_MS)
        self.ring.acknowledge(self.ring.pack()[2])

    def send(self, kind, body=b"", epoch=1):
        self.dealer.send(wire.HEAD.pack(kind, 0, wire.VERSION, ID, epoch) + body)

    def reply(self) -> tuple[int, bytes]:
        frame = self.dealer.recv()
        kind, _, version, producer_id, epoch = wire.HEAD.unpack_from(frame)
        assert (version, producer_id, epoch) == (wire.VERSION, ID, 1)
        return kind, frame[wire.HEAD.size :]

    def hello(self):
        self.send(wire.HELLO, wire.S_HELLO.pack(0) + msgspec.msgpack.encode({"source": "me"}))
        kind, body = self.reply()
        assert kind == wire.WELCOME
        return wire.S_WELCOME.unpack(body)

    def batch(self, base, count, body=None, crc=None):
        if body is None:
            encoded = [msgspec.msgpack.encode(event(i)) for i in range(base, base + count)]
            body = b"\xdd" + struct.pack(">I", count) + b"".join(encoded)
        crc = crc32c(body) if crc is None else crc
        self.send(wire.BATCH, wire.S_BATCH.pack(base, count, crc, base + count - 1) + body)

    def ack(self) -> tuple[int, int, list[tuple[int, int, int]]]:
        kind, body = self.reply()
        assert kind == wire.ACK
        durable, credit, _, rejects = wire.S_ACK.unpack_from(body)
        rest = body[wire.S_ACK.size :]
        assert len(rest) == rejects * wire.S_REJECT.size
        return durable, credit, list(wire.S_REJECT.iter_unpack(rest))

    def nack(self):
        kind, body = self.reply()
        assert kind == wire.NACK
        return wire.S_NACK.unpack(body)

    @property
    def book(self):
        return self.ring.account(self.ring.identities[ID, 1])


@pytest.fixture
def make():
    made = []

    def build(**source):
        made.append(Bench(**source))
        return made[-1]

    yield build
    for each in made:
        each.close()


def test_frames_of_both_encodings_arrive_as_they_were_sent(make):
    bench = make()
    one, two = json.dumps(event(1)).encode(), msgspec.msgpack.encode(event(2))
    bench.push.send(one)
    bench.push.send(two)
    bench.push.send_multipart([b"a topic", b"[" + one + b" , " + one + b"]"])
    assert bench.raws(4) == [one, two, one, one]


@pytest.mark.parametrize(("frame", "reason"), [(b"{}", "event_type"), (b"nonsense", "neither"), (bytes(5000), "over")])
def test_a_frame_that_is_no_event_is_counted_and_sampled_and_the_next_one_arrives(make, frame, reason):
    bench = make()
    bench.push.send(frame)
    bench.push.send(json.dumps(event()).encode())
    bench.raws(1)
    assert bench.sampled.wait(10)
    [(sample, why)] = bench.samples
    assert sample == frame and reason in why
    assert bench.ingest.malformed + bench.ingest.oversize == 1


@pytest.mark.parametrize(
    "parts",
    [
        [b'{"px": 1}'],
        [b'BTC {"px": 1}'],
        [b"BTC", b'{"px": 1}'],
        [msgspec.msgpack.encode({"px": 1})],
    ],
)
def test_a_bare_payload_is_wrapped_and_its_keys_renamed(make, parts):
    bench = make(event_type="tick", source="100% feed", fields={"px": "price"})
    bench.push.send_multipart(parts)
    [raw] = bench.raws(1)
    found = (msgspec.msgpack if raw[0] >= 0x80 else msgspec.json).decode(raw)
    assert (found["event_type"], found["source"], found["data"]) == ("tick", "100% feed", {"price": 1})
    assert found["timestamp"] > 1e9


def test_what_is_an_event_already_is_not_wrapped(make):
    bench = make(event_type="tick", source="feed")
    raw = json.dumps(event()).encode()
    bench.push.send(raw)
    assert bench.raws(1) == [raw]


def test_batches_are_welcomed_stored_and_acknowledged_once_durable(make):
    bench = make()
    assert bench.hello()[:2] == (INSTANCE, 0)
    bench.batch(1, 3)
    bench.commit()
    assert bench.ack()[::2] == (3, [])
    bench.batch(1, 3)
    assert bench.ack()[0] == 3, "a duplicate is acknowledged again and not stored again"
    bench.batch(2, 4)
    assert [msgspec.msgpack.decode(raw)["data"]["n"] for raw in bench.raws(2)] == [4, 5]
    assert bench.ack()[0] == 5
    assert (bench.book.source, bench.book.watermark, bench.book.stored, bench.book.highest_seq) == ("me", 5, 5, 5)


def test_gaps_in_the_numbers_and_damaged_bodies_are_sent_again(make):
    bench = make()
    bench.batch(1, 1)
    assert bench.nack() == (0, wire.NACK_UNKNOWN)
    bench.hello()
    bench.batch(2, 1)
    assert bench.nack() == (1, wire.NACK_SEQUENCE)
    bench.batch(1, 1, crc=1)
    assert bench.nack() == (1, wire.NACK_CRC)
    bench.send(wire.PING, wire.S_HELLO.pack(9))
    assert bench.reply() == (wire.PONG, b"")
    assert (bench.book.highest_seq, bench.book.stored) == (9, 0)


def test_many_refused_ranges_are_all_told_with_the_acknowledgement_that_covers_them(make):
    bench = make()
    bench.hello()
    for base in range(1, 8):
        bench.batch(base, 1, body=b"\xdd\0\0\0\1\x01")
    bench.send(wire.PING, wire.S_HELLO.pack(7))
    assert bench.reply()[0] == wire.PONG
    bench.commit()
    told, covered = [], 0
    while len(told) < 7:
        durable, _, rejects = bench.ack()
        assert len(rejects) <= 3 and all(covered < first and last <= durable for first, last, _ in rejects)
        covered = durable
        told += rejects
    assert covered == 7
    assert told == [(n, n, 1) for n in range(1, 8)]
    assert (bench.book.watermark, bench.book.stored, bench.book.rejected) == (7, 0, {"ingest.malformed": 7})


def test_what_a_producer_dropped_is_booked_under_its_place(make):
    bench = make()
    bench.hello()
    bench.send(wire.GAP, wire.S_GAP.pack(1, 4, 4, 2))
    bench.commit()
    assert bench.ack()[0] == 4
    assert (bench.book.watermark, bench.book.dropped) == (4, {"client.ring_full": 4})


def test_a_full_store_takes_the_credit_away_and_gives_it_back(make):
    bench = make()
    credit = bench.hello()[2]
    bench.ingest.set_store_full(True)
    assert bench.ack()[1] == 0
    bench.ingest.set_store_full(False)
    assert bench.ack()[1] == credit


def test_goodbye_ends_a_session_and_the_bus_says_it_too(make):
    bench = make()
    bench.hello()
    bench.send(wire.BYE)
    bench.batch(1, 1)
    assert bench.nack()[1] == wire.NACK_UNKNOWN
    bench.hello()
    bench.ingest.stop()
    assert bench.reply() == (wire.BYE, bytes(8))


def test_a_frame_of_another_epoch_than_the_one_introduced_is_unknown(make):
    bench = make()
    bench.hello()
    bench.send(wire.BATCH, wire.S_BATCH.pack(1, 1, 0, 1), epoch=2)
    kind, _, _, _, epoch = wire.HEAD.unpack_from(frame := bench.dealer.recv())
    assert (kind, epoch, frame[wire.HEAD.size :]) == (wire.NACK, 2, wire.S_NACK.pack(0, wire.NACK_UNKNOWN))
    bench.batch(1, 1)
    bench.commit()
    assert bench.ack()[0] == 1
    assert list(bench.ring.identities) == [(b"legacy".ljust(16), 0), (ID, 1)], "no account is opened by a guess"


@pytest.mark.parametrize("count", [4097, 0xFFFFFFFF])
def test_a_batch_that_claims_more_events_than_a_frame_may_hold_is_refused_and_sampled(make, count):
    bench = make()
    bench.hello()
    bench.batch(1, count, body=b"\xdd" + struct.pack(">I", count) + msgspec.msgpack.encode(event()))
    assert bench.nack() == (1, wire.NACK_UNKNOWN)
    [(_, why)] = bench.samples
    assert "more events" in why and bench.ingest.malformed == 1
    assert (bench.book.watermark, bench.book.rejected) == (0, {})
    bench.batch(1, 2)
    bench.commit()
    assert bench.ack()[0] == 2


def test_hello_with_epoch_0_is_refused_because_it_marks_the_accounts_of_the_bus(make):
    bench = make()
    bench.send(wire.HELLO, wire.S_HELLO.pack(0) + msgspec.msgpack.encode({"source": "me"}), epoch=0)
    kind, _, _, _, epoch = wire.HEAD.unpack_from(frame := bench.dealer.recv())
    assert (kind, epoch, frame[wire.HEAD.size :]) == (wire.NACK, 0, wire.S_NACK.pack(0, wire.NACK_UNKNOWN))
    assert list(bench.ring.identities) == [(b"legacy".ljust(16), 0)]


def test_a_full_ring_tells_producers_that_it_is_busy_and_takes_the_batch_afterwards(make):
    bench = make(entries=4)
    bench.hello()
    for base in range(1, 5):
        bench.batch(base, 1)

    def next_nack():
        while (reply := bench.reply())[0] == wire.ACK:
            assert wire.S_ACK.unpack(reply[1])[0] == 0, "only the credit has changed"
        assert reply[0] == wire.NACK
        return wire.S_NACK.unpack(reply[1])

    bench.batch(5, 1)
    assert next_nack() == (5, wire.NACK_BUSY)
    bench.send(wire.GAP, wire.S_GAP.pack(5, 9, 9, 1))
    assert next_nack() == (5, wire.NACK_BUSY)
    assert len(bench.raws(4)) == 4
    wait_until(lambda: bench.ack()[0] == 4, "the acknowledgement of what was in the ring")
    bench.batch(5, 1)
    bench.commit()
    wait_until(lambda: bench.ack()[0] == 5, "the acknowledgement of the repeated batch")
    assert (bench.book.stored, bench.book.dropped) == (5, {})


def test_while_the_tape_stands_still_unacknowledged_frames_are_shed_and_counted(make):
    bench = make(entries=4)
    for n in range(1, 5):
        bench.push.send(msgspec.msgpack.encode(event(n)))
    wait_until(lambda: bench.ring.received_count == 4, "the ring to fill")
    for n in range(5, 9):
        bench.push.send(msgspec.msgpack.encode(event(n)))
    wait_until(lambda: bench.ingest.shed == 4, "four frames to be shed")
    assert [msgspec.msgpack.decode(raw)["data"]["n"] for raw in bench.raws(4)] == [1, 2, 3, 4]
    bench.push.send(msgspec.msgpack.encode(event(9)))
    assert msgspec.msgpack.decode(bench.raws(1)[0])["data"]["n"] == 9, "once it moves again nothing is shed"
    assert (bench.ingest.shed, bench.ingest.malformed, bench.ring.received_count) == (4, 0, 5)


def test_small_frames_that_come_together_keep_their_order_among_large_padded_broken_and_batch_frames(make):
    bench = make(max_frame=1 << 16)
    sent, expected = [], []
    for n in range(600):
        one = {**event(n), "data": {"n": n, "text": "x" * (5000 if n % 50 == 49 else n % 7)}}
        plain, packed = json.dumps(one).encode(), msgspec.msgpack.encode(one)
        if n % 10 == 3:
            sent += [b"junk", b" \n" + plain + b" \n"]
            expected.append(plain)
        elif n % 10 == 6:
            sent.append(b"[" + plain + b" , " + plain + b"]")
            expected += [plain, plain]
        elif n % 10 == 8:
            sent.append(b"\x93" + packed * 3)
            expected += [packed] * 3
        else:
            sent.append(packed)
            expected.append(packed)
    for each in sent:
        bench.push.send(each)
    assert bench.raws(len(expected)) == expected
    assert (bench.ingest.malformed, bench.ring.received_count) == (60, len(expected))
    assert bench.ring.account(bench.legacy).stored == len(expected)
    assert bench.ring.fill == (0, 0)


def test_a_connection_speaks_for_the_producer_it_introduced_last(make):
    bench = make()
    bench.hello()
    bench.send(wire.HELLO, wire.S_HELLO.pack(0), epoch=2)
    assert wire.HEAD.unpack_from(bench.dealer.recv())[4] == 2
    bench.batch(1, 1)
    assert bench.nack() == (0, wire.NACK_UNKNOWN)
    body = b"\xdd\0\0\0\1" + msgspec.msgpack.encode(event())
    bench.send(wire.BATCH, wire.S_BATCH.pack(1, 1, crc32c(body), 1) + body, epoch=2)
    bench.commit()
    kind, _, _, _, epoch = wire.HEAD.unpack_from(bench.dealer.recv())
    assert (kind, epoch) == (wire.ACK, 2)


def test_a_wide_mark_for_small_frames_is_narrowed_by_the_first_large_one_and_nobody_waits_at_the_old_one(make):
    bench = make(entries=64, wide=256, max_frame=1 << 18)
    small, large = (msgspec.msgpack.encode({**event(), "data": {"text": "x" * n}}) for n in (10, 100_000))
    for _ in range(300):
        bench.push.send(small)
    bench.raws(300)
    assert bench.pull.get(zmq.RCVHWM) == 256
    bench.push.send(large)
    for _ in range(900):
        # more than the ring and libzmq have room for: the writer waits at the mark, wide or narrow
        bench.push.send(small)
    assert bench.raws(901) == [large, *[small] * 900]
    assert bench.pull.get(zmq.RCVHWM) == 64


def test_the_parts_before_the_last_one_may_be_many(make):
    bench = make()
    bench.push.send_multipart([b"x"] * 20_000 + [msgspec.msgpack.encode(event(1))])
    bench.push.send(msgspec.msgpack.encode(event(2)))
    assert [msgspec.msgpack.decode(raw)["data"]["n"] for raw in bench.raws(2)] == [1, 2]
    bench.hello()
    bench.dealer.send_multipart([wire.HEAD.pack(wire.PING, 0, wire.VERSION, ID, 1) + bytes(8)] * 20_000)
    bench.send(wire.PING, wire.S_HELLO.pack(0))
    assert bench.reply() == (wire.PONG, b"")
    assert [why for _, why in bench.samples] == ["a message of several parts"]
    assert bench.ingest.malformed == 1


def test_a_connection_with_a_routing_id_of_its_own_is_counted_not_served(make):
    bench = make()
    with bench.zmq.socket(zmq.DEALER) as odd:
        odd.linger = 0
        odd.setsockopt(zmq.ROUTING_ID, b"me")
        odd.connect(bench.dealer.LAST_ENDPOINT.decode())
        odd.send(wire.HEAD.pack(wire.HELLO, 0, wire.VERSION, ID, 1) + bytes(8))
        assert bench.sampled.wait(10)
    assert [why for _, why in bench.samples] == ["the connection has a routing id of its own"]
    assert len(bench.ring.identities) == 1


def test_a_session_nobody_speaks_in_is_forgotten_and_its_producer_told_to_say_hello(make):
    bench = make()
    bench.ingest.silent_us = 20_000
    bench.hello()

    def forgotten() -> bool:
        # anything that arrives lets the bus look
        bench.push.send(json.dumps(event()).encode())
        return bool(bench.raws(1)) and bench.ingest.sessions_count == 0

    wait_until(forgotten, "the session to be forgotten")
    assert (bench.ingest.sessions_count, bench.ingest.connected()) == (0, set())
    bench.batch(1, 3)
    assert bench.nack() == (0, wire.NACK_UNKNOWN)
    assert bench.hello()[1] == 0


def test_all_producers_together_may_not_have_more_on_the_way_than_the_ring_holds(make):
    bench = make()
    credits = []
    dealers = [bench.zmq.socket(zmq.DEALER) for _ in range(40)]
    for n, dealer in enumerate(dealers):
        dealer.linger, dealer.rcvtimeo = 0, PATIENCE_MS
        dealer.connect(bench.router.last_endpoint)
        about = wire.S_HELLO.pack(0) + msgspec.msgpack.encode({"source": "many"})
        dealer.send(wire.HEAD.pack(wire.HELLO, 0, wire.VERSION, bytes([n + 1]) * 16, 1) + about)
        while (frame := dealer.recv())[0] != wire.WELCOME:
            pass
        credits.append(wire.S_WELCOME.unpack_from(frame, wire.HEAD.size)[3])
    assert credits == sorted(credits, reverse=True)
    assert credits[0] == 4 << 20 and credits[-1] * 40 <= bench.ring.max_bytes


def test_a_flood_of_unnumbered_frames_leaves_room_for_producers_that_number_theirs(make):
    bench = make(entries=16)
    bench.hello()
    for n in range(100):
        bench.push.send(json.dumps(event(n)).encode())
    # 13 of the 16 places are for everybody
    wait_until(lambda: bench.ring.received_count == 13, "the flood to take its share")
    bench.batch(1, 2)
    bench.batch(3, 2)
    wait_until(lambda: bench.ring.received_count == 17, "the batches to take theirs")
    bench.commit()
    assert bench.ack()[0] == 4
    assert bench.book.stored == 4

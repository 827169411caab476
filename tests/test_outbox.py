"""The ring of unacknowledged events against a plain list, and its checksum against known values."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tapebus import wire
from tapebus._emitter import Emitter, enc_hook
from tapebus._outbox import MAX_EVENT, Outbox
from tapebus.blocks import crc32c
from tapebus.events import PRIORITIES, Wire

EVENTS, BYTES = 6, 64


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_the_checksum_is_the_castagnoli_crc_of_rfc_3720(data, expected):
    assert crc32c(data) == expected


class OutboxModel(RuleBasedStateMachine):
    """The model keeps (number, bytes or place) pairs; only "is there room for bytes?" is asked of the ring."""

    def __init__(self) -> None:
        super().__init__()
        self.box = Outbox(EVENTS, BYTES)
        self.kept: dict[int, bytes | int] = {}
        self.seq = self.published = 0
        self.dropped = 0

    @rule(event=st.binary(min_size=1, max_size=40).map(msgspec.msgpack.encode))
    def append(self, event):
        seq = self.box.append(event)
        self.seq += 1
        self.published += 1
        live = [each for each in self.kept.values() if isinstance(each, bytes)]
        if seq:
            assert seq == self.seq
            assert len(live) < EVENTS and sum(map(len, live)) + len(event) <= BYTES
            self.kept[seq] = event
        else:
            # At most the unused end of the ring, shorter than this event, may be wasted.
            assert len(live) + len(self.kept) >= EVENTS or sum(map(len, live)) + 2 * len(event) > BYTES or live
            assert live or len(self.kept) >= EVENTS
            self.kept[self.seq] = 2
            self.dropped += 1

    @rule(place=st.sampled_from([1, 2]))
    def drop(self, place):
        self.box.drop(place)
        self.seq += 1
        self.published += 1
        self.kept[self.seq] = place
        self.dropped += 1

    @rule(data=st.data())
    def ack(self, data):
        upto = data.draw(st.integers(0, self.seq))
        gone = [seq for seq in self.kept if seq <= upto]
        assert self.box.ack(upto) == sum(isinstance(self.kept.pop(seq), bytes) for seq in gone)

    @rule()
    def renumber(self):
        shift = min(self.kept, default=self.seq + 1) - 1
        self.box.renumber()
        self.kept = {seq - shift: each for seq, each in self.kept.items()}
        self.seq -= shift

    @rule(data=st.data(), max_events=st.integers(1, 8), max_bytes=st.integers(0, 100))
    def read(self, data, max_events, max_bytes):
        start = data.draw(st.integers(1, self.seq + 1))
        expected, size = [], 5
        while isinstance(event := self.kept.get(start + len(expected)), bytes):
            size += len(event)
            if len(expected) == max_events or size > max_bytes:
                break
            expected.append(event)
        body, n = self.box.build_batch(start, max_events, max_bytes)
        assert n == len(expected)
        if n:
            assert body == b"\xdd" + n.to_bytes(4, "big") + b"".join(expected)
        else:
            assert body == b""

    @invariant()
    def every_number_is_an_event_or_in_one_gap(self):
        for seq, each in self.kept.items():
            gap = self.box.gap_at(seq)
            if isinstance(each, bytes):
                assert gap is None
            else:
                assert gap is not None and gap[0] == seq
                assert all(isinstance(self.kept[other], int) for other in range(seq, gap[1] + 1))

    @invariant()
    def the_books_close(self):
        published, waiting, acked, dropped = self.box.books()
        assert published == self.published
        assert waiting == sum(isinstance(each, bytes) for each in self.kept.values())
        assert sum(dropped.values()) == self.dropped
        assert published == waiting + acked + sum(dropped.values())
        assert self.box.next_seq == self.seq + 1
        assert self.box.first_pending == min(self.kept, default=self.seq + 1)


OutboxModel.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
test_the_outbox_behaves_like_a_list = OutboxModel.TestCase


def test_drops_at_one_place_share_one_range_until_acknowledged():
    box = Outbox(4, 100)
    box.append(b"a")
    for _ in range(3):
        box.drop(1)
    box.drop(2)
    assert box.gap_at(2) == (2, 4, 1)
    assert box.gap_at(5) == (5, 5, 2)
    box.ack(3)
    assert box.gap_at(4) == (4, 4, 1)


def test_abandoned_events_are_counted_at_exit():
    box = Outbox()
    box.append(b"a")
    box.drop(1)
    box.abandon()
    assert box.books() == (2, 0, 0, {"client.encode": 1, "client.exit_abandoned": 1})


def test_the_largest_event_fits_one_frame():
    box = Outbox(4, 1 << 20)
    box.append(bytes(MAX_EVENT))
    body, n = box.build_batch(1, 10, wire.MAX_FRAME - wire.HEAD.size - wire.S_BATCH.size)
    assert n == 1 and len(body) + wire.HEAD.size + wire.S_BATCH.size == wire.MAX_FRAME


@pytest.mark.parametrize("args", [(0, 1), (1, 0), (1, 1, 0)])
def test_an_outbox_without_room_is_refused(args):
    with pytest.raises(ValueError):
        Outbox(*args)


def test_an_object_that_only_pretends_to_be_a_scalar_is_refused():
    class Pretender:
        def item(self):
            return self

    with pytest.raises(TypeError):
        enc_hook(Pretender())


TEXT = st.one_of(st.text(max_size=40), st.sampled_from([0, 31, 32, 255, 256, 65535, 65536]).map("é".__mul__))


@given(
    event_type=st.text(min_size=1, max_size=100),
    source=TEXT,
    data=st.dictionaries(TEXT, st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT | st.lists(TEXT)),
    timestamp=st.floats(),
    texts=st.fixed_dictionaries(
        {},
        optional={
            "correlation_id": TEXT,
            "user_id": TEXT,
            "session_id": TEXT,
            "event_id": TEXT,
            "causation_id": TEXT,
            "priority": st.sampled_from(PRIORITIES),
        },
    ),
)
def test_an_event_is_written_like_its_envelope_as_a_whole(event_type, source, data, timestamp, texts):
    box, emitter = Outbox(capacity_bytes=1 << 22), Emitter()
    emitter._setup(source, box)
    envelope = Wire(event_type=event_type, timestamp=timestamp, source=source[:100], data=data, **texts)
    expected = msgspec.msgpack.encode(envelope)
    kept = emitter.publish(event_type, data, timestamp=timestamp, source=source, **texts)
    assert kept == (len(expected) <= MAX_EVENT)
    if kept:
        assert box.build_batch(1, 1, wire.MAX_FRAME) == (b"\xdd\0\0\0\1" + expected, 1)


@pytest.mark.parametrize("field", ["correlation_id", "user_id", "session_id", "event_id", "causation_id", "source"])
def test_text_that_is_no_utf_8_is_a_drop_with_its_place(field):
    box, emitter = Outbox(), Emitter()
    emitter._setup("test", box)
    assert not emitter.publish("t", {}, **{field: "\ud800"})
    assert box.books() == (1, 0, 0, {"client.encode": 1})

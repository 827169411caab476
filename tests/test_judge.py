"""The judge: one dead letter for each event that failed, committed with the cursor that covers it."""

from __future__ import annotations

import msgspec

from tapebus._topics import Topics
from tapebus.blocks import BlockView
from tapebus.codec import Codec
from tapebus.events import EventType, Registry
from tapebus.judge import NAME, Judge


class Price(msgspec.Struct, frozen=True):
    value: float


def blocks_of(*values: object) -> tuple[Codec, BlockView]:
    """Events of one type with `values` as prices, as one opened block."""
    from tapebus._ingest import Ingest
    from tapebus._ring import Ring

    codec = Codec(Registry([EventType("price", Price)]), Topics())
    codec.register_topics()
    ring = Ring(codec.topics, 1024)
    producer = ring.producer(b"test".ljust(16, b"\0"), 0, "test", sequenced=False)
    ingest = Ingest(ring, 1)
    events = [{"event_type": "price", "timestamp": 1.0, "source": "t", "data": {"value": each}} for each in values]
    ring.inject(msgspec.msgpack.encode(events), producer)
    ingest.stop()
    ingest.run()
    block, _, _ = ring.pack()
    return codec, BlockView(block.payload, block.first_seq)


def test_dead_letters_travel_with_the_cursor_that_covers_them():
    codec, view = blocks_of(1.0, "x", 2.0, None)
    units = []
    judge = Judge(codec.topics, 0, units.append)
    _, faults = codec.decode(view)
    judge.judge(faults, view, 1, 4)
    judge.close_unit()
    assert [(unit.consumer, unit.cursor) for unit in units] == [(NAME, 4)]
    assert [(letter.bus_seq, letter.reason, letter.event_type) for letter in units[0].dead] == [
        (2, "schema", "price"),
        (4, "schema", "price"),
    ]
    assert judge.faults == {"schema": 2}


def test_what_was_judged_before_a_restart_is_not_judged_again():
    codec, view = blocks_of("x", "y", "z")
    units = []
    judge = Judge(codec.topics, 2, units.append)
    _, faults = codec.decode(view)
    judge.judge(faults, view, 1, 3)
    judge.close_unit()
    assert [letter.bus_seq for letter in units[0].dead] == [3]


def test_a_cursor_without_faults_is_written_when_asked_to():
    codec, view = blocks_of(1.0)
    units = []
    judge = Judge(codec.topics, 0, units.append)
    judge.judge([], view, 1, 1)
    assert judge.unsaved
    judge.close_unit(force=True)
    assert not judge.unsaved
    assert [(unit.cursor, unit.dead) for unit in units] == [(1, [])]

"""The compiled part of decoding: stamping, checks, fan-out and the batch a handler iterates over."""

from __future__ import annotations

import struct

import pytest

from tapebus._decode import Batch, run_checks, split, stamp
from tapebus.blocks import BlockView
from tapebus.events import GenericEvent


def view(*topics: int) -> BlockView:
    n = len(topics)
    columns = struct.pack(f"<{n}I{n}I{n}H", *[0] * (2 * n), *topics)
    return BlockView(struct.pack("<IIQQ", n, 0, 0, 0) + columns + bytes(2 * n), 10)


def event() -> GenericEvent:
    return GenericEvent(timestamp=0.0, source="", event_type="a", data={})


def test_a_stamp_gives_numbers_and_origin_and_refuses_what_is_no_event():
    events, origin = [event(), event()], view(1, 1, 1)
    stamp(events, origin, 1)
    assert [each.bus_seq for each in events] == [11, 12] and events[0].origin is origin
    with pytest.raises(TypeError, match="only events"):
        stamp([{}], origin, 0)


def test_a_check_that_raises_breaks_its_event_only():
    checks = [None, lambda each: 1 / 0, lambda each: "wrong", lambda each: None]
    broken = run_checks([event() for _ in range(5)], view(1, 2, 3, 0, 9), 0, checks)
    assert broken == [(0, "ZeroDivisionError: division by zero"), (1, "wrong")]


def test_events_go_to_the_groups_their_type_names_in_order():
    events = [event(), None, event(), event(), event()]
    groups = split(events, view(1, 1, 2, 3, 0), 0, [(), (0,), (0, 1), ()], 2, lambda name: (1,))
    assert groups == [[events[0], events[2]], [events[2], events[4]]]


def test_a_batch_remembers_how_far_its_handler_came():
    events = [event(), event()]
    stamp(events, view(1, 1), 0)
    batch = Batch(events)
    assert (len(batch), batch[1], batch.first_seq, batch.last_seq) == (2, events[1], 10, 11)
    iterator = iter(batch)
    next(iterator)
    assert batch.position == 1
    assert not batch.exhausted
    assert list(batch) == events and batch.position == 2 and batch.exhausted
    assert batch[0] is events[0] and batch.position == 1 and not batch.exhausted
    assert batch[:1] == events[:1] and batch.position == 2 and batch.exhausted


def test_what_else_looks_at_a_batch_counts_only_until_its_iteration_has_moved_on():
    batch = Batch([event() for _ in range(4)])
    for n, _ in enumerate(batch):
        if n == 1:
            assert batch[0] and batch.position == 1 and next(iter(batch)) and batch.position == 1
        if n == 2:
            assert len(list(batch)) == 4 and batch.position == 4 and batch.exhausted
        if n == 3:
            break
        assert n in (1, 2) or batch.position == n + 1
    assert batch.position == 4 and not batch.exhausted

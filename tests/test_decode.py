"""The compiled part of decoding: stamping, checks, fan-out and the batch a handler iterates over."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapebus._decode import Batch, InOrder, run_checks, split, stamp
from tapebus.blocks import BlockView
from tapebus.errors import PluginError
from tapebus.events import EventType, GenericEvent, Registry


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


class Pair(msgspec.Struct, frozen=True, gc=False):
    low: Any
    high: Any


@given(st.lists(st.tuples(*[st.sampled_from([1.0, 2.0, -0.0, float("nan"), float("inf"), 1, None, "1"])] * 2)))
def test_a_rule_is_not_asked_about_numbers_in_order_and_is_asked_about_everything_else(pairs):
    registry = Registry([EventType("pair", Pair, check=lambda each: "asked", in_order=("low", "high"))])
    made = registry.classes["pair"]
    check = InOrder(registry.types["pair"].check, made, Pair, "low", "high")
    events = [made(timestamp=0.0, source="", data=Pair(low, high)) for low, high in pairs]
    asked = [i for i, _ in run_checks(events, view(*[1] * len(pairs)), 0, [None, check]) or ()]
    floats = [isinstance(low, float) and isinstance(high, float) for low, high in pairs]
    assert asked == [i for i, (low, high) in enumerate(pairs) if not (floats[i] and low <= high)]
    other = GenericEvent(event_type="pair", timestamp=0.0, source="", data={"low": 1.0, "high": 2.0})
    assert run_checks([other], view(1), 0, [None, check]) == [(0, "asked")] and check(other) == "asked"


def test_fields_to_compare_must_exist():
    with pytest.raises(PluginError, match="'pair': in_order names fields"):
        Registry([EventType("pair", Pair, check=lambda each: None, in_order=("low", "top"))])

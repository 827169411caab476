"""Decoding blocks: every path gives the same typed events, and what does not fit is a fault of one event."""

from __future__ import annotations

import json
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from tapebus._scan import scan
from tapebus.blocks import BlockView
from tapebus.codec import Codec
from tapebus.events import EventType, GenericEvent, Registry
from tapebus.store import Block

FIRST = 41
ENCODERS = {"json": lambda value: json.dumps(value).encode(), "msgpack": msgspec.msgpack.encode}


class Tick(Struct, frozen=True):
    symbol: str
    price: float
    size: float | None = None


def check(event):
    return "price must be positive" if event.data.price <= 0 else None


def make(policy="reject") -> Codec:
    aliases = {"instrument": "symbol", "px": "price", "qty": "size"}
    codec = Codec(Registry([EventType("tick", Tick, aliases, check, policy=policy)]))
    codec.register_topics()
    return codec


def event(kind="tick", /, data=None, **envelope):
    return {
        "event_type": kind,
        "timestamp": 5.0,
        "source": "s",
        "data": data or {"symbol": "A", "price": 1},
        **envelope,
    }


def payload(codec: Codec, *raws: bytes) -> bytes:
    found = [scan(codec.topics, raw)[0] for raw in raws]
    numbers = {name: number for number, name in codec.topics.after(0).items()}
    n = len(raws)
    head = struct.pack("<IIQQ", n, 0, 9_000_000, sum(map(len, raws)))
    topics = [numbers[item["topic"]] for item in found]
    columns = struct.pack(f"<{n}I{n}I{n}H", *map(len, raws), *[0] * n, *topics)
    return head + columns + bytes(i["flags"] for i in found) + bytes(i["priority"] for i in found) + b"".join(raws)


def decode(codec: Codec, *raws: bytes):
    return codec.decode(BlockView(payload(codec, *raws), FIRST))


@pytest.mark.parametrize("encoding", ENCODERS)
@pytest.mark.parametrize("spelling", [("symbol", "price", "size"), ("instrument", "px", "qty")])
@pytest.mark.parametrize("count", [1, 3])
def test_every_encoding_and_spelling_gives_the_same_typed_event(encoding, spelling, count):
    raw = ENCODERS[encoding](event(data=dict(zip(spelling, ("A", 2, 3), strict=True)), extra=1))
    events, faults = decode(make(), *[raw] * count)
    assert not faults
    for i, each in enumerate(events):
        assert (each.event_type, each.data, each.timestamp) == ("tick", Tick("A", 2.0, 3.0), 5.0)
        assert (each.bus_seq, each.raw, each.received_at) == (FIRST + i, raw, 9.0)


@pytest.mark.parametrize("encoding", ENCODERS)
@pytest.mark.parametrize("number", [7, "seven"])
def test_what_a_producer_puts_into_the_private_fields_is_overwritten(encoding, number):
    raw = ENCODERS[encoding]({**event(), "@bus_seq": number, "@origin": "me"})
    events, faults = decode(make(), raw, raw)
    assert not faults and [(each.bus_seq, each.raw) for each in events] == [(FIRST, raw), (FIRST + 1, raw)]


@pytest.mark.parametrize("encoding", ENCODERS)
@pytest.mark.parametrize("policy", ["reject", "quarantine", "pass"])
def test_only_the_policy_pass_delivers_an_event_that_breaks_a_rule(encoding, policy):
    good, bad = (ENCODERS[encoding](event(data={"symbol": "A", "price": price})) for price in (1, -1))
    events, [fault] = decode(make(policy), good, bad, good)
    assert [each is not None for each in events] == [True, policy == "pass", True]
    assert (fault.index, fault.reason, fault.detail) == (1, "schema", "price must be positive")
    assert fault.event.data.price == -1


@pytest.mark.parametrize("encoding", ENCODERS)
def test_one_broken_event_costs_no_other(encoding):
    encode = ENCODERS[encoding]
    good, nan = encode(event()), encode(event(data={"symbol": "A", "price": float("nan")}))
    unfit, other = encode(event(data={"symbol": 1})), encode(event("free", data={"x": 1}))
    events, faults = decode(make(), good, unfit, nan, other, good)
    assert [each is not None for each in events] == [True, False, False, True, True]
    assert [(fault.index, fault.reason) for fault in faults] == [(1, "schema"), (2, "nonfinite")]
    assert isinstance(events[3], GenericEvent) and events[3].data == {"x": 1} and events[3].bus_seq == FIRST + 3


@given(st.lists(st.sampled_from(["good", "bad", "other spelling", "json"]), max_size=40))
def test_what_does_not_fit_is_found_wherever_it_stands_in_its_run(kinds):
    raws = {
        "good": ENCODERS["msgpack"](event()),
        "bad": ENCODERS["msgpack"](event(data={"symbol": "A", "price": "none"})),
        "other spelling": ENCODERS["msgpack"](event(data={"instrument": "A", "px": 1})),
        "json": ENCODERS["json"](event()),
    }
    events, faults = decode(make(), *[raws[kind] for kind in kinds])
    assert [fault.index for fault in faults] == [i for i, kind in enumerate(kinds) if kind == "bad"]
    assert [each and each.bus_seq for each in events] == [
        None if kind == "bad" else FIRST + i for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("timestamp", "why"),
    [(None, "timestamp is missing"), ("soon", "timestamp 'soon' is neither Unix seconds nor ISO 8601")],
)
def test_a_time_that_is_none_is_named(timestamp, why):
    codec = Codec(Registry([EventType("tick", Tick, prepare=dict)]))
    codec.register_topics()
    events, [fault] = decode(codec, ENCODERS["json"](event(timestamp=timestamp)))
    assert events == [None] and why in fault.detail


@pytest.mark.parametrize("encoding", ENCODERS)
def test_a_reader_gets_what_does_not_fit_as_a_generic_event(encoding):
    encode, codec = ENCODERS[encoding], make()
    raws = encode(event()), encode(event(data={"price": "?"}, timestamp="12")), encode(event("free", data={"x": 1}))
    block = Block(FIRST, 3, 0, 0, 0, 0, 0, payload(codec, *raws))
    topics = codec.topics.after(0)
    found = make().decode_block(block, topics)
    assert [type(each).__name__ for each in found] == ["Tick", "GenericEvent", "GenericEvent"]
    assert (found[1].event_type, found[1].data, found[1].timestamp) == ("tick", {"price": "?"}, 12.0)
    assert [each.raw for each in found] == list(raws)
    assert [each.bus_seq for each in make().decode_block(block, topics, FIRST, {2})] == [FIRST + 2]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("wanted", [None, {1}, {2}, {1, 2}, set()])
@pytest.mark.parametrize("among", [None, [0, 3, 70, 71, 300, 399, 5000], []])
@pytest.mark.parametrize(("after", "until"), [(0, 10**6), (FIRST + 60, FIRST + 330), (FIRST + 400, 10**6)])
def test_a_choice_of_events_is_the_same_as_all_of_them_chosen_from(reverse, wanted, among, after, until):
    codec, raws = make(), []
    for i in range(400):
        odd = {"data": {"price": "?"}} if i % 37 == 0 else {}
        made = event("free" if i % 7 == 3 else "tick", **odd, user_id=str(i))
        raws.append(ENCODERS["json" if i % 5 else "msgpack"](made))
    block = Block(FIRST, len(raws), 0, 0, 0, 0, 0, payload(codec, *raws))
    topics = codec.topics.after(0)
    numbers = {"tick": 1, "free": 2}
    every = make().decode_block(block, topics)
    assert [(each.bus_seq, each.raw) for each in every] == [(FIRST + i, raw) for i, raw in enumerate(raws)]
    expected = [
        each
        for each in every
        if after < each.bus_seq <= until
        and (wanted is None or numbers[each.event_type] in wanted)
        and (among is None or each.bus_seq - FIRST in among)
    ]
    found = list(make().events(block, topics, after, until, wanted, among, reverse))
    assert [(each.bus_seq, each.raw, each.received_at, each.data) for each in found] == [
        (each.bus_seq, each.raw, each.received_at, each.data) for each in (expected[::-1] if reverse else expected)
    ]

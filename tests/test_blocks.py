"""Blocks and correlation runs against lists, and the checksum against published values."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapebus._blocks import _crc32c_soft
from tapebus.blocks import BlockView, crc32c, find_corr, merge_payloads, merge_runs, sort_run, topic_counts
from tapebus.errors import CorruptError

EVENT = st.tuples(
    st.binary(max_size=9), st.integers(0, 10**6), st.integers(0, 9), st.integers(0, 31), st.integers(0, 3)
)
ENTRIES = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 1000)), max_size=20)


def pack(events, base=0) -> bytes:
    """The documented layout, written down independently."""
    raw, wait, topic, flags, priority = zip(*events, strict=True) if events else ((),) * 5
    n = len(events)
    head = struct.pack("<IIQQ", n, 0, base, sum(map(len, raw)))
    columns = struct.pack(f"<{n}I{n}I{n}H", *map(len, raw), *wait, *topic)
    return head + columns + bytes(flags) + bytes(priority) + b"".join(raw)


def run(entries) -> bytes:
    return b"".join(struct.pack("<II", *each) for each in entries)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_the_checksum_is_the_castagnoli_crc_of_rfc_3720(data, expected):
    assert crc32c(data) == _crc32c_soft(data) == expected


@given(st.binary(max_size=100), st.integers(0, 100))
def test_the_table_agrees_with_the_processor_and_pieces_with_the_whole(data, cut):
    assert crc32c(data) == _crc32c_soft(data) == crc32c(data[cut:], crc32c(data[:cut]))


@given(st.lists(EVENT, max_size=12), st.integers(1, 2**40), st.integers(0, 2**50))
def test_a_view_returns_what_was_packed(events, first, base):
    view = BlockView(pack(events, base), first)
    received = base
    for i, (raw, wait, topic, flags, priority) in enumerate(events):
        received += wait if i else 0
        seq = first + i
        assert (view.raw(seq), view.topic(seq), view.flags(seq), view.priority(seq)) == (raw, topic, flags, priority)
        assert view.received_at(seq) == received / 1e6
    assert view.urgent() == [first + i for i, each in enumerate(events) if each[4] > 1]
    for outside in (first - 1, first + len(events)):
        with pytest.raises(IndexError):
            view.raw(outside)


@given(st.lists(st.lists(EVENT, min_size=1, max_size=5), min_size=1, max_size=4))
def test_merged_payloads_hold_the_events_of_all_in_order(parts):
    merged = merge_payloads([pack(each, 10**9 * i) for i, each in enumerate(parts)])
    view, everything = BlockView(merged, 1), [each for part in parts for each in part]
    assert [view.raw(i + 1) for i in range(view.count)] == [each[0] for each in everything]
    counts = topic_counts(merged)
    assert counts == {t: [e[2] for e in everything].count(t) for t in counts} and sum(counts.values()) == view.count
    starts = [sum(map(len, parts[:i])) + 1 for i in range(len(parts))]
    assert [view.received_at(start) for start in starts] == [1000.0 * i for i in range(len(parts))]


@given(st.lists(st.tuples(ENTRIES, st.integers(0, 1000)), max_size=4), st.integers(0, 6))
def test_a_merged_run_finds_every_entry_of_a_correlation(runs, wanted):
    merged = merge_runs([(sort_run(run(entries)), delta) for entries, delta in runs])
    expected = sorted(offset + delta for entries, delta in runs for key, offset in entries if key == wanted)
    assert find_corr(merged, wanted) == expected


@given(st.lists(EVENT, min_size=1, max_size=5), st.data())
def test_a_shortened_or_inconsistent_payload_is_reported_as_corrupt(events, data):
    payload = pack(events)
    with pytest.raises(CorruptError):
        BlockView(payload[: data.draw(st.integers(0, len(payload) - 1))], 1)
    with pytest.raises(CorruptError):
        BlockView(struct.pack("<I", len(events) + 10**8) + payload[4:], 1)
    with pytest.raises(CorruptError):
        BlockView(payload + b"x", 1)


@given(st.lists(EVENT, max_size=12), st.integers(0, 14), st.integers(0, 14), st.data())
def test_places_and_what_is_taken_of_them_are_those_of_a_list(events, start, stop, data):
    view = BlockView(pack(events, 5), 100)
    topics = data.draw(st.none() | st.sets(st.integers(0, 9)))
    among = data.draw(st.none() | st.sets(st.integers(0, 14)).map(sorted))
    places = view.places(start, stop, topics, among)
    assert places == [
        i
        for i, each in enumerate(events)
        if start <= i < stop and (topics is None or each[2] in topics) and (among is None or i in among)
    ]
    part = view.take(places)
    assert (part.count, part.first_seq) == (len(places), 100)
    for i, place in enumerate(places):
        found = part.raw(100 + i), part.topic(100 + i), part.flags(100 + i), part.priority(100 + i)
        assert found == (events[place][0], *events[place][2:])
    with pytest.raises(IndexError):
        view.take([len(events)])
    part.spread(view, places)
    for place in range(len(events) + 1):
        seq = 100 + place
        if place in places:
            found = part.raw(seq), part.topic(seq), part.flags(seq), part.priority(seq), part.received_at(seq)
            assert found == (events[place][0], *events[place][2:], view.received_at(seq))
        else:
            with pytest.raises(IndexError):
                part.raw(seq)

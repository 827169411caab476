"""Stored runs of the correlation index: answers against a list, and no flipped bit that changes one."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapebus.blocks import merge_runs, sort_run
from tapebus.errors import CorruptError
from tapebus_store import runs
from tapebus_store.layout import seq_key

ENTRIES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1000)), max_size=40)
KEY = seq_key(77)


def run(entries) -> bytes:
    return sort_run(b"".join(struct.pack("<II", *each) for each in entries))


@contextmanager
def segments_of(entries: int) -> Iterator[None]:
    before, runs.SEGMENT = runs.SEGMENT, entries
    try:
        yield
    finally:
        runs.SEGMENT = before


@given(ENTRIES, st.sampled_from([0, 1, 2]), st.integers(1, 9))
def test_a_stored_run_finds_what_a_list_finds(entries, level, segment):
    with segments_of(segment):
        value = runs.encode(KEY, run(entries), level)
        assert runs.level_of(value) == level
        assert bytes(runs.entries_of(KEY, value)) == run(entries)
        for wanted in range(11):
            assert runs.find(KEY, value, wanted) == sorted(offset for key, offset in entries if key == wanted)


@given(st.lists(st.tuples(ENTRIES, st.sampled_from([0, 1, 2])), min_size=1, max_size=4), st.integers(1, 5))
def test_runs_of_either_form_merge_into_one_that_finds_everything(stored, segment):
    with segments_of(segment):
        values = [runs.encode(seq_key(77 + 2000 * i), run(each), level) for i, (each, level) in enumerate(stored)]
        taken = [(bytes(runs.entries_of(seq_key(77 + 2000 * i), value)), 2000 * i) for i, value in enumerate(values)]
        merged = runs.encode(KEY, merge_runs(taken), 2)
        for wanted in range(11):
            expected = [o + 2000 * i for i, (each, _) in enumerate(stored) for key, o in each if key == wanted]
            assert runs.find(KEY, merged, wanted) == sorted(expected)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_no_flipped_bit_of_a_run_changes_an_answer(level):
    draw = random.Random(level)
    entries = [(draw.randrange(8), draw.randrange(1000)) for _ in range(30)]
    span = runs.Span(77, 176, 0b110, 1.0, 2.0) if level else None
    with segments_of(4):
        value = runs.encode(KEY, run(entries), level, span)
        expected = {wanted: sorted(o for key, o in entries if key == wanted) for wanted in range(9)}
        answered = 0
        for bit in range(8 * len(value)):
            damaged = bytearray(value)
            damaged[bit // 8] ^= 1 << bit % 8
            # the level of a plain run is not covered by its checksum, and decides over no answer
            if bit >= 8 or level:
                with pytest.raises(CorruptError, match="from bus_seq 77 does not match"):
                    runs.entries_of(KEY, bytes(damaged))
            for wanted, right in expected.items():
                try:
                    assert runs.find(KEY, bytes(damaged), wanted) == right
                    answered += 1
                except CorruptError:
                    pass
            try:
                # one that passes for a plain run says nothing of its blocks
                found = runs.span_of(KEY, bytes(damaged))
                assert found is None if runs.is_plain(damaged) else found == span
            except CorruptError:
                pass
        # a look-up reads some segments of many, so most damage is none of its business
        assert answered > (level > 0) * 8 * 8 * len(entries) * len(expected) // 2
        for wrong in (value[:-1], value + b"\0", value[:20], value[:1], b""):
            with pytest.raises(CorruptError):
                runs.entries_of(KEY, wrong)
            with pytest.raises(CorruptError):
                runs.find(KEY, wrong, 3)
        with pytest.raises(CorruptError):
            runs.find(seq_key(78), value, 3)


def test_spans_join_only_where_they_leave_no_gap():
    a, b, c = runs.Span(1, 4, 0b10, 5.0, 6.0), runs.Span(5, 9, 0b100, 1.0, 5.5), runs.Span(11, 12, 1, 0.0, 0.0)
    assert runs.join([a, b]) == runs.Span(1, 9, 0b110, 1.0, 6.0)
    assert runs.join([a]) == a
    assert runs.join([a, None]) is runs.join([a, b, c]) is runs.join([]) is None
    values = [(seq_key(each.first), runs.encode(seq_key(each.first), b"", 1, each)) for each in (a, b)]
    assert runs.merge_spans(values) == runs.Span(1, 9, 0b110, 1.0, 6.0)
    assert runs.merge_spans([*values, (seq_key(10), runs.encode(seq_key(10), b"", 0))]) is None

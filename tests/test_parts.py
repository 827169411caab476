"""Sealed payloads in parts: whole or in excerpts the same as before, and no flipped bit that changes an event."""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tapebus.blocks import BlockView, join_payload, split_payload, topics_at
from tapebus.errors import CorruptError
from tapebus.store import Block
from tapebus_store import layout, parts

sys.path.insert(0, str(Path(__file__).parent))
from store_support import payload

EVENTS = st.lists(st.tuples(st.binary(max_size=30), st.integers(0, 7)), min_size=1, max_size=30)
COMPRESS, EXPAND = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()


def sealed(raws: list[bytes], topics: list[int], first: int = 500) -> bytes:
    mask = sum({1 << each % 64 for each in topics})
    block = Block(first, len(raws), 1.0, 2.0, 3.0, 4.0, mask, payload(raws, topics))
    return layout.encode_block(block, COMPRESS, layout.SEALED)


def events(block: Block) -> list[tuple[bytes, int, float]]:
    view = BlockView(block.payload, block.first_seq)
    seqs = range(block.first_seq, block.last_seq + 1)
    return [(view.raw(seq), view.topic(seq), view.received_at(seq)) for seq in seqs]


@given(EVENTS, st.sampled_from([0, 20, 60, 10_000]))
def test_what_is_split_joins_to_the_same_payload(made, least):
    raws, topics = map(list, zip(*made, strict=True))
    whole = payload(raws, topics)
    columns, pieces = split_payload(whole, least, 1 << 17)
    assert join_payload(columns, len(raws), pieces, 1 << 17) == whole
    sizes = {topic: sum(len(raw) for raw, each in made if each == topic) for topic in topics}
    assert set(pieces) - {1 << 17} == {topic for topic, size in sizes.items() if size >= least}
    for offset, topic in enumerate(topics):
        assert topics_at(columns, len(raws), [offset, 99]) == {topic}


@given(EVENTS, st.data())
def test_pieces_that_do_not_fit_are_refused(made, data):
    raws, topics = map(list, zip(*made, strict=True))
    columns, pieces = split_payload(payload(raws, topics), 0, 1 << 17)
    kind = data.draw(st.sampled_from(sorted(pieces)))
    for wrong in ({**pieces, kind: pieces[kind] + b"x"}, {k: v for k, v in pieces.items() if k != kind}):
        with pytest.raises(ValueError, match="piece"):
            join_payload(columns, len(raws), wrong, 1 << 17)
    with pytest.raises(ValueError, match="columns"):
        join_payload(columns[:-1], len(raws), pieces, 1 << 17)


@pytest.fixture(scope="module")
def stored() -> bytes:
    """A sealed block of 60 events: two types with a part of their own, two that share one."""
    draw = random.Random(3)
    topics = [draw.choice((1, 1, 1, 2, 2, 3, 9)) for _ in range(60)]
    raws = [bytes(draw.choices(b"abc", k=200 if topic < 3 else 60)) for topic in topics]
    return sealed(raws, topics)


def read(value: bytes, topics=None, offsets=None) -> Block:
    header = layout.decode_header(layout.seq_key(500), value)
    return layout.decode_block(header, layout.excerpt(header, value, topics), EXPAND, offsets)


def test_an_excerpt_holds_the_wanted_types_and_the_columns_of_all(stored):
    header = layout.decode_header(layout.seq_key(500), stored)
    assert header.codec == layout.PARTS
    whole = events(read(stored))
    assert len(whole) == 60 and all(raw for raw, _, _ in whole)
    for wanted, there in (({1}, {1}), ({2}, {2}), ({3}, {3, 9}), ({1, 9}, {1, 3, 9}), ({5}, {3, 9})):
        expected = [(raw if topic in there else b"", topic, at) for raw, topic, at in whole]
        assert events(read(stored, frozenset(wanted))) == expected
        offsets = [i for i, each in enumerate(whole) if each[1] in wanted]
        if offsets:
            assert events(read(stored, offsets=offsets)) == expected
    assert layout.excerpt(header, stored, frozenset({3})).size < layout.excerpt(header, stored).size / 2


def test_no_flipped_bit_of_a_sealed_block_changes_an_event(stored):
    ways = [{}, {"topics": frozenset({1})}, {"topics": frozenset({9})}, {"offsets": [0, 7, 30]}]
    right = [read(stored, **way) for way in ways]
    answered = 0
    for bit in range(8 * len(stored)):
        damaged = bytearray(stored)
        damaged[bit // 8] ^= 1 << bit % 8
        for way, expected in zip(ways, right, strict=True):
            try:
                assert read(bytes(damaged), **way) == expected
                assert way
                answered += 1
            except CorruptError as error:
                assert "500" in str(error)
        with pytest.raises(CorruptError):
            layout.check_payload(layout.decode_header(layout.seq_key(500), bytes(damaged)), bytes(damaged))
    assert answered > 8 * len(stored)


def test_the_end_of_a_stored_block_is_found_in_front_of_anything(stored):
    assert layout.trim_block(stored + b"what follows" * 50) == stored
    assert layout.trim_block(stored[:-1]) is None
    damaged = stored[:-1] + bytes([stored[-1] ^ 1])
    assert layout.trim_block(damaged + bytes(99)) is None


def test_small_blocks_and_unsealed_ones_are_stored_in_one_piece():
    small = sealed([b"abc"] * 20, [1, 2] * 10)
    assert layout.decode_header(layout.seq_key(500), small).codec != layout.PARTS
    block = Block(500, 40, 1.0, 2.0, 3.0, 4.0, 2, payload([bytes(200)] * 40, [1] * 40))
    hot = layout.encode_block(block, COMPRESS)
    header = layout.decode_header(layout.seq_key(500), hot)
    assert header.codec == layout.ZSTD
    assert layout.decode_block(header, layout.excerpt(header, hot, frozenset({7})), EXPAND) == replace(block, corr=b"")


def test_a_block_in_parts_of_a_table_that_is_cut_short_is_refused(stored):
    header = layout.decode_header(layout.seq_key(500), stored)
    for length in (0, 3, 20):
        with pytest.raises(CorruptError):
            layout.excerpt(header, stored[: layout.HEADER_SIZE + length])
    assert parts.read_table(memoryview(struct.pack("<I", 1 << 31)), 0) is None

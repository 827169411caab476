"""How the correlation index looks on disk: sorted runs of hashes, each with what a reader must know of its blocks.

A run of form 1 begins with a head: what its blocks hold (a `Span`), and a table with the first hash and the checksum of
each segment of its entries. The head has a checksum of its own, so a look-up verifies the head and the segments it
reads, and nothing else. Runs of form 0, one for each commit, are short and have one checksum over everything; tapes of
store version 1 have longer ones.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from tapebus.blocks import crc32c, find_corr, find_segmented, segment_table
from tapebus.errors import CorruptError
from tapebus.store import Block
from tapebus_store.layout import Header, key_seq

#: level (0: one commit, 1: one sealed block, 2: many), form, CRC of what `_guarded` says
_RUN = struct.Struct("<BBxxI")
#: what follows in form 1: last_seq, topics bitmap, min/max event time, number of entries; then the table
_SPAN = struct.Struct("<QQddI")
HEAD = _RUN.size + _SPAN.size
PLAIN_HEAD = _RUN.size
PLAIN, SEGMENTED = 0, 1
#: Entries of one segment: 1 KiB, and one table entry of 8 bytes for each.
SEGMENT = 128
ENTRY = 8


class Span(NamedTuple):
    """The blocks a run stands for: all events from `first` to `last`, their types and event times."""

    first: int
    last: int
    topics: int
    min_time: float
    max_time: float


def span_of_block(block: Block | Header) -> Span:
    return Span(block.first_seq, block.last_seq, block.topics, block.min_time, block.max_time)


def join(spans: Sequence[Span | None]) -> Span | None:
    """One span of all, in order; None where they leave a gap or one is not known."""
    known = [each for each in spans if each is not None]
    if not known or len(known) < len(spans):
        return None
    if any(after.first != before.last + 1 for before, after in pairwise(known)):
        return None
    topics = 0
    for each in known:
        topics |= each.topics
    low, high = min(each.min_time for each in known), max(each.max_time for each in known)
    return Span(known[0].first, known[-1].last, topics, low, high)


def encode(key: bytes, run: bytes, level: int, span: Span | None = None) -> bytes:
    """The stored form of a sorted run of correlation entries. Without `span` nothing is known of its blocks."""
    if level == 0:
        return _RUN.pack(level, PLAIN, crc32c(run, crc32c(key))) + run
    known = span or Span(0, 0, (1 << 64) - 1, -math.inf, math.inf)
    rest = _SPAN.pack(*known[1:], len(run) // ENTRY) + segment_table(run, SEGMENT)
    return b"".join((_RUN.pack(level, SEGMENTED, _guarded(key, level, rest)), rest, run))


def _guarded(key: bytes, level: int, rest: bytes | memoryview) -> int:
    return crc32c(rest, crc32c(key + bytes((level, SEGMENTED))))


def level_of(value: bytes | memoryview) -> int:
    return value[0]


def is_plain(value: bytes | memoryview) -> bool:
    """Whether a run has one checksum over all of it."""
    return len(value) > 1 and value[1] == PLAIN


def mark_of(value: bytes | memoryview) -> int:
    """The checksum stored with a run: what tells one content of a key from another."""
    return int(_RUN.unpack_from(value)[2])


def _damaged(key: bytes) -> CorruptError:
    return CorruptError(f"tape: the correlation index from bus_seq {key_seq(key)} does not match its checksum")


def _head(key: bytes, value: bytes | memoryview) -> tuple[Span | None, int]:
    """The span of a run of form 1 and where its entries begin, verified. Raises `CorruptError`."""
    if len(value) < HEAD:
        raise _damaged(key)
    level, form, crc = _RUN.unpack_from(value)
    last, topics, low, high, entries = _SPAN.unpack_from(value, _RUN.size)
    begin = HEAD + ENTRY * -(-entries // SEGMENT)
    if (
        form != SEGMENTED
        or value[2] | value[3]
        or len(value) != begin + ENTRY * entries
        or crc != _guarded(key, level, value[_RUN.size : begin])
    ):
        raise _damaged(key)
    return (Span(key_seq(key), last, topics, low, high) if last else None), begin


def span_of(key: bytes, value: bytes | memoryview) -> Span | None:
    """What a run says of its blocks, verified; None where it does not know. Raises `CorruptError`."""
    return None if is_plain(value) else _head(key, value)[0]


def find(key: bytes, value: bytes | memoryview, wanted: int) -> list[int]:
    """Offsets of the entries with hash `wanted`, ascending; what is read is verified first. Raises `CorruptError`."""
    if is_plain(value):
        return find_corr(entries_of(key, value), wanted)
    _, begin = _head(key, value)
    view = memoryview(value)
    found = find_segmented(view[begin:], view[HEAD:begin], SEGMENT, wanted)
    if found is None:
        raise _damaged(key)
    return found


def entries_of(key: bytes, value: bytes | memoryview) -> memoryview:
    """All entries of a run, verified and not copied. Raises `CorruptError`."""
    view = memoryview(value)
    if is_plain(value):
        run = view[PLAIN_HEAD:]
        if len(value) < _RUN.size or value[2] | value[3] or mark_of(value) != crc32c(run, crc32c(key)):
            raise _damaged(key)
        return run
    _, begin = _head(key, value)
    if segment_table(bytes(view[begin:]), SEGMENT) != bytes(view[HEAD:begin]):
        raise _damaged(key)
    return view[begin:]


def merge_spans(found: Iterable[tuple[bytes, bytes | memoryview]]) -> Span | None:
    """The span of the stored runs `found`, which follow each other."""
    return join([span_of(key, value) for key, value in found])

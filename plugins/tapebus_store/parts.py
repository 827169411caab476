"""How a sealed payload is stored in parts: its columns, then the bytes of its events type by type.

The table of the parts comes first and is covered by the checksum in the block's header; it holds the checksum of each
part. So a reader unpacks, and verifies, the columns and the parts with types it wants.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import zstandard

from tapebus.blocks import crc32c, join_payload, split_payload, topics_at
from tapebus.errors import CorruptError

_COUNT = struct.Struct("<I")
#: topic id or one of the two below, size unpacked, size stored (the same: not compressed), CRC as stored
_PART = struct.Struct("<IIII")
COLUMNS, OTHERS = 1 << 16, 1 << 17
#: A type with fewer bytes shares a part with others: a frame of its own would cost more.
LEAST = 1024


class Part(NamedTuple):
    """One line of the table, and where the part lies in the stored payload."""

    kind: int
    length: int
    size: int
    crc: int
    at: int

    @property
    def end(self) -> int:
        return self.at + self.size


#: All parts of a table, and the bytes of those that are wanted.
Taken = list[tuple[Part, bytes | None]]


def pack(payload: bytes, compressor: zstandard.ZstdCompressor) -> tuple[bytes, bytes]:
    """The stored form of a payload, and the table in front of it, which the header's checksum is to cover."""
    columns, found = split_payload(payload, LEAST, OTHERS)
    pieces: list[bytes | bytearray | memoryview] = [columns, *found.values()]
    lines, stored = [], []
    # one call: after each the writer would have to wait for the GIL again
    segments = compressor.multi_compress_to_buffer(pieces)
    for i, (kind, data) in enumerate(((COLUMNS, columns), *found.items())):
        packed = segments[i].tobytes() if len(segments[i]) < len(data) else data
        lines.append(_PART.pack(kind, len(data), len(packed), crc32c(packed)))
        stored.append(packed)
    table = _COUNT.pack(len(lines)) + b"".join(lines)
    return b"".join((table, *stored)), table


def read_table(stored: memoryview, crc: int) -> list[Part] | None:
    """The parts of a stored payload; None where the table does not match its checksum."""
    if len(stored) < _COUNT.size:
        return None
    at = _COUNT.size + _PART.size * _COUNT.unpack_from(stored)[0]
    if at > len(stored) or crc32c(stored[:at]) != crc:
        return None
    found = []
    for kind, length, size, part_crc in _PART.iter_unpack(stored[_COUNT.size : at]):
        found.append(Part(kind, length, size, part_crc, at))
        at += size
    return found


def choose(table: list[Part], topics: frozenset[int] | None) -> set[int]:
    """The kinds of the parts needed for the events of `topics`, None for all."""
    kinds = {part.kind for part in table}
    if topics is None:
        return kinds
    chosen = {COLUMNS, *topics} if topics <= kinds else {COLUMNS, OTHERS, *topics}
    return kinds & chosen


def unpack(
    taken: Taken, count: int, decompressor: zstandard.ZstdDecompressor, offsets: list[int] | None = None
) -> bytes:
    """The payload with the events of the parts `taken`; those of others have no bytes.

    With `offsets` only parts with one of these events are unpacked. Raises `CorruptError`, `ValueError` and
    `zstandard.ZstdError` where something does not match.
    """
    columns, found = b"", dict[int, bytes | None]()
    for part, data in taken:
        if part.kind == COLUMNS and data is not None:
            columns = _unpacked(part, data, decompressor)
    chosen = None if offsets is None else frozenset(topics_at(columns, count, offsets))
    kinds = choose([part for part, _ in taken], chosen)
    for part, data in taken:
        if part.kind != COLUMNS:
            wanted = part.kind in kinds and data is not None
            found[part.kind] = _unpacked(part, data, decompressor) if wanted else None  # type: ignore[arg-type]
    return join_payload(columns, count, found, OTHERS)


def is_sound(part: Part, data: bytes) -> bool:
    return len(data) == part.size and crc32c(data) == part.crc


def _unpacked(part: Part, data: bytes, decompressor: zstandard.ZstdDecompressor) -> bytes:
    if not is_sound(part, data):
        raise CorruptError("a part of them is damaged")
    if part.length != part.size:
        data = decompressor.decompress(data, max_output_size=part.length)
    if len(data) != part.length:
        raise CorruptError(f"a part of them has {len(data)} bytes instead of {part.length}")
    return data

"""How records look on disk: the block header, checksummed book values and keys.

Everything read back is checked with CRC32C first, because LMDB itself has no page checksums.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import zstandard

from tapebus.blocks import crc32c
from tapebus.errors import CorruptError
from tapebus.store import Block
from tapebus_store import parts

#: Major versions cannot be read by older code; a minor one can.
MAJOR, MINOR = 2, 0

MAGIC = b"TBLK"
FORMAT = 1
#: How a payload is stored: as it is, in one zstd frame, or in `parts`.
RAW, ZSTD, PARTS = 0, 1, 2
SEALED = 1

#: magic, format, codec, flags, first_seq, count, raw length, min/max event time, min/max receive time,
#: topics bitmap, CRC of the stored payload or of the table of its parts; followed by the CRC of these bytes
_FIELDS = struct.Struct("<4sBBHQIIddddQI")
_CRC = struct.Struct("<I")
HEADER_SIZE = _FIELDS.size + _CRC.size

#: Below this parts cost more than they save, and a block of a commit will not stay: small ones are sealed together.
PARTS_FROM, LARGE = 4096, 128 * 1024
#: Below this the zstd frame costs more than it saves.
COMPRESS_FROM = 400
MAX_KEY = 500

_SEQ = struct.Struct(">Q")
seq_key = _SEQ.pack


def key_seq(key: bytes | memoryview) -> int:
    """The number a `seq_key` was made from."""
    return int.from_bytes(key, "big")


class Header(NamedTuple):
    """The decoded header of a stored block."""

    codec: int
    flags: int
    first_seq: int
    events: int
    raw_length: int
    min_time: float
    max_time: float
    min_received: float
    max_received: float
    topics: int
    payload_crc: int

    @property
    def last_seq(self) -> int:
        return self.first_seq + self.events - 1


class Excerpt(NamedTuple):
    """What was taken of a stored payload: all of it as stored, or some of its parts."""

    whole: bytes
    parts: parts.Taken | None

    @property
    def size(self) -> int:
        return len(self.whole) + sum(len(data or b"") for _, data in self.parts or ())


def encode_block(block: Block, compressor: zstandard.ZstdCompressor, flags: int = 0) -> bytes:
    """The stored form of `block`: header, then the payload, compressed where that makes it smaller.

    One that stays is stored in parts, so that readers need not unpack events of types they do not want.
    """
    payload, codec, covered = block.payload, RAW, b""
    if len(payload) >= (PARTS_FROM if flags & SEALED else LARGE):
        payload, covered = parts.pack(payload, compressor)
        codec = PARTS
    elif len(payload) > COMPRESS_FROM:
        packed = compressor.compress(payload)
        if len(packed) < len(payload):
            payload, codec = packed, ZSTD
    fields = _FIELDS.pack(
        MAGIC,
        FORMAT,
        codec,
        flags,
        block.first_seq,
        block.count,
        len(block.payload),
        block.min_time,
        block.max_time,
        block.min_received,
        block.max_received,
        block.topics,
        crc32c(covered or payload),
    )
    return b"".join((fields, _CRC.pack(crc32c(fields)), payload))


def first_seq(value: bytes) -> int:
    """The ``bus_seq`` a stored block begins with."""
    return int(_FIELDS.unpack_from(value)[4])


def decode_header(key: bytes | memoryview, value: bytes | memoryview) -> Header:
    """The header of the block stored under `key`; copies no payload. Raises `CorruptError`."""
    seq = key_seq(key)
    if len(value) < HEADER_SIZE:
        raise CorruptError(f"tape: the block at bus_seq {seq} is cut short; run `tapebus check`")
    magic, form, *rest = _FIELDS.unpack_from(value)
    if _CRC.unpack_from(value, _FIELDS.size)[0] != crc32c(bytes(value[: _FIELDS.size])):
        raise CorruptError(f"tape: the header of the block at bus_seq {seq} does not match its checksum")
    header = Header(*rest)
    if magic != MAGIC or form != FORMAT or header.first_seq != seq:
        raise CorruptError(f"tape: the record at bus_seq {seq} is not a block of format {FORMAT}")
    return header


def excerpt(header: Header, value: bytes | memoryview, topics: frozenset[int] | None = None) -> Excerpt:
    """A copy of the payload of a stored block, or of those of its parts with events of `topics`. Raises `CorruptError`.

    What is copied is not verified yet, which `decode_block` does.
    """
    stored = memoryview(value)[HEADER_SIZE:]
    if header.codec != PARTS:
        return Excerpt(bytes(stored), None)
    table = parts.read_table(stored, header.payload_crc)
    if table is None:
        raise _mismatch(header)
    kinds = parts.choose(table, topics)
    return Excerpt(b"", [(part, bytes(stored[part.at : part.end]) if part.kind in kinds else None) for part in table])


def decode_block(
    header: Header,
    taken: Excerpt,
    decompressor: zstandard.ZstdDecompressor,
    offsets: list[int] | None = None,
) -> Block:
    """The block of `header` with its payload verified and unpacked, as far as it was `taken`. Raises `CorruptError`.

    With `offsets` the events elsewhere may be without their bytes, as those are whose part was not taken.
    """
    if taken.parts is None:
        payload = _whole(header, taken.whole, decompressor)
    else:
        try:
            payload = parts.unpack(taken.parts, header.events, decompressor, offsets)
        except (ValueError, CorruptError, zstandard.ZstdError) as error:
            raise _mismatch(header, str(error)) from error
    return Block(
        first_seq=header.first_seq,
        count=header.events,
        min_time=header.min_time,
        max_time=header.max_time,
        min_received=header.min_received,
        max_received=header.max_received,
        topics=header.topics,
        payload=payload,
    )


def _whole(header: Header, stored: bytes, decompressor: zstandard.ZstdDecompressor) -> bytes:
    where = f"bus_seq {header.first_seq}..{header.last_seq}"
    if crc32c(stored) != header.payload_crc:
        raise _mismatch(header)
    if header.codec == ZSTD:
        try:
            stored = decompressor.decompress(stored, max_output_size=header.raw_length)
        except zstandard.ZstdError as error:
            raise CorruptError(f"tape: the events at {where} cannot be decompressed: {error}") from error
    elif header.codec != RAW:
        raise CorruptError(f"tape: the events at {where} use the unknown codec {header.codec}")
    if len(stored) != header.raw_length:
        raise CorruptError(f"tape: the events at {where} have {len(stored)} bytes instead of {header.raw_length}")
    return stored


def _mismatch(header: Header, why: str = "") -> CorruptError:
    where = f"bus_seq {header.first_seq}..{header.last_seq}"
    return CorruptError(f"tape: the events at {where} do not match their checksum" + (f": {why}" if why else ""))


def check_payload(header: Header, value: bytes | memoryview) -> None:
    """Compare the payload of a stored block with its checksum. Raises `CorruptError`."""
    taken = excerpt(header, value)
    if taken.parts is None:
        sound = crc32c(taken.whole) == header.payload_crc
    else:
        sound = all(
            data is not None and len(data) == part.size and crc32c(data) == part.crc for part, data in taken.parts
        )
    if not sound:
        raise _mismatch(header)


def trim_block(value: bytes) -> bytes | None:
    """The stored block that `value` begins with, when its end is not known; None where there is none."""
    if value[:4] != MAGIC or len(value) < HEADER_SIZE:
        return None
    try:
        header = decode_header(seq_key(first_seq(value)), value)
        if header.codec == PARTS:
            table = parts.read_table(memoryview(value)[HEADER_SIZE:], header.payload_crc)
            value = value[: HEADER_SIZE + max((part.end for part in table), default=0)] if table else b""
        elif header.codec == ZSTD:
            unpack = zstandard.ZstdDecompressor().decompressobj()
            unpack.decompress(value[HEADER_SIZE:])
            value = value[: len(value) - len(unpack.unused_data)]
        else:
            value = value[: HEADER_SIZE + header.raw_length]
        check_payload(header, value)
    except (CorruptError, zstandard.ZstdError):
        return None
    return value


def guard(key: bytes, value: bytes) -> bytes:
    """`value` with a checksum over it and its key in front."""
    return _CRC.pack(crc32c(value, crc32c(key))) + value


def unguard(database: str, key: bytes, value: bytes) -> bytes:
    """The value inside a `guard`, verified. Raises `CorruptError`."""
    body = value[4:]
    if len(value) < 4 or _CRC.unpack_from(value)[0] != crc32c(body, crc32c(key)):
        raise CorruptError(f"tape: a record of {database!r} (key {key!r}) does not match its checksum")
    return body

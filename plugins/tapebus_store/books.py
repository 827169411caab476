"""The small records next to the blocks: what the tape knows about itself, producers, cursors, state."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from tapebus.errors import CorruptError, StoreError
from tapebus.store import ProducerBook, Unit
from tapebus_store.ages import Ages
from tapebus_store.layout import MAJOR, MAX_KEY, MINOR

VERSION_KEY = b"version"
TAPE_KEY = b"tape"
AGES_KEY = b"ages"
TOPIC_PREFIX = b"topic:"
COUNTER_PREFIX = b"counter:"
HOLE_PREFIX = b"hole:"

#: Databases whose records are kept a second time, in ``mirror``: losing one page loses none of them.
MIRROR = "mirror"
MIRRORED = ("producers", "cursors", "state", "meta")
#: LMDB's own limit.
LONGEST_KEY = 511


class TapeRecord(msgspec.Struct):
    """What must be known at once after opening, whatever the length of the tape; one per commit.

    Bytes are as stored (compressed). Blocks up to ``sealed_to`` are sealed; correlation runs up to
    ``merged_to`` are of level 2, and ``runs`` of level 1 follow them. ``txn`` is the transaction that
    wrote the record: what it must be equal to tells a meta page with a flipped bit from a sound one.
    ``lost`` counts events that were on the tape and could not be recovered.
    """

    last_seq: int = 0
    events: int = 0
    block_bytes: int = 0
    corr_bytes: int = 0
    raw_bytes: int = 0
    hot_blocks: int = 0
    hot_events: int = 0
    hot_raw: int = 0
    sealed_blocks: int = 0
    sealed_to: int = 0
    merged_to: int = 0
    runs: int = 0
    last_dead: int = 0
    dead: int = 0
    newest: float = 0.0
    damaged: int = 0
    txn: int = 0
    lost: int = 0


class Hole(msgspec.Struct, array_like=True):
    """Events that are no longer on the tape although retention did not remove them; ``at`` in Unix seconds."""

    first: int
    last: int
    at: float = 0.0


def encode_version() -> bytes:
    return f"tapebus {MAJOR}.{MINOR}".encode()


def check_version(stored: bytes, where: object) -> None:
    """Raise `StoreError` when a newer major version wrote this tape."""
    try:
        name, number = stored.decode("ascii").split(" ")
        major = int(number.split(".")[0])
        if name != "tapebus":
            raise ValueError(name)
    except ValueError as error:
        raise CorruptError(f"{where}: this is not a tape (version record {stored[:40]!r})") from error
    if major > MAJOR:
        raise StoreError(
            f"{where}: written by store version {number}, this tapebus reads up to {MAJOR}.x: upgrade tapebus"
        )


def is_older(stored: bytes) -> bool:
    """Whether a version that `check_version` has let pass is of an older major one: what is written now is not."""
    return int(stored.split(b" ")[1].split(b".")[0]) < MAJOR


_packer = msgspec.msgpack.Encoder()
encode = _packer.encode
decode_tape = msgspec.msgpack.Decoder(TapeRecord).decode
decode_ages = msgspec.msgpack.Decoder(Ages).decode
decode_producer = msgspec.msgpack.Decoder(ProducerBook).decode


decode_hole = msgspec.msgpack.Decoder(Hole).decode


def hole_key(hole: Hole) -> bytes:
    return HOLE_PREFIX + hole.first.to_bytes(8, "big")


def mirror_key(database: str, key: bytes) -> bytes:
    """The key of a record's second copy, empty where it would be too long for one."""
    name = database.encode() + b"\0" + key
    return name if len(name) <= LONGEST_KEY else b""


def producer_key(book: ProducerBook) -> bytes:
    return book.producer_id + book.epoch.to_bytes(8, "big")


def encode_cursor(unit: Unit) -> bytes:
    return encode((unit.cursor, unit.namespace, unit.ahead))


def decode_cursor(consumer: str, value: bytes) -> Unit:
    cursor, namespace, ahead = msgspec.msgpack.decode(value, type=tuple[int, str, list[int]])
    return Unit(consumer=consumer, cursor=cursor, namespace=namespace, ahead=ahead)


def state_prefix(namespace: str) -> bytes:
    return namespace.encode() + b"\0"


def state_key(namespace: str, key: str) -> bytes:
    """The database key of one state entry; a key too long for LMDB is replaced by a hash of it.

    0xff never starts UTF-8 text, so a hash cannot be taken for a plain key.
    """
    prefix, plain = state_prefix(namespace), key.encode()
    if len(prefix) + len(plain) <= MAX_KEY:
        return prefix + plain
    return prefix + b"\xff" + blake2b(plain, digest_size=24).digest()


def encode_state(key: str, value: bytes) -> bytes:
    plain = key.encode()
    return len(plain).to_bytes(4, "little") + plain + value


def decode_state(value: bytes) -> tuple[str, bytes]:
    end = 4 + int.from_bytes(value[:4], "little")
    return value[4:end].decode(), value[end:]

"""What the tests of the store share: blocks built from their documented layout, stores with small limits."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

import tapebus_store
from tapebus.blocks import BlockView, corr_hash, sort_run
from tapebus.store import Block, Commit

SMALL = {"seal_events": 20, "seal_bytes": 1 << 20, "initial_bytes": 1 << 16}


def payload(events: list[bytes], topics: list[int]) -> bytes:
    """A block payload as the wire documents it: head, five columns, then the raw events."""
    count, data = len(events), b"".join(events)
    return b"".join(
        (
            struct.pack("<IIQQ", count, 0, 1_700_000_000_000_000, len(data)),
            struct.pack(f"<{count}I", *map(len, events)),
            struct.pack(f"<{count}I", *[1] * count),
            struct.pack(f"<{count}H", *topics),
            b"\1" * count,
            b"\1" * count,
            data,
        )
    )


def block(first: int, events: list[tuple[float, int, str | None]], size: int = 40) -> Block:
    """A block from (event time, topic id, correlation id)."""
    times = [each[0] for each in events]
    entries = [
        struct.pack("<II", corr_hash(each[2]), place) for place, each in enumerate(events) if each[2] is not None
    ]
    raws = [f"{first + place}:{each}".encode().ljust(size, b".") for place, each in enumerate(events)]
    return Block(
        first_seq=first,
        count=len(events),
        min_time=min(times),
        max_time=max(times),
        min_received=min(times) + 1,
        max_received=max(times) + 1,
        topics=sum({1 << (each[1] % 64) for each in events}),
        payload=payload(raws, [each[1] for each in events]),
        corr=sort_run(b"".join(entries)) if entries else b"",
    )


def raws(found: Iterator[Block] | list[Block], after: int = 0) -> list[bytes]:
    """The raw events of blocks, each once."""
    out = []
    for each in found:
        view = BlockView(each.payload, each.first_seq)
        for seq in range(max(after + 1, each.first_seq), each.last_seq + 1):
            out.append(view.raw(seq))
            after = seq
    return out


def open_store(path: Path, **config: Any) -> tapebus_store.LmdbStore:
    opened = tapebus_store.tapebus_open_store(path, SMALL | config, False)
    assert isinstance(opened, tapebus_store.LmdbStore)
    return opened


def fill(store: tapebus_store.LmdbStore, blocks: int, per_block: int = 5, size: int = 40) -> list[Block]:
    made = []
    for _ in range(blocks):
        first = store.last_seq() + 1
        events = [(float(seq), 1 + seq % 3, f"c{seq % 7}") for seq in range(first, first + per_block)]
        made.append(block(first, events, size))
        store.commit(Commit(blocks=[made[-1]]))
    return made


def upkeep(store: tapebus_store.LmdbStore, now: float = 1e12) -> int:
    pieces = 1
    while store.maintain(now):
        pieces += 1
        assert pieces < 1000
    return pieces


def block_of(first: int, events: list[tuple[int, dict[str, Any]]]) -> Block:
    """A block of JSON events from (topic id, envelope)."""
    times = [wire["timestamp"] for _, wire in events]
    entries = [
        struct.pack("<II", corr_hash(wire["correlation_id"]), place)
        for place, (_, wire) in enumerate(events)
        if "correlation_id" in wire
    ]
    return Block(
        first_seq=first,
        count=len(events),
        min_time=min(times),
        max_time=max(times),
        min_received=float(first),
        max_received=float(first + len(events)),
        topics=sum({1 << topic % 64 for topic, _ in events}),
        payload=payload([msgspec.json.encode(wire) for _, wire in events], [topic for topic, _ in events]),
        corr=sort_run(b"".join(entries)) if entries else b"",
    )

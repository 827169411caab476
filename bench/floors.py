"""What the parts alone can do with the same events: no bus built of them can be quicker than the slowest it needs.

A floor does one thing that the bus has to do to every event as well, with the same library and the same bytes, and
nothing else. Each counts on a core of its own; the bus does all of it on the machine's cores together, so it stays
below the lowest. The names begin with the way in they belong to:

``publisher-receive``, ``publisher-decode``, ``publisher-commit``, ``publisher-sync``
    What two Publishers send: frames of 100 events through libzmq; one call of msgspec a frame, into the typed classes
    of the schema plugin; the blocks of up to 1 MiB that the tape packs, compressed as it compresses them, each put
    into LMDB in a transaction of its own; and those blocks written to a file, each synced, without LMDB.
``msgpack-receive``, ``msgpack-decode``, ``json-decode``
    One event a frame from plain PUSH sockets, received; and one call of msgspec an event. The bus gathers such events
    and decodes many in a call, so ``json-decode-batches`` and ``publisher-decode`` bound its decoding; the single calls
    are what a consumer without that pays.

Compression, scanning, ordering, indexes, accounts, plugins and the live feed are in none of them. What a floor did is
checked after its clock has stopped; what is repeated is repeated three times, and the quickest pass counts: a floor is
about what can be.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import zmq
import zstandard
from bench.load import DISTINCT, envelope, laps, mix
from bench.peers.peer import PATIENCE_S, Ledger, Wrong, union
from bench.peers.processes import BATCH, Producers, directory, frames_of
from bench.peers.zeromq import pulling

from tapebus._ingest import Ingest
from tapebus._ring import Ring
from tapebus._topics import Topics
from tapebus.store import Block
from tapebus.tapewriter import MAX_BLOCK_BYTES, MAX_BLOCK_EVENTS
from tapebus_store import layout

PASSES = 3
MAP_BYTES = 8 << 30


def _encoded(count: int, encode: Callable[[Any], bytes]) -> list[bytes]:
    return [encode(envelope(event)) for event in laps(mix(1, min(count, DISTINCT)), count)]


def _json(event: Any) -> bytes:
    return json.dumps(event).encode()


def _quickest(passes: Callable[[], float]) -> float:
    return min(passes() for _ in range(PASSES))


# -- decode -----------------------------------------------------------------------------------------------------------


def _decode(as_json: bool, batch: int, count: int) -> dict[str, Any]:
    """Calls of one msgspec decoder with `batch` events each."""
    events = _encoded(count, _json if as_json else msgspec.msgpack.encode)
    kind: Any = msgspec.json if as_json else msgspec.msgpack
    if batch == 1:
        decode, buffers = kind.Decoder(union()).decode, events
    else:
        decode, buffers = kind.Decoder(list[union()]).decode, [_array(part, as_json) for part in _parts(events, batch)]
    sizes: list[int] = []

    def once() -> float:
        nonlocal sizes
        begun = time.perf_counter()
        if batch == 1:
            for buffer in buffers:
                decode(buffer)
        else:
            sizes = [len(decode(buffer)) for buffer in buffers]
        return time.perf_counter() - begun

    seconds = _quickest(once)
    if batch > 1 and sum(sizes) != count:
        raise Wrong(f"{sum(sizes)} of {count} events were decoded")
    return {"events_per_s": count / seconds, "bytes_per_event": sum(map(len, buffers)) / count}


def _parts(events: list[bytes], size: int) -> Iterator[list[bytes]]:
    for at in range(0, len(events), size):
        yield events[at : at + size]


def _array(events: list[bytes], as_json: bool) -> bytes:
    if as_json:
        return b"[" + b",".join(events) + b"]"
    return b"\xdc" + len(events).to_bytes(2, "big") + b"".join(events)


# -- receive ----------------------------------------------------------------------------------------------------------


def _receive(kind: str, batch: int, count: int) -> dict[str, Any]:
    """pyzmq's ``recv`` in a loop, from two producers over a Unix socket. What it costs beyond libzmq is paid once a
    frame; with one event a frame the producers, in Python too, are about as quick."""
    ledger = Ledger()
    with pulling() as (socket, endpoint), Producers(kind, endpoint, count) as producers:
        producers.go()
        socket.poll(PATIENCE_S * 1e3)
        ledger.start()
        receive, done = socket.recv, ledger.handled.append
        with suppress(zmq.Again):
            for _ in range(frames_of(count, batch)):
                done(receive())
        ledger.stop()
        if batch > 1:
            ledger.unpack()
        return {"events_per_s": ledger.result(producers.sent())["events_per_s"]}


# -- disk -------------------------------------------------------------------------------------------------------------


def _packed(events: list[bytes]) -> list[Block]:
    """The blocks that the bus makes of `events`, by its own ring and ingest, full ones but the last."""
    ring = Ring(Topics())
    producer = ring.producer(b"floor".ljust(16), 0, "floor", sequenced=False)
    ingest = Ingest(ring, 1)
    thread = threading.Thread(target=ingest.run, daemon=True)
    thread.start()
    blocks: list[Block] = []
    done = 0
    try:
        for part in _parts(events, BATCH):
            ring.inject(_array(part, False), producer)
        while done < len(events):
            if not ring.wait(round(PATIENCE_S * 1e3)):
                raise Wrong(f"{done} of {len(events)} events were packed")
            if ring.fill[1] < MAX_BLOCK_BYTES and ring.received_count < len(events):
                time.sleep(0.001)
                continue
            packed = ring.pack(MAX_BLOCK_BYTES, MAX_BLOCK_EVENTS)
            if packed is not None and packed[0] is not None:
                blocks.append(packed[0])
                done += packed[0].count
    finally:
        ingest.stop()
        thread.join()
    return blocks


def _blocks(count: int) -> list[tuple[int, bytes]]:
    """The events as stored blocks: first ``bus_seq``, and the block as the tape puts it."""
    compressor = zstandard.ZstdCompressor(level=1)
    blocks = _packed(_encoded(count, msgspec.msgpack.encode))
    return [(block.first_seq, layout.encode_block(block, compressor)) for block in blocks]


def _commit(count: int) -> dict[str, Any]:
    """One transaction a block, with LMDB's default durability: returned means on disk."""
    blocks = _blocks(count)

    def once() -> float:
        with directory() as place, lmdb.open(str(place), map_size=MAP_BYTES, max_dbs=1, readahead=False) as env:
            database = env.open_db(b"blocks")
            begun = time.perf_counter()
            for seq, value in blocks:
                with env.begin(write=True, db=database) as txn:
                    txn.put(layout.seq_key(seq), value, append=True)
            seconds = time.perf_counter() - begun
            with env.begin(db=database) as txn:
                if [bytes(value) for _, value in txn.cursor()] != [value for _, value in blocks]:
                    raise Wrong("LMDB does not hold what was put")
            return seconds

    return _disk(count, blocks, _quickest(once))


def _sync(count: int) -> dict[str, Any]:
    """``write`` and ``fdatasync`` of each block, into a file that grows."""
    blocks = _blocks(count)
    calls: list[float] = []

    def once() -> float:
        with directory() as place:
            file = Path(place) / "blocks"
            fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                begun = before = time.perf_counter()
                for _, value in blocks:
                    os.write(fd, value)
                    os.fdatasync(fd)
                    now = time.perf_counter()
                    calls.append(now - before)
                    before = now
            finally:
                os.close(fd)
            if file.read_bytes() != b"".join(value for _, value in blocks):
                raise Wrong("the file does not hold what was written")
            return before - begun

    found = _disk(count, blocks, _quickest(once))
    calls.sort()
    return found | {f"p{q}_ms": calls[len(calls) * q // 100] * 1e3 for q in (50, 99)}


def _disk(count: int, blocks: list[tuple[int, bytes]], seconds: float) -> dict[str, Any]:
    size = sum(len(value) for _, value in blocks)
    return {
        "events_per_s": count / seconds,
        "mb_per_s": size / seconds / 1e6,
        "bytes_per_event": size / count,
        "commit_ms": seconds / len(blocks) * 1e3,
    }


#: Each takes the number of events; raises `Wrong` when what it did is not what it had to do.
FLOORS: dict[str, Callable[[int], dict[str, Any]]] = {
    "publisher-receive": partial(_receive, "push-batches", BATCH),
    "publisher-decode": partial(_decode, False, BATCH),
    "publisher-commit": _commit,
    "publisher-sync": _sync,
    "msgpack-receive": partial(_receive, "push", 1),
    "msgpack-decode": partial(_decode, False, 1),
    "json-decode": partial(_decode, True, 1),
    "json-decode-batches": partial(_decode, True, BATCH),
}

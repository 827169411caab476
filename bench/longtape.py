"""A long tape of the mix, written through the store's own commits and upkeep, as a bus leaves it behind.

``python -m bench.longtape EVENTS`` builds it once below ``build/bench`` and prints where it is.

Each signal has a chain: ``signal_generated``, then ``fire_command``, ``trade_executed`` and ``signal_outcome`` 50, 300
and 20,000 events later under the same correlation id. Every user action has an id of its own, so one event in ten is in
the index. ``system_health`` stops after the first tenth of the tape.
"""

from __future__ import annotations

import random
import shutil
import struct
import sys
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tapebus._scan import scan
from tapebus._topics import Topics
from tapebus.blocks import corr_hash, sort_run
from tapebus.store import Block, Commit
from tapebus_store import LmdbStore, StoreConfig

try:
    from bench.load import SYMBOLS
except ImportError:  # started as a file
    from load import SYMBOLS  # type: ignore[import-not-found,no-redef]

CACHE = Path(__file__).parents[1] / "build" / "bench"
#: Changes with what is written, so that an older tape is not taken for it.
EDITION = 3
TOPICS = (
    *("market_data", "user_action", "signal_generated", "fire_command", "trade_executed", "signal_outcome"),
    "system_health",
)
BEGAN = 1_700_000_000.0
STEP_S = 0.001
HOT_EVENTS = 512
BLOCKS_A_COMMIT = 64
PERIOD = 500
#: The place in a period of each step; 20,000 is a whole number of periods, so the last one needs a place of its own.
PLACES = {"signal_generated": 7, "fire_command": 57, "trade_executed": 307, "signal_outcome": 8}
LATER = 40  # periods


class Shape(NamedTuple):
    """An event as published, and where in its bytes the parts stand that differ from event to event."""

    topic: int
    flags: int
    priority: int
    raw: bytes
    time_at: int
    bid_at: int
    ids_at: tuple[int, ...]


def correlation(signal: int) -> str:
    """The correlation id of the `signal`-th signal, counted from 0."""
    return f"SIG_{signal:012d}"


def chain(signal: int, events: int) -> list[int]:
    """The ``bus_seq`` of the events of a chain, as far as the tape has them."""
    first = signal * PERIOD
    steps = [first + PLACES[name] for name in ("signal_generated", "fire_command", "trade_executed")]
    steps.append(first + LATER * PERIOD + PLACES["signal_outcome"])
    return [place + 1 for place in steps if place < events]


def health_ends(events: int) -> int:
    """The ``bus_seq`` of the last event of type ``system_health``."""
    return events // 10 // PERIOD * PERIOD + 10


def _shapes() -> dict[tuple[str, int], Shape]:
    topics = Topics()
    for name in TOPICS:
        topics.add(name)
    ident, first_id = correlation(0), correlation(0).encode()
    kinds: dict[tuple[str, int], dict[str, Any]] = {}
    for number, symbol in enumerate(SYMBOLS):
        kinds["market_data", number] = {"symbol": symbol, "bid": -1.5, "ask": -2.5, "volume": number}
        kinds["user_action", number] = {"user_id": f"u{number % 10}", "action": "click"}
        levels = {"pattern_type": "KALMAN_QUICKFIRE", "entry": 1.1, "sl": 0.9, "tp": 1.3, "confidence": 85.0}
        kinds["signal_generated", number] = {"signal_id": ident, "symbol": symbol, "direction": "BUY", **levels}
        order = {"fire_id": ident, "symbol": symbol, "direction": "BUY"}
        kinds["fire_command", number] = {**order, "lot": 0.1, "user_id": "u1"}
        kinds["trade_executed", number] = {**order, "ticket": 70_000 + number, "price": 1.1, "status": "FILLED"}
        ended = {"outcome": "WIN", "opened_at": 1e9, "closed_at": 1e9 + 20, "duration_s": 20.0, "quotes_seen": 1000}
        signal = {"signal_id": ident, "symbol": symbol, "direction": "BUY", "pattern_type": "KALMAN_QUICKFIRE"}
        kinds["signal_outcome", number] = {**signal, "confidence": 85.0, **ended, "fired": True, "pips": 12.5}
        kinds["system_health", number] = {"component": f"part{number}", "status": "running"}
    found = {}
    for (name, number), data in kinds.items():
        wire = {"event_type": name, "timestamp": -3.5, "source": "bench", "data": data}
        if name not in ("market_data", "system_health"):
            wire["correlation_id"] = ident
        raw = msgspec.msgpack.encode(wire)
        item = scan(topics, raw)[0]
        assert not isinstance(item, str) and item["topic"] == name
        ids = [at for at in range(len(raw)) if raw.startswith(first_id, at)]
        bid = raw.find(struct.pack(">d", -1.5))
        time_at = raw.index(struct.pack(">d", -3.5))
        topic = TOPICS.index(name) + 1
        found[name, number] = Shape(topic, item["flags"], item["priority"], raw, time_at, bid, tuple(ids))
    return found


class Writer:
    """Makes the blocks of a tape of `events` events."""

    def __init__(self, events: int) -> None:
        self.events = events
        self._shapes = _shapes()
        self._draw = random.Random(1)
        self._bids = [1.0 + number / 10 for number in range(len(SYMBOLS))]
        self._order = self._period()
        #: The reception of the next event, in µs.
        self._clock = int(BEGAN * 1e6)

    def _period(self) -> list[str]:
        order = ["market_data"] * PERIOD
        for place in self._draw.sample([at for at in range(PERIOD) if at not in PLACES.values() and at != 9], 46):
            order[place] = "user_action"
        for name, place in PLACES.items():
            order[place] = name
        order[9] = "system_health"
        return order

    def _kind(self, place: int) -> str:
        name = self._order[place % PERIOD]
        if name == "system_health" and place > health_ends(self.events):
            return "market_data"
        if name == "signal_outcome" and place < LATER * PERIOD:
            return "market_data"
        return name

    def block(self, first: int, count: int) -> Block:
        """The events ``first`` to ``first + count - 1``, as the tape thread packs what arrives."""
        draw, bids = self._draw.random, self._bids
        size, topic, flags, priority = array("I"), array("H"), bytearray(), bytearray()
        data, run, seen = bytearray(), bytearray(), 0
        for offset in range(count):
            place = first - 1 + offset
            number = place % len(SYMBOLS)
            name = self._kind(place)
            shape = self._shapes[name, number]
            at = len(data)
            data += shape.raw
            struct.pack_into(">d", data, at + shape.time_at, BEGAN + place * STEP_S)
            if shape.bid_at >= 0:
                bid = bids[number] = round(bids[number] + (draw() - 0.5) / 1000, 5)
                struct.pack_into(">d", data, at + shape.bid_at, bid)
                struct.pack_into(">d", data, at + shape.bid_at + 13, round(bid + 0.0002, 5))
            if shape.ids_at:
                period = place // PERIOD
                if name == "user_action":
                    ident = f"ACT_{place:012d}"
                else:
                    ident = correlation(period - LATER if name == "signal_outcome" else period)
                for into in shape.ids_at:
                    data[at + into : at + into + len(ident)] = ident.encode()
                run += struct.pack("<II", corr_hash(ident), offset)
            size.append(len(shape.raw))
            topic.append(shape.topic)
            flags.append(shape.flags)
            priority.append(shape.priority)
            seen |= 1 << shape.topic
        began = self._clock
        head = struct.pack("<IIQQ", count, 0, began, len(data))
        waits = array("I", [0, *(int(STEP_S * 1e6 * 2 * draw()) for _ in range(count - 1))])
        ended = began + sum(waits)
        self._clock = ended + 1
        columns = (size.tobytes(), waits.tobytes(), topic.tobytes(), bytes(flags), bytes(priority))
        return Block(
            first_seq=first,
            count=count,
            min_time=BEGAN + (first - 1) * STEP_S,
            max_time=BEGAN + (first + count - 2) * STEP_S,
            min_received=began / 1e6,
            max_received=ended / 1e6,
            topics=seen,
            payload=b"".join((head, *columns, bytes(data))),
            corr=sort_run(bytes(run)),
        )


def write(data_dir: Path, events: int) -> None:
    """Write a tape of `events` events (a multiple of `HOT_EVENTS` at least), sealed and merged, into `data_dir`."""
    writer = Writer(events)
    store = LmdbStore(data_dir, StoreConfig())
    try:
        topics = dict(enumerate(TOPICS, 1))
        while store.last_seq() < events:
            first = store.last_seq() + 1
            starts = range(first, min(first + HOT_EVENTS * BLOCKS_A_COMMIT, events + 1), HOT_EVENTS)
            blocks = [writer.block(start, min(HOT_EVENTS, events + 1 - start)) for start in starts]
            store.commit(Commit(blocks=blocks, topics=topics))
            topics = {}
            while store.maintain(0.0):
                pass
    finally:
        store.close()


def long_tape(events: int) -> Path:
    """The data directory of a tape of `events` events, built at the first call."""
    path = CACHE / f"tape-{events}-{EDITION}"
    if not path.exists():
        fresh = path.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        write(fresh, events)
        fresh.rename(path)
    return path


if __name__ == "__main__":
    print(long_tape(int(sys.argv[1])))

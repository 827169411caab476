"""One stage of an event's path each, alone on one thread, through the bus's own functions.

A workload makes its input outside of what is measured, does its work once, and says whether the answer is right. The
guard counts its instructions (`bench.guard`), the micro benchmarks take its time (`bench/micro`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from bench.load import Event, envelope, mix, standing_signals

import tapebus_outcomes
import tapebus_schema
import tapebus_slots
import tapebus_store
import tapebus_telegram
from tapebus import plugins
from tapebus._emitter import Emitter
from tapebus._ingest import Ingest
from tapebus._outbox import Outbox
from tapebus._ring import Ring
from tapebus._topics import Topics
from tapebus.blocks import BlockView, crc32c
from tapebus.codec import Codec, Fault
from tapebus.consumer import Consumer, covers
from tapebus.dispatcher import Dispatcher
from tapebus.events import Registry
from tapebus.fence import Fence, PluginContext
from tapebus.judge import Judge
from tapebus.store import Block, Commit, Unit, steady_clock
from tapebus_store import layout

FIVE = {
    "schema": tapebus_schema,
    "store": tapebus_store,
    "outcomes": tapebus_outcomes,
    "slots": tapebus_slots,
    "telegram": tapebus_telegram,
}
SEED = 7
#: Signals that stay open, as in the throughput benchmarks.
OPEN = 200
BATCH = 100
#: Events of a block and of a slice: a busy bus makes larger blocks, and slices of ``bus.max_batch``.
BLOCK, SLICE = 2000, 1000
#: The market time of the first event, in Unix seconds, and what passes between two.
BEGIN, STEP = 1_760_000_000.0, 0.001


class Task(NamedTuple):
    """Work that can be done once: `run` is what is measured, ``check(answer)`` fails when it went wrong."""

    run: Callable[[], Any]
    check: Callable[[Any], None]


class Workload(NamedTuple):
    """``make(count)`` prepares work on `count` events, a multiple of `BLOCK`."""

    name: str
    make: Callable[[int], Task]


@cache
def manager() -> Any:
    """The five plugins, as a bus loads them."""
    return plugins.load((), list(FIVE.items()))


@cache
def registry() -> Registry:
    """The event types of the five plugins."""
    return plugins.registry(manager())


def codec() -> Codec:
    """A codec with the types of the five plugins, each with a topic number."""
    made = Codec(registry(), Topics())
    made.register_topics()
    return made


@cache
def events(count: int) -> list[Event]:
    """The same mix every time."""
    return mix(SEED, count)


def envelopes(made: list[Event]) -> list[dict[str, Any]]:
    """As a client sends them, with times that are the same every time."""
    return [envelope(event) | {"timestamp": BEGIN + i * STEP} for i, event in enumerate(made)]


def batches(made: list[Event]) -> list[bytes]:
    """MessagePack frames of `BATCH` events."""
    whole = envelopes(made)
    return [msgspec.msgpack.encode(whole[i : i + BATCH]) for i in range(0, len(whole), BATCH)]


class Intake:
    """A ring and its ingest, whose thread never starts: frames come in through the mailbox."""

    def __init__(self, topics: Topics, first_seq: int = 1) -> None:
        self.ring = Ring(topics, next_seq=first_seq)
        self.ingest = Ingest(self.ring, 1)
        self.ingest.stop()
        self.producer = self.ring.producer(b"workload".ljust(16), 0, "workload", sequenced=False)

    def take(self, frames: list[bytes]) -> int:
        """Scan the frames into the ring; how many events it then holds."""
        for frame in frames:
            self.ring.inject(frame, self.producer)
        self.ingest.run()  # stopped already, so it takes what is there and returns
        return self.ring.received_count

    def pack(self, size: int = BLOCK) -> list[Block]:
        """All blocks of what is in the ring."""
        found = []
        while (packed := self.ring.pack(max_events=size)) is not None and packed[0] is not None:
            found.append(packed[0])
            self.ring.acknowledge(packed[2])
        return found


def blocks(topics: Topics, frames: list[bytes], first_seq: int = 1, size: int = BLOCK) -> list[Block]:
    """What the tape thread makes of these frames."""
    intake = Intake(topics, first_seq)
    intake.take(frames)
    return intake.pack(size)


def decoded(decoder: Codec, frames: list[bytes], first_seq: int = 1) -> list[Any]:
    """The typed events of these frames, those that fit their types."""
    found: list[Any] = []
    for block in blocks(decoder.topics, frames, first_seq):
        found += decoder.decode(BlockView(block.payload, block.first_seq))[0]
    return [event for event in found if event is not None]


def slices(block: Block) -> list[tuple[BlockView, int, int]]:
    view = BlockView(block.payload, block.first_seq)
    return [(view, at, min(at + SLICE, block.count)) for at in range(0, block.count, SLICE)]


def consumers() -> list[tuple[str, Consumer, PluginContext]]:
    """Those of the five plugins, registered as `Wiring` does."""
    found = []
    loaded = manager()
    for name in FIVE:
        context = PluginContext(name, {}, Path("."), {}, lambda: BEGIN)
        made = plugins.call_one(loaded, "tapebus_register_consumers", name, context=context)
        found += [(name, consumer, context) for consumer in made or ()]
    return found


def equal(answer: Any, wanted: Any) -> None:
    if answer != wanted:
        raise AssertionError(f"{answer!r} instead of {wanted!r}")


# -- the producer --------------------------------------------------------------------------------------------------


def publish(count: int) -> Task:
    """publish() into the outbox."""
    emitter = Emitter()
    outbox = Outbox(count, 64 << 20)
    emitter._setup("workload", outbox)
    made = events(count)

    def run() -> int:
        call = emitter.publish
        return sum(call(kind, data, correlation) for kind, data, correlation in made)

    def check(answer: int) -> None:
        equal((answer, outbox.waiting), (count, count))

    return Task(run, check)


def send(count: int) -> Task:
    """What the sender does between two system calls: build batches, check sum, acknowledge."""
    outbox = Outbox(count, 64 << 20)
    for whole in envelopes(events(count)):
        outbox.append(msgspec.msgpack.encode(whole))

    def run() -> tuple[int, int]:
        seq, sent = 1, 0
        while seq <= count:
            body, n = outbox.build_batch(seq, BATCH, 1 << 20)
            crc32c(body)
            sent += n
            seq += n
            outbox.ack(seq - 1)
        return sent, outbox.waiting

    return Task(run, lambda answer: equal(answer, (count, 0)))


# -- the way to the tape -------------------------------------------------------------------------------------------


def take(frames: list[bytes], count: int) -> Task:
    intake = Intake(codec().topics)
    return Task(lambda: intake.take(frames), lambda answer: equal((answer, intake.ingest.malformed), (count, 0)))


def scan_batches(count: int) -> Task:
    """Frames of 100 events through the mailbox: scan, topic numbers, ring."""
    return take(batches(events(count)), count)


def scan_single(count: int) -> Task:
    """The same, a MessagePack event a frame."""
    return take([msgspec.msgpack.encode(each) for each in envelopes(events(count))], count)


def scan_json(count: int) -> Task:
    """The same, a JSON event a frame."""
    return take([msgspec.json.encode(each) for each in envelopes(events(count))], count)


def pack(count: int) -> Task:
    """Ring to blocks."""
    intake = Intake(codec().topics)
    intake.take(batches(events(count)))
    return Task(intake.pack, lambda answer: equal(sum(block.count for block in answer), count))


class Store:
    """A store in a directory that goes with it."""

    def __init__(self, **config: Any) -> None:
        self._directory = tempfile.mkdtemp(prefix="tb-")
        opened = tapebus_store.tapebus_open_store(Path(self._directory), config, False)
        assert isinstance(opened, tapebus_store.LmdbStore)
        self.store = opened

    def __del__(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def encode(count: int) -> Task:
    """Blocks to the values the tape holds: compress and check sum."""
    made = blocks(codec().topics, batches(events(count)))
    held = Store()
    hot = held.store._hot

    def check(answer: list[bytes]) -> None:
        for block, value in zip(made, answer, strict=True):
            header = layout.decode_header(layout.seq_key(block.first_seq), value)
            equal((header.events, header.raw_length), (block.count, len(block.payload)))

    return Task(lambda: [layout.encode_block(block, hot) for block in made], check)


def commit(count: int) -> Task:
    """A commit a block, with its encoding, up to the fsync."""
    made = blocks(codec().topics, batches(events(count)))
    held = Store()

    def run() -> int:
        for block in made:
            held.store.commit(Commit([block]))
        return held.store.last_seq()

    return Task(run, lambda answer: equal(answer, count))


def seal(count: int) -> Task:
    """Small blocks, as a quiet bus leaves them, into large ones."""
    held = Store(seal_events=BLOCK)
    for block in blocks(codec().topics, batches(events(count)), size=BATCH):
        held.store.commit(Commit([block]))

    def run() -> int:
        while held.store.maintain(steady_clock()):
            pass
        return int(held.store.stats()["blocks_hot"])

    def check(answer: int) -> None:
        equal((answer, sum(block.count for block in held.store.blocks(0))), (0, count))

    return Task(run, check)


# -- the way to the plugins ----------------------------------------------------------------------------------------


def decoding(frames: list[bytes], count: int) -> Task:
    decoder = codec()
    pieces = [piece for block in blocks(decoder.topics, frames) for piece in slices(block)]

    def run() -> tuple[int, int]:
        good = bad = 0
        for view, start, stop in pieces:
            found, faults = decoder.decode(view, start, stop)
            good += len(found)
            bad += len(faults)
        return good, bad

    return Task(run, lambda answer: equal(answer, (count, 0)))


def decode(count: int) -> Task:
    """Blocks to typed events, with the rules of their types."""
    return decoding(batches(events(count)), count)


def decode_json(count: int) -> Task:
    """The same from JSON."""
    return decoding([msgspec.json.encode(each) for each in envelopes(events(count))], count)


def judge(count: int) -> Task:
    """Events that break a rule: decode, reasons, dead letters in units of work."""
    broken: list[Event] = [("market_data", {"symbol": "EURUSD", "bid": 1.2, "ask": 1.1}, None)] * count
    decoder = codec()
    pieces = [piece for block in blocks(decoder.topics, batches(broken)) for piece in slices(block)]
    units: list[Unit] = []
    judging = Judge(decoder.topics, 0, units.append)

    def run() -> int:
        for view, start, stop in pieces:
            faults: list[Fault] = decoder.decode(view, start, stop)[1]
            judging.judge(faults, view, view.first_seq + start, view.first_seq + stop - 1)
            judging.close_unit()
        return sum(len(unit.dead) for unit in units)

    return Task(run, lambda answer: equal((answer, judging.cursor), (count, count)))


class Plugin:
    """One consumer of a plugin with `OPEN` signals open, and the events of the mix that it asks for."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        decoder = codec()
        _, consumer, self.context = next(each for each in consumers() if each[0] == name)
        self.fence = Fence(consumer, name, self.context, 0, [], lambda unit, frame: None)
        before = decoded(decoder, batches(standing_signals(OPEN)))
        whole = decoded(decoder, batches(events(count)), OPEN + 1)
        self.before = [event for event in before if covers(consumer.topics, event.event_type)]
        self.lists = [
            [event for event in whole[i : i + SLICE] if covers(consumer.topics, event.event_type)]
            for i in range(0, len(whole), SLICE)
        ]
        self.fence.offer(self.before, OPEN)

    def run(self) -> int:
        last = OPEN
        for each in self.lists:
            last += SLICE
            self.fence.offer(each, last)
        return self.fence.handled


def metrics(plugin: Plugin) -> dict[str, Any]:
    found: dict[str, Any] = plugins.call_one(manager(), "tapebus_metrics", plugin.name, context=plugin.context)
    return found


def handling(name: str, count: int, check: Callable[[Any], bool]) -> Task:
    plugin = Plugin(name, count)
    wanted = len(plugin.before) + sum(map(len, plugin.lists))

    def right(answer: int) -> None:
        equal((answer, plugin.fence.errors, plugin.fence.cursor), (wanted, 0, OPEN + count))
        if not check(plugin):
            raise AssertionError(f"the state of {name} is not what these events lead to")

    return Task(plugin.run, right)


def outcomes(count: int) -> Task:
    """The handler of outcomes, behind its fence."""

    def settled(plugin: Plugin) -> bool:
        figures = metrics(plugin)
        signals = sum(event.event_type == "signal_generated" for each in plugin.lists for event in each)
        return int(figures["open"]) >= OPEN and int(figures["open"]) + int(figures["resolved"]) == OPEN + signals

    return handling("outcomes", count, settled)


def slots(count: int) -> Task:
    """The handler of slots, behind its fence."""

    def judged(plugin: Plugin) -> bool:
        figures = metrics(plugin)
        signals = sum(event.event_type == "signal_generated" for each in plugin.lists for event in each)
        return bool(figures["gate_verdicts"] == OPEN + signals)

    return handling("slots", count, judged)


def telegram(count: int) -> Task:
    """The handler of telegram, behind its fence, in a dry run; quotes are none of its topics."""

    def shown(plugin: Plugin) -> bool:
        return int(metrics(plugin)["dry_run"]) > OPEN

    return handling("telegram", count, shown)


def dispatch(count: int) -> Task:
    """All that the dispatch thread does with a block: decode, verdict, fan-out, the handlers behind their fences."""
    decoder = codec()
    fences = [
        Fence(consumer, name, context, 0, [], lambda unit, frame: None)
        for name, consumer, context in consumers()
        if consumer.mode == "inline"
    ]
    made = blocks(decoder.topics, batches(standing_signals(OPEN)))
    made += blocks(decoder.topics, batches(events(count)), OPEN + 1)
    raised: list[BaseException] = []
    dispatcher = Dispatcher(
        decoder,
        fences,
        None,
        0,
        OPEN + count,
        max_batch=SLICE,
        judge=Judge(decoder.topics, 0, lambda unit: None),
        fail=raised.append,
    )
    dispatcher._dispatch(made.pop(0))

    def run() -> list[int]:
        for block in made:
            dispatcher._dispatch(block)
        return [fence.cursor for fence in fences]

    return Task(run, lambda answer: equal((answer, raised), ([OPEN + count] * len(fences), [])))


WORKLOADS = [
    Workload("publish", publish),
    Workload("send", send),
    Workload("scan-batches", scan_batches),
    Workload("scan-single", scan_single),
    Workload("scan-json", scan_json),
    Workload("pack", pack),
    Workload("encode", encode),
    Workload("commit", commit),
    Workload("seal", seal),
    Workload("decode", decode),
    Workload("decode-json", decode_json),
    Workload("judge", judge),
    Workload("outcomes", outcomes),
    Workload("slots", slots),
    Workload("telegram", telegram),
    Workload("dispatch", dispatch),
]

"""The processes that send the events of a benchmark: ``python -m bench.producers LOAD``, `LOAD` a JSON object.

Each prepares its events, says ``ready``, waits for a line on standard input, sends, says ``sent``, and prints what it
sent. ``python -m bench.producers KIND ENDPOINT COUNT`` sends the mix at once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import msgspec
import zmq
from bench.load import DISTINCT, SIGNALS, SYMBOLS, Event, digest_sent, envelope, laps, mix, recorded, renamed

#: Events, and bytes of text, a producer keeps in flight at most, so that nothing is dropped for want of memory.
WINDOW, WINDOW_BYTES = 40_000, 8 << 20
PATIENCE = 300.0


class Load(msgspec.Struct):
    """What one producer sends: `kind` is ``publisher``, ``msgpack`` or ``json`` (plain PUSH), or ``paced``.

    `symbols` are its share of the market, `signals` the share of these among its events, `only` one event type, `batch`
    the events of a PUSH frame, `padding` the bytes of a text in each event instead of the mix, `ticks` recorded files
    whose quotes are the mix's.
    """

    kind: str
    endpoint: str
    count: int
    source: str
    seed: int = 1
    symbols: list[str] = []
    signals: float = SIGNALS
    only: str = ""
    batch: int = 1
    padding: int = 0
    ticks: list[str] = []
    at_once: bool = False

    def events(self) -> list[Event]:
        """The distinct events, of which `laps` makes all."""
        count = min(self.count, DISTINCT)
        if self.padding:
            return padded(self.seed, min(count, 64 * 1024 * 1024 // self.padding), self.padding)
        if self.ticks:
            return recorded(self.ticks, self.seed, count)
        options = (tuple(self.symbols) or SYMBOLS, self.signals)
        if self.only:
            return [event for event in mix(self.seed, count * 10 // 8 + 100, *options) if event[0] == self.only][:count]
        return mix(self.seed, count, *options)


def padded(seed: int, count: int, size: int) -> list[Event]:
    """User actions with a text of `size` characters drawn at random."""
    draw = random.Random(seed)
    who = {"user_id": "bench", "action": "note"}
    return [("user_action", {**who, "details": {"text": draw.randbytes(size // 2).hex()}}, None) for _ in range(count)]


def begin(load: Load) -> None:
    """Tell that everything is prepared, and wait for the start."""
    print("ready", flush=True)
    if not load.at_once:
        sys.stdin.readline()


def done() -> None:
    """Tell that everything is on its way for good; what takes time to work out comes after it."""
    print("sent", flush=True)


def publisher(load: Load) -> dict[str, Any]:
    """Through `tapebus.Publisher`, acknowledged."""
    from tapebus import Publisher

    events = load.events()
    pub = Publisher(load.source, load.endpoint)
    publish = pub.publish
    window = min(WINDOW, WINDOW_BYTES // max(load.padding, 1))
    look = min(1000, window // 4)
    begin(load)
    for sent, (event_type, data, correlation_id) in enumerate(laps(events, load.count), 1):
        publish(event_type, data, correlation_id)
        if sent % look == 0:
            while pub.stats()["in_flight"] > window:
                pub.flush(0.002)
    acknowledged = pub.flush(PATIENCE)
    stats = pub.stats()
    pub.close()
    if not acknowledged or stats["dropped"]:
        sys.exit(f"the publisher lost events: {stats}")
    done()
    return {"digest": reduce(digest_sent, laps(events, load.count), 0)}


def push(load: Load) -> dict[str, Any]:
    """Through a plain PUSH socket, as any program in any language does."""
    encode: Callable[[Any], bytes] = msgspec.msgpack.encode
    if load.kind == "json":
        encode = _json
    events = load.events()
    current = list(events)
    frames = [encode(each) for each in _frames(events, load)]
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.SNDHWM, 10_000)
        socket.setsockopt(zmq.LINGER, int(PATIENCE * 1000))
        socket.connect(load.endpoint)
        send = socket.send
        begin(load)
        sent = lap = 0
        while sent < load.count:
            if lap:
                _rename(frames, current, lap, encode, load)
            part = min(len(frames), (load.count - sent) // load.batch)
            for frame in frames[:part]:
                send(frame)
            sent += part * load.batch
            lap += 1
    done()
    return {"digest": reduce(digest_sent, laps(events, load.count), 0)}


def _json(event: Any) -> bytes:
    return json.dumps(event).encode()


def _frames(events: list[Event], load: Load) -> Iterator[Any]:
    """What each frame holds: an event, or a list of `load.batch` of them."""
    if load.count % load.batch or len(events) % load.batch:
        sys.exit(f"{load.count} events, {len(events)} of them distinct, do not fill frames of {load.batch}")
    for first in range(0, len(events), load.batch):
        made = [envelope(event, load.source) for event in events[first : first + load.batch]]
        yield made if load.batch > 1 else made[0]


def _rename(frames: list[bytes], events: list[Event], lap: int, encode: Callable[[Any], bytes], load: Load) -> None:
    """Give the signals of the next lap new names, as `laps` does."""
    for i, event in enumerate(events):
        if event[2] is not None:
            events[i] = renamed(event, lap)
    for place in sorted({i // load.batch for i, event in enumerate(events) if event[2] is not None}):
        part = events[place * load.batch : (place + 1) * load.batch]
        made = [envelope(event, load.source) for event in part]
        frames[place] = encode(made if load.batch > 1 else made[0])


def paced(load: Load) -> dict[str, Any]:
    """One event a millisecond through a Publisher, then bursts; the seconds of every call of `publish`."""
    from tapebus import Publisher

    with Publisher(load.source, load.endpoint) as pub:
        pub.publish("user_action", {"user_id": "u", "action": "warm"})
        if not pub.flush(30.0):
            sys.exit("the publisher found no bus")
        begin(load)
        spent = [0.0] * load.count
        start = time.perf_counter()
        for i in range(load.count):
            wait = start + i * 0.001 - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            begun = time.perf_counter()
            pub.publish("user_action", {"user_id": "u", "action": "paced"})
            spent[i] = time.perf_counter() - begun
        pub.flush(30.0)
        done()
        sys.stdin.readline()
        burst = []
        for _ in range(20):
            for _ in range(1000):
                begun = time.perf_counter()
                pub.publish("user_action", {"user_id": "u", "action": "burst"})
                burst.append(time.perf_counter() - begun)
            pub.flush(30.0)
        if pub.stats()["dropped"]:
            sys.exit(f"the publisher lost events: {pub.stats()}")
    return {"paced": spent, "burst": burst}


def plain(load: Load) -> dict[str, Any]:
    """One event a millisecond through plain pyzmq to whoever binds, without a bus."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(load.endpoint)
        begin(load)
        start = time.perf_counter()
        for i in range(load.count):
            wait = start + i * 0.001 - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            event = envelope(("user_action", {"user_id": "u", "action": "paced"}, None), load.source)
            socket.send(msgspec.msgpack.encode(event))
    done()
    return {}


KINDS = {"publisher": publisher, "msgpack": push, "json": push, "paced": paced, "plain": plain}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the whole run; the harness says so
    if len(sys.argv) == 2:
        wanted = msgspec.json.decode(sys.argv[1], type=Load)
    else:
        kind, endpoint, count = sys.argv[1:]
        wanted = Load(kind, endpoint, int(count), f"bench-{os.getpid()}", seed=os.getpid(), at_once=True)
    print(json.dumps(KINDS[wanted.kind](wanted)), flush=True)

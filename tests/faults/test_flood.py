"""One producer floods: the others keep their pace, memory stays bounded, and every event is accounted for."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from bus_support import PATIENCE, pushing, quote, wait_until
from tapebus import Tape, books

TRAFFIC = Path(__file__).with_name("traffic.py")
#: Events per second of each of the three normal producers; the flood is at least fifty times as many.
RATE = 100
MiB = 1 << 20


class Traffic:
    """One ``traffic.py`` process, ready to begin."""

    def __init__(self, bus: Any, kind: str, source: str, seconds: float, size: int = 0) -> None:
        endpoint = bus.ingest if kind == "push" else bus.acked
        words = [kind, endpoint, source, str(seconds), str(RATE), str(size)]
        self.process = subprocess.Popen(
            [sys.executable, str(TRAFFIC), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.seconds = seconds

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> Any:
        out, _ = self.process.communicate(timeout=self.seconds + 180)
        assert self.process.returncode == 0
        return json.loads(out)


@contextmanager
def memory_of(process: subprocess.Popen[bytes]) -> Iterator[dict[str, float]]:
    """The most anonymous memory seen while the block runs, and the most of all kinds ever, in MiB.

    Pages of the tape's map are the kernel's to take back, so only the first is the bus's own.
    """
    peak = {"anonymous_mib": 0.0, "resident_mib": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while True:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            figures = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
            peak["anonymous_mib"] = max(peak["anonymous_mib"], round(int(figures["RssAnon"]) / 1024, 1))
            peak["resident_mib"] = round(int(figures["VmHWM"]) / 1024, 1)
            if ended.wait(0.05):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def together(*traffic: Traffic) -> list[Any]:
    try:
        for each in traffic:
            each.begin()
        return [each.result() for each in traffic]
    finally:
        for each in traffic:
            each.process.kill()
            each.process.wait()


def rates(results: list[Any]) -> list[float]:
    """What each normal producer got acknowledged per second while it was publishing."""
    return [round(each["acked_per_s"], 1) for each in results]


def closed_books(bus: Any) -> books.Summary:
    with Tape.open(bus.data_dir) as tape:
        accounts, last_seq = tape.accounts()
        assert sum(tape.count_by_source(last_seq)[0].values()) == last_seq
    total = books.summary(accounts, last_seq)
    assert total.closed, total.line()
    return total


@pytest.mark.parametrize(("kind", "bytes_each"), [("flood", 0), ("push", 300)])
def test_three_normal_producers_keep_their_pace_beside_a_flood(make_bus, size, figures, kind, bytes_each):
    seconds = size(2.0, 60.0, 300.0)
    bus = make_bus(["schema", "store"]).start()
    calm = together(*(Traffic(bus, "paced", f"calm{n}", size(0.6, 10.0, 30.0)) for n in range(3)))
    with memory_of(bus.process) as memory:
        *normal, flooded = together(
            *(Traffic(bus, "paced", f"normal{n}", seconds) for n in range(3)),
            Traffic(bus, kind, "flooder", seconds, bytes_each),
        )
        bus.wait_for(lambda s: s["books"]["in_flight"] == 0, "to finish")
        if kind == "push":
            bus.wait_for(lambda s: _received(s) >= flooded["sent"], "to take everything the flood sent")
    stats = bus.stats()
    figures.update(
        alone_per_s=rates(calm),
        beside_per_s=rates(normal),
        flood_per_s=round(flooded["sent"] / flooded["seconds"]),
        flood_dropped=sum(flooded.get("dropped", {}).values()),
        flood_shed=stats["bus"]["dropped"].get("legacy.shed", 0),
        **memory,
    )
    assert flooded["sent"] / flooded["seconds"] >= 50 * RATE
    # within two seconds one slow flush of a busy disk is more than a tenth
    assert min(rates(normal)) >= size(0.6, 0.9, 0.9) * min(rates(calm))
    assert memory["anonymous_mib"] <= 256
    assert [each["dropped"] for each in normal] == [{}] * 3
    assert [each["acked"] for each in normal] == [each["sent"] + 1 for each in normal]
    assert bus.stop() == 0
    total = closed_books(bus)
    assert total.in_flight == 0
    sent = sum(each["sent"] + 1 for each in [*calm, *normal])
    if kind == "flood":
        assert flooded["published"] == flooded["acked"] + sum(flooded["dropped"].values())
        assert total.published == sent + flooded["sent"] + 1 + _heartbeats(bus)
    else:
        assert _received(stats) == flooded["sent"]


def _received(stats: Any) -> int:
    """Events taken from the fire-and-forget port: stored and shed."""
    stored = sum(each["stored"] for each in stats["producers"] if each["producer_id"] == "ingest")
    return int(stored + stats["bus"]["dropped"].get("legacy.shed", 0))


def _heartbeats(bus: Any) -> int:
    with Tape.open(bus.data_dir) as tape:
        return sum(1 for _ in tape.read(topics=["system_health"]))


@pytest.mark.parametrize("kind", ["flood", "push"])
def test_a_flood_of_the_largest_events_stays_within_the_memory_limit(make_bus, size, figures, kind):
    seconds = size(1.0, 30.0, 120.0)
    bus = make_bus(["schema", "store"]).start()
    with memory_of(bus.process) as memory:
        results = together(*(Traffic(bus, kind, f"big{n}", seconds, 200_000) for n in range(size(2, 4, 8))))
        bus.wait_for(lambda s: s["books"]["in_flight"] == 0, "to finish")
        if kind == "push":
            sent = sum(each["sent"] for each in results)
            bus.wait_for(lambda s: _received(s) >= sent, "to take everything")
    figures.update(sent=sum(each["sent"] for each in results), **memory)
    assert memory["anonymous_mib"] <= 256
    assert bus.stop() == 0
    closed_books(bus)


def test_frames_beyond_the_limit_and_messages_of_many_parts_cost_a_connection_and_no_memory(make_bus, figures):
    bus = make_bus(["schema", "store"]).start()
    with memory_of(bus.process) as memory, zmq.Context() as context:
        for endpoint in (bus.ingest, bus.acked):
            kind = zmq.PUSH if endpoint == bus.ingest else zmq.DEALER
            for message in ([bytes(256 * MiB)], [b"x"] * 20_000, [bytes(64 << 10)] * 200):
                with context.socket(kind) as socket:
                    socket.linger, socket.sndtimeo = 2000, 2000
                    socket.connect(endpoint)
                    try:
                        socket.send_multipart(message, copy=False)
                    except zmq.Again:
                        pass
        with pushing(bus.ingest) as send:
            send(json.dumps({"event_type": "a", "timestamp": 1.0, "source": "s", "data": quote(1)}).encode())
        bus.wait_for(lambda s: s["bus"]["stored"] >= 1, "to go on as if nothing had been")
    figures.update(memory)
    assert memory["anonymous_mib"] <= 256
    assert bus.stop() == 0
    closed_books(bus)


def test_many_connections_cost_little_each_and_leave_room_for_the_others(make_bus, size, figures):
    count = size(200, 5000, 8000)
    bus = make_bus(["schema", "store"]).start()
    before = bus.stats()["bus"]["rss_bytes"]
    opened = 0
    with memory_of(bus.process) as memory, zmq.Context(1) as context:
        context.max_sockets = count + 10
        sockets = []
        try:
            for _ in range(count):
                socket = context.socket(zmq.PUSH)
                socket.linger = 0
                socket.connect(bus.ingest)
                sockets.append(socket)
        except zmq.ZMQError:
            pass  # this process may open fewer
        opened = len(sockets)
        frame = json.dumps({"event_type": "a", "timestamp": 1.0, "source": "s", "data": quote(1)}).encode()
        sent = sum(_sent(socket, frame) for socket in sockets)
        # a PUSH socket takes a message before it is connected, and the system may refuse some of a crowd for long
        stats = bus.wait_for(lambda s: _received(s) >= 0.9 * sent, "to hear nearly everyone")
        for socket in sockets:
            socket.close(0)
    figures.update(
        connections=opened,
        heard=_received(stats),
        kib_each=round((memory["anonymous_mib"] * 1024 - before / 1024) / opened, 1),
    )
    figures.update(memory)
    assert opened >= min(count, 200) and sent >= opened * 0.9
    assert memory["anonymous_mib"] <= 256
    bus.wait_for(lambda s: True, "to answer still")
    assert bus.stop() == 0
    closed_books(bus)


def _sent(socket: Any, frame: bytes) -> int:
    socket.sndtimeo = int(PATIENCE * 1000)
    try:
        socket.send(frame)
    except zmq.Again:
        return 0
    return 1


def test_a_flood_of_frames_that_are_no_events_is_counted_and_its_memory_bounded(make_bus, size, figures):
    frames = size(1000, 100_000, 500_000)
    bus = make_bus(["schema", "store"]).start()
    junk = b"\xc1" * 200_000
    with memory_of(bus.process) as memory, pushing(bus.ingest) as send:
        for _ in range(frames // 10):
            send(junk)
        for _ in range(frames - frames // 10):
            send(b"{broken")
        bus.wait_for(lambda s: s["bus"]["rejected"].get("ingest.malformed") == frames, "to count every frame")
    wait_until(lambda: bus.stats()["bus"]["rejected"]["ingest.malformed"] == frames, "the count to stay")
    figures.update(frames=frames, **memory)
    assert memory["anonymous_mib"] <= 256
    assert bus.stop() == 0
    closed_books(bus)

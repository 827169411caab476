"""Stop the bus by every signal a service manager or a person sends, with its queues full, and start it again."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from fault_plugins import DERIVED, TRIGGERS, install
from ledger import Checker, event_of
from producers import Producer, finish

from bus_support import wait_until
from tapebus import Publisher

PLUGINS = ["schema", "store", "outcomes", "slots", "telegram", *DERIVED]
#: Events that are pushed into the bus just before it is asked to stop, and how many go in one frame.
QUEUED, FRAME = 100_000, 250
#: Seconds: draining may take 5 and closing 5 more; then the bus ends itself with code 1.
LIMIT = 15.0
#: Number of the system call tgkill on x86-64; other machines have others.
TGKILL = 234


def burst() -> list[bytes]:
    """`QUEUED` quotes in batch frames, for the port that acknowledges nothing."""
    frames = []
    for first in range(1, QUEUED, FRAME):
        events = []
        for n in range(first, first + FRAME):
            data = event_of("burst", 10 * n + 1)[1]
            events.append({"event_type": "market_data", "timestamp": float(n), "source": "burst", "data": data})
        frames.append(msgspec.msgpack.encode(events))
    return frames


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(each) for each in (task / "children").read_text().split()]
    return found


def ask_to_stop(process: Any, kind: str, chance: random.Random) -> None:
    if kind == "tree":
        # a terminal and PM2 signal every process of the tree, the deepest first
        for pid in children(process.pid):
            os.kill(pid, signal.SIGINT)
    first, second = (signal.SIGTERM, signal.SIGINT) if kind == "term" else (signal.SIGINT, signal.SIGTERM)
    process.send_signal(first)
    if kind == "double":
        if chance.random() < 0.5:
            threading.Event().wait(chance.uniform(0, 0.2))
        process.send_signal(second)


def wait_for_end(bus: Any, kind: str) -> float:
    """Seconds until the process has ended, as it should."""
    process, bus.process = bus.process, None
    begun = time.monotonic()
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        process.wait()
        pytest.fail(f"{kind}: the bus still ran after {LIMIT} s:\n{bus.output()}")
    assert code == 0 or (kind == "double" and code in (128 + signal.SIGINT, 128 + signal.SIGTERM)), (
        kind,
        code,
        bus.output(),
    )
    return time.monotonic() - begun


@pytest.mark.timeout(7200)
def test_a_bus_asked_to_stop_under_load_ends_by_itself_and_loses_nothing(make_bus, tmp_path, size, chance, figures):
    bus = make_bus(PLUGINS, "[plugins.store]\nmax_dead = 1000000")
    # a stop that hangs is shown by the stacks of its threads
    bus.variables["PYTHONFAULTHANDLER"] = "1"
    install(bus, tmp_path / "plugins")
    bus.start()
    producers = [Producer(bus.acked, "elite_guard", tmp_path, rate=2000), Producer(bus.acked, "webapp", tmp_path)]
    checker = Checker(bus.data_dir, [each.ledger for each in producers], TRIGGERS)
    took: dict[str, list[float]] = {"term": [], "int": [], "tree": [], "double": []}
    frames = burst()
    begun = time.monotonic()
    try:
        for number in range(size(4, 60, 500)):
            kind = list(took)[number % len(took)]
            before = [each.acked for each in producers]
            wait_until(
                lambda before=before: all(p.acked > n for p, n in zip(producers, before, strict=True)),
                "acknowledgements",
            )
            with zmq.Context() as context, context.socket(zmq.PUSH) as push:
                push.setsockopt(zmq.LINGER, 0)
                push.setsockopt(zmq.SNDHWM, 0)
                push.connect(bus.ingest)
                for frame in frames:
                    push.send(frame)
                checker.read_on()
                ask_to_stop(bus.process, kind, chance)
                took[kind].append(wait_for_end(bus, kind))
            checker.read_on()
            verdict = checker.verdict()
            assert not verdict.wrong, (number, kind, verdict)
            bus.start()
        seconds = time.monotonic() - begun
        ends = finish(producers)
    finally:
        for each in producers:
            each.kill()
    wait_until(lambda: checker.read_on() == 0 and not checker.underived(), "every derived event", 120.0)
    verdict = checker.verdict(bus.stats())
    asked = sorted(took["term"] + took["int"] + took["tree"])
    figures.update(
        stops=sum(map(len, took.values())),
        events_on_tape=checker.seq,
        seconds=round(seconds),
        stop_s_p50=round(asked[len(asked) // 2], 2),
        stop_s_max=round(asked[-1], 2),
        double_s_max=round(max(took["double"]), 2),
        publish_us={name: max(end["publish_us"][name] for end in ends) for name in ("p50", "p99", "p99.9", "max")},
        **verdict.figures(),
    )
    assert not verdict.wrong, verdict
    assert "cut short" not in bus.log.read_text(errors="replace")
    assert bus.stop() == 0


NOISY = """
import logging
from tapebus import Consumer, hookimpl

@hookimpl
def tapebus_register_consumers(context):
    def handler(batch):
        for event in batch:
            context.log.info("x" * 1000)
    return [Consumer(name="noisy", topics=["market_data"], handler=handler, mode="inline")]
"""


@pytest.mark.parametrize("reader", ["stands still", "is gone"])
def test_a_log_that_nobody_reads_stops_neither_the_bus_nor_its_end(make_bus, tmp_path, reader):
    (tmp_path / "noisy_plugin.py").write_text(NOISY)
    info = tmp_path / "noisy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noisy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tapebus.plugins]\nnoisy = noisy_plugin\n")
    bus = make_bus(["schema", "store", "noisy"])
    bus.python_path.append(str(tmp_path))
    with subprocess.Popen(bus.command, stderr=subprocess.PIPE, env=bus.environ(), cwd=tmp_path) as process:
        bus.process = process
        bus.wait_for(lambda stats: True, "to answer")
        if reader == "is gone":
            process.stderr.close()
        with Publisher("webapp", endpoint=bus.acked) as publisher:
            for n in range(5000):
                event_type, data, at, correlation = event_of("webapp", 10 * n + 1)
                assert publisher.publish(event_type, data, timestamp=at, correlation_id=correlation)
            assert publisher.flush(30.0)
            bus.wait_for(lambda stats: stats["consumers"][0]["handled"] >= 5000, "to handle all")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
        bus.process = None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of tgkill is known for x86-64 only")
def test_a_signal_that_reaches_another_thread_than_the_main_one_stops_the_bus(make_bus):
    bus = make_bus(["schema", "store"]).start()
    others = [int(each.name) for each in Path(f"/proc/{bus.process.pid}/task").iterdir()]
    others.remove(bus.process.pid)
    # the thread of the control socket, or any other that Python started: those of ZeroMQ let no signal in
    tid = next(each for each in sorted(others) if blocked_signals(bus.process.pid, each) == 0)
    assert ctypes.CDLL(None).syscall(TGKILL, bus.process.pid, tid, int(signal.SIGTERM)) == 0
    wait_for_end(bus, "term")


def blocked_signals(pid: int, tid: int) -> int:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/task/{tid}/status").read_text().splitlines())
    return int(status["SigBlk"], 16)

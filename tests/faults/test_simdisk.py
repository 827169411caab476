"""Power cuts on a simulated disk: whatever part of the unsynced writes survives, the promises of the bus hold."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from preload import BUILT, built

from bus_support import quote
from tapebus import Publisher

HERE = Path(__file__).parent
PROCESSES = 2
COUNTER = """
from tapebus import Consumer, hookimpl

@hookimpl
def tapebus_register_consumers(context):
    def handle(batch):
        for event in batch:
            count = int(context.state.get("count", b"0")) + 1
            context.state["count"] = b"%d" % count
            context.emit("counted", {"n": count, "of": event.bus_seq}, cause=event)

    return [Consumer(name="counter", topics=["user_action"], handler=handle, mode="thread", start="first")]
"""
SMALL = {"initial_bytes": 65536, "seal_events": 150, "max_events": 1500}


def install(site: Path, name: str, source: str) -> None:
    """A plugin as pip would leave it in `site`."""
    (site / f"tapebus_{name}.py").write_text(source)
    info = site / f"tapebus_{name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tapebus-{name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[tapebus.plugins]\n{name} = tapebus_{name}\n")


def load(bus: Any, bursts: int, chance: random.Random) -> None:
    """Two producers with bursts of all sizes: quotes, actions that make derived events, and events that are refused."""
    with Publisher("elite_guard", endpoint=bus.acked) as first, Publisher("webapp", endpoint=bus.acked) as second:
        for _ in range(bursts):
            for publisher in (first, second):
                for _ in range(chance.choice((0, 1, 1, 2, 5, 30))):
                    number = publisher.stats()["published"]
                    wrong = chance.random() < 0.03
                    kind = "user_action" if chance.random() < 0.2 else "market_data"
                    data = {"user_id": "7", "action": "x"} if kind == "user_action" else quote(number)
                    assert publisher.publish(kind, {} if wrong else data, correlation_id=f"C{number % 20}")
            if chance.random() < 0.7:
                assert first.flush(30.0)
                assert second.flush(30.0)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory, where there is one: tens of thousands of images are written to it."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="tb-", dir=place))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def record(make_bus: Callable[..., Any], memory: Path, tmp_path: Path) -> Callable[..., Path]:
    """``record(sabotage="", store=...)``: a trace of the real bus under load."""

    def run(sabotage: str = "", store: dict[str, int] = SMALL, bursts: int = 120) -> Path:
        if not list(tmp_path.glob("*.dist-info")):
            install(tmp_path, "counter", COUNTER)
        settings = "\n".join(f"{key} = {value}" for key, value in store.items())
        bus = make_bus(["schema", "store", "counter"], f"[plugins.store]\n{settings}")
        bus.python_path = [str(tmp_path), str(HERE)]
        trace = memory / f"trace{sabotage}"
        bus.command = [sys.executable, str(HERE / "traced_bus.py"), str(bus.config_file), *filter(None, [sabotage])]
        bus.variables = {
            "LD_PRELOAD": str(built("record")),
            "RECORD_ROOT": str(bus.config_file.parent),
            "RECORD_TRACE": str(trace),
        }
        bus.start()
        load(bus, bursts, random.Random(7))
        assert bus.stop() == 0
        return trace

    return run


def examine(trace: Path, memory: Path, seed: int, count: int, store: dict[str, int] = SMALL) -> dict[str, Any]:
    """The findings over about `count` crash states of a trace, looked at by `PROCESSES` processes."""
    shares = []
    for number in range(PROCESSES):
        root = memory / f"{trace.name}.{number}"
        root.mkdir()
        orders = {
            "trace": str(trace),
            "root": str(root),
            "seed": seed * PROCESSES + number,
            "count": count // PROCESSES,
            "skip": 0,
            "config": store,
        }
        shares.append((root, orders, start_check(orders)))
    total: dict[str, Any] = {"states": 0, "different": 0, "violated": 0, "violations": []}
    for root, orders, process in shares:
        while True:
            out, errors = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode < 0, errors
            # killed by what it opened: the state counts as violated, the next ones are still looked at
            number, place = map(int, (root / "at").read_text().split())
            total["violated"] += 1
            total["violations"].append(f"state {number}, after call {place}: died of signal {-process.returncode}")
            process = start_check({**orders, "skip": number + 1})
        for key, value in json.loads(out).items():
            total[key] += value
    return total


def start_check(orders: dict[str, Any]) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(HERE), *sys.path])
    return subprocess.Popen(
        [sys.executable, str(HERE / "simcheck.py"), json.dumps(orders)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_whatever_a_power_cut_leaves_on_the_disk_holds_all_that_was_acknowledged(record, memory, seed, size, figures):
    trace = record()
    found = examine(trace, memory, seed, size(300, 10_000, 50_000))
    figures |= {key: found[key] for key in ("states", "different", "violated")}
    assert found["violations"] == [], f"the trace is kept as {shutil.copy(trace, BUILT / 'violated.trace')}"
    assert found["states"] >= size(250, 9_000, 45_000)


@pytest.mark.parametrize("sabotage", ["ack-first", "nosync", "nometasync"])
def test_the_simulated_disk_tells_a_careless_writer_from_a_careful_one(record, memory, seed, figures, sabotage):
    found = examine(record(sabotage, bursts=40), memory, seed, 150)
    figures |= {key: found[key] for key in ("states", "violated")}
    assert found["violated"] > 0

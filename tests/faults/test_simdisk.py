"""Power cuts on a simulated disk: whatever part of the unsynced writes survives, the promises of the bus hold."""

from __future__ import annotations

import errno
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
from fault_plugins import DERIVED, install
from preload import BUILT, DATA, SYNC, Faults, built

from bus_support import PATIENCE, quote, wait_until
from tapebus import Publisher

HERE = Path(__file__).parent
PROCESSES = 2
SMALL = {"initial_bytes": 65536, "seal_events": 150, "max_events": 1500}


class Load:
    """Two producers with bursts of all sizes: quotes, actions that make derived events, and events that are refused."""

    def __init__(self, bus: Any, faults: Faults) -> None:
        self.bus = bus
        self.faults = faults
        self.chance = random.Random(7)
        self.producers = [Publisher(source, endpoint=bus.acked) for source in ("elite_guard", "webapp")]

    def bursts(self, count: int, wait: bool = True) -> None:
        chance = self.chance
        for _ in range(count):
            for publisher in self.producers:
                for _ in range(chance.choice((0, 1, 1, 2, 5, 30))):
                    number = publisher.stats()["published"]
                    wrong = chance.random() < 0.03
                    kind = "user_action" if chance.random() < 0.2 else "market_data"
                    data = {"user_id": "7", "action": "x"} if kind == "user_action" else quote(number)
                    assert publisher.publish(kind, {} if wrong else data, correlation_id=f"C{number % 20}")
            if wait and chance.random() < 0.7:
                self.flush()

    def flush(self) -> None:
        for publisher in self.producers:
            assert publisher.flush(PATIENCE)

    def close(self) -> None:
        for publisher in self.producers:
            publisher.close()


def steady(load: Load) -> None:
    """Growing, sealing, merging and retention, and a clean end."""
    load.bursts(120)


def killed(load: Load) -> None:
    """Buses that are killed and started again; the page cache outlives them, the power cut comes later."""
    for _ in range(3):
        load.bursts(25)
        load.bursts(5, wait=False)
        load.bus.kill()
        load.bus.start()
    load.bursts(25)


def full(load: Load) -> None:
    """A disk that is full now and then."""
    for call in (DATA, SYNC, DATA | SYNC):
        load.bursts(20)
        load.faults.order(call, errno.ENOSPC, 1, times=1 << 30)
        load.bursts(5, wait=False)
        wait_until(lambda: load.faults.failed >= 2, "the disk to be full")
        load.faults.none()
        load.flush()
    load.bursts(20)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory, where there is one: tens of thousands of images are written to it."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="tb-", dir=place))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def record(make_bus: Callable[..., Any], memory: Path, tmp_path: Path) -> Callable[..., Path]:
    """``record(scenario, sabotage)``: a trace of the real bus under load."""

    def run(scenario: Callable[[Load], None], sabotage: str = "") -> Path:
        settings = "\n".join(f"{key} = {value}" for key, value in SMALL.items())
        bus = make_bus(["schema", "store", *DERIVED], f"[plugins.store]\n{settings}")
        install(bus, tmp_path / "plugins")
        bus.python_path.append(str(HERE))
        bus.command = [sys.executable, str(HERE / "traced_bus.py"), str(bus.config_file), *filter(None, [sabotage])]
        trace, faults = memory / "trace", Faults(tmp_path, bus.data_dir / "tape")
        bus.variables = {
            **faults.variables,
            "LD_PRELOAD": f"{built('record')}:{built('fail')}",
            "RECORD_ROOT": str(bus.config_file.parent),
            "RECORD_TRACE": str(trace),
        }
        load = Load(bus.start(), faults)
        try:
            scenario(load)
        finally:
            load.close()
            faults.close()
        assert bus.stop() == 0
        return trace

    return run


def examine(trace: Path, memory: Path, seed: int, count: int) -> dict[str, Any]:
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
            "config": SMALL,
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


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("scenario", [steady, killed, full])
def test_whatever_a_power_cut_leaves_on_the_disk_holds_all_that_was_acknowledged(
    record, memory, seed, size, figures, scenario
):
    trace = record(scenario)
    found = examine(trace, memory, seed, size(120, 3500, 17_500))
    figures |= {key: found[key] for key in ("states", "different", "violated")}
    assert found["violations"] == [], f"the trace is kept as {shutil.copy(trace, BUILT / 'violated.trace')}"
    assert found["states"] >= size(90, 3200, 16_500)


@pytest.mark.parametrize("sabotage", ["ack-first", "nosync", "nometasync"])
def test_the_simulated_disk_tells_a_careless_writer_from_a_careful_one(record, memory, seed, figures, sabotage):
    found = examine(record(lambda load: load.bursts(30), sabotage), memory, seed, 60)
    figures |= {key: found[key] for key in ("states", "violated")}
    assert found["violated"] > 0

"""Run for long at a steady rate with all plugins: memory and descriptors stay where they are, the books close."""

from __future__ import annotations

import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ledger import Checker
from producers import Producer, finish

from bus_support import wait_until

#: Events per second of each of the producers: 20,000 together.
RATE, SOURCES = 5000, ("elite_guard", "webapp", "mt5_adapter", "mt5_feed")
MB = 1e6


def sample(pid: int, begun: float) -> dict[str, float]:
    """What the process uses now. Resident pages of the tape's map belong to the page cache: `anon` is without them."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return {
        "at": time.monotonic() - begun,
        "rss": int(status["VmRSS"].split()[0]) * 1024 / MB,
        "anon": int(status["RssAnon"].split()[0]) * 1024 / MB,
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "cpu": (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
    }


def summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    """First, last and slope after a warm-up of a quarter of the time."""
    warm = samples[len(samples) // 4 :]
    slope, _ = statistics.linear_regression([each["at"] for each in warm], [each["anon"] for each in warm])
    return {
        "rss_mb": [round(warm[0]["rss"], 1), round(warm[-1]["rss"], 1)],
        "anon_mb": [round(warm[0]["anon"], 1), round(warm[-1]["anon"], 1)],
        "anon_mb_per_hour": round(slope * 3600, 1),
        "fds": [int(warm[0]["fds"]), int(max(each["fds"] for each in warm))],
        "cpu_s": round(samples[-1]["cpu"] - samples[0]["cpu"], 1),
    }


@pytest.mark.timeout(14400)
def test_memory_and_descriptors_stay_flat_at_a_steady_rate(make_bus, tmp_path, size, figures):
    seconds = size(8, 600, 3600)
    bus = make_bus().start()
    producers = [Producer(bus.acked, source, tmp_path, rate=RATE) for source in SOURCES]
    pause = threading.Event()
    samples: list[dict[str, float]] = []
    try:
        wait_until(lambda: all(each.acked for each in producers), "the first acknowledgements")
        begun = time.monotonic()
        already = sum(each.acked for each in producers)
        while time.monotonic() - begun < seconds:
            samples.append(sample(bus.process.pid, begun))
            pause.wait(seconds / 400 if seconds > 400 else 0.25)
        took = time.monotonic() - begun
        acked = sum(each.acked for each in producers) - already
        ends = finish(producers)
    finally:
        for each in producers:
            each.kill()
    found = summary(samples)
    stats = bus.stats()
    lag = max(stats["bus"]["last_seq"] - each["cursor"] for each in stats["consumers"])
    checker = Checker(bus.data_dir, [each.ledger for each in producers])
    checker.read_on()
    verdict = checker.verdict(stats)
    figures.update(
        seconds=round(took),
        events_per_s=round(acked / took),
        **found,
        lag_at_the_end=lag,
        bytes_per_event=stats["store"]["bytes_per_event"],
        blocks=[stats["store"]["blocks_hot"], stats["store"]["blocks_sealed"]],
        publish_us={name: max(end["publish_us"][name] for end in ends) for name in ("p50", "p99", "p99.9", "max")},
        **verdict.figures(),
    )
    assert not verdict.wrong, verdict
    assert found["fds"][1] <= found["fds"][0] + 2
    # the promise, whatever the load and however long
    assert samples[-1]["anon"] < 256
    if seconds > 60:
        assert found["anon_mb"][1] - found["anon_mb"][0] < 8, found
        # sealing keeps up with what arrives: some hundred commits a second would leave as many small blocks
        assert stats["store"]["blocks_hot"] < 8192, stats["store"]
    assert bus.stop() == 0

"""kill -9 and SIGSTOP at random times while four processes publish: what was acknowledged is on the tape, once."""

from __future__ import annotations

import random
import signal
import threading
import time
from typing import Any

import pytest
from ledger import Checker
from producers import Producer, finish

from bus_support import wait_until

#: Events per second of each producer; the last one has many events in flight when the bus dies.
RATES = {"elite_guard": 500, "webapp": 500, "mt5_adapter": 1000, "mt5_feed": 4000}
#: One kill in so many comes during a pause longer than the producers' patience.
LONG_PAUSE = 50


def first_ack_after(producers: list[Producer], moment: float) -> float:
    """The time at which the first producer learned of an acknowledgement after `moment`."""

    def found() -> float:
        moments = [each.ledger.read_on().acked_at for each in producers]
        return min((at for at in moments if at > moment), default=0.0)

    return float(wait_until(found, "an acknowledgement after the restart"))


def end_of_a_life(bus: Any, chance: random.Random) -> None:
    """Let the bus run for a moment, perhaps pause it, and kill it."""
    pause = threading.Event()
    pause.wait(chance.uniform(0.0, 0.5))
    if chance.random() < 0.3:
        bus.process.send_signal(signal.SIGSTOP)
        pause.wait(1.5 if chance.randrange(LONG_PAUSE) == 0 else chance.uniform(0.0, 0.2))
        if chance.random() < 0.7:
            bus.process.send_signal(signal.SIGCONT)
            pause.wait(chance.uniform(0.0, 0.1))
    bus.process.kill()
    bus.process.wait()


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(len(ordered) * part))], 3) for name, part in at.items()}


@pytest.mark.timeout(7200)
def test_nothing_acknowledged_is_lost_doubled_or_reordered_by_kills_and_pauses(
    make_bus, tmp_path, size, chance, figures
):
    bus = make_bus(["schema", "store"]).start()
    producers = [Producer(bus.acked, source, tmp_path, rate=rate) for source, rate in RATES.items()]
    ledgers = [each.ledger for each in producers]
    checker = Checker(bus.data_dir, ledgers)
    recoveries: list[float] = []
    cycles = size(6, 300, 1000)
    begun = time.monotonic()
    try:
        wait_until(lambda: all(each.acked for each in producers), "the first acknowledgements")
        for cycle in range(cycles):
            stopped = chance.choice(producers) if chance.random() < 0.2 else None
            if stopped is not None:
                stopped.pause()
            end_of_a_life(bus, chance)
            for each in ledgers:
                each.read_on()
            checker.read_on()
            verdict = checker.verdict()
            assert not verdict.wrong, (cycle, verdict)
            spawned = time.monotonic()
            bus.spawn()
            if stopped is not None:
                stopped.go_on()
            recoveries.append(first_ack_after(producers, spawned) - spawned)
        seconds = time.monotonic() - begun
        ends = finish(producers)
    finally:
        for each in producers:
            each.kill()
    whole = Checker(bus.data_dir, ledgers)
    whole.read_on()
    verdict = whole.verdict(bus.stats())
    figures.update(
        cycles=cycles,
        seconds_per_cycle=round(seconds / cycles, 2),
        **{f"first_ack_s_{name}": value for name, value in percentiles(recoveries).items()},
        publish_us_max=max(each["publish_us"]["max"] for each in ends),
        **verdict.figures(),
    )
    assert not verdict.wrong, verdict
    assert verdict.stored == sum(each["published"] for each in ends)
    assert bus.stop() == 0

"""kill -9 in the middle of a recorded day: the outcomes on the tape are those of a scan, none lost, none doubled."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from bus_support import PATIENCE, wait_until
from outcome_days import DAYS, Oracle, Published, make_orders, read_day, stream
from tapebus import Publisher, Tape

PIPS = {"EURUSD": Fraction(1, 10_000), "XAUUSD": Fraction(1, 10)}


def replay(bus: Any, events: Sequence[Published], file: Path) -> None:
    """Publish `events` with ``tapebus replay``; returns when all are on disk."""
    envelopes = [{"event_type": t, "timestamp": at, "source": "test", "data": data} for t, at, data in events]
    file.write_text("".join(json.dumps(each) + "\n" for each in envelopes))
    command = [sys.executable, "-m", "tapebus", "replay", str(file), "--speed", "max", "--endpoint", bus.acked]
    done = subprocess.run([*command, "--config", str(bus.config_file)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def publish(publisher: Publisher, events: Sequence[Published]) -> None:
    for event_type, timestamp, data in events:
        while not publisher.publish(event_type, data, timestamp=timestamp):
            publisher.flush(0.1)


def outcomes(bus: Any) -> list[dict[str, Any]]:
    with Tape.open(bus.data_dir) as tape:
        return [
            {name: getattr(event.data, name) for name in event.data.__struct_fields__}
            for event in tape.read(topics=["signal_outcome"])
        ]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", DAYS)
def test_the_outcomes_of_a_day_are_those_of_a_scan_over_kills(
    make_bus, shared_data, tmp_path, size, chance, figures, name
):
    day = read_day(shared_data / "ticks" / name)
    quotes, signals, kills = size((6_000, 300, 1), (len(day), 3_000, 20), (len(day), 10_000, 100))
    first = chance.randrange(len(day) - quotes + 1)
    day = day.part(first, first + quotes)
    day.cross(chance, quotes // 100)
    orders = make_orders(day, chance, signals)
    events = list(stream(day, orders))
    bus = make_bus(["schema", "store", "outcomes"]).start()
    step = len(events) // (kills + 2)
    replay(bus, events[:step], tmp_path / "first.jsonl")
    with Publisher("test", endpoint=bus.acked) as publisher:
        for number in range(1, kills + 1):
            middle = number * step + chance.randrange(step)
            publish(publisher, events[number * step : middle])
            bus.kill()  # with what was published last on its way
            publish(publisher, events[middle : (number + 1) * step])
            bus.start()
            assert publisher.flush(PATIENCE)  # or what waits would be more than it keeps, after a few kills
        publish(publisher, events[(kills + 1) * step :])
        assert publisher.flush(PATIENCE * 4)
    wait_until(lambda: len(outcomes(bus)) >= signals, "an outcome of every signal", PATIENCE * 4)
    bus.wait_for(lambda stats: all(each["lag_events"] == 0 for each in stats["consumers"]), "to have seen everything")
    assert bus.stop() == 0
    found = outcomes(bus)
    assert len(found) == len({each["signal_id"] for each in found}) == signals
    oracle, got = Oracle(day, PIPS[day.symbol], orders[0]), {each["signal_id"]: each for each in found}
    for order in orders:
        wanted = oracle.judge(order)
        assert not wanted.differences(got[order.signal_id], order.opened_at), (order, wanted)
    figures |= {"symbol": day.symbol, "quotes": quotes, "signals": signals, "kills": kills}

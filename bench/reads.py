"""What it costs to ask a long tape: ``python -m bench.reads [EVENTS] [--rounds N]``.

Every answer is compared with what was written. Times are of the process itself, in ms, the tape in the page cache:
the median, the 99th percentile and the longest of the rounds; ``first`` is asked right after opening the tape, ``warm``
again after that.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.longtape import BEGAN, PERIOD, PLACES, STEP_S, chain, correlation, health_ends, long_tape

from tapebus import Tape

LAST = 1000
Ask = Callable[[Tape, random.Random], list[int]]


def _of_signal(events: int) -> Ask:
    def ask(tape: Tape, draw: random.Random) -> list[int]:
        signal = draw.randrange(events // PERIOD)
        begun = time.perf_counter()
        found = [event.bus_seq for event in tape.read(correlation_id=correlation(signal))]
        _spent.append(time.perf_counter() - begun)
        return [] if found == chain(signal, events) else found

    return ask


def _newest(topic: str, expected: range) -> Ask:
    """`expected` are the places of the newest ones, or where they must lie if their places were drawn."""

    def ask(tape: Tape, draw: random.Random) -> list[int]:
        begun = time.perf_counter()
        found = [event.bus_seq for event in tape.read(topics=[topic], last=LAST)]
        _spent.append(time.perf_counter() - begun)
        exact = expected.step == PERIOD
        right = found == list(expected) if exact else len(found) == LAST and set(found) < set(expected)
        return [] if right and found == sorted(found) else found

    return ask


def _between(events: int) -> Ask:
    def ask(tape: Tape, draw: random.Random) -> list[int]:
        place = draw.randrange(events - LAST)
        since, until = BEGAN + (place - 0.5) * STEP_S, BEGAN + (place + LAST - 0.5) * STEP_S
        begun = time.perf_counter()
        found = [event.bus_seq for event in tape.read(since=since, until=until)]
        _spent.append(time.perf_counter() - begun)
        return [] if found == list(range(place + 1, place + 1 + LAST)) else found

    return ask


def _stats(tape: Tape, draw: random.Random) -> list[int]:
    begun = time.perf_counter()
    found = tape.stats()
    _spent.append(time.perf_counter() - begun)
    return [] if found["events"] == tape.last_seq else [found["events"]]


_spent: list[float] = []


def every(last: int, events: int) -> range:
    """At most `LAST` places a period apart; the newest is `last`, or where that lies in the last period of the tape."""
    newest = last if last > PERIOD else (events - last) // PERIOD * PERIOD + last
    return range(max(newest - (LAST - 1) * PERIOD, newest % PERIOD), newest + 1, PERIOD)


def asks(events: int) -> dict[str, Ask]:
    """What is asked of a tape of `events` events, by name; each returns what was wrong."""
    return {
        "correlation_id": _of_signal(events),
        "last 1,000 market_data": _newest("market_data", range(events - 2 * LAST, events + 1)),
        "last 1,000 user_action": _newest("user_action", range(events - 30 * PERIOD, events + 1)),
        "last 1,000 signal_generated": _newest("signal_generated", every(PLACES["signal_generated"] + 1, events)),
        "last 1,000 system_health, gone since": _newest("system_health", every(health_ends(events), events)),
        "since, until: 1,000 events": _between(events),
        "stats": _stats,
    }


def measure(data_dir: Path, events: int, rounds: int = 20) -> dict[str, dict[str, float]]:
    """Milliseconds by question: ``p50``, ``p99`` and ``max`` of ``first`` and ``warm``; and of opening the tape."""
    draw = random.Random(rounds)
    figures: dict[str, dict[str, float]] = {}
    opened = []
    for name, ask in asks(events).items():
        first, warm = [], []
        for _ in range(rounds):
            begun = time.perf_counter()
            tape = Tape.open(data_dir)
            opened.append(time.perf_counter() - begun)
            with tape:
                for into in (first, warm):
                    _spent.clear()
                    wrong = ask(tape, draw)
                    if wrong:
                        sys.exit(f"bench: {name}: the tape answers {wrong[:10]}")
                    into += _spent
        figures[name] = {**_figures("first", first), **_figures("warm", warm)}
    return {"open": {"once": round(opened[0] * 1e3, 2), **_figures("first", opened[1:])}, **figures}


def _figures(name: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(each * 1e3 for each in seconds)
    places = {"p50": len(ordered) // 2, "p99": len(ordered) * 99 // 100, "max": -1}
    return {f"{name}_{key}": round(ordered[place], 2) for key, place in places.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.reads", description=__doc__)
    parser.add_argument("events", type=int, nargs="?", default=10_000_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = measure(long_tape(options.events), options.events, options.rounds)
    if options.json:
        print(json.dumps(figures))
        return
    for name, each in figures.items():
        print(f"{name:38} " + "  ".join(f"{key} {value:8.2f}" for key, value in each.items()))


if __name__ == "__main__":
    main()

"""What a benchmark is, how large a run is, and the run itself: rounds in which all take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from statistics import median
from typing import Any

from bench.harness import Skipped, Wrong

#: Figures of one repetition; the end of each name is its unit.
Figures = dict[str, float]


@dataclass(frozen=True)
class Size:
    """How much of everything. Counts are events, times seconds."""

    name: str = "default"
    rounds: int = 3
    events: int = 1_000_000
    peer_events: int = 100_000
    peer_paced_events: int = 1_000
    topology_events: int = 300_000
    paced_events: int = 5_000
    idle_s: float = 10.0
    tape: tuple[int, ...] = (1_000_000, 10_000_000)
    queries: int = 60
    signals: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    batches: tuple[int, ...] = (1, 10, 100, 1000)
    shares: tuple[int, ...] = (20, 200, 2000)
    payloads: tuple[int, ...] = (100, 1000, 10_000)
    plugins: tuple[int, ...] = (1, 2, 5, 10, 20)


SIZES = {
    "default": Size(),
    "full": Size(
        "full",
        rounds=5,
        events=2_000_000,
        peer_events=300_000,
        topology_events=500_000,
        paced_events=10_000,
        tape=(1_000_000, 10_000_000, 50_000_000),
        queries=200,
    ),
    "quick": Size(
        "quick",
        rounds=1,
        events=200_000,
        peer_events=10_000,
        peer_paced_events=300,
        topology_events=50_000,
        paced_events=1_500,
        idle_s=3.0,
        tape=(200_000,),
        queries=20,
        signals=(100, 10_000),
        batches=(1, 100),
        shares=(20,),
        payloads=(100, 10_000),
        plugins=(5, 20),
    ),
    # for the tests of the harness itself: its figures say nothing
    "tiny": Size(
        "tiny",
        rounds=1,
        events=2_000,
        peer_events=1_000,
        peer_paced_events=20,
        topology_events=2_000,
        paced_events=100,
        idle_s=0.2,
        tape=(20_000,),
        queries=5,
        signals=(10,),
        batches=(1, 10),
        shares=(20,),
        payloads=(100,),
        plugins=(5, 6),
    ),
}


@dataclass(frozen=True)
class Bench:
    """One benchmark. `rounds`: it is repeated, in turn with the others; else it runs once."""

    name: str
    what: str
    run: Callable[[Size], Figures]
    rounds: bool = True


@dataclass
class Results:
    """Every repetition of every figure by ``benchmark.figure``, and what could not run or was wrong."""

    repetitions: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    #: Version, kind and promise of each peer that ran.
    peers: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, bench: str, figures: Figures) -> None:
        for name, value in figures.items():
            self.repetitions.setdefault(f"{bench}.{name}", []).append(value)

    def as_json(self) -> dict[str, Any]:
        figures = {
            name: {"unit": unit(name), "median": median(values), "best": best(name, values), "rounds": values}
            for name, values in self.repetitions.items()
        }
        return {"figures": figures, "skipped": self.skipped, "wrong": self.wrong, "peers": self.peers}


UNITS = {
    "events_per_s": "events/s",
    "commits_per_s": "commits/s",
    "mb_per_s": "MB/s",
    "us_per_event": "µs/event",
    "bytes_per_event": "B/event",
    "percent": "%",
    "ms": "ms",
    "us": "µs",
    "mb": "MB",
    "s": "s",
    "x": "×",
}


def unit(name: str) -> str:
    """The unit of a figure by the end of its name; empty for a plain count."""
    return next((sign for end, sign in UNITS.items() if name.endswith("_" + end) or name.endswith("." + end)), "")


def best(name: str, values: list[float]) -> float:
    """The highest rate, or else the lowest of what costs."""
    return max(values) if name.endswith("_per_s") else min(values)


def chosen(benches: Iterable[Bench], only: Iterable[str]) -> list[Bench]:
    """Those whose name is in `only` or begins with it, or fits it as a pattern; all of them without any."""
    wanted = list(only)
    return [
        each
        for each in benches
        if not wanted or any(each.name.startswith(name) or fnmatchcase(each.name, name) for name in wanted)
    ]


def run(benches: list[Bench], size: Size, tell: Callable[[str, str, Figures | str], None], results: Results) -> None:
    """Run all, round after round, so that a slow minute of the machine hits all alike.

    `tell(round, bench, figures or why there are none)` is called before (with an empty reason) and after each.
    """
    for number in range(size.rounds):
        for bench in benches:
            if bench.name in results.skipped or bench.name in results.wrong or (number and not bench.rounds):
                continue
            place = f"{number + 1}/{size.rounds}"
            tell(place, bench.name, "")
            begun = time.monotonic()
            try:
                figures = bench.run(size)
            except Skipped as reason:
                results.skipped[bench.name] = str(reason)
                tell(place, bench.name, f"skipped: {reason}")
            except Wrong as reason:
                results.wrong[bench.name] = str(reason)
                tell(place, bench.name, f"WRONG: {reason}")
            else:
                results.add(bench.name, figures)
                results.add(bench.name, {"took_s": time.monotonic() - begun})
                tell(place, bench.name, figures)

"""The tape: bytes at rest of the mix, and what it takes to open a long one and to ask it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.harness import Bus, Skipped, Wrong, drive, loads
from bench.load import DISTINCT, recorded
from bench.longtape import long_tape
from bench.plan import Bench, Figures, Size
from bench.producers import Load

from tapebus import Tape


def rest(size: Size) -> Figures:
    """The mix through the whole bus, then the tape as it lies there once upkeep has sealed and merged it."""
    with Bus() as bus:
        return at_rest(bus, loads(bus, "publisher", 2, size.events))


def rest_of(ticks: list[str]) -> Callable[[Size], Figures]:
    """The same with recorded quotes instead of those that walk at random, one after the other and none twice."""

    def run(size: Size) -> Figures:
        count = len(recorded(ticks, 1, min(size.events, DISTINCT)))
        with Bus() as bus:
            return at_rest(bus, loads(bus, "publisher", 1, count, ticks=ticks))

    return run


def at_rest(bus: Bus, sent: list[Load]) -> Figures:
    drive(bus, sent)
    store = bus.sealed()
    return {
        "bytes_per_event": store["bytes_per_event"],
        "raw_bytes_per_event": store["raw_bytes"] / store["events"],
        "index_bytes_per_event": store["index_bytes"] / store["events"],
        "file_bytes_per_event": store["bytes_on_disk"] / store["events"],
    }


def ask(events: int) -> Callable[[Size], Figures]:
    """Questions to a tape of `events` events, by a reader in this process; each answer is compared."""

    def run(size: Size) -> Figures:
        try:
            from bench.reads import measure
        except ImportError:
            raise Skipped("bench/reads.py is missing") from None
        path = long_tape(events)
        try:
            found = measure(path, events, size.queries)
        except SystemExit as error:
            raise Wrong(str(error)) from error
        with Tape.open(path) as tape:
            figures = {"bytes_per_event": tape.stats()["bytes_per_event"]}
        for question, times in found.items():
            for name, value in times.items():
                figures[f"{plain(question)}_{name}_ms"] = value
        with tempfile.TemporaryDirectory(prefix="tb-") as directory:
            # a bus writes on its tape, and the next run wants this one as it is
            copy = shutil.copytree(path, Path(directory) / "data")
            with Bus(standing=0, data_dir=copy) as bus:
                figures["ready_s"] = bus.ready_s
        return figures

    return run


def plain(question: str) -> str:
    """A question as part of the name of a figure."""
    return "_".join("".join(c if c.isalnum() else " " for c in question.replace(",", "")).split())


def length(events: int) -> str:
    """10_000_000 → ``10M``."""
    return f"{events // 1_000_000}M" if events % 1_000_000 == 0 else f"{events // 1000}k"


def benches(size: Size, ticks: list[str]) -> list[Bench]:
    """Bytes at rest, and the questions at each length that `size` names."""
    return [
        Bench("rest", "bytes an event of the mix takes once it is sealed", rest, rounds=False),
        *([Bench("rest-ticks", "the same with recorded quotes", rest_of(ticks), rounds=False)] if ticks else []),
        *(
            Bench(f"query-{length(events)}", f"questions to a tape of {events:,} events", ask(events), rounds=False)
            for events in size.tape
        ),
    ]

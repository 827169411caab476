"""The bus of a benchmark, in a process of its own as an operator runs it: ``python -m bench.bus CONFIG PROBES``.

It is the `Runtime` that ``tapebus run`` starts, with the probes as further plugins. On standard input it takes one
JSON object a line and answers with one.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bench.load import standing_signals
from bench.probes import KINDS, Probe, plugin

from tapebus import Config, Runtime, limits


class Answers:
    """One method for each request."""

    def __init__(self, runtime: Runtime, probes: list[Probe]) -> None:
        self.runtime = runtime
        self.probes = probes

    def stored(self, source: str) -> int:
        ring = self.runtime.ring
        books = (ring.account(index) for index in range(ring.n_producers))
        return sum(book.stored for book in books if book.source == source)

    def settle(self, stored: dict[str, int], ignore: list[str], patience: float) -> dict[str, Any]:
        """When so many events of each source were on the tape and through all consumers but `ignore`.

        Events that plugins derive take places on the tape as well: a cursor alone does not tell whose events
        are through.
        """
        tape, ring = self.runtime.tape, self.runtime.ring
        fences = [fence for fence in self.runtime.wiring.fences if fence.consumer.name not in ignore]
        deadline = time.monotonic() + patience
        while any(self.stored(source) < count for source, count in stored.items()):
            if time.monotonic() > deadline:
                found = {source: self.stored(source) for source in stored}
                return {"error": f"of {stored} events only {found} came to the tape"}
            time.sleep(0.001)
        last = ring.last_seq
        while tape.done_seq < last or min((fence.cursor for fence in fences), default=last) < last:
            if time.monotonic() > deadline:
                behind = {fence.consumer.name: fence.cursor for fence in fences if fence.cursor < last}
                return {"error": f"up to {last} events are on the tape, but these consumers stand at {behind}"}
            time.sleep(0.001)
        return {"at": time.monotonic(), "last": last}

    def open_signals(self, count: int) -> dict[str, Any]:
        """Put `count` signals on the bus that stay open."""
        for event_type, data, correlation_id in standing_signals(count):
            self.runtime.publish(event_type, data, correlation_id=correlation_id, source="opener")
        return {}

    def commits(self) -> dict[str, int]:
        return {"commits": self.runtime.tape.commits}

    def stats(self) -> dict[str, Any]:
        return self.runtime.stats()

    def probed(self) -> dict[str, Any]:
        return {probe.name: probe.figures() for probe in self.probes}

    def forget(self) -> dict[str, Any]:
        """Throw away what latency probes have noted so far."""
        for probe in self.probes:
            if hasattr(probe, "seconds"):
                probe.seconds.clear()
        return {}


def main(config_file: str, probes: str) -> None:
    config = Config.load(Path(config_file), environ={})
    made: list[Probe] = [KINDS[each.pop("kind")](**each) for each in json.loads(probes)]
    logging.basicConfig(level=logging.ERROR)
    limits.apply(config.bus.memory_limit_mb)
    with Runtime(config, plugins=[(probe.name, plugin(probe)) for probe in made]) as runtime:
        answers = Answers(runtime, made)
        print(json.dumps({"ready": time.monotonic()}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(getattr(answers, request.pop("cmd"))(**request)), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the harness, which closes standard input
    main(sys.argv[1], sys.argv[2])

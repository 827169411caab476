"""Producers in processes of their own, each with a ledger outside the bus.

``producers.py`` is run as a program by `Producer`. It publishes `event_of(source, n)` for n = 1, 2, 3 … until its
standard input ends, waits for the rest, and ends with what its publisher counted as the last line of the ledger.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from array import array
from pathlib import Path
from typing import Any

from ledger import Ledger, Writer, event_of

from tapebus import Publisher

#: What may be in flight, in events; less than a publisher holds, so that nothing is dropped.
WINDOW = 20_000
#: How often a paced producer wakes up, in seconds.
PACE_S = 0.01
CHUNK = 100
#: Seconds to wait for the bus at the end: an upper bound, never a claim about speed.
PATIENCE = 60.0


class Producer:
    """A producer process. `rate` is events per second, 0 as many as it can; `window` 0 never waits and so may drop."""

    def __init__(
        self,
        endpoint: str,
        source: str,
        directory: Path,
        *,
        rate: float = 0,
        window: int = WINDOW,
        count: int = 0,
        variables: dict[str, str] | None = None,
        stderr: Any = None,
    ) -> None:
        self.ledger = Ledger(directory / f"{source}.ledger", source)
        command = [sys.executable, __file__, "--endpoint", endpoint, "--source", source]
        command += ["--file", str(self.ledger.file), "--rate", str(rate), "--window", str(window)]
        command += ["--count", str(count)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TAPEBUS_")}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env={**environment, **(variables or {})}, stderr=stderr
        )

    @property
    def acked(self) -> int:
        return self.ledger.read_on().acked

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def ask_to_end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def join(self, patience: float = 2 * PATIENCE) -> dict[str, Any]:
        """Wait for the end that was asked for; the last line of the ledger."""
        code = self.process.wait(patience)
        assert code == 0, f"producer {self.ledger.source} ended with code {code}"
        end = self.ledger.read_on().end
        assert end is not None, f"producer {self.ledger.source} did not finish its ledger"
        return end

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def finish(producers: list[Producer]) -> list[dict[str, Any]]:
    """Let all of them end, with everything acknowledged; their last lines."""
    for each in producers:
        each.ask_to_end()
    return [each.join() for each in producers]


# -- the process ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("endpoint", str), ("source", str), ("file", str)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--count", type=int, default=0)
    options = parser.parse_args()
    # a signal to the whole group of processes is meant for the bus
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    Run(options, ended).run()


class Run:
    """What one producer process does; everything on its main thread."""

    def __init__(self, options: Any, ended: threading.Event) -> None:
        self.options = options
        self.ended = ended
        self.ledger = Writer(options.file)
        self.publisher = Publisher(options.source, endpoint=options.endpoint)
        self.published = self.noted = 0
        self.times = array("I")

    def run(self) -> None:
        pace = self._paced if self.options.rate else self._flat_out
        pace()
        self.publisher.flush(PATIENCE)
        self._note()
        stats = self.publisher.stats()
        self.publisher.close()
        self.ledger.line("end", json.dumps({**stats, "publish_us": self._latency()}))

    def _publish(self, count: int) -> None:
        publish, clock, source = self.publisher.publish, time.perf_counter_ns, self.options.source
        if self.options.count:
            count = min(count, self.options.count - self.published)
        first = self.published + 1
        self.ledger.line("publish", self.published + count)
        refused: list[int] = []
        for n in range(first, first + count):
            event_type, data, at, correlation = event_of(source, n)
            begun = clock()
            taken = publish(event_type, data, timestamp=at, correlation_id=correlation)
            took = clock() - begun
            if len(self.times) < 2_000_000:
                self.times.append(min(took, 0xFFFFFFFF))
            if not taken:
                refused.append(n)
        self.published += count
        for each in _ranges(refused):
            self.ledger.line("dropped", *each)

    def _note(self) -> int:
        """Write down how many events are acknowledged; how many are in flight."""
        stats = self.publisher.stats()
        if stats["acked"] > self.noted:
            self.noted = stats["acked"]
            self.ledger.line("acked", self.noted, time.monotonic())
        return int(stats["in_flight"])

    def _done(self) -> bool:
        return self.ended.is_set() or 0 < self.options.count <= self.published

    def _flat_out(self) -> None:
        pause = threading.Event()
        while not self._done():
            self._publish(CHUNK)
            while self._note() >= self.options.window > 0 and not self.ended.is_set():
                pause.wait(0.002)
        self._linger()

    def _paced(self) -> None:
        pause = threading.Event()
        due_at, owed = time.monotonic(), 0.0
        while not self._done():
            now = time.monotonic()
            # after a pause of the whole process there is no catching up
            owed = min(owed + (now - due_at) * self.options.rate, self.options.rate)
            due_at = now
            full = self._note() >= self.options.window > 0
            if owed >= 1 and not full:
                self._publish(int(owed))
                owed -= int(owed)
            pause.wait(PACE_S)
        self._linger()

    def _linger(self) -> None:
        """Keep the ledger up to date until told to end."""
        while not self.ended.wait(PACE_S):
            self._note()

    def _latency(self) -> dict[str, float]:
        """How long ``publish`` took, in microseconds."""
        ordered = sorted(self.times)
        if not ordered:
            return {}

        def at(part: float) -> float:
            return ordered[min(len(ordered) - 1, int(len(ordered) * part))] / 1000

        return {"p50": at(0.5), "p99": at(0.99), "p99.9": at(0.999), "max": ordered[-1] / 1000}


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges of consecutive ones."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and found[-1][1] == n - 1:
            found[-1] = (found[-1][0], n)
        else:
            found.append((n, n))
    return found


if __name__ == "__main__":
    main()

"""What every benchmark is made of: a bus on free ports, producers beside it, and the check of what came out."""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
from bench.load import SYMBOLS, digest_seen
from bench.producers import Load

from tapebus import Tape

ROOT = Path(__file__).parents[1]
PATIENCE = 300.0
#: Seconds without a change after which upkeep has nothing left to seal.
SEALED_S = 3.0
FIVE = ("schema", "store", "outcomes", "slots", "telegram")
STANDING = 200
#: What the bus calls the account of everybody who does not number his events.
UNNUMBERED = "unsequenced"


_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, be it by a kill that runs no ``finally``; Linux only."""
    with suppress(AttributeError):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Wrong(Exception):
    """A benchmark whose answer is not what it must be; its figures are worth nothing."""


class Skipped(Exception):
    """A benchmark that cannot run here, and why."""


class Child:
    """A process that is spoken to line by line."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", *arguments]
        self.name = arguments[0]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            preexec_fn=die_with_parent,  # nothing of ours outlives a run that is killed
        )
        self._rest = b""

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        # one that has ended is noticed when its answer is heard
        with suppress(BrokenPipeError):
            self.process.stdin.write(line.encode() + b"\n")

    def hear(self, patience: float = PATIENCE) -> str:
        """The next line; raises `Wrong` when the process ends or says nothing for so many seconds."""
        assert self.process.stdout is not None
        while b"\n" not in self._rest:
            if not select.select([self.process.stdout], [], [], patience)[0]:
                raise Wrong(f"{self.name} has said nothing for {patience:.0f} s")
            more = os.read(self.process.stdout.fileno(), 1 << 20)
            if not more:
                raise Wrong(f"{self.name} ended with code {self.process.wait()} before it answered")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def close(self, patience: float = 60.0) -> None:
        """End of input, then wait; a process that does not end is killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.close()


class Producer(Child):
    """A process that sends a `Load`; returns from the constructor at once, `ready` when it can start."""

    def __init__(self, load: Load) -> None:
        super().__init__("bench.producers", msgspec.json.encode(load).decode())
        self.load = load

    def ready(self) -> None:
        if (line := self.hear()) != "ready":
            raise Wrong(f"{self.name} said {line!r} instead of ready")

    def sent(self) -> None:
        """Wait until all of it is on its way for good."""
        if (line := self.hear()) != "sent":
            raise Wrong(f"{self.name} said {line!r} instead of sent")

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.hear())
        return found


class Bus(Child):
    """A bus with its own ports and data directory; `probes` are ``{"kind", "name", …}`` of `bench.probes`.

    `extra` is added to its configuration.
    """

    def __init__(
        self,
        probes: list[dict[str, Any]] | None = None,
        *,
        plugins: tuple[str, ...] = FIVE,
        standing: int = STANDING,
        data_dir: Path | None = None,
        drain_s: float = 5.0,
        commit_interval_ms: float = 0.0,
        extra: str = "",
    ) -> None:
        self._own = Path(tempfile.mkdtemp(prefix="tb-"))
        self.data_dir = data_dir or self._own / "data"
        with ExitStack() as held:
            ports = [held.enter_context(socket.socket()) for _ in range(3)]
            for each in ports:
                each.bind(("127.0.0.1", 0))
            feed, self.push, acked = (f"tcp://127.0.0.1:{each.getsockname()[1]}" for each in ports)
        self.ipc = f"ipc://{self._own}/i.sock"
        file = self._own / "bench.toml"
        file.write_text(
            f"[bus]\ndata_dir = {json.dumps(str(self.data_dir))}\ndrain_s = {drain_s}\n"
            f"commit_interval_ms = {commit_interval_ms}\n"
            f'[listen]\nfeed = "{feed}"\ningest = "{self.push}"\nacked = ["{acked}", "{self.ipc}"]\n'
            f"[plugins]\nenabled = {json.dumps(plugins)}\n{extra}"
        )
        begun = time.monotonic()
        super().__init__("bench.bus", str(file), json.dumps(probes or []))
        try:
            #: Seconds from the start of the process until it takes events.
            self.ready_s = json.loads(self.hear(60.0))["ready"] - begun
            if standing and "outcomes" in plugins:
                self.ask("open_signals", count=standing)
                self.settle({"tapebus": standing})
                self.quiet()
        except BaseException:
            self.kill()
            shutil.rmtree(self._own, ignore_errors=True)
            raise

    def __enter__(self) -> Bus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        shutil.rmtree(self._own, ignore_errors=True)

    def ask(self, cmd: str, **arguments: Any) -> Any:
        self.say(json.dumps({"cmd": cmd, **arguments}))
        answer = json.loads(self.hear())
        if isinstance(answer, dict) and "error" in answer:
            raise Wrong(answer["error"])
        return answer

    def settle(self, stored: dict[str, int], ignore: tuple[str, ...] = (), patience: float = PATIENCE / 2) -> float:
        """When (`time.monotonic`) so many events of each source were on disk and through all consumers."""
        at: float = self.ask("settle", stored=stored, ignore=ignore, patience=patience)["at"]
        return at

    def quiet(self) -> None:
        """Wait until nothing that plugins derive comes any more."""
        last = -1
        while last != (last := self.ask("settle", stored={}, ignore=(), patience=PATIENCE)["last"]):
            time.sleep(0.1)

    def sealed(self) -> dict[str, float]:
        """The figures of the store once upkeep has sealed what it can; it may leave a few events for later."""
        begun = changed = time.monotonic()
        store: dict[str, float] = {}
        while time.monotonic() - changed < SEALED_S:
            before, store = store, self.ask("stats")["store"]
            if store["blocks_hot"] == 0:
                break
            if before.get("blocks_hot") != store["blocks_hot"]:
                changed = time.monotonic()
            if changed - begun > PATIENCE:
                raise Wrong(f"after {PATIENCE:.0f} s {store['blocks_hot']} blocks are not sealed")
            time.sleep(0.2)
        return store

    def cpu(self) -> float:
        """Seconds of CPU the process has used so far, by the kernel's clock of that process."""
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def memory(self) -> dict[str, float]:
        """Resident megabytes now, at their highest, and now without what is mapped from files."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        fields = {name: line for name, _, line in (line.partition(":") for line in status.splitlines())}
        names = {"now": "VmRSS", "peak": "VmHWM", "private": "RssAnon"}
        return {key: int(fields[name].split()[0]) * 1024 / 1e6 for key, name in names.items()}


def loads(bus: Bus, kind: str, producers: int, count: int, **options: Any) -> list[Load]:
    """`producers` loads of together `count` events, each quoting symbols of its own as feeds do."""
    endpoint = bus.ipc if kind in ("publisher", "paced") else bus.push
    share = count // producers
    return [
        Load(
            kind,
            endpoint,
            share,
            f"bench-{number}",
            seed=number + 1,
            symbols=list(SYMBOLS[number::producers]),
            **options,
        )
        for number in range(producers)
    ]


def drive(bus: Bus, sent: list[Load], ignore: tuple[str, ...] = ()) -> dict[str, float]:
    """Let producers send, wait until all of it is on disk and through all plugins, check it, and sum up.

    The clock runs from the word to start until the last event is through the last consumer (but `ignore`).
    """
    total = sum(load.count for load in sent)
    numbered = sent[0].kind == "publisher"
    expected = {load.source: load.count for load in sent} if numbered else {UNNUMBERED: total}
    before = {source: bus.ask("stored", source=source) for source in expected}
    producers: list[Producer] = []
    try:
        for load in sent:
            producers.append(Producer(load))
        for each in producers:
            each.ready()
        cpu, begun = bus.cpu(), time.monotonic()
        for each in producers:
            each.say("go")
        for each in producers:
            each.sent()  # no question disturbs the bus before that
        end = bus.settle({source: before[source] + count for source, count in expected.items()}, ignore)
        cpu = bus.cpu() - cpu
        results = [each.result() for each in producers]
    finally:
        for each in producers:
            each.close()
    digests = {load.source: (load.count, result["digest"]) for load, result in zip(sent, results, strict=True)}
    check_books(bus)
    check_tape(bus.data_dir, digests)
    check_probes(bus, digests)
    return {
        "events_per_s": total / (end - begun),
        "bus_cpu_us_per_event": cpu / total * 1e6,
        "rss_peak_mb": bus.memory()["peak"],
    }


def check_books(bus: Bus) -> None:
    """Nothing was refused, dropped or is unexplained, and no consumer has failed."""
    stats = bus.ask("stats")
    figures = stats["bus"]
    for name in ("rejected", "dropped", "dead_letters", "unexplained", "lost"):
        if figures[name]:
            raise Wrong(f"the bus reports {name} {figures[name]}")
    for consumer in stats["consumers"]:
        if consumer["errors"] or consumer["state"] != "running":
            raise Wrong(f"consumer {consumer['name']} is {consumer['state']} with {consumer['errors']} errors")


def check_tape(data_dir: Path, expected: dict[str, tuple[int, int]]) -> None:
    """Read the whole tape back: each producer's events are there, once, in order, with the values they had."""
    found = dict.fromkeys(expected, (0, 0))
    with Tape.open(data_dir) as tape:
        for event in tape.read():
            source = event.source
            if source in found:
                count, digest = found[source]
                found[source] = count + 1, digest_seen(digest, event)
    compare(found, expected, "on the tape")


def check_probes(bus: Bus, expected: dict[str, tuple[int, int]]) -> None:
    """What tallies have seen is what was sent."""
    for name, figures in bus.ask("probed").items():
        if "seen" in figures:
            compare({source: tuple(seen) for source, seen in figures["seen"].items()}, expected, f"in {name}")


def compare(found: dict[str, Any], expected: dict[str, tuple[int, int]], where: str) -> None:
    for source, (count, digest) in expected.items():
        seen = found.get(source, (0, 0))
        if seen[0] != count:
            raise Wrong(f"{seen[0]:,} of {count:,} events of {source} {where}")
        if seen[1] != digest:
            raise Wrong(f"the {count:,} events of {source} {where} are not what was sent, or not in that order")

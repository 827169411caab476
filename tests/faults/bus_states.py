"""The eight states of a bus that a publisher may meet, and the process that publishes into them.

As a program: ``bus_states.py ENDPOINT CALLS ODD CONNECTS SPOOL_DIR``. It publishes one event (and waits until the bus
has it, if CONNECTS), says ``ready``, waits for a line, publishes, says what that cost, waits for another line,
and then exits or first flushes. With a SPOOL_DIR that is not empty it publishes through a spool.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

PATIENCE = 60.0
STATES = ("up", "absent", "killed", "stopped", "no accept", "no handshake", "zero credit", "disk full")
BURST, PAUSE_S = 200, 0.002
DISK_MB = 16


class State(NamedTuple):
    """A bus before its fault. ``mend`` is ``None`` where the bus can never take the events."""

    endpoint: str
    connects: bool
    fault: Callable[[], None]
    mend: Callable[[], None] | None
    bus: Any = None


def nothing() -> None:
    pass


@contextlib.contextmanager
def entering(name: str, make_bus: Callable[..., Any]) -> Iterator[State]:
    """The state `name` on a real bus where a real one can get into it."""
    if name in ("up", "killed", "stopped"):
        bus = make_bus(["schema", "store"]).start()
        fault, mend = {
            "up": (nothing, nothing),
            "killed": (bus.kill, bus.start),
            "stopped": (
                lambda: bus.process.send_signal(signal.SIGSTOP),
                lambda: bus.process.send_signal(signal.SIGCONT),
            ),
        }[name]
        yield State(bus.acked, True, fault, mend, bus)
    elif name == "disk full" and os.geteuid() == 0:
        with full_disk(make_bus) as state:
            yield state
    elif name in ("zero credit", "disk full"):
        from scripted_bus import Bus

        bus = Bus()

        def close() -> None:
            bus.credit = (0, 0)

        def reopen() -> None:
            bus.credit = (4096, 1 << 20)

        if name == "zero credit":
            close()
        yield State(bus.endpoint, name == "disk full", close, reopen, bus)
        bus.kill()
    else:
        with socket.socket() as listener, contextlib.ExitStack() as held:
            listener.bind(("127.0.0.1", 0))
            endpoint = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            if name == "absent":
                listener.close()
            else:
                listener.listen(16)
            if name == "no handshake":
                held.enter_context(silent(listener))
            yield State(endpoint, False, nothing, None)


@contextlib.contextmanager
def silent(listener: socket.socket) -> Iterator[None]:
    """Accepts whoever comes and never says a word."""
    import threading

    taken: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(listener.accept()[0])

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for each in taken:
            each.close()


@contextlib.contextmanager
def full_disk(make_bus: Callable[..., Any]) -> Iterator[State]:
    """A real bus on a small tmpfs, which a file fills."""
    bus = make_bus(["schema", "store"])
    bus.data_dir.mkdir(mode=0o700)
    options = f"size={DISK_MB}m,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(bus.data_dir)], check=True)
    try:
        bus.start()
        filler = bus.data_dir / "filler"

        def fill() -> None:
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))

        yield State(bus.acked, True, fill, filler.unlink, bus)
    finally:
        if bus.process is not None:
            bus.kill()
        subprocess.run(["umount", "-l", str(bus.data_dir)], check=True)


class Child:
    """One publishing process."""

    def __init__(self, state: State, calls: int, odd: int = 0, spool_dir: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, state.endpoint, str(calls), str(odd), str(int(state.connects)), spool_dir],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def signal_data(n: int) -> dict[str, Any]:
    """A signal as the generator makes it."""
    return {
        "signal_id": f"ELITE_GUARD_EURUSD_{n}",
        "symbol": "EURUSD",
        "direction": "BUY",
        "confidence": 87.5,
        "pattern_type": "LIQUIDITY_SWEEP_REVERSAL",
        "entry": 1.09125,
        "sl": 1.08995,
        "tp": 1.09515,
        "stop_pips": 13.0,
        "target_pips": 39.0,
        "session": "LONDON",
        "timeframe": "M5",
    }


def percentiles(spent_ns: list[int]) -> dict[str, float]:
    """p50, p99, p99.9 and the longest, in µs."""
    ordered = sorted(spent_ns) or [0]
    last = len(ordered) - 1
    named = (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))
    return {name: round(ordered[int(last * q)] / 1000, 2) for name, q in named}


def main(endpoint: str, calls: str, odd: str, connects: str, spool_dir: str) -> None:
    from tapebus import Publisher

    options = {"spool": "crash", "spool_dir": spool_dir} if spool_dir else {}
    pub = Publisher("spooling" if spool_dir else "plain", endpoint, **options)
    first = pub.publish("signal_generated", signal_data(0), correlation_id="0")
    if int(connects):
        assert pub.flush(PATIENCE)
    say = json.dumps
    print(say({"ready": True}), flush=True)
    sys.stdin.readline()
    clock, rng, kept = time.perf_counter_ns, random.Random(1), int(first)
    spent: list[int] = []
    spent_on_odd: list[int] = []
    odd_at = set(rng.sample(range(int(calls)), int(odd))) if int(odd) else set()
    wrong = 0
    for n in range(1, int(calls) + 1):
        data, broken = signal_data(n), n - 1 in odd_at
        if broken:
            data["broken"] = object()
        begun = clock()
        taken = pub.publish("signal_generated", data, correlation_id=data["signal_id"])
        (spent_on_odd if broken else spent).append(clock() - begun)
        kept += taken
        wrong += taken and broken
        if n % BURST == 0:
            time.sleep(PAUSE_S)
    cost = {"us": percentiles(spent), "odd_us": percentiles(spent_on_odd)}
    print(say({**cost, "kept": kept, "wrong": wrong, "stats": pub.stats()}), flush=True)
    if sys.stdin.readline() == "flush\n":
        print(say({"flushed": pub.flush(PATIENCE), "stats": pub.stats()}), flush=True)
        sys.stdin.readline()
    print(say({"at": time.monotonic()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

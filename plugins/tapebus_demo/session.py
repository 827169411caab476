"""One demo from start to end: a bus in this process, its producers in others, and what they did."""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import msgspec

from tapebus import Config, Runtime
from tapebus.errors import TapebusError
from tapebus.replay import Recording
from tapebus_demo import results
from tapebus_demo.child import Order
from tapebus_demo.probe import LatencyProbe
from tapebus_demo.trading import TERMINAL, USER

#: Per second of the session: quotes, signals, messages of the unsequenced program; and the burst's events.
QUOTES, SIGNALS, VIEWS, BURST = 1600, 9, 20, 20_000
BURST_PROCESSES = 2
#: Seconds that open signals get to end after the last one was made, longer than one lives.
SETTLE_S = 6.0
#: Seconds a process may take to get ready, and the bus to catch up.
PATIENCE_S = 20.0
PLUGINS = ("schema", "store", "outcomes", "slots", "analytics", "telegram")

Show = Callable[[str, dict[str, Any]], None]


class Options(msgspec.Struct, frozen=True):
    """``seconds``: length of the paced part; ``ticks``: a recording to play instead of simulated prices."""

    seconds: float = 12.0
    seed: int = 7
    ticks: str = ""
    keep: bool = False


class Process:
    """One producer process; ends with its stdin, whatever happens to this process."""

    def __init__(self, order: Order) -> None:
        self.role = order.role
        self.account: dict[str, Any] = {}
        command = [sys.executable, "-m", "tapebus_demo.producer", msgspec.json.encode(order).decode()]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
        # A group of its own: Ctrl-C is for the demo, which ends its processes in order.
        self._popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, process_group=0
        )
        self._in, self._out = cast(IO[bytes], self._popen.stdin), cast(IO[bytes], self._popen.stdout)

    def _line(self, seconds: float) -> dict[str, Any]:
        if not select.select([self._out], [], [], seconds)[0]:
            raise TapebusError(f"demo: the {self.role} process gives no answer after {seconds:g} s; try again")
        line = self._out.readline()
        if not line:
            raise TapebusError(f"demo: the {self.role} process ended early with code {self._popen.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def wait_ready(self) -> None:
        self._line(PATIENCE_S)

    def go(self) -> None:
        self._in.write(b"go\n")
        self._in.flush()

    def done(self) -> bool:
        """Whether its account can be read without waiting."""
        return bool(select.select([self._out], [], [], 0)[0])

    def finish(self) -> dict[str, Any]:
        """Let it end and take its account."""
        self._in.close()
        self.account = self._line(PATIENCE_S)
        self._popen.wait(PATIENCE_S)
        self._out.close()
        return self.account

    def hang_up(self) -> None:
        """Tell it to end; safe to call at any time."""
        try:
            self._in.close()
        except BrokenPipeError:
            pass

    def abandon(self) -> None:
        """See it end, without its account; safe to call at any time."""
        self.hang_up()
        try:
            self._popen.wait(2.0)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._out.close()


class Session:
    """Everything one demo starts. `show` is called a few times a second with the phase and the statistics."""

    def __init__(self, options: Options, show: Show) -> None:
        self.options = options
        self._show = show
        self._processes: list[Process] = []
        self._pause = threading.Event()
        self.directory = Path(tempfile.mkdtemp(prefix="tapebus-demo-"))
        self.probe = LatencyProbe()
        self.slots_peak = 0
        self.caught_up_s = 0.0
        self._interrupted = False

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_processes()
        if not self.options.keep:
            shutil.rmtree(self.directory, ignore_errors=True)

    def run(self) -> dict[str, Any]:
        """Play the session and return its summary; raises `TapebusError`."""
        began = time.monotonic()
        if self.options.ticks:
            _check_recording(self.options.ticks)
        self.config_file = self._write_config()
        self.config = Config.load(self.config_file, environ={})
        # Producers of the demo break things on purpose; what the bus says to that stands in the summary.
        logging.getLogger("tapebus").setLevel(logging.ERROR)
        self.runtime = Runtime(self.config, plugins=[("latency", self.probe)])
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            with self.runtime:
                try:
                    self._play()
                finally:
                    # While the bus still runs: a producer that cannot reach it would wait before it ends.
                    self._end_processes()
                self.stats = self.runtime.stats()
        finally:
            signal.signal(signal.SIGINT, before)
        return results.summarise(self, time.monotonic() - began)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        # what is raised inside a finalizer is lost, so the next look at the figures asks as well
        self._interrupted = True
        raise KeyboardInterrupt

    def accounts(self, role: str) -> list[dict[str, Any]]:
        return [each.account for each in self._processes if each.role == role]

    def _end_processes(self) -> None:
        for process in self._processes:
            process.hang_up()
        for process in self._processes:
            process.abandon()

    # -- phases ----------------------------------------------------------------------------------

    def _play(self) -> None:
        options = self.options
        self._acked, feed = self.config.acked_endpoints[0], self.config.listen.feed
        burst = [
            self._start("burst", self._acked, feed, 1000 + n, int(BURST * options.seconds / BURST_PROCESSES))
            for n in range(BURST_PROCESSES)
        ]
        market = self._start("market", self._acked, feed, 0, QUOTES)
        signals = self._start("signals", self._acked, feed, 1, SIGNALS)
        terminal = self._start("terminal", self._acked, feed, 2)
        webapp = self._start("webapp", self.config.listen.ingest, feed, 3, VIEWS)
        for process in self._processes:
            process.wait_ready()
        for process in (terminal, market, signals, webapp):
            process.go()
        self._watch("market session", options.seconds, lambda: False)
        for process in (signals, webapp):
            process.finish()
        self._watch("signals ending", SETTLE_S, self._all_ended)
        for process in (market, terminal):
            process.finish()
        for process in burst:
            process.go()
        # Looked at often: how long the plugins took after the last event is one of the results.
        self._watch("flat out", PATIENCE_S, lambda: all(process.done() for process in burst), every=0.02)
        self._catch_up()
        for process in burst:
            process.finish()

    def _start(self, role: str, endpoint: str, feed: str, seed: int, amount: int = 0) -> Process:
        options = self.options
        ticks = os.path.abspath(options.ticks) if options.ticks and role == "market" else ""
        order = Order(role, endpoint, feed, options.seed + seed, amount, options.seconds + SETTLE_S, ticks)
        process = Process(order)
        self._processes.append(process)
        return process

    def _all_ended(self) -> bool:
        return bool(self.runtime.stats()["plugins"]["outcomes"]["metrics"]["open"] == 0)

    def _watch(self, phase: str, seconds: float, ended: Callable[[], bool], every: float = 0.25) -> None:
        """Show figures until `seconds` have passed or `ended` says so."""
        deadline = time.monotonic() + seconds
        while True:
            if self._interrupted:
                raise KeyboardInterrupt
            stats = self.runtime.stats()
            used = int(str(stats["plugins"]["slots"]["metrics"]["slots"]).partition("/")[0])
            self.slots_peak = max(self.slots_peak, used)
            self._show(phase, stats)
            left = deadline - time.monotonic()
            if left <= 0 or ended():
                return
            self._pause.wait(min(every, left))

    def _catch_up(self) -> None:
        """Wait until every plugin has seen everything."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            stats = self.runtime.stats()
            bus = stats["bus"]
            if bus["received"] == bus["stored"] and not any(each["lag_events"] for each in stats["consumers"]):
                break
            self._pause.wait(0.005)
        self.caught_up_s = time.monotonic()

    # -- set-up ----------------------------------------------------------------------------------

    def _write_config(self) -> Path:
        feed, ingest, acked = _free_ports(3)
        path = self.directory / "tapebus.toml"
        path.write_text(
            f"""[bus]
data_dir = "data"
stats_s = 0

[listen]
feed = "tcp://127.0.0.1:{feed}"
ingest = "tcp://127.0.0.1:{ingest}"
acked = "tcp://127.0.0.1:{acked}"

[plugins]
enabled = {json.dumps(PLUGINS)}

[plugins.slots]
auto_fire = true
risk_pct = 1.0
max_total_open_risk_pct = 10.0
user_id = "{USER}"
accounts = {{ {TERMINAL} = "{USER}" }}
"""
        )
        return path


def _check_recording(path: str) -> None:
    """One clear line before anything is started; raises `TapebusError`."""
    first = next((each for each in Recording(Path(path)) if each.event_type == "market_data"), None)
    if first is None:
        raise TapebusError(f"{path}: holds no quotes; give a tick recording")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]

"""Fixtures shared by all tests: recorded data, private directories, free ports and a real bus process."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
#: Seconds: an upper bound for a loaded machine, never a claim about speed.
PATIENCE = 30.0

# a busy machine is no reason to fail
settings.register_profile("tapebus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tapebus")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--faults", choices=("quick", "long", "full"), default="quick", help="size of the fault tests")
    group.addoption("--seed", type=int, default=None, help="repeat the chances of a fault test")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The figures that fault tests measured, one line a test; they come from workers as well."""
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, [])]
    lines = [
        f"{report.nodeid.rpartition('::')[2]}: " + ", ".join(f"{key} {value}" for key, value in found.items())
        for report in reports
        for name, found in report.user_properties
        if name == "figures" and found
    ]
    if lines and terminalreporter.config.getoption("--faults") != "quick":
        terminalreporter.section("figures")
        terminalreporter.write("\n".join(lines) + "\n")


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    """Fail a test that leaves a thread behind which would keep the interpreter from exiting."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"thread {thread.name!r} is still running: something was not closed"


@pytest.fixture(autouse=True, scope="session")
def nothing_leaks() -> Iterator[None]:
    """Under the leak sanitizer (``make asan``): memory that nothing points to any more is a failure."""
    yield
    if os.environ.get("TAPEBUS_SANITIZE"):
        gc.collect()
        check = getattr(ctypes.CDLL(None), "__lsan_do_recoverable_leak_check")
        assert check() == 0, "memory was leaked: see the sanitizer's report"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The recorded events, ticks and wire captures, which are not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no recorded data: ../shared/data is absent")
    return SHARED_DATA


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A private directory with a path short enough for ipc sockets, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp" if os.access("/tmp", os.W_OK) else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def free_ports() -> Callable[[int], list[int]]:
    """``free_ports(n)``: loopback TCP ports that nobody listens on."""

    def find(count: int = 1) -> list[int]:
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in range(count)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            return [each.getsockname()[1] for each in sockets]

    return find


class Bus:
    """A ``tapebus run`` process on its own ports and data directory; may be killed and started again."""

    def __init__(self, directory: Path, ports: Sequence[int], plugins: Sequence[str], extra: str = "") -> None:
        self.data_dir = directory / "data"
        self.config_file = directory / "tapebus.toml"
        self.log = directory / "bus.log"
        self.feed, self.ingest, self.acked = (f"tcp://127.0.0.1:{port}" for port in ports)
        self.config_file.write_text(
            f"[bus]\ndata_dir = {json.dumps(str(self.data_dir))}\n"
            f'[listen]\nfeed = "{self.feed}"\ningest = "{self.ingest}"\nacked = "{self.acked}"\n'
            f"[plugins]\nenabled = {json.dumps(list(plugins))}\n{extra}\n"
        )
        self.python_path: list[str] = []
        #: What is run, and variables it gets on top of those of the test.
        self.command = [sys.executable, "-m", "tapebus", "run", "--config", str(self.config_file)]
        self.variables: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Any:
        from tapebus.config import Config

        return Config.load(self.config_file, environ={})

    def environ(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TAPEBUS_")}
        path = [*self.python_path, *filter(None, [kept.get("PYTHONPATH")])]
        if path:
            kept["PYTHONPATH"] = os.pathsep.join(path)
        return kept | self.variables

    def start(self) -> Bus:
        """Start the process and return once it answers on its control socket."""
        self.spawn()
        self.wait_for(lambda stats: True, "to answer on its control socket")
        return self

    def spawn(self) -> Bus:
        """Start the process and wait for nothing."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environ(),
                cwd=self.data_dir.parent,
            )
        return self

    def request(self, command: str, **arguments: Any) -> Any:
        """One command to the control socket."""
        from tapebus.control import request

        return request(self.config, {"cmd": command, **arguments})

    def stats(self) -> Any:
        return self.request("stats")

    def consumer(self, name: str) -> Any:
        """The line of one consumer in ``stats``."""
        return next(each for each in self.stats()["consumers"] if each["name"] == name)

    def wait_for(self, condition: Callable[[Any], bool], what: str) -> Any:
        """Ask for ``stats`` until `condition` holds; fail with the log when it never does or the bus ends."""
        from tapebus.errors import TapebusError

        assert self.process is not None
        deadline = time.monotonic() + PATIENCE
        stats: Any = None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"the bus ended with code {self.process.returncode}:\n{self.output()}")
            try:
                stats = self.stats()
                if condition(stats):
                    return stats
            except TapebusError:
                pass
            try:
                self.process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
        pytest.fail(f"waited in vain for the bus {what}; last stats: {stats}\n{self.output()}")

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""

    def stop(self) -> int:
        """Ask the bus to finish, as a service manager does; its exit code."""
        return self.end(signal.SIGTERM)

    def kill(self) -> None:
        """End the process without any chance to tidy up."""
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals, patience: float = PATIENCE) -> int:
        """Send `number` and wait for the end of the process; its exit code."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        try:
            return process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"the bus did not end on {number.name}:\n{self.output()}")


@pytest.fixture
def make_bus(data_dir: Path, free_ports: Callable[[int], list[int]]) -> Iterator[Callable[..., Bus]]:
    """``make_bus(plugins=[...], extra="toml")``: a `Bus` not started yet; all are ended after the test."""
    made: list[Bus] = []

    def make(
        plugins: Sequence[str] = ("schema", "store", "outcomes", "slots", "analytics", "alerts", "telegram"),
        extra: str = "",
    ) -> Bus:
        directory = data_dir / str(len(made))
        directory.mkdir()
        made.append(Bus(directory, free_ports(3), plugins, extra))
        return made[-1]

    yield make
    for each in made:
        if each.process is not None:
            each.kill()


@pytest.fixture
def embed(data_dir: Path, free_ports: Callable[[int], list[int]]) -> Iterator[Callable[..., Any]]:
    """``embed(plugins, ("name", object), …, extra="toml")``: a started bus in this process, stopped after the test.

    A second call with ``again=`` a former one starts on the same data directory and ports.
    """
    from bus_support import Embedded
    from tapebus.config import Config

    made: list[Any] = []

    def make(
        names: Sequence[str],
        *plugins: tuple[str, Any],
        extra: str = "",
        bus: str = "",
        listening: str = "",
        again: Any = None,
    ) -> Any:
        if again is None:
            listen = [f"tcp://127.0.0.1:{port}" for port in free_ports(3)]
            directory = data_dir / f"data{len(made)}"
        else:
            listen, directory = [again.feed, again.ingest, again.acked], again.data_dir
        file = data_dir / f"tapebus{len(made)}.toml"
        file.write_text(
            f"[bus]\ndata_dir = {json.dumps(str(directory))}\npublish_heartbeat = false\n{bus}\n"
            f'[listen]\nfeed = "{listen[0]}"\ningest = "{listen[1]}"\nacked = "{listen[2]}"\n{listening}\n'
            f"[plugins]\nenabled = {json.dumps(list(names))}\n{extra}\n"
        )
        made.append(Embedded(Config.load(file, environ={}), list(plugins)))
        return made[-1].start()

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def bus(make_bus: Callable[..., Bus]) -> Bus:
    """A running bus with the five built-in plugins."""
    return make_bus().start()

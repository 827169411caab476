"""The peers of the benchmark: each gives a checked answer or says why it cannot, and a wrong answer is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from zlib import crc32

import msgspec
import pytest

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench.load import envelope, mix  # noqa: E402
from bench.peers import PEERS, Peer, Skipped, Wrong, in_process, jetstream, redis_streams  # noqa: E402
from bench.peers.peer import Ledger, percentiles  # noqa: E402
from bench.peers.processes import Producers, server  # noqa: E402

from bus_support import wait_until  # noqa: E402

BY_NAME = {peer.name: peer for peer in PEERS}
#: What the packages of the tests are enough for; the others run where they are installed.
HERE = ["pyzmq", "pyzmq-batches", "sqlite-normal", "sqlite-full", "simplequeue", "pluggy"]
MAYBE = [name for name in BY_NAME if name not in HERE]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}


def answer(peer: Peer, count: int) -> dict:
    assert peer.version
    return peer.throughput(count)


@pytest.mark.parametrize("name", HERE)
def test_a_peer_handles_every_event_it_was_sent(name):
    found = answer(BY_NAME[name], 1_001)
    assert found["events_per_s"] > 0 and found["checked"] and found["settings"]


@pytest.mark.parametrize("name", MAYBE)
def test_a_peer_that_may_be_absent_gives_a_checked_answer_or_the_reason(name):
    try:
        found = answer(BY_NAME[name], 1_001)
    except Skipped as reason:
        assert "not installed" in str(reason) or "cannot be imported" in str(reason)
        pytest.skip(str(reason))
    assert found["events_per_s"] > 0 and found["checked"] and found["settings"]


@pytest.mark.parametrize("name", ["pyzmq", "sqlite-normal"])
def test_a_latency_is_of_every_event_from_publish_to_handler(name):
    found = BY_NAME[name].latency(50)
    assert 0 < found["p50_ms"] <= found["p99_ms"]


def test_every_peer_names_its_kind_and_its_promise_once():
    assert len(BY_NAME) == len(PEERS)
    assert all(peer.kind in ("durable", "memory", "in-process") and peer.promise for peer in PEERS)


# -- wrong answers ----------------------------------------------------------------------------------------------------


def frames(source: str) -> list[bytes]:
    return [msgspec.msgpack.encode(envelope(event, source)) for event in mix(1, 20)]


def sent(*sources: str) -> dict[str, tuple[int, int]]:
    return {source: (20, crc32(b"".join(frames(source)))) for source in sources}


@pytest.fixture
def both(monkeypatch):
    """The events of two producers; every event the same moment, so that encoding them again gives the same bytes."""
    monkeypatch.setattr("bench.load.time.time", lambda: 1_763_700_000.0)
    return frames("a"), frames("b")


def ledger(*handled: list[bytes]) -> Ledger:
    out = Ledger()
    out.handled = [raw for each in handled for raw in each]
    return out


def test_producers_may_be_mixed_in_any_way_that_keeps_the_order_of_each(both):
    a, b = both
    ledger(b, a).check(sent("a", "b"))
    ledger([raw for pair in zip(a, b, strict=True) for raw in pair]).check(sent("a", "b"))


def lose(a: list[bytes]) -> list[bytes]:
    return a[:7] + a[8:]


def double(a: list[bytes]) -> list[bytes]:
    return [*a[:8], *a[7:]]


def replace(a: list[bytes]) -> list[bytes]:
    return [*a[:7], a[6], *a[8:]]


def swap(a: list[bytes]) -> list[bytes]:
    return [*a[:7], a[8], a[7], *a[9:]]


@pytest.mark.parametrize("change", [lose, double, replace, swap], ids=lambda each: each.__name__)
def test_what_was_handled_otherwise_than_sent_is_found(both, change):
    a, b = both
    assert change(a) != a
    with pytest.raises(Wrong):
        ledger(change(a), b).check(sent("a", "b"))


class Careless(in_process.InProcess):
    """Hands out all but one."""

    name = "careless"

    def __init__(self, change):
        self.change = change

    def _prepare(self, handlers):
        def deliver(events):
            for number, handle in enumerate(handlers):
                for event in self.change(events) if number == 3 else events:
                    handle(event)

        return deliver


@pytest.mark.parametrize("change", [lose, double, replace, swap], ids=lambda each: each.__name__)
def test_one_handler_that_had_something_else_is_found(change):
    with pytest.raises(Wrong, match="handler 3"):
        Careless(change).throughput(50)


def test_a_latency_of_fewer_events_than_sent_is_wrong():
    with pytest.raises(Wrong, match="2 events"):
        percentiles([0.1, 0.2], 3)


# -- processes --------------------------------------------------------------------------------------------------------


def test_a_producer_that_fails_is_no_figure():
    with pytest.raises(Wrong, match="before it answered"), Producers("no such kind", "", 10, 1):
        pass


def test_a_server_ends_with_its_block_whatever_happens(tmp_path):
    with pytest.raises(ZeroDivisionError), server(["sleep", "600"], tmp_path / "log", lambda: True) as process:
        assert process.poll() is None
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux to end them")
def test_neither_server_nor_producers_outlive_a_run_that_is_killed(tmp_path):
    code = (
        "import sys, pathlib, time\n"
        "from bench.peers.processes import Producers, server\n"
        f"place = pathlib.Path({str(tmp_path)!r})\n"
        "with server(['sleep', '600'], place / 'log', lambda: True) as process:\n"
        "    with Producers('push', f'ipc://{place}/nobody', 100_000, 1) as producers:\n"
        "        producers.go()\n"
        "        print(process.pid, producers._all[0].process.pid, flush=True)\n"
        "        time.sleep(600)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    pids = run.stdout.readline().split()
    run.kill()
    run.communicate()
    assert len(pids) == 2
    for pid in pids:
        wait_until(lambda pid=pid: not running(pid), f"the end of process {pid}", 10.0)


def running(pid: str) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_server_that_does_not_start_is_told_with_what_it_said(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('the port is taken')"]
    with pytest.raises(Wrong, match="the port is taken"), server(command, tmp_path / "log", lambda: False):
        pass


# -- absent -----------------------------------------------------------------------------------------------------------


def absent(*_):
    raise PackageNotFoundError


@pytest.mark.parametrize(("module", "peer"), [(redis_streams, "redis-everysec"), (jetstream, "jetstream")])
def test_without_its_server_a_peer_is_skipped_with_how_to_get_it(module, peer, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module.sys if hasattr(module, "sys") else sys, "executable", "/nowhere/python")
    for call in (lambda: BY_NAME[peer].version, lambda: BY_NAME[peer].throughput(10)):
        with pytest.raises(Skipped, match=r"is not installed \("):
            call()


@pytest.mark.parametrize("name", ["redis-always", "jetstream-fast"])
def test_without_its_client_a_peer_is_skipped_with_how_to_get_it(name, monkeypatch):
    for module in (redis_streams, jetstream):
        monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(module, "version", absent)
    with pytest.raises(Skipped, match="make bench"):
        BY_NAME[name].throughput(10)


@pytest.mark.parametrize("name", ["blinker", "nautilus-messagebus", "vnpy-eventengine"])
def test_without_its_package_a_peer_is_skipped_with_how_to_get_it(name, monkeypatch):
    monkeypatch.setattr(in_process, "version", absent)
    with pytest.raises(Skipped, match="make bench"):
        BY_NAME[name].throughput(10)


# -- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.peers", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_lists_every_peer():
    done = command()
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")] == list(BY_NAME)


def test_the_command_runs_what_is_named_and_knows_nothing_else():
    done = command("pluggy", "--events", "500", "--json")
    assert done.returncode == 0
    assert msgspec.json.decode(done.stdout)["throughput"]["settings"]["handlers"] == 5
    assert command("no-such-peer").returncode == 2

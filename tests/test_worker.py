"""The process of a consumer while its surroundings fail: what it emitted waits, and no event is to blame."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus_support import quote, wait_until
from tapebus import Publisher, Tape
from tapebus.config import Config
from tapebus.events import derive
from tapebus.store import Unit
from tapebus.worker import Orders, Outlet
from tapebus_store import tapebus_open_store
from test_units import COUNTER, install

#: More than the publisher of a worker holds, 65,536 events.
MANY = 70_000
CHUNK = 5_000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stops and limits processes as Linux does")


@pytest.fixture
def outlet(make_bus: Any, tmp_path: Path) -> Iterator[Any]:
    """``outlet()``: one life of an outlet, with a store of its own and a bus that is not started yet."""
    bus = make_bus(["schema", "store"])
    made: list[tuple[Any, Outlet]] = []

    def end() -> None:
        for store, each in made:
            each.publisher.close()
            store.close()
        made.clear()

    def live() -> Outlet:
        end()
        store = tapebus_open_store(tmp_path, {}, False)
        orders = Orders(Config(), "many", "many", bus.acked, 0, 0)
        made.append((store, Outlet(store, orders, lambda seconds: True)))
        return made[-1][1]

    live.bus = bus  # type: ignore[attr-defined]
    yield live
    end()


def emit(outlet: Outlet, first: int, count: int) -> None:
    """Commit one unit of work that emits the numbers from `first` on."""
    events = [derive("many", "emitted", {"n": n}, now=1.0) for n in range(first, first + count)]
    outlet.commit(Unit("many", first + count), msgspec.msgpack.encode(events))


def emitted(bus: Any) -> list[int]:
    with Tape.open(bus.data_dir) as tape:
        return [event.data["n"] for event in tape.read(topics=["emitted"])]


def test_more_than_the_publisher_holds_waits_on_disk_across_restarts_and_comes_once_in_order(outlet):
    life = outlet()
    for first in range(0, MANY, CHUNK):
        emit(life, first, CHUNK)
    assert life.backlog and not life.feed()
    life = outlet()
    assert len(life.backlog) == MANY - life.publisher.stats()["published"] > 0
    assert life.publisher.stats()["dropped"] == {}
    outlet.bus.start()
    wait_until(lambda: life.feed() or life.wait(), "the bus to take what waited")
    emit(life, MANY, 1)
    life = outlet()
    emit(life, MANY + 1, 1)
    assert life.publisher.flush(30.0)
    assert emitted(outlet.bus) == list(range(MANY + 2))
    assert outlet.bus.stop() == 0


def test_what_a_worker_that_ends_has_not_sent_is_left_to_its_next_life_and_not_given_up(outlet):
    outlet.bus.start()
    life = outlet()
    emit(life, 0, 1)
    assert life.publisher.flush(30.0)
    # far more than the credit of one connection, and the end right behind it; a bus that stands still takes none of it
    outlet.bus.process.send_signal(signal.SIGSTOP)
    try:
        emit(life, 1, 60_000)
        assert life.publisher.stats()["in_flight"] == 60_000
    finally:
        life = outlet()
        outlet.bus.process.send_signal(signal.SIGCONT)
    emit(life, 60_001, 1)
    wait_until(lambda: life.feed() and life.publisher.flush(1.0), "the rest to arrive")
    assert emitted(outlet.bus) == list(range(60_002))
    outlet.bus.wait_for(lambda stats: not stats["bus"]["unexplained"], "to close its books")


def test_an_emitted_event_too_large_for_a_frame_holds_up_nothing(outlet):
    outlet.bus.start()
    life = outlet()
    big = derive("many", "emitted", {"n": 1, "filler": "x" * (4 << 20)}, now=1.0)
    emit(life, 0, 1)
    life.commit(Unit("many", 2), msgspec.msgpack.encode([big]))
    emit(life, 2, 1)
    wait_until(lambda: life.feed() and life.publisher.flush(1.0), "the rest to arrive")
    assert emitted(outlet.bus) == [0, 2]
    assert life.publisher.stats()["dropped"] == {"client.encode": 1}
    outlet.bus.wait_for(lambda stats: not stats["bus"]["unexplained"], "to close its books")


@pytest.fixture
def counting(make_bus: Any, tmp_path: Path) -> Any:
    """A bus that counts quotes in a process of its own, and the publisher's end."""
    install(tmp_path, "counter", COUNTER.replace("MODE", "process"))
    bus = make_bus(["schema", "store", "counter"], "[plugins.counter.faults]\ndeadline_s = 2.0\ndeaths = 1")
    bus.python_path = [str(tmp_path)]
    return bus.start()


def counted(bus: Any) -> int:
    with Tape.open(bus.data_dir) as tape:
        return len(list(tape.read(topics=["counted"])))


def worker_of(bus: Any) -> int:
    """The process id of the one child the bus has."""
    found: list[int] = []
    for task in Path(f"/proc/{bus.process.pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    [pid] = found
    return pid


def no_letters(bus: Any) -> bool:
    with Tape.open(bus.data_dir) as tape:
        return not list(tape.dead_letters())


def test_a_worker_whose_own_disk_is_full_waits_and_no_event_is_buried_for_it(counting):
    with Publisher("test", endpoint=counting.acked) as publisher:
        publisher.publish("market_data", quote(1))
        wait_until(lambda: counted(counting) == 1, "the first event")
        worker = worker_of(counting)
        file = counting.data_dir / "workers" / "counter" / "tape" / "data.mdb"
        _, hard = resource.prlimit(worker, resource.RLIMIT_FSIZE)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (file.stat().st_size, hard))
        published = 1
        while "waits for room" not in counting.consumer("counter")["last_error"]:
            for _ in range(500):
                published += publisher.publish("market_data", quote(published + 1))
            assert publisher.flush(30.0)
            assert published < 100_000, "its disk is never full"
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (hard, hard))
        wait_until(lambda: counted(counting) == published, "all of them")
    assert counting.consumer("counter")["restarts"] == 0
    assert no_letters(counting)
    assert counting.stop() == 0


def test_a_worker_with_a_full_disk_ends_when_told_to_and_does_the_unit_again(counting):
    with Publisher("test", endpoint=counting.acked) as publisher:
        publisher.publish("market_data", quote(1))
        wait_until(lambda: counted(counting) == 1, "the first event")
        worker = worker_of(counting)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        published = 1
        while "waits for room" not in counting.consumer("counter")["last_error"]:
            for _ in range(500):
                published += publisher.publish("market_data", quote(published + 1))
            assert publisher.flush(30.0)
        assert counting.stop() == 0
        assert not Path(f"/proc/{worker}").exists()
        counting.start()
        wait_until(lambda: counted(counting) == published, "all of them, once")
    assert no_letters(counting)
    assert counting.stop() == 0


def test_a_bus_that_was_stopped_with_its_worker_does_not_take_the_pause_for_a_hanging_handler(counting):
    with Publisher("test", endpoint=counting.acked) as publisher:
        publisher.publish("market_data", quote(1))
        wait_until(lambda: counted(counting) == 1, "the first event")
        worker = worker_of(counting)
        for pid in (worker, counting.process.pid):
            os.kill(pid, signal.SIGSTOP)
        # longer than the handler may take
        threading.Event().wait(3.0)
        counting.process.send_signal(signal.SIGCONT)
        counting.wait_for(lambda stats: True, "to run again, a moment before its worker")
        os.kill(worker, signal.SIGCONT)
        publisher.publish("market_data", quote(2))
        wait_until(lambda: counted(counting) == 2, "the second event")
    assert worker_of(counting) == worker
    assert counting.consumer("counter")["restarts"] == 0
    assert counting.stop() == 0


def test_a_worker_that_is_killed_idle_costs_no_event_although_one_death_buries(counting):
    with Publisher("test", endpoint=counting.acked) as publisher:
        for n in range(1, 4):
            publisher.publish("market_data", quote(n))
            wait_until(lambda n=n: counting.consumer("counter")["handled"] == n, "the event to be handled")
            os.kill(worker_of(counting), signal.SIGKILL)
            wait_until(lambda n=n: counting.consumer("counter")["restarts"] == n, "the end to be noticed")
            wait_until(lambda: counting.consumer("counter")["state"] == "running", "the next life")
        wait_until(lambda: counted(counting) == 3, "all events")
    assert no_letters(counting)
    assert counting.stop() == 0

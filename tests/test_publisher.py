"""The Publisher against a small real bus on a ROUTER socket, which can be told to misbehave."""

from __future__ import annotations

import asyncio
import decimal
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest

from bus_support import wait_until
from scripted_bus import PATIENCE_S, Bus
from tapebus.errors import UsageError
from tapebus.publisher import Publisher

CORE = str(Path(__file__).parents[1] / "core")


@pytest.fixture
def bus():
    bus = Bus()
    yield bus
    bus.kill()


@pytest.fixture
def pub(bus):
    with Publisher("test", bus.endpoint) as pub:
        yield pub


def assert_books_close(pub: Publisher) -> dict:
    s = pub.stats()
    assert s["published"] == s["acked"] + sum(s["dropped"].values()) + sum(s["rejected"].values()) + s["in_flight"], s
    return s


def publish(pub: Publisher, numbers) -> None:
    for i in numbers:
        assert pub.publish("t", {"i": i})


def test_everything_published_is_stored_once_and_in_order(bus, pub):
    publish(pub, range(20_000))
    assert pub.flush(PATIENCE_S)
    assert bus.stored() == list(range(20_000))
    assert assert_books_close(pub)["acked"] == 20_000
    assert bus.greetings[0]["source"] == "test"


def test_the_envelope_arrives_as_it_was_given(bus, pub):
    assert pub.publish(
        "t", {"i": 0, "price": decimal.Decimal("1.5"), "n": numpy.float64(2.5)}, "sig-1", "high", 12.5, user_id=7
    )
    assert pub.flush(PATIENCE_S)
    (events,) = bus.events.values()
    assert events[1] == {
        "event_type": "t",
        "timestamp": 12.5,
        "source": "test",
        "data": {"i": 0, "price": 1.5, "n": 2.5},
        "correlation_id": "sig-1",
        "user_id": "7",
        "priority": "high",
    }


def test_what_is_published_while_the_last_frame_lingers_leaves_together(bus):
    with Publisher("test", bus.endpoint, linger_ms=60_000) as pub:
        publish(pub, [0])
        assert pub.flush(PATIENCE_S)
        before = bus.frames
        publish(pub, range(1, 90))
        assert pub.flush(PATIENCE_S)
        assert (bus.frames - before, bus.stored()) == (1, list(range(90)))
        publish(pub, range(90, 200))
        bus.wait_for(lambda: len(bus.stored()) >= 190)


@pytest.mark.parametrize("wrong", ["-1", "soon", "nan", "60001"])
def test_a_linger_that_is_no_time_is_an_error_with_one_clear_line(wrong, monkeypatch):
    monkeypatch.setenv("TAPEBUS_LINGER_MS", wrong)
    with pytest.raises(UsageError, match=f"TAPEBUS_LINGER_MS='{wrong}': 0 to 60000 milliseconds are possible"):
        Publisher("test")
    with pytest.raises(UsageError, match="linger_ms=-1"):
        Publisher("test", linger_ms=-1)


def test_a_killed_bus_with_its_disk_gets_exactly_the_missing_tail(bus, pub):
    publish(pub, range(500))
    assert pub.flush(PATIENCE_S)
    bus.kill()
    publish(pub, range(500, 1000))
    assert_books_close(pub)
    again = Bus(bus.endpoint, bus.hw, bus.events)
    try:
        assert pub.flush(PATIENCE_S)
        assert again.stored() == list(range(1000))
    finally:
        again.kill()


def test_a_bus_without_its_past_still_gets_what_was_not_acknowledged(bus, pub):
    publish(pub, range(10))
    assert pub.flush(PATIENCE_S)
    bus.kill()
    publish(pub, range(10, 20))
    again = Bus(bus.endpoint)
    try:
        assert pub.flush(PATIENCE_S)
        assert again.stored() == list(range(10, 20))
        stats = assert_books_close(pub)
        assert (stats["acked"], stats["forgotten"]) == (20, 10)
    finally:
        again.kill()


@pytest.mark.parametrize("fault", ["busy", "bad_sequence", "bad_crc", "unknown", "bye", "mute"])
def test_a_refused_or_ignored_frame_is_sent_again(bus, pub, fault):
    publish(pub, range(10))
    assert pub.flush(PATIENCE_S)
    setattr(bus, fault, 2)
    publish(pub, range(10, 400))
    assert pub.flush(PATIENCE_S)
    assert bus.stored() == list(range(400))
    assert_books_close(pub)


def test_without_credit_nothing_is_sent_until_there_is_some(bus, pub):
    bus.credit = (0, 0)
    publish(pub, range(10))
    bus.wait_for(lambda: bus.greetings)
    assert not pub.flush(0.1)
    assert bus.stored() == []
    bus.credit = (3, 1000)
    assert pub.flush(PATIENCE_S)
    assert bus.stored() == list(range(10))


def test_events_the_bus_refuses_are_counted_and_never_sent_again(bus, pub):
    bus.reject = {2, 3}
    publish(pub, range(6))
    assert pub.flush(PATIENCE_S)
    assert bus.stored() == [0, 3, 4, 5]
    assert assert_books_close(pub)["rejected"] == {"ingest.schema": 2}


def test_dropped_events_are_told_to_the_bus_by_number_and_place(bus):
    with Publisher("test", "tcp://127.0.0.1:1", capacity_events=4) as absent:
        assert [absent.publish("t", {"i": i}) for i in range(7)] == [True] * 4 + [False] * 3
        assert assert_books_close(absent)["dropped"] == {"client.ring_full": 3}
    with Publisher("test", bus.endpoint) as pub:
        publish(pub, [1])
        assert not pub.publish("t", {"i": object()})
        publish(pub, [3])
        assert pub.flush(PATIENCE_S)
        assert bus.gaps == [(2, 2, 1)]
        assert bus.stored() == [1, 3]
        assert assert_books_close(pub)["dropped"] == {"client.encode": 1}


class Hostile:
    def __getattr__(self, name):
        raise RuntimeError(name)

    def __str__(self):
        raise BaseException("no")

    __iter__ = __len__ = __fspath__ = __float__ = __bool__ = __str__


def test_publish_never_raises_whatever_it_is_given():
    loop: dict = {}
    loop["loop"] = loop
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    odd = [
        None,
        0,
        -1,
        2**70,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x" * 101,
        "\ud800",
        b"\xff",
        object(),
        Hostile(),
        Hostile,
        loop,
        {"deep": deep},
        {1: 2},
        {None: 1},
        {"a": Hostile()},
        {"big": "x" * 300_000},
        [],
        {1, 2},
        (i for i in "ab"),
        range(3),
        numpy.arange(3),
        numpy.float64("nan"),
        numpy.int64(3),
        numpy.datetime64("2025-01-01"),
        decimal.Decimal("NaN"),
        Path("a"),
        lambda: 1,
        sys,
        Exception("x"),
        memoryview(b"ab"),
        1j,
    ]
    with Publisher("test", "tcp://127.0.0.1:1") as pub:
        for value in odd:
            for kept in (
                pub.publish("t", value),
                pub.publish("t", {"v": value}),
                pub.publish(value, {}),
                pub.publish("t", {}, value),
                pub.publish("t", {}, None, value),
                pub.publish("t", {}, timestamp=value),
                pub.publish("t", {}, user_id=value, session_id=value, event_id=value, causation_id=value),
            ):
                assert kept in (True, False)
        rng = random.Random(1)
        for _ in range(3000):
            data = {str(rng.random()): rng.choice(odd), "b": [rng.choice(odd)]}
            assert pub.publish("t", data, rng.choice(odd)) in (True, False)
        assert assert_books_close(pub)["published"] == 7 * len(odd) + 3000
    assert_books_close(pub)
    assert pub.publish("t", {}) is False
    assert assert_books_close(pub)["in_flight"] == 0


def test_keyboard_interrupt_from_user_code_is_not_swallowed():
    class Stop:
        def item(self):
            raise KeyboardInterrupt

    with Publisher("test", "tcp://127.0.0.1:1") as pub, pytest.raises(KeyboardInterrupt):
        pub.publish("t", {"v": Stop()})


def test_a_wrong_source_is_an_error_with_one_clear_line():
    with pytest.raises(UsageError, match="source=''"):
        Publisher("")


def test_many_threads_share_one_publisher(bus, pub):
    threads = [threading.Thread(target=publish, args=(pub, range(k * 1000, k * 1000 + 1000))) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pub.flush(PATIENCE_S)
    stored = bus.stored()
    assert sorted(stored) == list(range(4000))
    for k in range(4):
        mine = [i for i in stored if i // 1000 == k]
        assert mine == sorted(mine)


def test_publishing_from_coroutines_does_not_stop_the_loop(bus, pub):
    async def one(k: int) -> None:
        for i in range(50):
            pub.publish("t", {"i": k * 50 + i})
            await asyncio.sleep(0)

    async def main() -> bool:
        await asyncio.gather(*(one(k) for k in range(20)))
        return await asyncio.to_thread(pub.flush, PATIENCE_S)

    assert asyncio.run(main())
    assert sorted(bus.stored()) == list(range(1000))


FORK = """
import os, sys
from tapebus.publisher import Publisher
pub = Publisher("parent", sys.argv[1])
for i in range(100): pub.publish("t", {"i": i})
assert pub.flush(10)
pid = os.fork()
first = 1000 if pid == 0 else 100
assert pid or pub.stats()["published"] == 0
for i in range(first, first + 100): pub.publish("t", {"i": i})
ok = pub.flush(10)
if pid == 0:
    os._exit(0 if ok else 1)
assert ok and os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def run_python(code: str, *args: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code, *args], check=True, timeout=60, env={**os.environ, "PYTHONPATH": CORE})
    return time.monotonic() - began


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_is_another_producer_and_the_parent_goes_on(bus):
    run_python(FORK, bus.endpoint)
    books = sorted([e["data"]["i"] for _, e in sorted(events.items())] for events in bus.events.values())
    assert books == [list(range(200)), list(range(1000, 1100))]


def test_a_process_that_just_ends_delivers_what_it_published(bus):
    run_python(
        "import sys\nfrom tapebus.publisher import Publisher\n"
        "with Publisher('t', sys.argv[1]) as p: p.publish('t', {'i': 1})",
        bus.endpoint,
    )
    bus.wait_for(lambda: bus.stored() == [1])


def test_an_absent_bus_does_not_keep_a_process_from_exiting():
    code = "from tapebus.publisher import Publisher\np = Publisher('t', 'tcp://127.0.0.1:1')\n"
    run_python(code)
    baseline = min(run_python(code) for _ in range(2))
    busy = min(run_python(code + "for i in range(1000): p.publish('t', {'i': i})\n") for _ in range(3))
    # The promise is 200 ms; the rest is for a machine that runs other tests as well.
    assert busy - baseline < 0.5


def test_what_never_left_is_told_to_the_bus_at_the_end(bus):
    pub = Publisher("test", bus.endpoint)
    publish(pub, range(3))
    assert pub.flush(PATIENCE_S)
    bus.credit = (0, 0)
    wait_until(lambda: pub._sender.line.credit == (0, 0), "the credit to be withdrawn")
    publish(pub, range(3, 10))
    pub.close()
    bus.wait_for(lambda: bus.gaps)
    assert bus.gaps == [(4, 10, 4)]
    assert assert_books_close(pub)["dropped"] == {"client.exit_abandoned": 7}


NO_FILES = """
import os, resource, sys
from tapebus.publisher import Publisher
spare, pub = int(sys.argv[2]), Publisher("test", sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
for _ in range(spare):
    os.close(taken.pop())
assert pub.publish("t", {"i": 0})
pub.publish("t", {"i": 1}, durable=True, timeout=0.2)
pub.flush(0.2)
for fd in taken:
    os.close(fd)
assert pub.publish("t", {"i": 2}) and pub.flush(30)
"""


@pytest.mark.parametrize("spare", [0, 1, 3, 5, 9])
def test_a_process_that_may_open_no_more_files_goes_on_and_its_events_arrive_when_it_may(bus, spare):
    run_python(NO_FILES, bus.endpoint, str(spare))
    bus.wait_for(lambda: bus.stored() == [0, 1, 2])


def test_leftovers_are_counted_at_close():
    pub = Publisher("test", "tcp://127.0.0.1:1")
    publish(pub, range(5))
    pub.close()
    assert assert_books_close(pub)["dropped"] == {"client.exit_abandoned": 5}


def test_a_publisher_nobody_holds_still_delivers(bus):
    publish(Publisher("test", bus.endpoint), range(3))
    bus.wait_for(lambda: bus.stored() == [0, 1, 2])

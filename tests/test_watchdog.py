"""The watchdog: who stands still is named with the place, and a bus that was stopped as a whole is not blamed."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from bus_support import PATIENCE, Seen, plugin, quote, wait_until
from tapebus import Consumer
from tapebus._decode import Batch
from tapebus.consumer import FaultPolicy
from tapebus.deadline import Overdue, within
from tapebus.errors import PluginError
from tapebus.fence import Doing
from tapebus.watchdog import Watched


def gated(gate: threading.Event) -> Any:
    def a_handler_that_waits(batch: Any) -> None:
        for _ in batch:
            assert gate.wait(PATIENCE)

    return a_handler_that_waits


@pytest.mark.parametrize("mode", ["inline", "thread"])
def test_a_handler_that_stands_still_is_named_with_its_place_and_cleared_when_it_goes_on(embed, caplog, mode):
    gate, seen = threading.Event(), Seen()
    policy = FaultPolicy(deadline_s=0.2)
    waits = Consumer(name="waits", topics=["*"], handler=gated(gate), mode=mode, faults=policy)
    bus = embed(
        ["schema", "store"],
        ("slow", plugin(waits)),
        ("seen", plugin(Consumer(name="seen", topics=["market_data"], handler=seen, after=["waits"]))),
    )
    try:
        bus.publish(5)
        wait_until(lambda: bus.consumer("waits")["state"] == "hanging", "the watchdog")
        stats = bus.runtime.stats()
        assert stats["plugins"]["slow"]["health"]["status"] == "error"
        assert "come no further for 0.2 s at bus_seq 1" in stats["plugins"]["slow"]["health"]["message"]
        assert "a_handler_that_waits" in caplog.text, "the stack of its thread"
        bus.publish(5, first=5)
        with bus.tape() as tape:
            [alert] = wait_until(lambda: list(tape.read(topics=["alert"])), "the alert to be on the tape")
        assert (alert.data.severity, alert.data.name) == ("critical", "hanging.waits")
    finally:
        gate.set()
    wait_until(lambda: len(seen.events) == 10, "everybody to get everything")
    wait_until(lambda: bus.consumer("waits")["state"] == "running", "the mark to go")
    assert bus.runtime.stats()["plugins"]["slow"]["health"]["status"] == "ok"


def test_a_slow_handler_that_moves_on_is_no_hanging_one():
    doing = Doing()
    watched = Watched(doing, 5.0, None)
    batch = Batch(["a", "b", "c"])
    doing.begin("handler", batch)
    for _ in batch:
        watched.look(1.0)
        assert watched.idle_s == 0.0
        watched.look(4.0)
    doing.end()
    watched.look(100.0)
    assert watched.idle_s == 0.0


def test_standing_still_is_the_sum_of_the_looks_and_ends_with_the_next_call():
    doing = Doing()
    watched = Watched(doing, 5.0, None)
    doing.begin("on_tick")
    for _ in range(4):
        watched.look(1.0)
    assert watched.idle_s == 3.0
    doing.end()
    doing.begin("on_tick")
    watched.look(1.0)
    assert watched.idle_s == 0.0


def test_a_bus_that_was_stopped_as_a_whole_blames_no_plugin(embed):
    gate, entered = threading.Event(), threading.Event()

    def handler(batch: Any) -> None:
        for _ in batch:
            entered.set()
            assert gate.wait(PATIENCE)

    waits = Consumer(name="waits", topics=["*"], handler=handler, faults=FaultPolicy(deadline_s=60.0))
    bus = embed(["schema", "store"], ("slow", plugin(waits)))
    watchdog = bus.runtime.statistics.watchdog
    try:
        bus.publish(1)
        assert entered.wait(PATIENCE)
        for _ in range(2):
            # as after SIGCONT or the sleep of the machine: a long time has passed without a look
            watchdog._looked_at -= 1000.0
            watchdog.look()
        assert bus.consumer("waits")["state"] == "running"
        for _ in range(5):
            watchdog._looked_at -= 12.0
            watchdog.look()
        assert bus.consumer("waits")["state"] == "hanging", "many looks are another matter"
    finally:
        gate.set()


def test_an_idle_or_busy_bus_is_never_called_hanging(embed, caplog):
    seen = Seen()
    policy = FaultPolicy(deadline_s=0.1)
    bus = embed(
        ["schema", "store"],
        ("seen", plugin(Consumer(name="seen", topics=["*"], handler=seen, faults=policy, mode="thread"))),
    )
    with bus.publisher() as publisher:
        for n in range(20_000):
            publisher.publish("market_data", quote(n))
        assert publisher.flush(PATIENCE)
    wait_until(lambda: len(seen.events) == 20_000, "all events")
    assert "come no further" not in caplog.text


def test_a_call_within_a_deadline_gives_what_it_returns_and_raises_what_it_raises():
    assert within(5.0, "a call", lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5.0, "a call", lambda: 1 / 0)
    with pytest.raises(PluginError, match="a call raised SystemExit: 3"):
        within(5.0, "a call", lambda: exit_with(3))


def exit_with(code: int) -> None:
    raise SystemExit(code)


def test_a_call_that_does_not_return_is_named_with_its_place():
    gate = threading.Event()
    try:
        with pytest.raises(Overdue, match=r"a call did not return within 0\.05 s; it stands at .*test_watchdog\.py"):
            within(0.05, "a call", lambda: gate.wait(PATIENCE))
    finally:
        gate.set()

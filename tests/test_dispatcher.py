"""Consumers in company: one that raises, hangs, lags or overtakes costs the others nothing."""

from __future__ import annotations

import threading

import pytest

from bus_support import PATIENCE, Seen, plugin, quote, wait_until
from tapebus import Consumer
from tapebus.consumer import FaultPolicy


class Raising(Seen):
    """Raises on every event until it is healed; notes what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.healed = False

    def __call__(self, batch: object) -> None:
        for event in batch:
            if not self.healed:
                raise RuntimeError("broken on purpose")
            self.events.append(event)


@pytest.mark.parametrize("mode", ["inline", "thread"])
@pytest.mark.parametrize("names", [("schema", "store"), ("schema",)], ids=["with a store", "without"])
def test_a_raising_consumer_costs_the_others_nothing_and_resumes_at_its_cursor(embed, mode, names):
    broken, well, threaded = Raising(), Seen(), Seen()
    policy = FaultPolicy(window=10, retry_s=3600)
    bus = embed(
        list(names),
        ("broken", plugin(Consumer(name="broken", topics=["*"], handler=broken, mode=mode, faults=policy))),
        ("well", plugin(Consumer(name="well", topics=["*"], handler=well))),
        ("threaded", plugin(Consumer(name="threaded", topics=["*"], handler=threaded, mode="thread"))),
    )
    bus.publish(3000)
    wait_until(lambda: len(well.events) == len(threaded.events) == 3000, "the others to get all")
    assert well.seqs == threaded.seqs == list(range(1, 3001))
    stats = wait_until(lambda: (c := bus.consumer("broken"))["state"] == "open" and c, "the breaker to open")
    assert 0 < stats["errors"] < 20
    assert "broken on purpose" in stats["last_error"]
    assert stats["cursor"] == stats["errors"]
    assert bus.runtime.stats()["plugins"]["broken"]["health"]["status"] == "error"
    broken.healed = True
    bus.request("resume", consumer="broken")
    bus.publish(10, first=3000)
    if "store" in names:
        wait_until(lambda: len(broken.events) >= 3010 - stats["errors"], "the rest from the tape")
        assert broken.seqs == list(range(stats["errors"] + 1, 3011))
        with bus.tape() as tape:
            wait_until(lambda: len(list(tape.dead_letters())) == stats["errors"], "a dead letter for each failure")
            assert {letter.place for letter in tape.dead_letters()} == {"plugin.broken"}
    else:
        wait_until(lambda: broken.seqs[-1:] == [3010], "what comes now, since nothing else was kept")
    assert bus.consumer("broken")["state"] == "running"


def test_an_open_breaker_tries_one_event_and_closes_by_itself(embed):
    broken = Raising()
    policy = FaultPolicy(window=10, retry_s=0.05, retry_max_s=0.1)
    bus = embed(
        ["schema", "store"],
        ("broken", plugin(Consumer(name="broken", topics=["*"], handler=broken, faults=policy))),
    )
    bus.publish(100)

    def states() -> list[str]:
        return [state for _, state, _ in bus.consumer("broken")["history"]]

    wait_until(lambda: states()[:3] == ["open", "half-open", "open"], "a try")
    broken.healed = True
    wait_until(lambda: bus.consumer("broken")["cursor"] == 100, "the rest")
    assert bus.consumer("broken")["state"] == "running"
    lost = bus.consumer("broken")["errors"]
    assert broken.seqs == list(range(lost + 1, 101))


def test_one_bad_event_is_charged_to_itself_alone(embed):
    seen: list[int] = []

    def handler(batch: object) -> None:
        for event in batch:
            if event.bus_seq % 10 == 0:
                raise SystemExit("even this")
            seen.append(event.bus_seq)

    bus = embed(["schema", "store"], ("p", plugin(Consumer(name="p", topics=["*"], handler=handler))))
    bus.publish(100)
    wait_until(lambda: bus.consumer("p")["cursor"] == 100, "all events")
    assert seen == [n for n in range(1, 101) if n % 10]
    with bus.tape() as tape:
        letters = wait_until(lambda: len(found := list(tape.dead_letters())) == 10 and found, "ten dead letters")
    assert [letter.bus_seq for letter in letters] == list(range(10, 101, 10))
    assert bus.consumer("p")["handled"] == 90


def test_a_hanging_thread_consumer_delays_nobody_and_continues_from_the_tape_when_lapped(embed):
    gate, hanging, well, other = threading.Event(), Seen(), Seen(), Seen()

    def handler(batch: object) -> None:
        assert gate.wait(PATIENCE)
        hanging(batch)

    slow = Consumer(name="slow", topics=["*"], handler=handler, mode="thread", capacity=100)
    bus = embed(
        ["schema", "store"],
        ("slow", plugin(slow)),
        ("well", plugin(Consumer(name="well", topics=["*"], handler=well))),
        ("other", plugin(Consumer(name="other", topics=["*"], handler=other, mode="thread"))),
        bus="max_batch = 64",
    )
    try:
        for part in range(5):
            bus.publish(1000, first=part * 1000)
        wait_until(lambda: len(well.events) == len(other.events) == 5000, "the others to get all")
        assert bus.consumer("slow")["lag_events"] == 5000
    finally:
        gate.set()
    bus.publish(1000, first=5000)
    wait_until(lambda: len(hanging.events) >= 6000, "the slow one to catch up")
    assert hanging.seqs == list(range(1, 6001))
    assert [event.data.volume for event in hanging.events] == list(range(6000))
    wait_until(lambda: bus.consumer("slow")["lag_events"] == 0, "no lag")


@pytest.mark.parametrize("mode", ["inline", "thread"])
def test_critical_events_overtake_a_backlog_and_nothing_comes_twice(embed, mode):
    gate, entered, seen = threading.Event(), threading.Event(), Seen()

    def handler(batch: object) -> None:
        entered.set()
        assert gate.wait(PATIENCE)
        seen(batch)

    bus = embed(
        ["schema", "store"],
        ("lanes", plugin(Consumer(name="lanes", topics=["*"], handler=handler, mode=mode, lanes=True))),
    )
    try:
        with bus.publisher() as publisher:
            publisher.publish("market_data", quote(0))
            assert publisher.flush(PATIENCE)
            assert entered.wait(PATIENCE)
            for n in range(1, 2001):
                publisher.publish("market_data", quote(n), priority="normal")
                assert n % 200 or publisher.flush(PATIENCE)
            for n in range(2001, 2004):
                publisher.publish("fire_command", fire(n), priority="critical")
                assert publisher.flush(PATIENCE)
        wait_until(lambda: bus.runtime.tape.done_seq == 2004, "the backlog")
        if mode == "thread":
            wait_until(lambda: bus.runtime.dispatcher.done_seq == 2004, "the backlog of the thread")
    finally:
        gate.set()
    wait_until(lambda: len(seen.events) >= 2004, "all events")
    bus.stop()
    seqs = seen.seqs
    assert sorted(seqs) == list(range(1, 2005))
    urgent = [seq for seq in seqs if seq > 2001]
    normal = [seq for seq in seqs if seq <= 2001]
    assert urgent == sorted(urgent)
    assert normal == sorted(normal)
    # At most what was on its way already comes before them: far from the whole backlog.
    assert seqs.index(2002) < 1500
    assert seqs.index(2004) < 1500


def fire(n: int) -> dict:
    return {"fire_id": f"F{n}", "symbol": "EURUSD", "direction": "BUY", "lot": 0.01}


def test_what_overtook_does_not_come_again_after_a_restart(embed):
    gate, entered = threading.Event(), threading.Event()
    first, second = Seen(), Seen()

    def blocked(batch: object) -> None:
        entered.set()
        if first.events and first.seqs[-1] == 3:
            raise AssertionError("after the urgent one nothing may be handled before the restart")
        assert gate.wait(PATIENCE)
        first(batch)

    def made(handler: object) -> tuple:
        return ("l", plugin(Consumer(name="l", topics=["*"], handler=handler, lanes=True, start="first")))

    bus = embed(["schema", "store"], made(blocked), bus="max_batch = 1")
    try:
        with bus.publisher() as publisher:
            publisher.publish("market_data", quote(0))
            assert publisher.flush(PATIENCE) and entered.wait(PATIENCE)
            publisher.publish("market_data", quote(1))
            assert publisher.flush(PATIENCE)
            publisher.publish("fire_command", fire(2), priority="critical")
            assert publisher.flush(PATIENCE)
        wait_until(lambda: bus.runtime.tape.done_seq == 3, "the backlog")
    finally:
        gate.set()
    bus.stop()
    with bus.tape() as tape:
        cursors = tape._reader.cursors()
    bus = embed(["schema", "store"], made(second), again=bus)
    bus.publish(1, first=3)
    bus.stop()
    handled = [*first.seqs, *second.seqs]
    assert len(handled) == len(set(handled))
    assert set(handled) >= set(range(1, cursors["l"].cursor + 1)) - {2}
    assert second.seqs[-1] == 4


def test_an_event_of_many_consumers_is_one_object_in_bus_order(embed):
    one, two = Seen(), Seen()
    bus = embed(
        ["schema", "store"],
        ("one", plugin(Consumer(name="one", topics=["market_*"], handler=Seen()))),
        ("two", plugin(Consumer(name="two", topics=["market_data"], handler=two))),
        ("three", plugin(Consumer(name="three", topics=["*"], handler=one, after=["two"]))),
    )
    bus.publish(500)
    wait_until(lambda: len(one.events) == 500, "all events")
    assert all(a is b for a, b in zip(one.events, two.events, strict=True))
    with pytest.raises(AttributeError):
        one.events[0].timestamp = 0.0


@pytest.mark.parametrize("mode", ["inline", "thread"])
def test_a_breaker_that_waits_for_an_event_to_try_costs_nothing(embed, mode):
    broken = Raising()
    policy = FaultPolicy(consecutive=1, retry_s=0.1, retry_max_s=0.1)
    consumer = Consumer(name="broken", topics=["*"], handler=broken, faults=policy, mode=mode)
    bus = embed(["schema", "store"], ("broken", plugin(consumer)))
    taker = bus.runtime.dispatcher if mode == "inline" else bus.runtime.threads[0]
    turns = []
    take = taker.backlog.get
    taker.backlog.get = lambda timeout: turns.append(timeout) or take(timeout)
    bus.publish(1)
    wait_until(lambda: bus.consumer("broken")["state"] == "half-open", "the time of the next try")
    wait_until(lambda: not bus.runtime.wiring.fences[0].unsaved, "its cursor to be written down")
    before = len(turns)
    threading.Event().wait(0.5)
    assert len(turns) - before < 20, "nobody spins while there is nothing to try"
    broken.healed = True
    bus.publish(1)
    wait_until(lambda: bus.consumer("broken")["state"] == "running", "the try to succeed")

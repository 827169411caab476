"""Consumers with a thread of their own, and those among them that see events before these are on disk."""

from __future__ import annotations

import threading

import pytest

from bus_support import Seen, plugin, quote, wait_until
from tapebus import Consumer, outlets
from tapebus.consumer import FaultPolicy
from tapebus.errors import PluginError

PATIENT = FaultPolicy(deadline_s=60)


class Held:
    """A commit that waits until it is let go."""

    def __init__(self, commit) -> None:
        self.commit = commit
        self.go = threading.Event()
        self.go.set()

    def __call__(self, commit) -> None:
        self.go.wait()
        self.commit(commit)


def early(name: str, handler, topics=("market_data",), **options) -> Consumer:
    return Consumer(name=name, topics=topics, handler=handler, mode="thread", deliver="early", **options)


def test_an_early_consumer_sees_an_event_before_it_is_on_disk_and_nobody_else_does(embed):
    soon, later = Seen(), Seen()
    bus = embed(
        ["schema", "store"],
        ("soon", plugin(early("soon", soon))),
        ("later", plugin(Consumer(name="later", topics=["market_data"], handler=later))),
    )
    held = bus.runtime.store.commit = Held(bus.runtime.store.commit)
    try:
        held.go.clear()
        bus.runtime.publish("market_data", quote(1))
        wait_until(lambda: soon.events, "the early consumer to see it")
        assert bus.runtime.store.last_seq() < soon.seqs[0] and not later.events
    finally:
        held.go.set()
    wait_until(lambda: later.events, "the others to see it once it is on disk")
    assert soon.seqs == later.seqs and soon.events[0].data.bid == later.events[0].data.bid
    row = bus.consumer("soon")
    assert (row["deliver"], row["mode"], row["errors"]) == ("early", "thread", 0)


@pytest.mark.parametrize("names", [("schema", "store"), ("schema",)], ids=["with a store", "without"])
def test_an_early_consumer_gets_every_event_once_in_order_however_slow_it_is(embed, monkeypatch, names):
    monkeypatch.setattr(outlets, "EARLY_BYTES", 2000)
    gate, seen = threading.Event(), Seen()

    def slow(batch):
        gate.wait()
        seen(batch)

    bus = embed(list(names), ("slow", plugin(early("slow", slow, faults=PATIENT))))
    if "store" in names:
        bus.publish(3000)
        wait_until(lambda: bus.runtime.tape.done_seq == 3000, "all of it to be stored while the consumer stands")
    gate.set()
    bus.publish(3000, first=3000)
    goal = 6000 if "store" in names else 3000
    wait_until(lambda: len(seen.events) >= goal, "the slow one to get the rest")
    assert seen.seqs == list(range(1, goal + 1))


def test_what_an_early_consumer_emits_commits_after_its_cause_and_once(embed):
    from tapebus.hookspecs import hookimpl

    class Echo:
        @hookimpl
        def tapebus_register_consumers(self, context):
            def handle(batch):
                for event in batch:
                    context.emit("echo", {"of": event.bus_seq}, cause=event)

            return [early("echo", handle)]

    bus = embed(["schema", "store"], ("echo", Echo()))
    bus.publish(500)
    wait_until(lambda: bus.runtime.store.last_seq() >= 1000, "an echo of each")
    bus.stop()
    bus = embed(["schema", "store"], ("echo", Echo()), again=bus)
    bus.publish(500, first=500)
    wait_until(lambda: bus.runtime.store.last_seq() >= 2000, "an echo of each again")
    with bus.tape() as tape:
        events = list(tape.read())
    causes = {event.bus_seq for event in events if event.event_type == "market_data"}
    echoes = [event for event in events if event.event_type == "echo"]
    assert sorted(event.data["of"] for event in echoes) == sorted(causes) and len(causes) == 1000
    assert all(event.data["of"] < event.bus_seq for event in echoes)


def test_an_early_consumer_goes_on_from_the_tape_after_its_breaker_was_open(embed):
    seen, broken = Seen(), threading.Event()
    broken.set()

    def handle(batch):
        if broken.is_set():
            raise RuntimeError("not now")
        seen(batch)

    bus = embed(["schema", "store"], ("shy", plugin(early("shy", handle))))
    bus.publish(100)
    wait_until(lambda: bus.consumer("shy")["state"] == "open", "the breaker to open")
    broken.clear()
    bus.request("resume", consumer="shy")
    bus.publish(100, first=100)
    wait_until(lambda: len(seen.events) >= 200, "everything")
    assert seen.seqs == list(range(1, 201))


def test_an_early_consumer_ends_with_the_bus_though_what_it_waits_for_never_gets_to_the_disk(embed):
    seen, broken = Seen(), threading.Event()

    def handle(batch):
        if broken.is_set():
            raise RuntimeError("not now")
        seen(batch)

    bus = embed(["schema", "store"], ("shy", plugin(early("shy", handle))), bus="drain_s = 1")
    held = bus.runtime.store.commit = Held(bus.runtime.store.commit)
    try:
        held.go.clear()
        broken.set()
        for n in range(20):
            bus.runtime.publish("market_data", quote(n))
        [consumer] = bus.runtime.threads
        wait_until(lambda: consumer.fence.state == "open", "the breaker to open")
        broken.clear()
        bus.request("resume", consumer="shy")
        wait_until(lambda: consumer.fence.ready, "the consumer to wait for the tape")
        consumer.stop()
        consumer.join(60)
        assert not consumer.is_alive() and not seen.events
    finally:
        held.go.set()


@pytest.mark.parametrize("options", [{"mode": "inline"}, {"mode": "process"}, {"mode": "thread", "lanes": True}])
def test_early_delivery_needs_a_thread_of_its_own_and_no_lanes(embed, options):
    consumer = Consumer(name="odd", topics=["*"], handler=Seen(), deliver="early", **options)
    with pytest.raises(PluginError, match=r"'odd': deliver='early' needs mode='thread' and no lanes"):
        embed(["schema", "store"], ("odd", plugin(consumer)))

"""The bench that plugin authors test with behaves like the bus: topics, state, restarts and emitted events."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import msgspec
import pytest

from tapebus.consumer import Consumer, Context, covers
from tapebus.events import EventType, Registry
from tapebus.testing import ListBatch, PluginBench, RecordingContext


class Quote(msgspec.Struct, frozen=True):
    symbol: str
    bid: float


REGISTRY = Registry([EventType(name="market_data", payload=Quote), EventType(name="market_data.bar", payload=Quote)])


def plugin(topics: tuple[str, ...] = ("market_data",), **options: Any) -> ModuleType:
    """Counts events in memory and in its state, and emits the running number."""
    made = ModuleType("counting")
    made.seen = []  # type: ignore[attr-defined]
    made.ticks = []  # type: ignore[attr-defined]

    def tapebus_register_consumers(context: Context) -> list[Consumer]:
        count = int(context.state.get("count", b"0"))

        def handle(batch: Any) -> None:
            nonlocal count
            for event in batch:
                count += 1
                made.seen.append(event.bus_seq)  # type: ignore[attr-defined]
                context.emit("counted", {"n": count}, cause=event)

        def save() -> None:
            context.state["count"] = b"%d" % count

        ticks = made.ticks.append  # type: ignore[attr-defined]
        return [Consumer(name="counting", topics=topics, handler=handle, save=save, tick=1.0, on_tick=ticks, **options)]

    made.tapebus_register_consumers = tapebus_register_consumers  # type: ignore[attr-defined]
    return made


def quotes(bench: PluginBench, count: int, event_type: str = "market_data") -> list[Any]:
    return [bench.event(event_type, 100.0 + n, {"symbol": "EURUSD", "bid": 1.1}) for n in range(count)]


def test_events_arrive_typed_and_numbered_from_one():
    bench = PluginBench(plugin(), REGISTRY)
    first, second = quotes(bench, 2)
    assert first.data == Quote("EURUSD", 1.1)
    assert (first.bus_seq, second.bus_seq) == (1, 2)
    assert first.event_type == "market_data"


def test_an_event_that_breaks_its_type_is_refused_before_the_plugin_sees_it():
    with pytest.raises(msgspec.ValidationError, match=r"data\.bid"):
        PluginBench(plugin(), REGISTRY).event("market_data", 1.0, {"symbol": "EURUSD", "bid": "dear"})


def test_a_consumer_gets_only_the_topics_it_asked_for():
    counting = plugin(("market_data.*",))
    bench = PluginBench(counting, REGISTRY)
    bench.feed([*quotes(bench, 2), *quotes(bench, 1, "market_data.bar")])
    assert counting.seen == [3]


def test_a_restart_continues_from_the_saved_state_and_keeps_what_was_emitted():
    bench = PluginBench(plugin(), REGISTRY)
    bench.feed(quotes(bench, 3))
    bench.restart()
    bench.feed(quotes(bench, 1))
    assert [wire.data["n"] for wire in bench.emitted] == [1, 2, 3, 4]
    assert bench.context.state == {"count": b"4"}


def test_an_emitted_event_takes_time_correlation_and_causation_from_its_cause():
    bench = PluginBench(plugin(), REGISTRY)
    bench.feed([bench.event("market_data", 123.5, {"symbol": "EURUSD", "bid": 1.1}, correlation_id="ELITE_1")])
    (wire,) = bench.emitted
    assert (wire.timestamp, wire.correlation_id, wire.causation_id) == (123.5, "ELITE_1", "bus:1")
    assert wire.source == "counting"


def test_what_is_given_explicitly_wins_over_the_cause():
    context = RecordingContext("manual")
    cause = PluginBench(plugin(), REGISTRY).event("market_data", 1.0, {"symbol": "X", "bid": 1}, correlation_id="a")
    context.emit("alert", Quote("X", 2.0), cause=cause, timestamp=9.0, correlation_id="b", priority="critical")
    (wire,) = context.emitted
    assert (wire.timestamp, wire.correlation_id, wire.priority) == (9.0, "b", "critical")
    assert wire.data == {"symbol": "X", "bid": 2.0}


def test_an_exception_of_the_plugin_reaches_the_test():
    broken = ModuleType("broken")

    def handle(batch: Any) -> None:
        raise ZeroDivisionError

    broken.tapebus_register_consumers = lambda context: [  # type: ignore[attr-defined]
        Consumer(name="broken", topics=["*"], handler=handle)
    ]
    bench = PluginBench(broken, REGISTRY)
    with pytest.raises(ZeroDivisionError):
        bench.feed(quotes(bench, 1))


def test_ticks_reach_the_consumers_that_asked_for_them():
    counting = plugin()
    PluginBench(counting, REGISTRY).tick(42.0)
    assert counting.ticks == [42.0]


def test_a_batch_knows_its_first_and_last_number():
    bench = PluginBench(plugin(), REGISTRY)
    batch = ListBatch(quotes(bench, 3))
    assert (batch.first_seq, batch.last_seq, len(batch)) == (1, 3, 3)
    assert (ListBatch().first_seq, ListBatch().last_seq) == (0, 0)


@pytest.mark.parametrize(
    ("topics", "event_type", "expected"),
    [
        (["*"], "anything", True),
        (["market_data"], "market_data", True),
        (["market_data"], "market_data.bar", False),
        (["market_data.*"], "market_data.bar", True),
        (["market_data.*"], "market_data", False),
        (["market_data.*"], "market_database", False),
        ([], "market_data", False),
    ],
)
def test_topics_are_exact_or_a_prefix_up_to_a_dot(topics, event_type, expected):
    assert covers(topics, event_type) is expected

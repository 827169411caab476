"""``context.figures()``: what a plugin may know about the running bus, from memory and from any thread."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from bus_support import pushing, quote, wait_until
from tapebus import Consumer, Context, hookimpl
from tapebus.statistics import REACHED_S

#: Part of every statistics answer, and none of a plugin's business or not to be had from memory.
BESIDES = {"rss_bytes", "acks_mean", "uptime_s"}


class Curious:
    """A plugin that asks for figures at its start, in its handler and in its tick."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.asked_for_metrics = 0
        self.hold = threading.Event()

    @hookimpl
    def tapebus_register_consumers(self, context: Context) -> list[Consumer]:
        self.context = context
        self.told.append(("start", context.figures()))
        note = lambda when: self.told.append((when, context.figures()))  # noqa: E731
        return [
            Consumer(
                name=f"curious-{self.mode}",
                topics=["market_data"],
                handler=lambda batch: note("handler"),
                mode=self.mode,  # type: ignore[arg-type]
                tick=0.01,
                on_tick=lambda now: note("tick"),
            )
        ]

    @hookimpl
    def tapebus_metrics(self, context: Context) -> dict[str, int]:
        self.asked_for_metrics += 1
        return {}

    def seen(self, when: str) -> list[dict[str, Any]]:
        return [figures for at, figures in self.told.copy() if at == when]


@pytest.mark.parametrize("mode", ["inline", "thread"])
def test_figures_agree_with_the_statistics_and_ask_no_plugin(embed, mode):
    curious = Curious(mode)
    bus = embed(["schema", "store"], ("curious", curious))
    assert curious.seen("start") == [{}], "before the bus runs there is nothing to tell"
    bus.publish(100)
    wait_until(lambda: curious.seen("handler") and curious.seen("tick"), "a handler and a tick")
    with pushing(bus.ingest) as push:
        push(b"no event at all")
        push(b'{"event_type":"market_data","timestamp":1,"source":"s","data":{"symbol":"EURUSD"}}')
    wait_until(lambda: bus.runtime.stats()["bus"]["last_seq"] == 101, "the last event")
    wait_until(lambda: bus.consumer(f"curious-{mode}")["cursor"] == 101, "the consumer")
    asked = curious.asked_for_metrics
    figures = curious.context.figures()
    assert curious.asked_for_metrics == asked
    stats = bus.runtime.stats()
    assert {k: v for k, v in figures["bus"].items() if k not in BESIDES} == {
        k: v for k, v in stats["bus"].items() if k not in BESIDES
    }
    assert figures["bus"]["rejected"] == {"ingest.malformed": 1}
    assert sum(figures["bus"]["dead_letters"].values()) == 1
    assert figures["feed"] == stats["feed"]
    assert figures["producers"] == []
    told, shown = figures["consumers"], stats["consumers"]
    for key in ("name", "plugin", "lag_events", "handled", "state"):
        assert [each[key] for each in told] == [each[key] for each in shown]


def test_a_producer_that_dropped_events_is_named_with_where(embed):
    curious = Curious("inline")
    bus = embed(["schema", "store"], ("curious", curious))
    with bus.publisher("small", capacity_events=4) as publisher, bus.publisher("whole"):
        for n in range(20_000):
            publisher.publish("market_data", quote(n))
        assert publisher.flush(30.0)
        publisher.publish("market_data", quote(0))
        assert publisher.flush(30.0)
        dropped = publisher.stats()["dropped"]
    found = curious.context.figures()["producers"]
    assert [(each["source"], each["unexplained"]) for each in found] == [("small", 0)]
    assert sum(found[0]["dropped"].values()) == sum(dropped.values()) > 0
    assert curious.context.figures()["bus"]["dropped"] == found[0]["dropped"]


def test_a_consumer_that_stands_still_is_late_by_the_age_of_what_it_has_not_seen(embed):
    """Also while events keep coming: the newest of them says nothing about the oldest."""
    curious = Curious("inline")
    still = Curious("thread")
    bus = embed(["schema", "store"], ("curious", curious), ("still", still))
    bus.publish(1)
    wait_until(lambda: bus.consumer("curious-thread")["cursor"] == 1, "the consumer to follow")
    assert bus.request("pause", consumer="curious-thread")["state"] == "paused"
    begun = time.monotonic()
    bus.publish(1, 1)

    def late() -> float:
        bus.publish(1, 2)
        rows = curious.context.figures()["consumers"]
        return next(row["lag_ms"] for row in rows if row["name"] == "curious-thread")

    wait_until(lambda: late() > 2 * REACHED_S * 1e3, "the lag to grow under a steady flow")
    assert late() <= (time.monotonic() - begun) * 1e3 + 50
    bus.request("resume", consumer="curious-thread")
    wait_until(lambda: bus.consumer("curious-thread")["lag_ms"] == 0.0, "the consumer to catch up")

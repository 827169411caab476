"""Shapes of flow, each of which checks its answer, and what grows with a size; drawn in bench/README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.harness import Bus, Wrong, drive, loads
from bench.plan import Bench, Figures, Size
from bench.producers import Load

#: Steps whose times a target compares, so one of them alone in a slow minute would mislead; open signals are compared
#: by CPU time, which a slow minute changes little.
COMPARED = ("plugins-5", "plugins-20")
TALLY = {"kind": "tally", "name": "tally"}


def fan_in(producers: int) -> Callable[[Size], Figures]:
    """So many Publishers into five plugins, and a sixth that compares every event with what was sent."""

    def run(size: Size) -> Figures:
        with Bus([TALLY]) as bus:
            return drive(bus, loads(bus, "publisher", producers, size.topology_events))

    return run


def quotes(bus: Bus, count: int, producers: int = 2) -> list[Load]:
    return loads(bus, "publisher", producers, count, only="market_data")


def pipeline(size: Size) -> Figures:
    """A consumer emits an event for each quote, another one takes what it emitted."""
    count = size.topology_events // 2
    with Bus([{"kind": "emitter", "name": "emitter"}, {"kind": "staged", "name": "staged"}]) as bus:
        figures = drive(bus, quotes(bus, count))
        # what was derived goes round once more
        bus.settle({"emitter": count})
        found = bus.ask("probed")["staged"]
        if found != {"count": count, "disorder": 0}:
            raise Wrong(f"of {count} stages the second half saw {found}")
        return figures


def diamond(size: Size) -> Figures:
    """Two consumers after one, a fourth after both."""
    count = size.topology_events
    with Bus([{"kind": "diamond", "name": "diamond"}]) as bus:
        # the standing signals are among what the four see
        before = bus.ask("probed")["diamond"]["counts"]
        figures = drive(bus, loads(bus, "publisher", 2, count))
        found = bus.ask("probed")["diamond"]
        expected = {name: seen + count for name, seen in before.items()}
        if found["counts"] != expected or found["ahead"]:
            raise Wrong(f"each of the four was to see {expected} events after those before it, but: {found}")
        return figures


def slow_consumer(size: Size) -> Figures:
    """One consumer takes a millisecond an event, on its thread: the others must not notice."""
    count = size.topology_events
    slow = {"kind": "slow", "name": "slow", "mode": "thread"}
    with Bus([TALLY]) as bus:
        without = drive(bus, quotes(bus, count))
    # it is far behind at the end, and nobody waits for it
    with Bus([TALLY, slow], drain_s=0.5) as bus:
        figures = drive(bus, quotes(bus, count), ignore=("slow",))
        handled = bus.ask("probed")["slow"]["count"]
        if handled >= count:
            raise Wrong("the slow consumer was not slow")
        bus.process.kill()  # it has a lot to do yet, which no figure waits for
    return {**figures, "without_events_per_s": without["events_per_s"]}


def by_batch(batch: int) -> Callable[[Size], Figures]:
    def run(size: Size) -> Figures:
        with Bus() as bus:
            return drive(bus, loads(bus, "msgpack", 1, size.topology_events, batch=batch))

    return run


def by_payload(padding: int) -> Callable[[Size], Figures]:
    def run(size: Size) -> Figures:
        count = min(size.topology_events, 200_000_000 // padding)
        with Bus() as bus:
            figures = drive(bus, loads(bus, "publisher", 2, count, padding=padding))
            return {**figures, "mb_per_s": figures["events_per_s"] * padding / 1e6}

    return run


def by_plugins(count: int) -> Callable[[Size], Figures]:
    """So many plugins: the store, the schema, the other three, and small ones that look at every quote."""
    built_in = ("store", "schema", "outcomes", "slots", "telegram")[:count]
    extra = [{"kind": "quotes", "name": f"small-{number}"} for number in range(count - len(built_in))]

    def run(size: Size) -> Figures:
        with Bus(extra, plugins=built_in) as bus:
            figures = drive(bus, loads(bus, "publisher", 2, size.topology_events))
            seen = {each["count"] for each in bus.ask("probed").values()}
            if len(seen) > 1:
                raise Wrong(f"plugins saw different numbers of quotes: {sorted(seen)}")
            return figures

    return run


def by_signals(count: int) -> Callable[[Size], Figures]:
    """Quotes only, against so many open signals."""

    def run(size: Size) -> Figures:
        with Bus(standing=count) as bus:
            bus.sealed()  # opening so many is work for upkeep, which is not what is measured
            figures = drive(bus, quotes(bus, size.topology_events))
            found = bus.ask("stats")["plugins"]["outcomes"]["metrics"]
            if found["open"] != count:
                raise Wrong(f"{found['open']} of {count} signals are open")
            return figures

    return run


def by_share(of_100_000: int) -> Callable[[Size], Figures]:
    """The mix with more or fewer signals."""

    def run(size: Size) -> Figures:
        with Bus() as bus:
            return drive(bus, loads(bus, "publisher", 2, size.topology_events, signals=of_100_000 / 100_000))

    return run


def benches(size: Size) -> list[Bench]:
    """All shapes, at the steps that `size` names."""
    steps: list[tuple[str, str, Any, tuple[int, ...]]] = [
        ("batch", "events in a frame of a plain PUSH client", by_batch, size.batches),
        ("payload", "bytes of text in each event", by_payload, size.payloads),
        ("plugins", "plugins on the bus", by_plugins, size.plugins),
        ("share", "of 100,000 events are signals", by_share, size.shares),
        ("signals", "open signals that each quote is compared with", by_signals, size.signals),
    ]
    return [
        Bench("one-to-five", "one producer → five plugins", fan_in(1), rounds=False),
        Bench("four-to-five", "four producers → five plugins", fan_in(4), rounds=False),
        Bench("pipeline", "a consumer takes what another one emits", pipeline, rounds=False),
        Bench("diamond", "two consumers after one, a fourth after both", diamond, rounds=False),
        Bench(
            "slow-consumer",
            "the others beside a thread consumer of 1 ms an event",
            slow_consumer,
            rounds=False,
        ),
        *(
            Bench(f"{name}-{step}", f"{what}: {step:,}", make(step), rounds=f"{name}-{step}" in COMPARED)
            for name, what, make, values in steps
            for step in values
        ),
    ]

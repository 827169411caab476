"""The figures to reach, and how far a run has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

Repetitions = dict[str, list[float]]


@dataclass(frozen=True)
class Target:
    """One line of the table. `of` names the figure, or works it out; `most` of it are allowed, or `least` wanted."""

    what: str
    of: str | Callable[[Repetitions], list[float]]
    unit: str
    least: float | None = None
    most: float | None = None

    def values(self, repetitions: Repetitions) -> list[float]:
        """One value a round, none where something it needs has not run."""
        if callable(self.of):
            return self.of(repetitions)
        return repetitions.get(self.of, [])

    def share(self, value: float) -> float:
        """How much of the target is reached; 1 and more is all of it."""
        if self.least is not None:
            return value / self.least
        assert self.most is not None
        return self.most / value if value > 0 else float("inf")


@dataclass(frozen=True)
class Row:
    """A target and what a run has to say about it; `median` is None where it did not run."""

    target: Target
    median: float | None
    best: float | None

    @property
    def share(self) -> float | None:
        """By the median: a good moment does not reach a target."""
        return None if self.median is None else self.target.share(self.median)


def rows(results: dict[str, Any]) -> list[Row]:
    """The table of a run as it stands in its file."""
    repetitions = {name: figure["rounds"] for name, figure in results["figures"].items()}
    out = []
    for target in TARGETS:
        values = target.values(repetitions)
        best = max if target.least is not None else min
        out.append(Row(target, median(values) if values else None, best(values) if values else None))
    return out


def ratio(above: str, below: str) -> Callable[[Repetitions], list[float]]:
    """`above` ÷ `below`, round by round."""
    return lambda repetitions: divided(repetitions.get(above, []), repetitions.get(below, []))


def divided(above: list[float], below: list[float]) -> list[float]:
    """Round by round where both have as many, else by the medians."""
    if not above or not below:
        return []
    if len(above) == len(below):
        return [a / b for a, b in zip(above, below, strict=True)]
    return [median(above) / median(below)]


def of_floors(repetitions: Repetitions) -> list[float]:
    """Ours ÷ the lowest of the floors of this way in that were run."""
    begin, end = "floor:publisher-", ".events_per_s"
    floors = [v for name, v in repetitions.items() if name.startswith(begin) and name.endswith(end)]
    if not floors:
        return []
    return divided(repetitions.get("publisher.events_per_s", []), min(floors, key=median))


def growth(series: str, figure: str, low: int, high: int) -> Callable[[Repetitions], list[float]]:
    """`figure` at the step `high` ÷ at the step `low` of a series."""
    return ratio(f"{series}-{high}.{figure}", f"{series}-{low}.{figure}")


def time_growth(series: str, low: int, high: int) -> Callable[[Repetitions], list[float]]:
    """Time an event takes at the step `high` ÷ at `low`."""
    return ratio(f"{series}-{low}.events_per_s", f"{series}-{high}.events_per_s")


ALL = "to disk and five plugins"
TARGETS = [
    Target(f"{ALL}: Publisher", "publisher.events_per_s", "events/s", least=700_000),
    Target(
        "… ÷ Redis Streams, AOF everysec",
        ratio("publisher.events_per_s", "peer:redis-everysec.events_per_s"),
        "×",
        least=10,
    ),
    Target("… ÷ NATS JetStream", ratio("publisher.events_per_s", "peer:jetstream.events_per_s"), "×", least=25),
    Target(
        "… with statistics and alerts ÷ without",
        ratio("publisher-all.events_per_s", "publisher.events_per_s"),
        "×",
        least=0.9,
    ),
    Target("… ÷ lowest floor", of_floors, "×", least=0.30),
    Target(f"{ALL}: PUSH, MessagePack", "push-msgpack.events_per_s", "events/s", least=600_000),
    Target(f"{ALL}: PUSH, JSON", "push-json.events_per_s", "events/s", least=350_000),
    Target("publish → plugin after fsync, 1,000/s: p50", "latency.p50_ms", "ms", most=0.6),
    Target("… p99", "latency.p99_ms", "ms", most=2),
    Target(
        "… p50 beside a busy Telegram relay ÷ without",
        ratio("latency-relay.p50_ms", "latency.p50_ms"),
        "×",
        most=1.1,
    ),
    Target("early delivery p50 ÷ plain pyzmq (ipc)", ratio("latency-early.p50_ms", "pyzmq-ipc.p50_ms"), "×", most=1.5),
    Target("publish() at 1,000/s: p50", "latency.publish_p50_us", "µs", most=1),
    Target("… p99.9", "latency.publish_p999_us", "µs", most=100),
    Target("publish() in a burst: p50", "latency.publish_burst_p50_us", "µs", most=1),
    Target("… p99.9", "latency.publish_burst_p999_us", "µs", most=100),
    Target("CPU of the bus at 1,000 events/s", "latency.cpu_percent", "%", most=2),
    Target("CPU of the idle bus", "idle.cpu_percent", "%", most=0.3),
    Target("memory of the idle bus", "idle.rss_mb", "MB", most=60),
    Target("memory at full rate, highest", "publisher.rss_peak_mb", "MB", most=200),
    Target("the mix at rest", "rest.bytes_per_event", "B/event", most=40),
    # a reader opened for each question; the slowest of them read what the disk, not memory, holds
    Target("correlation id among 10 M events: p50", "query-10M.correlation_id_first_p50_ms", "ms", most=5),
    Target("last 1,000 quotes of 10 M events: p50", "query-10M.last_1000_market_data_first_p50_ms", "ms", most=10),
    Target(
        "last 1,000 signals of 10 M events: p50", "query-10M.last_1000_signal_generated_first_p50_ms", "ms", most=10
    ),
    Target("CPU a quote, 100,000 signals ÷ 100", growth("signals", "bus_cpu_us_per_event", 100, 100_000), "×", most=2),
    Target("time an event, 20 plugins ÷ 5", time_growth("plugins", 5, 20), "×", most=3),
]

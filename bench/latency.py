"""From `publish` to a plugin at 1,000 events a second, the cost of the call, plain pyzmq beside it, the idle bus."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import zmq
from bench.harness import Bus, Producer, Skipped, Wrong
from bench.plan import Bench, Figures, Size
from bench.probes import EARLY
from bench.producers import Load

QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
#: Messages of plain pyzmq that are not counted: the connection is being made.
WARM = 100
SETTLE_S = 3.0
#: Distances of commits to trade delay for CPU with.
INTERVALS_MS = (2, 10, 50)


def percentiles(seconds: list[float], scale: float, suffix: str, prefix: str = "") -> Figures:
    """The quantiles of `seconds`, times `scale`."""
    ordered = sorted(seconds)
    return {
        f"{prefix}{name}_{suffix}": ordered[min(int(len(ordered) * at), len(ordered) - 1)] * scale
        for name, at in QUANTILES.items()
    }


def through(deliver: str = "", commit_interval_ms: float = 0.0) -> Callable[[Size], Figures]:
    """Latency to a consumer, what the bus and the caller paid for it."""

    def run(size: Size) -> Figures:
        if deliver and not EARLY:
            raise Skipped("this version has no Consumer(deliver=…)")
        probe = {"kind": "latency", "name": "probe", **({"deliver": deliver, "mode": "thread"} if deliver else {})}
        with Bus([probe], commit_interval_ms=commit_interval_ms) as bus:
            figures, calls = paced(bus, size.paced_events)
            if commit_interval_ms:
                return figures
            return {
                **figures,
                **percentiles(calls["paced"], 1e6, "us", "publish_"),
                **percentiles(calls["burst"], 1e6, "us", "publish_burst_"),
            }

    return run


def paced(bus: Bus, count: int) -> tuple[Figures, dict[str, list[float]]]:
    """`count` events on a schedule through `bus`, which has a probe, and the seconds of the producer's calls."""
    producer = Producer(Load("paced", bus.ipc, count, "bench-paced"))
    try:
        producer.ready()
        bus.settle({"bench-paced": 1})
        bus.ask("forget")
        commits, cpu, begun = bus.ask("commits")["commits"], bus.cpu(), time.monotonic()
        producer.say("go")
        producer.sent()
        busy, took = bus.cpu() - cpu, time.monotonic() - begun
        commits = bus.ask("commits")["commits"] - commits
        bus.settle({"bench-paced": count + 1})
        seconds = bus.ask("probed")["probe"]["seconds"]
        producer.say("go")
        calls = producer.result()
    finally:
        producer.close()
    if len(seconds) != count:
        raise Wrong(f"the probe saw {len(seconds)} of {count} events")
    figures = {**percentiles(seconds, 1e3, "ms"), "cpu_percent": busy / took * 100, "commits_per_s": commits / took}
    return figures, calls


def plain(transport: str) -> Callable[[Size], Figures]:
    """One way through two plain sockets, no bus: what the transport alone takes."""

    def run(size: Size) -> Figures:
        count = size.paced_events + WARM
        with (
            tempfile.TemporaryDirectory(prefix="tb-") as directory,
            zmq.Context() as context,
            context.socket(zmq.PULL) as socket,
        ):
            socket.setsockopt(zmq.RCVTIMEO, 30_000)
            socket.bind(f"ipc://{directory}/s" if transport == "ipc" else "tcp://127.0.0.1:*")
            producer = Producer(Load("plain", str(socket.getsockopt_string(zmq.LAST_ENDPOINT)), count, "plain"))
            try:
                producer.ready()
                producer.say("go")
                found = []
                for _ in range(count):
                    message = socket.recv()
                    found.append((time.time(), message))
                producer.sent()
            except zmq.Again:
                raise Wrong(f"{len(found)} of {count} messages came") from None
            finally:
                producer.close()
        import msgspec

        decode = msgspec.msgpack.decode
        return percentiles([at - decode(message)["timestamp"] for at, message in found[WARM:]], 1e3, "ms")

    return run


def idle(size: Size) -> Figures:
    """A bus that nobody talks to."""
    with Bus(standing=0) as bus:
        time.sleep(min(SETTLE_S, size.idle_s))
        cpu, begun = bus.cpu(), time.monotonic()
        time.sleep(size.idle_s)
        share = (bus.cpu() - cpu) / (time.monotonic() - begun)
        memory = bus.memory()
        return {
            "cpu_percent": share * 100,
            "rss_mb": memory["now"],
            "private_mb": memory["private"],
            "ready_s": bus.ready_s,
        }


def spaced(interval_ms: float) -> Bench:
    what = f"the same with bus.commit_interval_ms = {interval_ms:g}"
    return Bench(f"latency-every-{interval_ms:g}ms", what, through(commit_interval_ms=interval_ms), rounds=False)


BENCHES = [
    Bench("latency", "publish → plugin after the fsync, at 1,000 events/s; cost of publish(); CPU", through()),
    Bench("latency-early", "the same to a consumer with deliver='early'", through("early")),
    Bench("pyzmq-ipc", "plain pyzmq, one way, at 1,000 messages/s", plain("ipc")),
    Bench("pyzmq-tcp", "plain pyzmq, one way, at 1,000 messages/s", plain("tcp")),
    *map(spaced, INTERVALS_MS),
    Bench("idle", "CPU and memory of a bus that nobody talks to, time until it is ready", idle, rounds=False),
]

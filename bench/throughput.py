"""Events a second onto the disk and through all five plugins, by the three ways in, and the peers and floors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.harness import STANDING, Bus, Skipped, Wrong, drive, loads
from bench.plan import Bench, Figures, Results, Size

#: With which every throughput line runs: as many programs publish, feeds push alone.
PRODUCERS = {"publisher": 2, "msgpack": 1, "json": 1}


def through(kind: str) -> Callable[[Size], Figures]:
    """The mix through all five plugins, `STANDING` signals open."""

    def run(size: Size) -> Figures:
        with Bus() as bus:
            figures = drive(bus, loads(bus, kind, PRODUCERS[kind], size.events))
            check_open(bus, STANDING)
            return figures

    return run


def check_open(bus: Bus, least: int) -> None:
    """The standing signals are still open, so every quote was compared with them."""
    found = bus.ask("stats")["plugins"]["outcomes"]["metrics"]
    if found["open"] < least:
        raise Wrong(f"{found['open']} signals are open at the end, {least} were to stay so")


BENCHES = [
    Bench("publisher", "two Publishers, acknowledged, on disk, through five plugins", through("publisher")),
    Bench("push-msgpack", "plain PUSH, one MessagePack event a frame", through("msgpack")),
    Bench("push-json", "plain PUSH, one JSON event a frame", through("json")),
]


def others(results: Results) -> list[Bench]:
    """The peers and the floors, each as a benchmark that takes its turn with ours."""
    try:
        from bench.floors import FLOORS
        from bench.peers import PEERS
    except ImportError:
        return []
    out = []
    for peer in PEERS:
        out.append(Bench(f"peer:{peer.name}", f"{peer.kind} peer", _of_peer(peer, results)))
    for name, floor in FLOORS.items():
        out.append(Bench(f"floor:{name}", "what the parts alone can do", _of_floor(floor)))
    return out


def _of_peer(peer: Any, results: Results) -> Callable[[Size], Figures]:
    from bench import peers

    def run(size: Size) -> Figures:
        try:
            figures = numbers(peer.throughput(size.peer_events))
            if hasattr(peer, "latency"):
                figures |= numbers(peer.latency(size.paced_events))
            results.versions[peer.name] = str(peer.version)
        except peers.Skipped as reason:
            raise Skipped(str(reason)) from reason
        return figures

    return run


def _of_floor(floor: Callable[[int], dict[str, Any]]) -> Callable[[Size], Figures]:
    def run(size: Size) -> Figures:
        try:
            return numbers(floor(size.peer_events))
        except Exception as error:
            if type(error).__name__ == "Skipped":
                raise Skipped(str(error)) from error
            raise

    return run


def numbers(found: dict[str, Any]) -> Figures:
    """The figures among what a peer tells; raises `Wrong` where its own check failed."""
    if found.get("checked") is False:
        raise Wrong("its answer did not pass its check")
    return {name: float(value) for name, value in found.items() if type(value) in (int, float)}

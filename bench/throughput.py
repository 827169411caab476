"""Events a second onto the disk and through all five plugins, by the three ways in, and the peers and floors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bench.harness import FIVE, STANDING, Bus, Skipped, Wrong, drive, loads
from bench.plan import Bench, Figures, Results, Size

from tapebus.config import Plugins

if TYPE_CHECKING:
    from bench.peers import Peer

#: The five and what learns from their events: statistics and alerts.
DEFAULT = tuple(Plugins().enabled)
#: With which every throughput line runs: as many programs publish, feeds push alone.
PRODUCERS = {"publisher": 2, "msgpack": 1, "json": 1}


def through(kind: str, plugins: tuple[str, ...] = FIVE) -> Callable[[Size], Figures]:
    """The mix through `plugins`, `STANDING` signals open."""

    def run(size: Size) -> Figures:
        with Bus(plugins=plugins) as bus:
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
    Bench("publisher-all", "the same through every plugin that is on by default", through("publisher", DEFAULT)),
    Bench("push-msgpack", "plain PUSH, one MessagePack event a frame", through("msgpack")),
    Bench("push-json", "plain PUSH, one JSON event a frame", through("json")),
]


def others(results: Results) -> list[Bench]:
    """The peers and the floors, each as a benchmark that takes its turn with ours."""
    from bench.floors import FLOORS
    from bench.peers import PEERS

    return [
        *(Bench(f"peer:{peer.name}", f"{peer.kind} peer: {peer.promise}", _of_peer(peer, results)) for peer in PEERS),
        *(Bench(f"floor:{name}", "what a part alone can do", _of_floor(floor)) for name, floor in FLOORS.items()),
    ]


def _of_peer(peer: Peer, results: Results) -> Callable[[Size], Figures]:
    def run(size: Size) -> Figures:
        with translated():
            figures = numbers(peer.throughput(size.peer_events))
            if hasattr(peer, "latency"):
                figures |= numbers(peer.latency(size.peer_paced_events))
            about = {"version": peer.version, "kind": peer.kind, "promise": peer.promise}
            results.peers[f"peer:{peer.name}"] = about
            return figures

    return run


def _of_floor(floor: Callable[[int], dict[str, Any]]) -> Callable[[Size], Figures]:
    def run(size: Size) -> Figures:
        with translated():
            return numbers(floor(size.topology_events))

    return run


@contextmanager
def translated() -> Iterator[None]:
    """Say in the harness's words what a peer could not do or did wrong; one that fails ends no run."""
    from bench.peers import Skipped as NotHere

    try:
        yield
    except NotHere as reason:
        raise Skipped(str(reason)) from reason
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {error}") from error


def numbers(found: dict[str, Any]) -> Figures:
    """The figures among what a peer tells."""
    return {name: float(value) for name, value in found.items() if type(value) in (int, float)}

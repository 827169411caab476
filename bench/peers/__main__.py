"""``python -m bench.peers``: what is here to be compared with; with names it runs them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bench.peers import PEERS, Peer, Skipped, Wrong


def show(peer: Peer) -> None:
    try:
        found = peer.version
    except Skipped as reason:
        found = f"skipped: {reason}"
    print(f"{peer.name:20} {peer.kind:11} {found}\n{'':32} {peer.promise}")


def run(peer: Peer, events: int, paced: int) -> dict[str, Any]:
    """Everything there is to measure about `peer`."""
    result = {"name": peer.name, "kind": peer.kind, "version": peer.version, "throughput": peer.throughput(events)}
    if paced and hasattr(peer, "latency"):
        result["latency"] = peer.latency(paced)
    return result


def line(result: dict[str, Any]) -> str:
    """One line of the table."""
    latency = result.get("latency")
    times = f"   p50 {latency['p50_ms']:.3f} p99 {latency['p99_ms']:.3f} ms" if latency else ""
    settings = ", ".join(f"{key} {value}" for key, value in result["throughput"]["settings"].items())
    return f"{result['name']:20} {result['throughput']['events_per_s']:>9,} events/s{times}\n{'':20} {settings}"


def main() -> None:
    """List the peers, or run those named and print their figures; exits 1 when one was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="peers to run, or all")
    parser.add_argument("--events", type=int, default=200_000, help="events of a throughput run, over all producers")
    parser.add_argument("--paced", type=int, default=2_000, help="events of a latency run, 1,000 a second; 0 for none")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    options = parser.parse_args()
    if not options.names:
        for peer in PEERS:
            show(peer)
        return
    by_name = {peer.name: peer for peer in PEERS}
    names = list(by_name) if options.names == ["all"] else options.names
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"no peer {unknown[0]!r}: there are {', '.join(by_name)}")
    failed = False
    for name in names:
        try:
            result = run(by_name[name], options.events, options.paced)
        except Skipped as reason:
            print(f"{name:20} skipped: {reason}", flush=True)
        except Wrong as reason:
            failed = True
            print(f"{name:20} wrong: {reason}", flush=True)
        else:
            print(json.dumps(result) if options.json else line(result), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()

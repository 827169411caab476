"""``python -m bench``: throughput, latency and cost of a real bus with all plugins and the tape on."""

from __future__ import annotations

import argparse
import json
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tapebus import Config, Consumer, Runtime, hookimpl

ROOT = Path(__file__).parents[1]


class Probe:
    """Notes publish → handler times of ``user_action`` events while `on`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.on = False

    @hookimpl
    def tapebus_register_consumers(self, context: Any) -> list[Consumer]:
        return [Consumer(name="probe", topics=["user_action"], handler=self._handle)]

    def _handle(self, batch: Any) -> None:
        if self.on:
            now = time.time()
            self.seconds += [now - event.timestamp for event in batch]


@contextmanager
def running(probe: Probe) -> Iterator[Runtime]:
    """A bus on free ports and a temporary data directory."""
    with tempfile.TemporaryDirectory(prefix="tb-") as directory, ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        feed, ingest, acked = (f"tcp://127.0.0.1:{each.getsockname()[1]}" for each in sockets)
        held.close()
        file = Path(directory) / "bench.toml"
        file.write_text(
            f'[bus]\ndata_dir = "{directory}/data"\n'
            f'[listen]\nfeed = "{feed}"\ningest = "{ingest}"\nacked = ["{acked}", "ipc://{directory}/i.sock"]\n'
        )
        with Runtime(Config.load(file, environ={}), plugins=[("probe", probe)]) as runtime:
            yield runtime


def start(kind: str, endpoint: str, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bench.producers", kind, endpoint, str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def wait_through(runtime: Runtime, count: int) -> None:
    """Until `count` events are on the tape and every consumer has had them."""
    pause = 0.002
    while min(fence.cursor for fence in runtime.wiring.fences) < count:
        time.sleep(pause)


def throughput(kind: str, producers: int, count: int) -> dict[str, Any]:
    """Events a second from the first one on the tape to the last one through all plugins."""
    with running(Probe()) as runtime:
        listen = runtime.config.listen
        endpoint = runtime.config.acked_endpoints[1] if kind == "publisher" else listen.ingest
        total = producers * count
        children = [start(kind, endpoint, count) for _ in range(producers)]
        while runtime.tape.done_seq < 1000:
            time.sleep(0.001)
        first, begun, cpu = runtime.tape.done_seq, time.perf_counter(), time.process_time()
        wait_through(runtime, total)
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        if any(child.wait() for child in children):
            sys.exit(f"bench: a {kind} producer failed")
        stats = runtime.stats()
        stored = sum(each["stored"] for each in stats["producers"] if each["source"] in ("bench", "unsequenced"))
        if stored != total or stats["bus"]["unexplained"] or stats["bus"]["dropped"]:
            sys.exit(f"bench: {stored} of {total} events stored, books {stats['bus']}")
        return {
            "events_per_s": round((total - first) / seconds),
            "bus_cpu_us_per_event": round(cpu / (total - first) * 1e6, 2),
            "rss_mb": round(stats["bus"]["rss_bytes"] / 1e6, 1),
            "bytes_per_event": stats["store"].get("bytes_per_event"),
        }


def latency(count: int) -> dict[str, Any]:
    """Publish → plugin after the commit at 1,000 events a second, the cost of a call, and the idle bus."""
    probe = Probe()
    begun = time.perf_counter()
    with running(probe) as runtime:
        ready = time.perf_counter() - begun
        probe.on = True
        cpu, begun = time.process_time(), time.perf_counter()
        child = start("paced", runtime.config.acked_endpoints[1], count)
        while len(probe.seconds) < count:
            time.sleep(0.05)
        cpu_share = (time.process_time() - cpu) / (time.perf_counter() - begun)
        ordered = sorted(probe.seconds[:count])
        output, _ = child.communicate()
        time.sleep(2.0)
        cpu = time.process_time()
        time.sleep(10.0)
        idle = (time.process_time() - cpu) / 10.0
        return {
            "ready_s": round(ready, 3),
            "publish_to_plugin_ms": [round(ordered[int(count * q)] * 1e3, 3) for q in (0.5, 0.99, 0.999)],
            "publish_call_us": json.loads(output),
            "cpu_percent_at_1000_per_s": round(cpu_share * 100, 1),
            "cpu_percent_idle": round(idle * 100, 2),
            "rss_mb_idle": round(runtime.stats()["bus"]["rss_bytes"] / 1e6, 1),
        }


def main() -> None:
    """Run everything, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=main.__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="events of each throughput line")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "machine": {"cpu": platform.machine(), "python": platform.python_version(), "system": platform.release()},
        "versions": {name: version(name) for name in ("tapebus", "pyzmq", "msgspec", "lmdb", "pluggy")},
        "throughput": {},
    }
    # the quiet figures first, before this process has grown under load
    results["latency"] = latency(3000)
    for name, value in results["latency"].items():
        print(f"{name:46} {json.dumps(value)}")
    for title, kind, producers in (
        ("two Publishers, acknowledged, batches of 100", "publisher", 2),
        ("plain PUSH, one MessagePack event a frame", "msgpack", 1),
        ("plain PUSH, one JSON event a frame", "json", 1),
    ):
        found = throughput(kind, producers, options.events // producers)
        results["throughput"][title] = found
        print(f"{title:46} {found['events_per_s']:>9,} events/s   {found['bus_cpu_us_per_event']:.2f} µs CPU an event")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

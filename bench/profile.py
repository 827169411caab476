"""``python -m bench.profile``: where the CPU time of an event goes, by process, thread and stage.

Runs a real bus with all plugins and the tape on, under the load of real producers, and writes into build/profile:
``account.json`` and ``account.md`` (ns of CPU an event), ``symbols.txt`` (perf, by thread and symbol), ``stacks-*.raw``
(py-spy) and ``flame.svg``. Linux. ``--render`` prints the table of the last run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import stages
from bench.harness import STANDING, Bus, Producer, loads
from bench.throughput import PRODUCERS

OUT = Path("build/profile")
#: Samples a second: perf looks on from outside, py-spy stops the process for each one.
PERF_HZ, SPY_HZ = 997, 100
WARM_EVENTS, WARM_S = 50_000, 2.0
#: More than is ever sent.
MANY = 1_000_000_000
HINT = {
    "perf": "perf is missing or not permitted: apt-get install linux-perf, and kernel.perf_event_paranoid <= 1 or root",
    "py-spy": "py-spy is missing or not permitted: pip install py-spy, and kernel.yama.ptrace_scope = 0 or root",
}


@contextmanager
def loaded(kind: str) -> Iterator[tuple[Bus, list[Producer]]]:
    """A bus under a load that ends with the block, warm."""
    with Bus() as bus:
        producers = [Producer(load) for load in loads(bus, kind, PRODUCERS[kind], MANY)]
        try:
            for each in producers:
                each.ready()
            for each in producers:
                each.say("go")
            while stored(bus) < WARM_EVENTS:
                time.sleep(0.05)
            time.sleep(WARM_S)
            yield bus, producers
        finally:
            for each in producers:
                each.kill()


def stored(bus: Bus) -> int:
    """How many events are on the tape."""
    return int(bus.ask("stats")["bus"]["last_seq"])


def cpu_of(pid: int) -> dict[int, tuple[str, int]]:
    """By thread id: its name and the ns it has spent on a CPU."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found[int(task.name)] = (
                (task / "comm").read_text().strip(),
                int((task / "schedstat").read_text().split()[0]),
            )
        except OSError:
            continue  # it has just ended
    return found


def tool(name: str) -> str | None:
    """The path of a program of this environment or of the system."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def under_perf(pids: list[int], seconds: float) -> bool:
    """Record for so long; whether there is a perf that may."""
    perf, data = tool("perf"), OUT / "perf.data"
    data.unlink(missing_ok=True)
    command = [perf or "", "record", "-q", "-e", "cpu-clock", "-F", str(PERF_HZ), "--call-graph", "fp", "-o", str(data)]
    command += ["-p", ",".join(map(str, pids)), "--", "sleep", str(seconds)]
    if perf is None or subprocess.run(command, capture_output=True).returncode or not data.exists():
        print(HINT["perf"])
        time.sleep(seconds)
        return False
    return True


def perf_samples() -> dict[int, list[list[str]]]:
    """What was recorded by thread id, after writing symbols.txt."""
    command, data = [tool("perf") or "", "report"], ["-i", str(OUT / "perf.data")]
    report = [*command, *data, "--no-children", "-g", "none", "--sort", "comm,dso,sym", "--stdio"]
    (OUT / "symbols.txt").write_bytes(subprocess.run(report, capture_output=True).stdout)
    command[1] = "script"
    output = subprocess.run([*command, *data, "-F", "tid,ip,sym,dso"], capture_output=True, text=True, errors="replace")
    found: dict[int, list[list[str]]] = {}
    for thread, frames in stages.read_samples(output.stdout.splitlines()):
        found.setdefault(thread, []).append(frames)
    return found


def under_spy(pid: int, seconds: float, name: str, style: str = "raw") -> list[str]:
    """Stacks of Python and C functions, also left in the file `name`; none where there is no py-spy."""
    spy, file = tool("py-spy"), OUT / name
    file.unlink(missing_ok=True)
    command = [spy or "", "record", "--pid", str(pid), "--rate", str(SPY_HZ), "--threads", "--format", style]
    command += ["--duration", str(round(seconds)), "--output", str(file)]
    # where C stacks cannot be unwound, Python's own are still worth having
    for native in (["--native"], []):
        if spy is not None and subprocess.run(command + native, capture_output=True).returncode == 0 and file.exists():
            return file.read_text().splitlines()
    print(HINT["py-spy"])
    return []


def process_account(
    name: str, cpu: dict[int, tuple[str, int]], events: int, samples: dict[int, list[list[str]]], stacks: list[str]
) -> dict[str, Any]:
    """One process: its threads by CPU time an event, each divided into stages."""
    busy = stages.read_stacks(stacks, calls_too=not samples)
    threads: list[dict[str, Any]] = []
    for tid, (thread, spent) in cpu.items():
        each = spent / events
        shares = stages.divide(thread, busy.get(tid, Counter()), samples.get(tid, []))
        found = [{"name": stage, "ns_per_event": round(each * share, 1)} for stage, share in shares.items()]
        threads.append({"name": thread, "ns_per_event": round(each, 1), "stages": found})
    threads.sort(key=lambda each: -each["ns_per_event"])
    return {"name": name, "ns_per_event": round(sum(each["ns_per_event"] for each in threads), 1), "threads": threads}


def spent_between(before: dict[int, tuple[str, int]], after: dict[int, tuple[str, int]]) -> dict[int, tuple[str, int]]:
    """CPU time by thread between two readings, of threads that did anything."""
    spent = {tid: (name, ns - before.get(tid, ("", 0))[1]) for tid, (name, ns) in after.items()}
    return {tid: found for tid, found in spent.items() if found[1] > 0}


def measure(kind: str, seconds: float) -> dict[str, Any]:
    """Run everything and return the account."""
    with loaded(kind) as (bus, producers):
        pids = [bus.process.pid, producers[0].process.pid]
        first, begun = stored(bus), time.perf_counter()
        before = [cpu_of(pid) for pid in pids]
        recorded = under_perf(pids, seconds)
        events, after = stored(bus) - first, [cpu_of(pid) for pid in pids]
        took = time.perf_counter() - begun
        bus_stacks = under_spy(pids[0], seconds, "stacks-bus.raw")
        producer_stacks = under_spy(pids[1], seconds / 2, "stacks-producer.raw")
        if bus_stacks:
            under_spy(pids[0], seconds / 2, "flame.svg", "flamegraph")
    samples = perf_samples() if recorded else {}
    spent = [spent_between(*each) for each in zip(before, after, strict=True)]
    # producers are alike: the first one stands for all, with its share of the events
    share = events // PRODUCERS[kind]
    return {
        "load": kind,
        "open_signals": STANDING,
        "seconds": round(took, 1),
        "events": events,
        "events_per_s": round(events / took),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}",
        "by": ["perf"] * recorded + ["py-spy"] * bool(bus_stacks),
        "processes": [
            process_account("bus", spent[0], events, samples, bus_stacks),
            process_account("producer", spent[1], share, samples, producer_stacks),
        ],
    }


def render(account: dict[str, Any]) -> str:
    """The account with its circumstances, in Markdown."""
    return (
        f"Load: {account['load']}; {account['events']:,} events in {account['seconds']} s, "
        f"{account['open_signals']} open signals; Python {account['python']}, {account['machine']}; "
        f"stages by {' and '.join(account['by']) or 'nothing: see what to install'}.\n\n{stages.table(account)}"
    )


def main() -> None:
    """Measure and write the account, or print the last one."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=main.__doc__)
    parser.add_argument(
        "--load", choices=("publisher", "msgpack", "json"), default="publisher", help="what producers use"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each tool looks on")
    parser.add_argument("--render", action="store_true", help="print the table of the last run")
    options = parser.parse_args()
    file = OUT / "account.json"
    if not options.render:
        if not Path("/proc/self/schedstat").exists():
            sys.exit("profile: needs Linux with /proc/PID/schedstat")
        OUT.mkdir(parents=True, exist_ok=True)
        account = measure(options.load, options.seconds)
        file.write_text(json.dumps(account, indent=1) + "\n")
        (OUT / "account.md").write_text(render(account))
    print(render(json.loads(file.read_text())))


if __name__ == "__main__":
    main()

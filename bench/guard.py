"""``python -m bench.guard``: how many instructions an event costs, stage by stage, against a recorded budget.

Instructions, counted by valgrind, are the same on a busy machine and from run to run, which times are not. A stage
that costs more than its budget allows fails, and so does one that has become much cheaper: then the budget is to be
recorded anew, ``--record``, or it would hide the next regression. Budgets hold for one minor version of Python on one
architecture, built alike; where there is none the counts are printed and nothing fails.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUDGET = Path(__file__).with_name("budget.toml")
MARKS = Path(__file__).with_name("marks.c")
OUT = ROOT / "build" / "guard"
#: Events that are counted, and those before them that let the interpreter specialise its code.
COUNT, WARM, WARM_TIMES = 10_000, 2_000, 3
#: Percent a stage may cost more or less than its budget, unless the budget says otherwise.
RISE, FALL = 5.0, 15.0
#: Packages whose code is counted with ours; named where they differ from those a budget was recorded with.
PARTS = ("msgspec", "lmdb", "zstandard", "Cython")


class Skipped(Exception):
    """Nothing can be counted here, and why."""


class Failed(Exception):
    """What was to be counted was not, and why."""


class Finding(NamedTuple):
    """One stage against its budget; `verdict` is ``ok``, ``dearer``, ``cheaper`` or ``new``."""

    name: str
    found: float
    budget: float
    verdict: str

    @property
    def change(self) -> float:
        """In percent of the budget."""
        return (self.found / self.budget - 1) * 100 if self.budget else 0.0


def key() -> str:
    """What a budget holds for."""
    return f"{sys.implementation.name}-{sys.version_info[0]}.{sys.version_info[1]}-{platform.machine()}"


def made_with() -> dict[str, str]:
    """What the counts depend on besides our own code."""
    flags = sorted(
        re.findall(r"--(enable-optimizations|with-lto|enable-shared)", sysconfig.get_config_var("CONFIG_ARGS") or "")
    )
    found = {"build": " ".join((platform.python_compiler(), *flags)), "python": platform.python_version()}
    return found | {"libc": " ".join(platform.libc_ver())} | {name: version(name) for name in PARTS}


# -- counting ------------------------------------------------------------------------------------------------------


def compile_marks(directory: Path) -> Path:
    """The library that tells callgrind where to begin and end; raises `Skipped` where it cannot be made."""
    library = directory / "marks.so"
    compiler = os.environ.get("CC", "cc")
    command = [*compiler.split(), "-shared", "-fPIC", "-O1", "-o", str(library), str(MARKS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Skipped(f"no C compiler: {error}") from error
    if done.returncode:
        raise Skipped(f"the headers of valgrind are missing or unusable: {done.stderr.strip().splitlines()[:1]}")
    return library


def command_line(valgrind: str, out: Path, *arguments: str) -> list[str]:
    """The child under valgrind, at the same addresses every time where the system allows that."""
    fixed = ["setarch", "-R"]
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    tool = [valgrind, "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}/callgrind.out"]
    return [*fixed, *tool, sys.executable, "-m", "bench.guard", *arguments]


def count(names: Iterable[str]) -> dict[str, float]:
    """Instructions an event by stage. Raises `Skipped`, or `Failed` with what the child said."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise Skipped("valgrind is not installed (Debian, Ubuntu: apt-get install valgrind)")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="tb-") as directory:
        marks = compile_marks(Path(directory))
        # nothing of the caller's environment may move an address or a hash
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
        done = subprocess.run(
            command_line(valgrind, OUT, "--child", str(marks), *names),
            cwd=ROOT,
            env=kept | {"PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "UTC", "TMPDIR": directory},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise Failed(f"valgrind ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    found = {}
    for path in OUT.glob("callgrind.out.*"):
        counted = read_profile(path.read_text())
        if counted is not None:
            found[counted[0]] = counted[1] / COUNT
            path.rename(OUT / f"{counted[0]}.callgrind")
    return found


def read_profile(text: str) -> tuple[str, int] | None:
    """The name that a region ended with and its instructions; None for a file of callgrind that is no region's."""
    name = re.search(r"^desc: Trigger: Client Request: (\S+)$", text, re.M)
    total = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
    return (name[1], int(total[1])) if name is not None and total is not None else None


def child(marks: str, names: list[str]) -> None:
    """Run the workloads inside valgrind, the counted part of each between two marks."""
    from bench.workloads import WORKLOADS

    library = ctypes.CDLL(marks)
    gc.disable()
    for workload in WORKLOADS:
        if names and workload.name not in names:
            continue
        for _ in range(WARM_TIMES):
            workload.make(WARM).run()
        task = workload.make(COUNT)
        gc.collect()
        library.start()
        answer = task.run()
        library.stop(workload.name.encode())
        task.check(answer)


# -- the budget ----------------------------------------------------------------------------------------------------


def compare(found: dict[str, float], budget: dict[str, dict[str, float]]) -> list[Finding]:
    """Each stage against its entry of the budget."""
    findings = []
    for name, instructions in sorted(found.items()):
        entry = budget.get(name)
        if entry is None:
            findings.append(Finding(name, instructions, 0.0, "new"))
            continue
        allowed = entry["instructions_per_event"]
        verdict = "ok"
        if instructions > allowed * (1 + entry.get("rise", RISE) / 100):
            verdict = "dearer"
        elif instructions < allowed * (1 - entry.get("fall", FALL) / 100):
            verdict = "cheaper"
        findings.append(Finding(name, instructions, allowed, verdict))
    return findings


def record(file: Path, found: dict[str, float]) -> None:
    """Write `found` as the budget of this interpreter; other budgets, and tolerances that were set, stay."""
    budgets = read(file)
    before = budgets.get(key(), {}).get("stages", {})
    stages = {}
    for name, instructions in sorted(found.items()):
        set_ones = {limit: before[name][limit] for limit in ("rise", "fall") if limit in before.get(name, {})}
        stages[name] = {"instructions_per_event": round(instructions, 1), **set_ones}
    budgets[key()] = {"with": made_with(), "stages": stages}
    lines = [
        "# Instructions an event may cost, by interpreter and stage. Renewed by: make guard ARGS=--record",
        f"# A stage may cost {RISE:g} % more (rise) or {FALL:g} % less (fall), unless its line says otherwise.",
    ]
    for name, budget in sorted(budgets.items()):
        lines += ["", f'["{name}".with]', *(f'{part} = "{text}"' for part, text in budget["with"].items())]
        lines += ["", f'["{name}".stages]']
        for stage, entry in budget["stages"].items():
            lines.append(f"{stage} = {{ {', '.join(f'{word} = {value}' for word, value in entry.items())} }}")
    file.write_text("\n".join(lines) + "\n")


def read(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text()) if file.exists() else {}


def report(findings: list[Finding], budget: dict[str, Any]) -> int:
    """Print the table and what to do; the exit code."""
    print(f"{'stage':<16}{'instructions an event':>24}{'budget':>12}{'change':>10}")
    for each in findings:
        allowed, change = (f"{each.budget:,.0f}", f"{each.change:+.1f} %") if each.budget else ("-", "-")
        verdict = "" if each.verdict == "ok" else each.verdict
        print(f"{each.name:<16}{each.found:>24,.0f}{allowed:>12}{change:>10}  {verdict}".rstrip())
    if not budget:
        print(f"guard: no budget for {key()}: nothing is compared. make guard ARGS=--record makes one")
        return 0
    others = [part for part, text in made_with().items() if budget["with"].get(part) != text]
    if others:
        print(f"guard: the budget was recorded with another {', '.join(others)}")
    if "build" in others:
        print("guard: instructions of another build of Python do not compare, so nothing fails")
        return 0
    dearer = [each.name for each in findings if each.verdict == "dearer"]
    stale = [each.name for each in findings if each.verdict in ("cheaper", "new")]
    if dearer:
        profile = (OUT / f"{dearer[0]}.callgrind").relative_to(ROOT)
        print(f"guard: dearer than the budget allows: {', '.join(dearer)}. callgrind_annotate {profile} shows where")
    if stale:
        print(f"guard: the budget is out of date for {', '.join(stale)}. make guard ARGS=--record renews it")
    return 1 if dearer or stale else 0


def main() -> int:
    """Count, compare, print; the exit code is 1 when a stage left its budget."""
    from bench.workloads import WORKLOADS

    every = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(prog="python -m bench.guard", description=main.__doc__)
    parser.add_argument("stages", nargs="*", help="only these: " + ", ".join(every))
    parser.add_argument("--record", action="store_true", help="make what is found the budget of this interpreter")
    parser.add_argument("--child", metavar="MARKS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.stages)
        return 0
    if unknown := sorted(set(options.stages) - set(every)):
        parser.error(f"no stage is called {', '.join(unknown)}: there are {', '.join(every)}")
    if options.record and options.stages:
        parser.error("--record renews the whole budget: leave out the names of stages")
    try:
        found = count(options.stages)
        if missing := sorted(set(options.stages or every) - found.keys()):
            raise Failed(f"valgrind left no count of {', '.join(missing)} in {OUT.relative_to(ROOT)}")
    except Skipped as reason:
        print(f"guard: skipped: {reason}")
        return 0
    except Failed as reason:
        print(f"guard: {reason}", file=sys.stderr)
        return 1
    if options.record:
        record(BUDGET, found)
    budget = read(BUDGET).get(key(), {})
    return report(compare(found, budget.get("stages", {})), budget)


if __name__ == "__main__":
    sys.exit(main())

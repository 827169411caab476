"""What every fault test shares: its size, its seed, and a place for the figures it measured.

``--faults quick|long|full`` chooses the size and ``--seed N`` repeats a run: a failing test prints the command.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

FIGURES = Path(__file__).parents[2] / "build" / "faults" / "figures.jsonl"
T = TypeVar("T")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def size(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``size(quick, long, full)``: the one that ``--faults`` asks for."""
    chosen = request.config.getoption("--faults")

    def choose(quick: T, long: T, full: T) -> T:
        return {"quick": quick, "long": long, "full": full}[chosen]

    return choose


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The number every chance of this test comes from; a fixed one in the quick size, so that CI repeats itself."""
    given = request.config.getoption("--seed")
    if given is None:
        given = 1 if request.config.getoption("--faults") == "quick" else random.SystemRandom().randrange(1 << 31)
    request.node.stash[SEED] = given
    return int(given)


@pytest.fixture
def chance(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """A dictionary for what the test measured; kept in ``build/faults/figures.jsonl``, shown at the end of the run."""
    found: dict[str, Any] = {}
    # the report of the call takes over what is in here by then
    request.node.user_properties.append(("figures", found))
    yield found
    if not found:
        return
    call = request.node.stash.get(REPORT, None)
    record = {
        "test": request.node.nodeid,
        "passed": call is not None and call.passed,
        "size": request.config.getoption("--faults"),
        "seed": request.node.stash.get(SEED, None),
        "seconds": round(call.duration, 1) if call is not None else None,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.platform(terse=True)}, Python {platform.python_version()}",
        "figures": found,
    }
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    with FIGURES.open("a") as file:
        file.write(json.dumps(record) + "\n")


SEED = pytest.StashKey[int]()
REPORT = pytest.StashKey[pytest.TestReport]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call":
        item.stash[REPORT] = report
        seed = item.stash.get(SEED, None)
        if report.failed and seed is not None:
            chosen = item.config.getoption("--faults")
            report.sections.append(("replay", f"make faults SIZE={chosen} ARGS='{item.nodeid} --seed {seed}'"))
    return report

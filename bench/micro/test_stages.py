"""Time of each stage of an event's path, alone on one thread: `make bench-micro`."""

from __future__ import annotations

from typing import Any

import pytest
from bench.workloads import WORKLOADS, Task, Workload

COUNT = 10_000
ROUNDS, WARM = 20, 2


@pytest.mark.parametrize("workload", WORKLOADS, ids=[workload.name for workload in WORKLOADS])
def test_stage(workload: Workload, benchmark: Any) -> None:
    """`COUNT` events a round, each round on input of its own and with its answer checked."""
    tasks: list[Task] = []
    answers: list[Any] = []

    def prepare() -> None:
        tasks[:], answers[:] = [workload.make(COUNT)], []

    def run() -> None:
        answers.append(tasks[0].run())

    def check() -> None:
        tasks[0].check(answers[0])

    benchmark.extra_info["events"] = COUNT
    benchmark.pedantic(run, setup=prepare, teardown=check, rounds=ROUNDS, warmup_rounds=WARM)
    benchmark.extra_info["ns_per_event"] = round(benchmark.stats.stats.min / COUNT * 1e9, 1)

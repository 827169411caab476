"""A consumer in its own process: it may be killed or hang, and what it emits is neither lost nor doubled."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tapebus.config import Config
from tapebus.runtime import Runtime
from tapebus.tape import Tape

PLUGIN = """
import os, time
from tapebus import Consumer, hookimpl

@hookimpl
def tapebus_register_consumers(context):
    def handler(batch):
        for event in batch:
            if event.data.action == "hang":
                flag = context.data_dir / "hung"
                if not flag.exists():
                    flag.touch()
                    time.sleep(3600)
            if event.data.action == "slow":
                print("{still here}", flush=True)
                time.sleep(0.25)
            if event.data.action == "abort":
                os._exit(3)
            if event.data.action == "raise":
                raise ValueError("as told")
            count = int(context.state.get("count", b"0")) + 1
            context.state["count"] = str(count).encode()
            context.emit("echo", {"of": event.bus_seq, "count": count, "pid": os.getpid()}, cause=event)
    return [Consumer(name="echo", topics=["user_action"], handler=handler, mode="process", start="first")]

@hookimpl
def tapebus_start(context):
    with (context.data_dir / "started").open("a") as file:
        file.write("%d\\n" % os.getpid())

@hookimpl
def tapebus_metrics(context):
    return {"pid": os.getpid(), "count": int(context.state.get("count", b"0")), "figures": len(context.figures())}
"""


@pytest.fixture
def runtime(
    data_dir: Path, free_ports: Callable[[int], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Runtime]:
    """A bus whose plugin ``echo`` runs in a process of its own."""
    (tmp_path / "echo_plugin.py").write_text(PLUGIN)
    info = tmp_path / "echo_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tapebus.plugins]\necho = echo_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    feed, ingest, acked = free_ports(3)
    config = tmp_path / "bus.toml"
    config.write_text(
        f"""
[bus]
data_dir = "{data_dir}"
publish_heartbeat = false
[listen]
feed = "tcp://127.0.0.1:{feed}"
ingest = "tcp://127.0.0.1:{ingest}"
acked = "tcp://127.0.0.1:{acked}"
[plugins]
enabled = ["schema", "store", "echo"]
[plugins.echo.faults]
deadline_s = 3.0
deaths = 2
"""
    )
    with Runtime(Config.load(config)) as running:
        yield running


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:g} s: {what}")


def echoes(runtime: Runtime) -> list[Any]:
    with Tape.open(runtime.config.data_dir) as tape:
        return list(tape.read(topics=["echo"]))


def answered(runtime: Runtime, count: int) -> list[Any]:
    found = echoes(runtime)
    return found if len(found) >= count else []


def publish(runtime: Runtime, count: int, action: str = "click") -> None:
    for _ in range(count):
        runtime.publish("user_action", {"user_id": "u1", "action": action})


def row(runtime: Runtime) -> dict[str, Any]:
    return next(each for each in runtime.stats()["consumers"] if each["name"] == "echo")


def test_each_event_is_answered_once_across_kills_of_the_worker(runtime: Runtime) -> None:
    total = 0
    for round_ in range(3):
        publish(runtime, 200)
        total += 200
        pid = wait_for(partial(answered, runtime, total - 150), f"round {round_}")[-1].data["pid"]
        os.kill(pid, signal.SIGKILL)
    found = wait_for(partial(answered, runtime, total), "all echoes")
    assert [each.data["count"] for each in found] == list(range(1, total + 1))
    with Tape.open(runtime.config.data_dir) as tape:
        asked = [event.bus_seq for event in tape.read(topics=["user_action"])]
    assert [each.data["of"] for each in found] == asked


def test_a_hung_worker_is_killed_and_continues_from_its_cursor(runtime: Runtime) -> None:
    publish(runtime, 10)
    publish(runtime, 1, "hang")
    publish(runtime, 10)
    found = wait_for(lambda: len(echoes(runtime)) == 21 and echoes(runtime), "the worker to be replaced")
    assert [each.data["count"] for each in found] == list(range(1, 22))
    assert row(runtime)["state"] == "running"
    assert "killed" in row(runtime)["last_error"]


def test_events_in_a_row_that_end_the_process_are_buried_once_each(runtime: Runtime) -> None:
    publish(runtime, 1)
    publish(runtime, 3, "abort")
    publish(runtime, 1)
    found = wait_for(lambda: answered(runtime, 2), "both good events", 60.0)
    assert [each.data["of"] for each in found] == [1, 5]
    with Tape.open(runtime.config.data_dir) as tape:
        letters = wait_for(lambda: len(list(tape.dead_letters())) >= 3 and list(tape.dead_letters()), "three letters")
    assert [(each.reason, each.bus_seq) for each in letters] == [("crashed", 2), ("crashed", 3), ("crashed", 4)]


def test_an_event_the_worker_cannot_handle_becomes_a_dead_letter(runtime: Runtime) -> None:
    publish(runtime, 1)
    publish(runtime, 1, "raise")
    publish(runtime, 1)
    wait_for(lambda: len(echoes(runtime)) == 2, "both good events")
    with Tape.open(runtime.config.data_dir) as tape:
        letter = wait_for(lambda: list(tape.dead_letters()), "the dead letter")[0]
    assert (letter.place, letter.reason, letter.bus_seq) == ("plugin.echo", "error", 2)
    assert "as told" in letter.detail
    assert wait_for(lambda: row(runtime)["errors"], "the count") == 1


def test_a_worker_that_works_slowly_through_its_batch_is_left_alone_whatever_it_prints(runtime: Runtime) -> None:
    publish(runtime, 20, "slow")
    wait_for(lambda: len(echoes(runtime)) == 20, "all echoes, five seconds later")
    assert row(runtime)["restarts"] == 0


def test_a_paused_worker_is_ended_and_a_reset_one_is_another_process(runtime: Runtime) -> None:
    publish(runtime, 1)
    first = wait_for(lambda: echoes(runtime), "the first echo")[0].data["pid"]
    [worker] = runtime.processes
    worker.pause()
    wait_for(lambda: not os.path.exists(f"/proc/{first}"), "the worker to end")
    publish(runtime, 1)
    assert row(runtime)["state"] == "paused"
    worker.resume()
    second = wait_for(lambda: len(found := echoes(runtime)) == 2 and found, "what waited")[1].data["pid"]
    worker.resume()
    wait_for(lambda: not os.path.exists(f"/proc/{second}"), "the worker to be replaced")
    publish(runtime, 1)
    found = wait_for(lambda: len(found := echoes(runtime)) == 3 and found, "the third echo")
    assert len({each.data["pid"] for each in found}) == 3
    assert [each.data["count"] for each in found] == [1, 2, 3]
    assert row(runtime)["restarts"] == 0, "nobody failed"


def test_start_and_metrics_of_a_plugin_are_those_of_its_own_process(runtime: Runtime) -> None:
    publish(runtime, 3)
    pid = wait_for(lambda: len(found := echoes(runtime)) == 3 and found, "all echoes")[0].data["pid"]
    assert (runtime.config.data_dir / "started").read_text().split() == [str(pid)]
    assert pid != os.getpid()
    # the figures of the bus are not to be had in another process
    told = {"pid": pid, "count": 3, "figures": 0}
    wait_for(lambda: runtime.stats()["plugins"]["echo"]["metrics"] == told, "the worker to tell its figures")

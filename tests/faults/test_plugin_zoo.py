"""Plugins that raise, exit, hang, crawl, leak, abort and fork: everybody else gets every event, once and in order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zoo_animals import BAD, POISON, install

from bus_support import quote, wait_until
from tapebus import Publisher, Tape

HERE = Path(__file__).parent
RAISING = ("raise", "exit", "interrupt")


@pytest.fixture
def zoo(make_bus: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """``zoo({name: (kind, mode)}, extra)``: a bus with these animals, not started yet."""

    def make(animals: dict[str, tuple[str, str]], extra: str = "", bus: str = "", more: str = "") -> Any:
        for name, (kind, mode) in animals.items():
            install(tmp_path, name, kind, mode, more)
        made = make_bus(["schema", "store", *animals], extra)
        text = made.config_file.read_text()
        made.config_file.write_text(text.replace("[bus]\n", f"[bus]\npublish_heartbeat = false\n{bus}\n"))
        made.python_path = [str(tmp_path), str(HERE)]
        return made

    return make


def publish(bus: Any, first: int, count: int, figures: dict[str, Any] | None = None) -> None:
    """`count` quotes numbered from `first`, in bursts; each is acknowledged, however the plugins are."""
    waits = []
    with Publisher("test", endpoint=bus.acked) as publisher:
        for start in range(first, first + count, 50):
            for n in range(start, min(start + 50, first + count)):
                assert publisher.publish("market_data", quote(n))
            begun = time.monotonic()
            assert publisher.flush(30.0)
            waits.append(time.monotonic() - begun)
    if figures is not None:
        waits.sort()
        figures["ack_p99_ms"] = round(waits[int(len(waits) * 0.99)] * 1e3, 1)


def echoes(bus: Any, name: str) -> list[int]:
    with Tape.open(bus.data_dir) as tape:
        return [event.data["n"] for event in tape.read(topics=[f"echo.{name}"])]


def buried(bus: Any, name: str) -> list[tuple[str, int]]:
    """Reason and number of the dead letters of one animal."""
    with Tape.open(bus.data_dir) as tape:
        numbers = {event.bus_seq: int(event.data.volume) for event in tape.read(topics=["market_data"])}
        found = [each for each in tape.dead_letters() if each.place == f"plugin.{name}"]
    assert {each.consumer for each in found} <= {name}
    return sorted((each.reason, numbers[each.bus_seq]) for each in found)


def all_done(bus: Any, names: Any, count: int, patience: float = 60.0) -> dict[str, float]:
    """Wait until each of `names` has handled or buried all of the first `count` quotes; how long each one took."""
    with Tape.open(bus.data_dir) as tape:
        last = next(tape.read(topics=["market_data"], reverse=True)).bus_seq
    begun, pause = time.monotonic(), threading.Event()
    took: dict[str, float] = {}

    def passed() -> bool:
        # asking costs the bus something, so not as often as one can
        pause.wait(0.05)
        for each in bus.stats()["consumers"]:
            if each["cursor"] >= last:
                took.setdefault(each["name"], round(time.monotonic() - begun, 1))
        return {*names} <= {*took}

    def done() -> bool:
        return all(len(echoes(bus, name)) + len(buried(bus, name)) >= count for name in names)

    wait_until(passed, "the cursors of the animals to pass the last event", patience)
    # what a process emits reaches the tape after its cursor has moved
    wait_until(done, "what the animals emitted")
    return took


def check(bus: Any, animals: dict[str, tuple[str, str]], count: int) -> None:
    """Nobody missed, doubled or reordered an event; buried is exactly what could not be handled."""
    for name, (kind, _) in animals.items():
        bad: list[tuple[str, int]] = []
        if kind in RAISING or (kind == "memory" and animals[name][1] != "process"):
            bad = [("error", n) for n in range(1, count + 1) if n % 10 == BAD]
        elif kind in ("abort", "segfault", "fork"):
            bad = [("crashed", POISON)]
        elif kind == "hang":
            bad = [("timeout", POISON)]
        assert buried(bus, name) == bad, name
        lost = {n for _, n in bad}
        assert echoes(bus, name) == [n for n in range(1, count + 1) if n not in lost], name


@pytest.mark.parametrize("mode", ["inline", "thread"])
def test_animals_inside_the_bus_cost_nobody_else_an_event(zoo, size, figures, mode):
    kinds = ("raise", "exit", "interrupt", "memory", "before", "slow", "leak", "print", "well")
    animals = {kind: (kind, mode) for kind in kinds}
    count = size(150, 400, 1000)
    extra = f"[plugins.slow]\nseconds = {size(0.2, 1.0, 1.0)}\n[plugins.before.faults]\nretry_s = 0.2\n"
    bus = zoo(animals, extra).start()
    begun = time.monotonic()
    publish(bus, 1, count, figures)
    all_done(bus, animals, count)
    figures["all_done_s"] = round(time.monotonic() - begun, 1)
    check(bus, animals, count)
    stats = bus.wait_for(
        lambda stats: all(each["cursor"] == stats["bus"]["last_seq"] for each in stats["consumers"]),
        "to move every cursor to the end",
    )
    rows = {each["name"]: each for each in stats["consumers"]}
    assert {row["state"] for row in rows.values()} == {"running"}
    states = [state for _, state, _ in rows["before"]["history"]]
    assert states == ["open", "half-open", "open", "half-open", "running"]
    assert "before it looked at an event" in rows["before"]["history"][0][2]
    assert rows["before"]["breaker"]["opened"] == 2
    assert bus.stop() == 0


def test_a_slow_thread_is_lapped_and_continues_from_the_tape_across_a_kill(zoo, size, figures):
    animals = {"slow": ("slow", "thread"), "well": ("well", "inline")}
    count = size(3000, 20_000, 100_000)
    bus = zoo(animals, f"[plugins.slow]\nseconds = {size(0.05, 0.1, 0.1)}\ncapacity = 100\n").start()
    publish(bus, 1, count // 2)
    behind = bus.wait_for(lambda stats: lag(stats, "slow") > 500, "to leave the slow one behind")
    figures["lag_events"] = lag(behind, "slow")
    bus.kill()
    bus.start()
    publish(bus, count // 2 + 1, count - count // 2)
    all_done(bus, animals, count)
    check(bus, animals, count)
    assert bus.stop() == 0


def lag(stats: Any, name: str) -> int:
    return next(each["lag_events"] for each in stats["consumers"] if each["name"] == name)


def test_animals_in_processes_of_their_own_are_replaced_and_their_poison_is_buried(zoo, size, figures):
    kinds = size(
        ("leak", "abort", "hang", "fork", "well"),
        ("raise", "exit", "memory", "slow", "leak", "abort", "segfault", "hang", "fork", "print", "before", "well"),
        ("raise", "exit", "memory", "slow", "leak", "abort", "segfault", "hang", "fork", "print", "before", "well"),
    )
    animals = {kind: (kind, "process") for kind in kinds if kind != "memory"}
    animals["inline"] = ("well", "inline")
    count, memory_mb = size((150, 120), (1000, 400), (5000, 400))
    extra = (
        f"[plugins.leak.faults]\nmemory_mb = {memory_mb}\n[plugins.hang.faults]\ndeadline_s = 1.0\ndeaths = 2\n"
        "[plugins.abort.faults]\ndeaths = 2\n[plugins.fork.faults]\ndeaths = 2\n[plugins.segfault.faults]\ndeaths = 2\n"
    )
    bus = zoo(animals, extra).start()
    publish(bus, 1, count, figures)
    begun = time.monotonic()
    all_done(bus, ["inline"], count)
    figures["inline_done_s"] = round(time.monotonic() - begun, 2)
    figures["recovered_s"] = all_done(bus, animals, count, size(60.0, 300.0, 600.0))
    check(bus, animals, count)
    stats = bus.wait_for(
        lambda stats: all(
            each["state"] == "running" and each["cursor"] == stats["bus"]["last_seq"] for each in stats["consumers"]
        ),
        "to have every worker running at the end of the tape",
    )
    rows = {each["name"]: each for each in stats["consumers"]}
    figures["restarts"] = {name: row["restarts"] for name, row in rows.items() if row["restarts"]}
    assert rows["leak"]["restarts"] >= 1
    assert f"needed more than its {memory_mb} MB" in rows["leak"]["last_error"]
    assert "signal 6" in rows["abort"]["last_error"]
    assert "no progress for 1 s" in rows["hang"]["last_error"]
    assert {rows[name]["restarts"] for name in ("well", "inline", "print", "raise") if name in rows} == {0}
    wait_until(lambda: not alive(forked(bus)), "the forked children to be ended with their parent")
    assert bus.stop() == 0


def forked(bus: Any) -> list[int]:
    return [int(line) for line in (bus.data_dir / "forked").read_text().split()]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if running(pid)]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers(bus: Any) -> list[int]:
    """The processes started by the bus."""
    assert bus.process is not None
    return [
        int(pid) for pid in Path(f"/proc/{bus.process.pid}/task").glob("*/children") for pid in pid.read_text().split()
    ]


CRASHING = """
@hookimpl
def tapebus_start(context):
    import os
    if context.name == "crash":
        os._exit(3)
    if context.name == "deaf":
        os.closerange(3, 256)
"""


def test_workers_that_end_before_they_begin_or_close_their_line_are_started_less_and_less_often(zoo):
    animals = {"crash": ("well", "process"), "deaf": ("well", "process"), "well": ("well", "inline")}
    bus = zoo(animals, more=CRASHING).start()
    for first in (1, 101):
        publish(bus, first, 100)
    all_done(bus, ["well"], 200)
    bus.wait_for(
        lambda stats: all(each["restarts"] >= 3 for each in stats["consumers"] if each["mode"] == "process"),
        "to start them again and again",
    )
    crash = bus.consumer("crash")
    assert "ended with exit code 3" in crash["last_error"]
    assert [state for _, state, _ in crash["history"]] == ["starting", "restarting"]
    assert crash["cursor"] == 0
    check(bus, {"well": animals["well"]}, 200)
    assert bus.stop() == 0


def test_no_worker_survives_a_killed_bus_even_while_it_hangs(zoo):
    bus = zoo({"hang": ("hang", "process"), "well": ("well", "process")}).start()
    publish(bus, 1, POISON + 10)
    all_done(bus, ["well"], POISON + 10)
    pids = wait_until(lambda: len(found := workers(bus)) == 2 and found, "two workers")
    bus.kill()
    wait_until(lambda: not alive(pids), "the workers to end with the bus")
    bus.start()
    all_done(bus, ["well"], POISON + 10)
    assert echoes(bus, "well") == list(range(1, POISON + 11))


def test_a_worker_gets_no_variable_but_the_common_ones_and_those_it_names(zoo, monkeypatch):
    monkeypatch.setenv("A_SECRET_OF_ANOTHER", "leaked-1")
    monkeypatch.setenv("A_SECRET_OF_ITS_OWN", "known-1")
    bus = zoo({"well": ("well", "process")}, '[plugins.well]\nkey = { env = "A_SECRET_OF_ITS_OWN" }\n').start()
    publish(bus, 1, 1)
    all_done(bus, ["well"], 1)
    [pid] = workers(bus)
    environ = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"leaked-1" not in environ and b"known-1" in environ
    status = Path(f"/proc/{pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert os.getpgid(pid) == pid
    os.kill(pid, signal.SIGINT)
    publish(bus, 2, 1)
    all_done(bus, ["well"], 2)
    assert workers(bus) == [pid], "an interrupt of the whole tree is for the bus to obey"


def test_a_hanging_thread_is_named_and_hinders_nobody_else(zoo):
    animals = {"hang": ("hang", "thread"), "well": ("well", "thread"), "inline": ("well", "inline")}
    bus = zoo(animals, "[plugins.hang.faults]\ndeadline_s = 0.5\n", "drain_s = 1.0").start()
    publish(bus, 1, POISON)
    bus.wait_for(lambda stats: stats["plugins"]["hang"]["health"]["status"] == "error", "to name the plugin")
    assert bus.consumer("hang")["state"] == "hanging"
    publish(bus, POISON + 1, 100)
    all_done(bus, ["well", "inline"], POISON + 100)
    assert "zoo_animals.py" in bus.log.read_text(), "the stack of the hanging thread"
    with Tape.open(bus.data_dir) as tape:
        [alert] = tape.read(topics=["alert"])
    assert "plugin hang: consumer hang" in alert.data.message
    assert bus.stop() == 0


def test_a_hanging_inline_consumer_is_named_put_aside_and_skips_its_event(zoo, figures):
    animals = {"hang": ("hang", "inline"), "well": ("well", "inline"), "thread": ("well", "thread")}
    faults = "[plugins.hang.faults]\ndeadline_s = 0.5\nretry_max_s = 1.0\n"
    bus = zoo(animals, faults, "hang_exit_s = 1.5").start()
    publish(bus, 1, POISON + 63)
    begun = time.monotonic()
    publish(bus, POISON + 64, 50, figures)
    assert bus.process.wait(30) == 1, "the bus ends for its service manager to start it again"
    figures["ended_after_s"] = round(time.monotonic() - begun, 1)
    text = bus.log.read_text()
    assert "plugin hang: consumer hang: handler has come no further for 0.5 s at bus_seq" in text
    assert "zoo_animals.py" in text, "the stack of the hanging thread"
    begun = time.monotonic()
    bus.start()
    assert bus.consumer("hang")["breaker"]["reason"].startswith("put aside by the watchdog")
    all_done(bus, animals, POISON + 113)
    figures["recovered_after_s"] = round(time.monotonic() - begun, 1)
    check(bus, animals, POISON + 113)
    assert [state for _, state, _ in bus.consumer("hang")["history"]] == ["open", "half-open", "running"]
    with Tape.open(bus.data_dir) as tape:
        assert [each.data.name for each in tape.read(topics=["alert"])] == ["hanging.hang"]
    assert bus.stop() == 0
    bus.start()
    assert bus.consumer("hang")["history"] == [], "what was put aside and came back is forgotten"


BLOCKING = """
@hookimpl
def tapebus_{hook}(context):
    import threading
    threading.Event().wait(3600)
"""


@pytest.mark.parametrize(("where", "words"), [("start", "tapebus_start"), ("import", "its import")])
def test_a_plugin_that_blocks_the_start_is_named_and_the_start_fails(zoo, where, words):
    more = BLOCKING.format(hook="start") if where == "start" else "\nimport threading\nthreading.Event().wait(3600)\n"
    bus = zoo({"block": ("well", "inline")}, bus="start_s = 0.5", more=more)
    with pytest.raises(pytest.fail.Exception, match="code 1"):
        bus.start()
    bus.process = None
    assert f"plugin 'block': {words} did not return within 0.5 s" in bus.log.read_text()
    assert "zoo_block.py" in bus.log.read_text()


@pytest.mark.parametrize("hook", ["stop", "health"])
def test_a_plugin_that_blocks_while_it_is_asked_or_stopped_delays_nothing_for_long(zoo, hook):
    bus = zoo({"block": ("well", "inline")}, bus="drain_s = 1.0", more=BLOCKING.format(hook=hook)).start()
    publish(bus, 1, 100)
    all_done(bus, ["block"], 100)
    if hook == "health":
        stats = bus.wait_for(lambda stats: stats["plugins"]["block"]["health"]["status"] == "error", "to say so")
        assert "tapebus_health did not return" in stats["plugins"]["block"]["health"]["message"]
    begun = time.monotonic()
    assert bus.stop() == 0
    assert time.monotonic() - begun < 10.0
    if hook == "stop":
        assert "plugin 'block': tapebus_stop did not return" in bus.log.read_text()

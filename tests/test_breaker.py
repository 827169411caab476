"""The circuit breaker: when it opens, what it remembers, when it tries again."""

from __future__ import annotations

import pytest

from bus_support import quote
from tapebus import Publisher, Tape
from tapebus import breaker as module
from tapebus.breaker import HISTORY, Breaker
from tapebus.cli import main
from tapebus.consumer import FaultPolicy
from tapebus.errors import ConfigError
from test_units import install


@pytest.fixture
def now(monkeypatch):
    at = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: at[0])
    return at


def test_it_opens_when_too_large_a_part_of_the_window_fails(now):
    breaker = Breaker(FaultPolicy(error_ratio=0.2, window=10, consecutive=1000))
    for _ in range(3):
        breaker.good(2)
        assert breaker.bad(1, "x") == (breaker.state == "running")
    assert breaker.state == "open"
    assert breaker.reason == "3 of 10 events failed, last: x"


def test_old_failures_count_less_and_less(now):
    breaker = Breaker(FaultPolicy(error_ratio=0.5, window=10, consecutive=1000))
    for _ in range(200):
        assert breaker.bad(1, "x")
        breaker.good(3)
    assert breaker.state == "running"


def test_it_opens_after_so_many_failures_in_a_row_however_long_the_window(now):
    breaker = Breaker(FaultPolicy(consecutive=3))
    breaker.good(10_000)
    assert breaker.bad(2, "a")
    breaker.good(1)
    assert breaker.bad(2, "b")
    assert not breaker.bad(1, "c")
    assert breaker.reason == "3 events in a row failed, last: c"


def test_each_failed_trial_doubles_the_pause_up_to_the_longest_and_a_success_forgets_it(now):
    breaker = Breaker(FaultPolicy(consecutive=1, retry_s=1.0, retry_max_s=4.0))
    breaker.bad(1, "x")
    for pause in (1.0, 2.0, 4.0, 4.0):
        assert breaker.retry_in == pause
        now[0] += pause - 0.001
        assert not breaker.ready
        now[0] += 0.001
        assert breaker.ready and breaker.state == "half-open"
        assert not breaker.bad(1, "x")
    now[0] += 4.0
    assert breaker.ready
    breaker.succeeded()
    assert breaker.state == "running" and breaker.opened == 5
    breaker.bad(1, "x")
    assert breaker.retry_in == 1.0


def test_the_history_holds_the_last_changes_with_their_reasons(now):
    breaker = Breaker(FaultPolicy(consecutive=1))
    for n in range(HISTORY):
        breaker.bad(1, f"error {n}")
        breaker.resume()
    assert len(breaker.history) == HISTORY
    assert [(state, reason) for _, state, reason in breaker.history[-2:]] == [
        ("open", f"1 events in a row failed, last: error {HISTORY - 1}"),
        ("running", "asked for"),
    ]


@pytest.mark.parametrize(
    ("table", "words"),
    [({"windoww": 1}, "windoww"), ({"error_ratio": 2}, "error_ratio"), ({"consecutive": 0}, "consecutive")],
)
def test_a_policy_that_cannot_work_is_refused_with_its_key_and_the_known_ones(table, words):
    with pytest.raises(ConfigError, match=r"plugins\.p\.faults: .*" + words + r".*deadline_s"):
        FaultPolicy().changed_by(table, "p")


def test_the_configuration_changes_single_fields_of_what_the_plugin_chose():
    changed = FaultPolicy(window=7, retry_s=3.0).changed_by({"retry_s": 5, "memory_mb": 64}, "p")
    assert (changed.window, changed.retry_s, changed.memory_mb) == (7, 5.0, 64)


BROKEN = """
from tapebus import Consumer, hookimpl

@hookimpl
def tapebus_register_consumers(context):
    def handle(batch):
        if not (context.data_dir / "mended").exists():
            raise ConnectionError("no database")
        for event in batch:
            context.emit("handled", {"n": int(event.data.volume)}, cause=event)

    return [Consumer(name="broken", topics=["market_data"], handler=handle, start="first")]
"""


def test_a_broken_plugin_is_seen_and_reset_from_the_command_line_and_misses_nothing(
    make_bus, tmp_path, capsys, monkeypatch
):
    install(tmp_path, "broken", BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    bus = make_bus(["schema", "store", "broken"], "[plugins.broken.faults]\nretry_s = 3600\nretry_max_s = 3600\n")
    bus.python_path = [str(tmp_path)]
    bus.start()
    where = ["--config", str(bus.config_file)]
    with Publisher("test", endpoint=bus.acked) as publisher:
        for n in range(10):
            publisher.publish("market_data", quote(n))
        assert publisher.flush(30.0)
    stats = bus.wait_for(lambda stats: stats["consumers"][0]["state"] == "open", "to open the breaker")
    [row] = stats["consumers"]
    assert (row["breaker"]["state"], row["breaker"]["opened"]) == ("open", 1)
    with Tape.open(bus.data_dir) as tape:
        assert row["cursor"] < next(tape.read(topics=["market_data"])).bus_seq
    assert 3500 < row["breaker"]["retry_in_s"] <= 3600
    assert stats["plugins"]["broken"]["health"]["status"] == "error"
    capsys.readouterr()
    assert main(["plugins", *where]) == 0
    shown = capsys.readouterr().out
    assert "broken: open, tries again in" in shown and "no database" in shown
    (bus.data_dir / "mended").touch()
    assert main(["plugins", *where, "reset", "broken"]) == 0
    row = bus.wait_for(lambda stats: stats["consumers"][0]["handled"] == 10, "to handle what waited")["consumers"][0]
    assert (row["state"], row["errors"], [state for _, state, _ in row["history"]]) == (
        "running",
        1,
        ["open", "running"],
    )
    assert bus.stop() == 0

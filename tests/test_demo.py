"""The demo, run as its users run it: a process of its own that starts everything and ends by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from tapebus import Tape
from tapebus.plugins import call_one, load
from tapebus_demo.market import INSTRUMENTS, Market
from tapebus_demo.results import by_pattern


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tapebus_demo", *arguments]


def environ(temporary: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TAPEBUS_")}
    return {**kept, "TMPDIR": str(temporary)}


def run(temporary: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environ(temporary), capture_output=True, text=True, timeout=100, check=False
    )


def processes_with(temporary: Path) -> list[str]:
    """The processes whose environment names `temporary`, which only those started by one test do."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={temporary}\0".encode() in (directory / "environ").read_bytes():
                found.append(directory.name)
        except OSError:
            continue  # it has just ended, or belongs to somebody else
    return found


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One short session with simulated prices."""
    done = run(tmp_path_factory.mktemp("d"), "--seconds", "4", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_the_producers_counted_is_what_the_tape_holds(summary: dict[str, Any]) -> None:
    books = summary["books"]
    assert books["unexplained"] == 0
    assert books["dropped"] == {}
    assert books["agree"]
    for row in books["rows"]:
        assert row["published"] == row["stored"] + row["lost"], row
    assert books["received"] == books["stored"] == summary["tape"]["events"]


def test_only_what_was_broken_on_purpose_is_refused(summary: dict[str, Any]) -> None:
    assert set(summary["books"]["rejected"]) == {"ingest.malformed"}
    assert all(each["errors"] == 0 and each["state"] == "running" for each in summary["consumers"])


def test_every_signal_has_a_verdict_and_an_outcome(summary: dict[str, Any]) -> None:
    signals = summary["signals"]
    assert signals["generated"] > 0
    assert signals["verdicts"] == signals["generated"] == signals["outcomes"]
    assert signals["fired"] == signals["reserved"] > 0
    assert sum(row["signals"] for row in summary["patterns"]) == signals["outcomes"]
    assert summary["slots"]["used"] == signals["reserved"] - signals["released"]
    assert summary["slots"]["used"] <= summary["slots"]["peak"] <= summary["slots"]["max"]


def test_the_story_goes_from_signal_to_released_slot_in_bus_order(summary: dict[str, Any]) -> None:
    steps = summary["story"]["steps"]
    assert [step["bus_seq"] for step in steps] == sorted(step["bus_seq"] for step in steps)
    assert steps[0]["step"] == "generated"
    assert {"verdict", "slot reserved", "slot opened", "outcome", "slot released"} <= {step["step"] for step in steps}
    assert steps[0]["ms"] == 0
    assert all(step["ms"] >= 0 for step in steps)


def test_latency_and_throughput_are_measured_on_events_that_arrived(summary: dict[str, Any]) -> None:
    latency, burst = summary["latency_ms"], summary["burst"]
    assert latency["n"] > 100
    assert 0 < latency["p50"] <= latency["p99"]
    assert burst["events"] == 80_000
    assert burst["on_disk_s"] > 0
    assert burst["handled_s"] > 0
    assert 0 < summary["tape"]["bytes_per_event"] < summary["tape"]["raw_bytes_per_event"]


def test_telegram_messages_are_shown_but_never_sent(summary: dict[str, Any]) -> None:
    telegram = summary["telegram"]
    assert telegram["count"] > 0
    assert {"signal_generated", "signal_outcome"} <= {each["topic"] for each in telegram["examples"]}


def test_nothing_is_left_behind(summary: dict[str, Any]) -> None:
    assert not Path(summary["data_dir"]).parent.exists()


def test_a_recording_is_played_and_read_by_people_within_100_columns(shared_data: Path, data_dir: Path) -> None:
    ticks = shared_data / "ticks" / "oanda_eurusd_20140508.zip"
    done = run(data_dir, "--seconds", "2", "--ticks", str(ticks), "--keep")
    assert done.returncode == 0, done.stderr
    assert "unexplained = 0" in done.stdout and "Books: closed" in done.stdout
    assert "SIMULATED prices" not in done.stdout
    # Live lines and paths may be longer; tables and text are not.
    text = done.stdout[done.stdout.index("The bus") : done.stdout.index("What to type next")]
    assert max(len(line) for line in text.splitlines()) <= 100
    kept = list(data_dir.glob("tapebus-demo-*"))
    assert len(kept) == 1 and str(kept[0]) in done.stdout
    with Tape.open(kept[0] / "data") as tape:
        assert {each.data.symbol for each in tape.read(topics=["signal_generated"])} <= {"EURUSD"}


def test_a_file_that_is_no_recording_is_refused_in_one_line(data_dir: Path) -> None:
    (data_dir / "ticks.txt").write_text("nothing of the kind\n")
    done = run(data_dir, "--ticks", str(data_dir / "ticks.txt"))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "not a known recording" in done.stderr


def test_an_interrupted_demo_ends_its_processes_and_cleans_up(data_dir: Path) -> None:
    process = subprocess.Popen(
        command("--seconds", "30"),
        env=environ(data_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "SIMULATED" in process.stdout.readline()
    process.stdout.readline()  # the first figures: everything runs now
    assert len(processes_with(data_dir)) > 1
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 130, complaints
    assert "Traceback" not in complaints and "stopped" in complaints
    assert not list(data_dir.glob("tapebus-demo-*"))
    assert processes_with(data_dir) == []


def test_the_command_comes_through_the_plugin_door() -> None:
    group = click.Group()
    call_one(load(["demo"]), "tapebus_register_commands", "demo", cli=group)
    assert list(group.commands) == ["demo"]


def test_the_same_seed_gives_the_same_prices() -> None:
    one, other, third = Market(3), Market(3), Market(4)
    quotes = [one.next() for _ in range(500)]
    assert quotes == [other.next() for _ in range(500)]
    assert quotes != [third.next() for _ in range(500)]
    assert {each.symbol for each in quotes} == {each.symbol for each in INSTRUMENTS}
    assert len(INSTRUMENTS) == 16
    assert all(0 < each.bid <= each.ask for each in quotes)


def test_timeouts_are_neither_wins_nor_losses() -> None:
    outcomes = [
        {"pattern_type": "A", "outcome": "WIN", "r": 2.0},
        {"pattern_type": "A", "outcome": "LOSS", "r": -1.0},
        {"pattern_type": "A", "outcome": "TIMEOUT", "r": 0.3},
        {"pattern_type": "B", "outcome": "UNKNOWN"},
    ]
    a, b = by_pattern(outcomes)
    assert (a["signals"], a["n"], a["wins"], a["timeouts"], a["win_rate"], a["mean_r"]) == (3, 2, 1, 1, 0.5, 0.5)
    assert (b["n"], b["other"], b["win_rate"], b["mean_r"]) == (0, 1, None, None)

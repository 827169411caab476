"""``tapebus import`` into a running bus: nothing comes twice, whoever is killed on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from bus_support import PATIENCE
from legacy_support import AT, FATES, lines_of, log, tracked, truth
from tapebus import Tape
from tapebus.cli import main


@pytest.fixture
def running(embed, data_dir, capsys):
    """A bus with all built-in plugins, and ``bring(files…)`` that imports into it and returns the report."""
    bus = embed(["schema", "store", "outcomes", "slots", "telegram"])

    def bring(*files: Any, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        got = main(["import", "--config", str(data_dir / "tapebus0.toml"), "--json", *map(str, files)])
        out, err = capsys.readouterr()
        assert got == code, err
        found: dict[str, Any] = json.loads(out) if out else {}
        return found

    bus.bring = bring
    return bus


def outcomes(bus: Any) -> list[Any]:
    with Tape.open(bus.data_dir) as tape:
        return list(tape.read(topics=["signal_outcome"]))


def test_the_truth_log_on_a_running_bus_gives_the_rates_of_the_record_and_wakes_nobody(running, shared_data):
    path = shared_data / "legacy" / "truth_log.jsonl"
    report = running.bring(path)
    assert report["events"] == report["stored"] == 3356
    (file,) = report["files"]
    assert file["lines"] == 3361 and sum(file[fate] for fate in FATES) == 3361

    events = outcomes(running)
    assert {each.source for each in events} == {"import:truth_log"}
    assert all(each.correlation_id == each.data.signal_id for each in events)
    table: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for each in events:
        table[each.data.pattern_type][0] += each.data.outcome == "WIN"
        table[each.data.pattern_type][1] += 1
    # the published figures count the two lines that stand there twice
    records = lines_of(path)
    for number, at in {record["signal_id"]: n for n, record in enumerate(records)}.items():
        twice = [record for record in records[:at] if record["signal_id"] == number and "win" in record]
        for record in twice:
            table[record["pattern"]][0] += record["win"]
            table[record["pattern"]][1] += 1
    assert sum(n for _, n in table.values()) == 3358
    assert round(100 * sum(k for k, _ in table.values()) / 3358, 1) == 39.2
    assert {name: tuple(table[name]) for name in table if table[name][1] > 20} == {
        "FAIR_VALUE_GAP_FILL": (660, 1641),
        "SWEEP_RETURN": (208, 544),
        "MOMENTUM_BURST": (181, 456),
        "ORDER_BLOCK_BOUNCE": (172, 412),
        "VCB_BREAKOUT": (88, 275),
        "LIQUIDITY_SWEEP_REVERSAL": (7, 25),
    }

    with Tape.open(running.data_dir) as tape:
        assert [*tape.dead_letters()] == []
        derived = [*tape.read(topics=["gate_verdict", "slot_*", "slot_reserved", "fire_command", "signal_generated"])]
    assert derived == []
    metrics = {name: each["metrics"] for name, each in running.runtime.stats()["plugins"].items()}
    assert (metrics["outcomes"]["opened"], metrics["telegram"]["dry_run"]) == (0, 0)


def test_importing_again_or_an_overlapping_log_adds_only_what_is_new(running, tmp_path):
    whole = [truth(number, win=number % 3 == 0) for number in range(300)]
    half, all_of_it = log(tmp_path / "half.jsonl", *whole[:200]), log(tmp_path / "whole.jsonl", *whole)
    assert running.bring(half)["stored"] == 200
    assert running.bring(half)["events"] == 0
    report = running.bring(all_of_it)
    assert report["events"] == report["stored"] == 100
    assert (report["files"][0]["mapped"], report["files"][0]["duplicate"]) == (100, 200)
    ids = [each.data.signal_id for each in outcomes(running)]
    assert len(ids) == len(set(ids)) == 300
    last = running.runtime.stats()["bus"]["last_seq"]
    assert running.bring(half, all_of_it)["events"] == 0
    assert running.runtime.stats()["bus"]["last_seq"] == last, "an import without news leaves no trace"


def test_an_open_signal_gets_its_end_from_a_later_log_and_a_contradiction_stays_out(running, tmp_path):
    name = tracked()["signal_id"]
    opened = log(tmp_path / "open.jsonl", truth(signal_id=name, pair="XAUUSD", direction="SELL", win=None))
    closed = log(tmp_path / "closed.jsonl", tracked())
    other = log(tmp_path / "other.jsonl", truth(signal_id=name, pair="XAUUSD", direction="SELL", win=True))
    assert running.bring(opened)["files"][0]["events"] == {"signal_imported": 1}
    assert running.bring(closed)["files"][0]["events"] == {"signal_outcome": 1}
    assert running.bring(opened)["files"][0]["duplicate"] == 1
    report = running.bring(other)["files"][0]
    assert (report["conflict"], report["mapped"]) == (1, 0)
    assert [each.data.outcome for each in outcomes(running)] == ["LOSS"]


def test_a_signal_the_bus_itself_follows_is_not_ended_by_a_log(running, tmp_path):
    with running.publisher("elite_guard") as publisher:
        data = {key: tracked()[key] for key in ("signal_id", "confidence", "pattern_type", "direction")}
        assert publisher.publish("signal_generated", {**data, "symbol": "XAUUSD"}, timestamp=AT) and publisher.flush(
            PATIENCE
        )
    report = running.bring(log(tmp_path / "a.jsonl", tracked()))["files"][0]
    assert (report["conflict"], report["mapped"]) == (1, 0)
    assert outcomes(running) == []


#: Imports ARGV[2] with the configuration ARGV[1] and dies of SIGKILL in the middle, after ARGV[3] events.
KILLED = """
import os, signal, sys
from tapebus.cli import main
from tapebus_legacy import importing
keep, count = importing.Import._recorded, 0
def recorded(self, made):
    global count
    count += 1
    if count > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return keep(self, made)
importing.Import._recorded = recorded
main(["import", "--config", sys.argv[1], sys.argv[2]])
"""


def killed_import(data_dir: Path, file: str, events: int) -> None:
    command = [sys.executable, "-c", KILLED, str(data_dir / "tapebus0.toml"), file, str(events)]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == -9, done.stderr.decode()


def test_an_import_killed_in_the_middle_is_completed_exactly_by_the_next(running, tmp_path, data_dir):
    file = log(tmp_path / "long.jsonl", *(truth(number) for number in range(2000)))
    killed_import(data_dir, file, 700)
    killed_import(data_dir, file, 300)
    report = running.bring(file)
    assert report["stored"] == report["events"] == 1000
    ids = Counter(each.data.signal_id for each in outcomes(running))
    assert len(ids) == 2000 and set(ids.values()) == {1}
    assert [each.name for each in (running.data_dir / "import").iterdir()] == ["lock"]


def test_a_bus_killed_under_an_import_gets_all_of_it_once_after_its_restart(make_bus, tmp_path):
    bus = make_bus(["schema", "store"]).start()
    file = log(tmp_path / "long.jsonl", *(truth(number) for number in range(20_000)))
    command = [sys.executable, "-m", "tapebus", "import", "--config", str(bus.config_file), "--json", file]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        bus.wait_for(lambda stats: stats["bus"]["last_seq"] > 1000, "to have some of it")
        bus.kill()
        bus.start()
        out, _ = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0 and json.loads(out)["stored"] == 20_000
    ids = Counter(each.data.signal_id for each in outcomes(bus))
    assert len(ids) == 20_000 and set(ids.values()) == {1}


def test_what_a_killed_import_left_through_another_endpoint_is_named(running, tmp_path, data_dir, capsys):
    file = log(tmp_path / "long.jsonl", *(truth(number) for number in range(50)))
    command = KILLED.replace("sys.argv[2]])", 'sys.argv[2], "--endpoint", "tcp://127.0.0.1:1"])').replace(
        "if not pub.flush", "if False"
    )
    patched = "from tapebus.publisher import Publisher\nPublisher.flush = lambda self, timeout=5.0: True\n" + command
    done = subprocess.run(
        [sys.executable, "-c", patched, str(data_dir / "tapebus0.toml"), file, "20"],
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == -9, done.stderr.decode()
    assert main(["import", "--config", str(data_dir / "tapebus0.toml"), file]) == 2
    assert "another endpoint was interrupted" in capsys.readouterr().err


def test_a_bus_that_has_stopped_is_told_of_at_once(running, tmp_path, data_dir, capsys):
    running.stop()
    assert main(["import", "--config", str(data_dir / "tapebus0.toml"), log(tmp_path / "a.jsonl", truth())]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "start one with `tapebus run`" in line


def test_two_imports_do_not_run_at_once(running, tmp_path, data_dir, capsys):
    import fcntl

    running.bring(log(tmp_path / "a.jsonl", truth()))
    with (running.data_dir / "import" / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["import", "--config", str(data_dir / "tapebus0.toml"), str(tmp_path / "a.jsonl")]) == 1
    assert "another import" in capsys.readouterr().err


def test_the_wrong_bus_is_found_out(running, embed, tmp_path, data_dir, capsys):
    other = embed(["schema", "store"])
    file = log(tmp_path / "a.jsonl", truth())
    code = main(["import", "--config", str(data_dir / "tapebus0.toml"), "--endpoint", other.acked, file])
    assert code == 1 and "is it the bus of this data directory" in capsys.readouterr().err


def test_the_report_fits_a_terminal_and_names_every_repair_once(tmp_path, capsys):
    file = log(tmp_path / f"{'long-name-' * 9}.jsonl", truth(), tracked(), tracked(2, sl_price=1.0), "x", "")
    assert main(["import", "--data-dir", str(tmp_path / "none"), "--dry-run", file]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 and "\x1b" not in out
    assert out.count("pips_recomputed") == 1 and "2 events would be imported" in out
    assert "blank" in out and "levels on the wrong side (line 3)" in out

"""The budget of instructions: what is read from callgrind, what counts as a change, workloads with right answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import guard
from bench.workloads import BLOCK, WORKLOADS

PROFILE = """\
# callgrind format
version: 1
creator: callgrind-3.19.0
pid: 554
cmd:  python -m bench.guard --child marks.so
part: 3


desc: I1 cache:
desc: Timerange: Basic block 95 - 14283
desc: Trigger: Client Request: scan-json

positions: line
events: Ir
summary: 6762821

fn=(1) something
16 3

totals: 6762821
"""

BUDGET = {
    "decode": {"instructions_per_event": 1000.0},
    "pack": {"instructions_per_event": 100.0, "rise": 20.0, "fall": 1.0},
}


def test_the_name_and_the_count_of_a_region_are_read_from_a_profile():
    assert guard.read_profile(PROFILE) == ("scan-json", 6762821)
    assert guard.read_profile(PROFILE.replace("Client Request: scan-json", "Program termination")) is None


@pytest.mark.parametrize(
    ("name", "found", "verdict"),
    [
        ("decode", 1000.0, "ok"),
        ("decode", 1049.0, "ok"),
        ("decode", 1051.0, "dearer"),
        ("decode", 851.0, "ok"),
        ("decode", 849.0, "cheaper"),
        ("pack", 119.0, "ok"),
        ("pack", 121.0, "dearer"),
        ("pack", 98.0, "cheaper"),
        ("scan", 5.0, "new"),
    ],
)
def test_a_stage_may_rise_a_little_and_fall_a_little_more(name, found, verdict):
    [finding] = guard.compare({name: found}, BUDGET)
    assert (finding.name, finding.found, finding.verdict) == (name, found, verdict)


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ({"decode": 1000.0, "pack": 100.0}, 0, ""),
        ({"decode": 1100.0, "pack": 100.0}, 1, "dearer than the budget allows: decode"),
        ({"decode": 500.0, "pack": 100.0, "scan": 1.0}, 1, "out of date for decode, scan"),
    ],
)
def test_a_stage_outside_its_budget_fails_and_is_named(capsys, found, code, said):
    budget = {"with": guard.made_with(), "stages": BUDGET}
    assert guard.report(guard.compare(found, BUDGET), budget) == code
    printed = capsys.readouterr().out
    assert said in printed and ("guard:" in printed) == bool(code)


def test_without_a_budget_for_this_interpreter_nothing_fails(capsys):
    assert guard.report(guard.compare({"decode": 1.0}, {}), {}) == 0
    assert f"no budget for {guard.key()}" in capsys.readouterr().out


def test_another_build_of_python_is_named_and_does_not_fail_while_another_package_does(capsys):
    found = guard.compare({"decode": 2000.0, "pack": 100.0}, BUDGET)
    parts = guard.made_with()
    assert guard.report(found, {"with": parts | {"build": "a compiler"}, "stages": BUDGET}) == 0
    assert "recorded with another build" in capsys.readouterr().out
    assert guard.report(found, {"with": parts | {"msgspec": "0.1"}, "stages": BUDGET}) == 1
    assert "recorded with another msgspec" in capsys.readouterr().out


def test_recording_renews_one_budget_and_keeps_the_others_and_the_tolerances(tmp_path):
    file = tmp_path / "budget.toml"
    guard.record(file, {"decode": 1234.56, "pack": 7.0})
    text = file.read_text().replace("pack = { ", "pack = { rise = 50.0, ").replace(guard.key(), "cpython-3.99-vax")
    first = tomllib.loads(text)
    file.write_text(text)
    guard.record(file, {"decode": 1.0})
    found = tomllib.loads(file.read_text())
    assert found["cpython-3.99-vax"] == first["cpython-3.99-vax"]
    assert found[guard.key()] == {"with": guard.made_with(), "stages": {"decode": {"instructions_per_event": 1.0}}}
    file.write_text(file.read_text().replace("decode = { i", "decode = { fall = 3.0, i"))
    guard.record(file, {"decode": 2.0})
    entry = tomllib.loads(file.read_text())[guard.key()]["stages"]["decode"]
    assert entry == {"instructions_per_event": 2.0, "fall": 3.0}


def test_every_recorded_budget_has_every_stage():
    names = sorted(workload.name for workload in WORKLOADS)
    budgets = guard.read(guard.BUDGET)
    assert budgets
    assert [(key, sorted(budget["stages"])) for key, budget in budgets.items()] == [(key, names) for key in budgets]


def test_a_machine_without_valgrind_is_told_so_and_passes(tmp_path):
    environ = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "bench.guard"], cwd=guard.ROOT, env=environ, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("guard: skipped: valgrind is not installed")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["decoed"], "no stage is called decoed: there are "), (["--record", "pack"], "--record renews the whole budget")],
)
def test_a_stage_that_does_not_exist_or_a_part_of_a_budget_is_refused(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["guard", *arguments])
    with pytest.raises(SystemExit) as ended:
        guard.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_count_that_is_missing_fails(monkeypatch, capsys):
    monkeypatch.setattr(guard, "count", lambda names: {"pack": 1.0})
    monkeypatch.setattr(sys, "argv", ["guard", "pack", "decode"])
    assert guard.main() == 1
    assert "no count of decode" in capsys.readouterr().err


@pytest.mark.parametrize("workload", WORKLOADS, ids=[workload.name for workload in WORKLOADS])
def test_a_workload_gives_the_right_answer_and_knows_a_wrong_one(workload):
    task = workload.make(BLOCK)
    with pytest.raises((AssertionError, TypeError)):
        task.check(None)
    task.check(task.run())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_the_count_of_a_stage_is_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "OUT", tmp_path / "out")
    try:
        first, again = guard.count(["pack"]), guard.count(["pack"])
    except guard.Skipped as reason:
        pytest.skip(str(reason))
    assert list(first) == list(again) == ["pack"]
    assert first["pack"] > 10 and again["pack"] == pytest.approx(first["pack"], rel=0.01)
    assert (tmp_path / "out" / "pack.callgrind").exists()

"""The registry of places where a process can be made to die: names, counts, and what a wrong one says."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tapebus.errors import ConfigError
from tapebus.failpoints import NAMES, VARIABLE, check

ROOT = Path(__file__).resolve().parents[1]


def places() -> Counter[str]:
    """How often the sources call ``failpoint("name")``, by name."""
    compiled = Counter(
        name
        for path in (ROOT / "core").rglob("*.pyx")
        for name in re.findall(r'^ +failpoint\("([a-z_.]+)"\)$', path.read_text(), re.MULTILINE)
    )
    return compiled + Counter(
        node.args[0].value
        for root in ("core", "plugins")
        for path in (ROOT / root).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "failpoint"
        and isinstance(node.args[0], ast.Constant)
    )


def reach(name: str, times: int, armed: str) -> int:
    """The exit code of a process that reaches `name` so often and then ends by itself."""
    code = f"from tapebus.failpoints import failpoint\nfor _ in range({times}): failpoint({name!r})"
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, VARIABLE: armed}, timeout=60, check=False
    ).returncode


def test_every_name_has_exactly_one_place_and_every_place_a_name():
    assert places() == Counter(dict.fromkeys(NAMES, 1))


@pytest.mark.parametrize(("times", "code"), [(6, 0), (7, -signal.SIGKILL), (8, -signal.SIGKILL)])
def test_the_process_dies_when_a_place_is_reached_for_the_given_time(times, code):
    assert reach("tape.after_commit", times, "tape.after_commit:7") == code


def test_a_name_without_a_count_means_the_first_time():
    assert reach("tape.after_commit", 1, "tape.after_commit") == -signal.SIGKILL


def test_other_places_than_the_armed_one_do_nothing():
    assert reach("tape.after_ack", 9, "tape.after_commit:1") == 0


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("tape.after_comit:7", "did you mean 'tape.after_commit'?"),
        ("tape.after_commit:0", "a count of 1 or more"),
        ("tape.after_commit:", "a count of 1 or more"),
        ("tape.after_commit:often", "a count of 1 or more"),
    ],
)
def test_a_wrong_variable_names_what_is_wrong(text, hint):
    with pytest.raises(ConfigError) as caught:
        check({VARIABLE: text})
    assert hint in str(caught.value) and repr(text) in str(caught.value)
    assert caught.value.exit_code == 78


def test_a_bus_with_a_wrong_variable_does_not_start(data_dir):
    run = subprocess.run(
        [sys.executable, "-m", "tapebus", "run", "--data-dir", str(data_dir / "data")],
        env={**os.environ, VARIABLE: "tape.nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 78
    assert "tape.nowhere" in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
    assert not (data_dir / "data").exists()

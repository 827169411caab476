"""What the project refuses to use, what it is locked to, and the oldest libraries it starts with."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tapebus import versions
from tapebus.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
#: Methods that pickle, which a linter cannot tell from others of their name.
PICKLING = {"send_pyobj", "recv_pyobj", "unsafe_load", "full_load"}

PROBES = [
    "import pickle\npickle.loads(b'')",
    "import pickle",
    "import marshal\nmarshal.loads(b'')",
    "import marshal",
    "import shelve",
    "import dill",
    "import cloudpickle",
    "import jsonpickle",
    "eval('1')",
    "exec('1')",
    "import yaml\nyaml.load('')",
    "import subprocess\nsubprocess.run('ls', shell=True)",
    "import os\nos.system('ls')",
    "import zmq\nzmq.Socket.send_pyobj",
]


def pickling_calls(source: str) -> list[str]:
    return [
        node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute) and node.attr in PICKLING
    ]


@pytest.mark.parametrize("probe", PROBES)
def test_code_that_could_run_what_it_reads_is_refused_by_the_linter(probe):
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed: it belongs to make lint")
    command = [ruff, "check", "--no-cache", "--quiet", "--stdin-filename", "core/tapebus/probe.py", "-"]
    run = subprocess.run(command, input=probe + "\n", cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1 and re.search(r"\b(S\d{3}|TID251)\b", run.stdout), run.stdout


def test_nothing_here_sends_pickled_objects():
    assert pickling_calls("socket.send_pyobj(x)") == ["send_pyobj"]
    sources = [path for root in ("core", "plugins", "bench", "examples") for path in (ROOT / root).rglob("*.py")]
    assert {path.name for path in sources if pickling_calls(path.read_text())} == set()


def locked() -> dict[str, str]:
    return {
        name.lower().replace("_", "-"): version for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", LOCK, re.M)
    }


def needed(names: list[str]) -> set[str]:
    """`names` and everything they need on this interpreter."""
    found: set[str] = set()
    while names:
        name = names.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        for text in requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.append(requirement.name)
    return found


def test_the_lock_file_covers_every_dependency_with_hashes_and_names_no_place():
    project = (ROOT / "pyproject.toml").read_text()
    direct = re.findall(r'^\s+"([\w-]+)>=[^"]*",\s+# |^\s+"([\w-]+)>=[\d.]+",$', project, re.M)
    names = [first or second for first, second in direct]
    assert {"pyzmq", "msgspec", "lmdb", "click"} <= set(names)
    assert needed([*names, "python-telegram-bot"]) - set(locked()) == set()
    for block in re.split(r"\n(?=[\w.-]+==)", LOCK)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
    assert "://" not in LOCK and "--index-url" not in LOCK and "@ " not in LOCK


def test_what_is_locked_is_above_the_floors():
    for name, floor in versions.FLOORS.items():
        if name != "libzmq":
            assert versions.numbers(locked()[name]) >= floor, name


@pytest.mark.parametrize("name", sorted(versions.FLOORS))
def test_a_library_below_its_floor_stops_the_start_with_its_name(monkeypatch, name):
    versions.require()
    monkeypatch.setitem(versions.FLOORS, name, (999,))
    with pytest.raises(ConfigError, match=f"{name}: .* is too old; 999 or later") as caught:
        versions.require()
    assert caught.value.exit_code == 78


def test_the_numbers_of_a_version_end_where_it_stops_being_numbers():
    assert versions.numbers("27.0.0b1") == (27, 0)
    assert versions.numbers("4.3.5") == (4, 3, 5)
    assert versions.numbers("dev") == ()
    assert "libzmq" in versions.line()

"""PM2 sees when the bus is ready, what it counts, and that it ends well."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tapebus.pm2 import Channel, ecosystem


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


def test_ready_and_metrics_are_one_json_line_each(pair):
    ours, theirs = pair
    channel = Channel(ours)
    channel.ready()
    channel.metrics({"events/s": 40.5, "slots": "4/10"}, {"events/s": "ev/s"})
    ready, metrics = theirs.recv(65536).splitlines()
    assert json.loads(ready) == "ready"
    assert json.loads(metrics) == {
        "type": "axm:monitor",
        "data": {
            "events/s": {"value": 40.5, "type": "custom", "historic": True, "unit": "ev/s"},
            "slots": {"value": "4/10", "type": "custom", "historic": False},
        },
    }


def test_a_daemon_that_is_gone_is_forgotten_quietly(pair):
    ours, theirs = pair
    channel = Channel(ours)
    theirs.close()
    channel.ready()
    channel.metrics({"x": 1})
    assert not channel.connected


def test_a_daemon_that_reads_nothing_neither_blocks_nor_tears_a_line(pair):
    ours, theirs = pair
    channel = Channel(ours)
    for count in range(5000):
        channel.metrics({"count": count, "text": "x" * 1000})
    theirs.settimeout(1)
    text = b""
    while not text.endswith(b"\n") or channel._unsent:
        text += theirs.recv(1 << 20)
        channel._flush()
    lines = [json.loads(line)["data"]["count"]["value"] for line in text.splitlines()]
    assert lines == list(range(len(lines)))
    assert len(lines) < 5000


@pytest.mark.parametrize("number", ["", "x", "-1", "987654", "99999999999999999999"])
def test_without_a_channel_every_call_does_nothing(monkeypatch, number):
    monkeypatch.setenv("NODE_CHANNEL_FD", number)
    channel = Channel.from_env()
    channel.ready()
    channel.metrics({"x": 1})
    assert not channel.connected


def test_the_channel_is_taken_from_the_environment_and_not_inherited(monkeypatch, pair):
    ours, theirs = pair
    number = ours.detach()
    os.set_inheritable(number, True)
    monkeypatch.setenv("NODE_CHANNEL_FD", str(number))
    channel = Channel.from_env()
    assert "NODE_CHANNEL_FD" not in os.environ
    assert not os.get_inheritable(number)
    channel.ready()
    assert theirs.recv(100) == b'"ready"\n'
    channel.close()


def app(text: str) -> dict[str, Any]:
    body = text[text.index("module.exports = ") + len("module.exports = ") :].rstrip().removesuffix(";")
    (only,) = json.loads(body)["apps"]
    return only


def test_the_ecosystem_leaves_time_to_drain_and_does_not_restart_a_wrong_configuration(tmp_path):
    found = app(ecosystem("bus.toml", "/opt/venv/bin/python", data_dir=tmp_path / "a b", drain_s=20))
    assert found["kill_timeout"] > 20_000
    assert found["wait_ready"] and 78 in found["stop_exit_codes"]
    assert found["args"][-1] == str(Path("bus.toml").absolute())
    assert (found["exec_mode"], found["instances"], found["interpreter"]) == ("fork", 1, "none")


@pytest.fixture(scope="session")
def pm2_program(tmp_path_factory) -> Path:
    """PM2 from npm, in a directory of its own."""
    if "TEST_PM2" in os.environ:
        return Path(os.environ["TEST_PM2"])
    if shutil.which("npm") is None:
        pytest.skip("npm is absent, so there is no PM2 to run under")
    home = tmp_path_factory.mktemp("npm")
    command = ["npm", "install", "pm2", "--no-audit", "--no-fund", "--silent", "--prefix", str(home)]
    if subprocess.run(command, capture_output=True, timeout=110).returncode != 0:
        pytest.skip("npm cannot install pm2 here")
    return home / "node_modules" / ".bin" / "pm2"


@pytest.mark.slow
def test_a_real_pm2_sees_ready_metrics_and_a_clean_end(pm2_program, make_bus, data_dir):
    bus = make_bus(plugins=["schema", "store"])
    text = ecosystem(bus.config_file, sys.executable, data_dir=bus.data_dir)
    file = data_dir / "ecosystem.config.js"
    file.write_text(text)
    environ = {**bus.environ(), "PM2_HOME": str(data_dir / "pm2")}

    def pm2(*words: str) -> str:
        done = subprocess.run(
            [str(pm2_program), *words], env=environ, capture_output=True, text=True, timeout=60, cwd=data_dir
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def listed() -> dict[str, Any]:
        text = pm2("jlist", "--silent")
        (only,) = json.loads(text[text.index("[{") :])
        return only

    bus.data_dir.mkdir(mode=0o700)
    try:
        pm2("start", str(file))
        # `pm2 start` returns after the ready signal, so the bus answers at once.
        first = bus.stats()
        assert first["bus"]["uptime_s"] < app(text)["listen_timeout"] / 1000
        for _ in range(100):
            metrics = listed()["pm2_env"].get("axm_monitor", {})
            if "events/s" in metrics:
                break
        assert "events/s" in metrics, metrics
        pm2("stop", "tapebus")
        ended = listed()["pm2_env"]
        assert (ended["status"], ended["exit_code"], ended["restart_time"]) == ("stopped", 0, 0)
    finally:
        subprocess.run([str(pm2_program), "kill"], env=environ, capture_output=True, timeout=60)

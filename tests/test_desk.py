"""The page "The trading desk" shows what its commands print once the hour of ``examples/desk`` was played."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bus_support import wait_until
from tapebus import Tape
from tapebus.cli import main
from tapebus_telegram import rendered
from test_docs import blocks

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "desk.md"
EXAMPLE = ROOT / "examples" / "desk"
#: What differs from day to day and from run to run: ages, places on the tape, how many events were said, padding.
VOLATILE = (
    (r"\d+ ?d( ?\d+ ?h)?\b", "AGE"),
    (r"@\d+", "@SEQ"),
    (r"(?m)^ +\d+(?= +2026-)", "SEQ"),
    (r"\b\d+ (published|stored)", r"N \1"),
    (r" {2,}", " "),
)


def settled(text: str) -> str:
    for pattern, word in VOLATILE:
        text = re.sub(pattern, word, text)
    return text


def promised(shown: str) -> re.Pattern[str]:
    """The output that a block shows; a line of … stands for any number of lines."""
    lines = settled(shown).splitlines()
    return re.compile("".join("(?:.*\n)*?" if line == "…" else re.escape(line) + "\n" for line in lines))


def relayed(data_dir: Path) -> bool:
    with Tape.open(data_dir) as tape:
        messages = rendered(tape.state("telegram"))
    outcomes = [each["text"] for each in messages if (each["topic"], each["status"]) == ("signal_outcome", "dry_run")]
    return any("XAGUSD_1" in text for text in outcomes)


def test_the_page_shows_the_configuration_of_the_example() -> None:
    (configuration,) = (block.text for block in blocks(PAGE) if block.language == "toml")
    assert configuration == (EXAMPLE / "tapebus.toml").read_text()


def test_each_output_on_the_page_is_what_the_command_prints(
    make_bus: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bus = make_bus()
    listen = {"FEED": bus.feed, "INGEST": bus.ingest, "ACKED": bus.acked}
    bus.variables = {f"TAPEBUS_LISTEN_{name}": endpoint for name, endpoint in listen.items()}
    bus.variables |= {"TAPEBUS_DATA_DIR": str(bus.data_dir), "TAPEBUS_CONFIG": str(EXAMPLE / "tapebus.toml")}
    bus.variables["TAPEBUS_PLUGINS_SLOTS_MAX_LATENESS_S"] = "1e12"
    bus.command = [sys.executable, "-m", "tapebus", "run"]
    bus.start()
    environ = bus.environ() | {"TAPEBUS_ENDPOINT": bus.acked}
    day = [sys.executable, str(EXAMPLE / "day.py")]
    played = subprocess.run(day, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert played.returncode == os.EX_OK, played.stderr
    bus.wait_for(lambda stats: not any(each["lag_events"] for each in stats["consumers"]), "to work through the hour")
    wait_until(lambda: relayed(bus.data_dir), "the last outcome to be shown instead of sent")

    for name, value in bus.variables.items():
        monkeypatch.setenv(name, value)
    commands = [block.text.partition("\n") for block in blocks(PAGE) if block.language == "console"]
    assert len(commands) > 5
    for command, _, shown in commands:
        main(shlex.split(command.removeprefix("$ tapebus ")))
        printed = settled(capsys.readouterr().out)
        whole = promised(shown).match(printed)
        assert whole, f"{command}\n{printed}"
        assert shown.endswith("…\n") or whole.end() == len(printed), f"{command} prints more:\n{printed[whole.end() :]}"
    assert bus.stop() == os.EX_OK

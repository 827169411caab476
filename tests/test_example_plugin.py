"""The door for other people's plugins works: a separately installed package joins the bus, and cannot harm it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "tapebus-hello"
SYMBOLS = ["EURUSD", "XAUUSD", "GBPJPY"]

WITNESS = """
from tapebus import Consumer, hookimpl

@hookimpl
def tapebus_register_consumers(context):
    seen = []

    def handle(batch):
        seen.extend(event.bus_seq for event in batch if event.source == "example")

    def save():
        (context.data_dir / "witness").write_text(" ".join(map(str, seen)))

    return [Consumer(name="witness", topics=["market_data"], handler=handle, save=save, start="first")]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the example as pip installs it, and a second plugin that notes what it receives."""
    made = tmp_path_factory.mktemp("hello")
    # A copy, because the build leaves its files beside the source.
    source = shutil.copytree(EXAMPLE, made / "source")
    target = made / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run(
        [*pip, "--disable-pip-version-check", "--target", str(target), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (target / "tapebus_witness.py").write_text(WITNESS)
    info = target / "tapebus_witness-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tapebus-witness\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[tapebus.plugins]\nwitness = tapebus_witness\n")
    return target


@pytest.fixture
def start(make_bus: Callable[..., Any], site: Path) -> Callable[..., Any]:
    """Start a bus that has the example plugin, with ``[plugins.hello]`` as given."""

    def begin(hello: str = "") -> Any:
        bus = make_bus(["schema", "store", "hello", "witness"], f"[plugins.hello]\n{hello}")
        bus.python_path = [str(site)]
        return bus.start()

    return begin


def publish(bus: Any, count: int) -> None:
    from tapebus import Publisher

    with Publisher(source="example", endpoint=bus.acked) as publisher:
        for n in range(count):
            quote = {"symbol": SYMBOLS[n % len(SYMBOLS)], "bid": 1.1, "ask": 1.2}
            assert publisher.publish("market_data", quote, timestamp=1_700_000_000.0 + n)
        assert publisher.flush(timeout=30.0)


def witnessed(bus: Any) -> list[int]:
    note = bus.data_dir / "witness"
    return [int(seq) for seq in note.read_text().split()] if note.exists() else []


def is_complete(bus: Any, count: int) -> Callable[[Any], bool]:
    return lambda stats: len(witnessed(bus)) >= count


def handled(name: str, count: int) -> Callable[[Any], bool]:
    return lambda stats: any(each["name"] == name and each["handled"] >= count for each in stats["consumers"])


def test_an_installed_plugin_is_listed_by_name(site):
    code = "from tapebus.plugins import installed; print(installed()['hello'][0].value)"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "tapebus_hello", run.stderr


def test_the_example_receives_every_quote_and_shows_its_counts(start):
    bus = start()
    publish(bus, 300)
    bus.wait_for(handled("hello", 300), "to hand 300 quotes to the example")
    stats = bus.wait_for(lambda stats: '"quotes.EURUSD": 100' in json.dumps(stats), "to show the counts")
    assert '"quotes.GBPJPY": 100' in json.dumps(stats)
    assert bus.consumer("hello")["errors"] == 0


def test_the_counts_survive_a_killed_bus_exact_to_the_event(start):
    bus = start()
    publish(bus, 150)
    bus.wait_for(handled("hello", 150), "to hand 150 quotes to the example")
    bus.kill()
    bus.start()
    publish(bus, 150)
    bus.wait_for(lambda stats: '"quotes.XAUUSD": 100' in json.dumps(stats), "to count all 300 quotes once")


def test_when_the_example_raises_on_every_event_all_others_still_get_all(start):
    bus = start("raise_on_every_event = true")
    publish(bus, 300)
    bus.wait_for(is_complete(bus, 300), "to hand 300 quotes to the witness")
    seen = witnessed(bus)
    assert len(seen) == 300
    assert seen == sorted(set(seen))
    hello, witness = bus.consumer("hello"), bus.consumer("witness")
    assert hello["errors"] > 0
    assert witness["errors"] == 0
    assert bus.stop() == 0


def test_the_documentation_shows_the_example_as_it_is():
    blocks = re.findall(r"```python\n(.+?)\n```", (ROOT / "docs" / "writing-plugins.md").read_text(), re.DOTALL)
    assert (EXAMPLE / "tapebus_hello.py").read_text().rstrip() == blocks[0]


def test_the_bench_snippet_of_the_documentation_works(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    blocks = re.findall(r"```python\n(.+?)\n```", (ROOT / "docs" / "writing-plugins.md").read_text(), re.DOTALL)
    (snippet,) = [block for block in blocks if "PluginBench" in block]
    exec(compile(snippet, "writing-plugins.md", "exec"), {})

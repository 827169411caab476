"""Plugins for buses under fault: each answers every ``user_action`` with one derived event.

`install` writes them as an installed distribution, so that bus and worker find them through their entry points.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Derived event type by plugin, which is also the mode its consumer runs in.
DERIVED = {"inlined": "inline", "threaded": "thread", "processed": "process"}
#: What `Checker` needs to know.
TRIGGERS = dict.fromkeys(DERIVED, "user_action")

TEMPLATE = """
import time
from tapebus import Consumer, hookimpl

@hookimpl
def tapebus_register_consumers(context):
    def handler(batch):
        flag = context.data_dir.parent / "{name}.slow"
        if flag.exists():
            time.sleep(float(flag.read_text() or 0))
        count = int(context.state.get("count", b"0"))
        for event in batch:
            count += 1
            context.emit("{name}", {{"count": count}}, cause=event)
        context.state["count"] = str(count).encode()
    return [Consumer(name="{name}", topics=["user_action"], handler=handler, mode="{mode}", start="first")]
"""


def install(bus: Any, directory: Path) -> None:
    """Make the plugins importable for `bus`, which has to have them enabled."""
    info = directory / "fault_plugins-1.0.dist-info"
    info.mkdir(parents=True)
    points = "".join(f"{name} = fault_plugin_{name}\n" for name in DERIVED)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fault-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tapebus.plugins]\n{points}")
    for name, mode in DERIVED.items():
        (directory / f"fault_plugin_{name}.py").write_text(TEMPLATE.format(name=name, mode=mode))
    bus.python_path.append(str(directory))


def slow_down(bus: Any, name: str, seconds: float) -> None:
    """Let every batch of one plugin take so long from now on; 0 for as fast as it can. Not on the disk that fills."""
    file = bus.data_dir.parent / f"{name}.slow"
    if seconds:
        file.write_text(str(seconds))
    else:
        file.unlink(missing_ok=True)

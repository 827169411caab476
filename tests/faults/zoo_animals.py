"""Consumers that misbehave, each in one way; installed as plugins by the tests of the zoo.

An animal emits ``echo.<name>`` for every event it has handled, so that the tape shows what it missed or did twice.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tapebus import Consumer

FOREVER = 3600.0
#: Every animal misbehaves on the events with this remainder modulo ten.
BAD = 3
#: The one event that ends or stops a process.
POISON = 137

TEMPLATE = """
from tapebus import hookimpl
import zoo_animals

@hookimpl
def tapebus_register_consumers(context):
    return zoo_animals.consumers(context, {name!r}, {kind!r}, {mode!r})
"""


def install(site: Path, name: str, kind: str, mode: str, more: str = "") -> None:
    """An animal as pip would leave it in `site`."""
    (site / f"zoo_{name}.py").write_text(TEMPLATE.format(name=name, kind=kind, mode=mode) + more)
    info = site / f"zoo_{name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: zoo-{name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[tapebus.plugins]\n{name} = zoo_{name}\n")


def consumers(context: Any, name: str, kind: str, mode: Any) -> list[Consumer]:
    misbehave = KINDS[kind](context)

    def handle(batch: Any) -> None:
        if kind == "before":
            misbehave(0)
        for event in batch:
            number = int(event.data.volume)
            if kind != "before":
                misbehave(number)
            context.emit(f"echo.{name}", {"n": number}, cause=event)

    capacity = int(context.config.get("capacity", 65536))
    topics = ["market_data"]
    return [Consumer(name=name, topics=topics, handler=handle, mode=mode, start="first", capacity=capacity)]


def raising(error: type[BaseException]) -> Callable[[Any], Callable[[int], None]]:
    def make(context: Any) -> Callable[[int], None]:
        def misbehave(number: int) -> None:
            if number % 10 == BAD:
                raise error(f"of {number}")

        return misbehave

    return make


def before(context: Any) -> Callable[[int], None]:
    """Fails twice before it looks at an event, as one that cannot reach its database."""
    left = [2]

    def misbehave(number: int) -> None:
        if left[0]:
            left[0] -= 1
            raise ConnectionError("no database")

    return misbehave


def slow(context: Any) -> Callable[[int], None]:
    pause = threading.Event()
    seconds = float(context.config.get("seconds", 1.0))

    def misbehave(number: int) -> None:
        if number % 100 == BAD:
            pause.wait(seconds)

    return misbehave


def leaking(context: Any) -> Callable[[int], None]:
    kept: list[bytes] = []

    def misbehave(number: int) -> None:
        kept.append(bytes([number % 256]) * (1 << 20))

    return misbehave


def at_poison(act: Callable[[], None]) -> Callable[[Any], Callable[[int], None]]:
    def make(context: Any) -> Callable[[int], None]:
        def misbehave(number: int) -> None:
            if number == POISON:
                act()

        return misbehave

    return make


def forking(context: Any) -> Callable[[int], None]:
    """Ten children that never end, then the end of the parent."""
    pids = context.data_dir / "forked"

    def misbehave(number: int) -> None:
        if number == POISON:
            for _ in range(10):
                pid = os.fork()
                if not pid:
                    threading.Event().wait(FOREVER)
                with pids.open("a") as file:
                    file.write(f"{pid}\n")
            os.abort()

    return misbehave


def printing(context: Any) -> Callable[[int], None]:
    def misbehave(number: int) -> None:
        print("{'not': 'a report'}", number, flush=True)

    return misbehave


KINDS: dict[str, Callable[[Any], Callable[[int], None]]] = {
    "well": lambda context: lambda number: None,
    "raise": raising(ValueError),
    "exit": raising(SystemExit),
    "interrupt": raising(KeyboardInterrupt),
    "memory": raising(MemoryError),
    "before": before,
    "slow": slow,
    "leak": leaking,
    "abort": at_poison(os.abort),
    "segfault": at_poison(lambda: ctypes.memset(0, 0, 1) and None),
    "hang": at_poison(lambda: threading.Event().wait(FOREVER) and None),
    "fork": forking,
    "print": printing,
}

"""The oldest libraries that are safe to run on, looked at before the bus starts.

Fixes in libzmq and liblmdb reach this program only through the wheels of pyzmq and lmdb, so those floors are
about security, not about features.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import zmq

from tapebus.errors import ConfigError

FLOORS: dict[str, tuple[int, ...]] = {
    "pyzmq": (26,),
    "libzmq": (4, 3, 5),
    "msgspec": (0, 19),
    "pluggy": (1, 5),
    "lmdb": (2, 3),
    "zstandard": (0, 22),
    "click": (8, 1),
}


class Found(NamedTuple):
    """One library; `problem` is empty when it is new enough."""

    name: str
    version: str
    problem: str = ""


def found() -> Iterator[Found]:
    """Every library with a floor, as installed here."""
    for name, floor in FLOORS.items():
        wanted = ".".join(map(str, floor))
        remedy = f"{wanted} or later is needed: pip install -U '{'pyzmq' if name == 'libzmq' else name}'"
        try:
            have = zmq.zmq_version() if name == "libzmq" else version(name)
        except PackageNotFoundError:
            yield Found(name, "", f"not installed; {remedy}")
            continue
        if numbers(have) < floor:
            yield Found(name, have, f"{have} is too old; {remedy}")
        else:
            yield Found(name, have)


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, as far as they go: ``27.0.0b1`` is ``(27, 0)``."""
    out: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        out.append(int(part))
    return tuple(out)


def require() -> None:
    """Raise `ConfigError` for the first library below its floor."""
    for each in found():
        if each.problem:
            raise ConfigError(f"{each.name}: {each.problem}")


def line() -> str:
    """All versions on one line, for the log."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{each.name} {each.version}" for each in found())])

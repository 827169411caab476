"""tapebus: an event bus that keeps every event on a tape and lets plugins work through it.

Names load on first use, so ``import tapebus`` stays cheap for programs that only publish.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapebus.config import Config, read_secret
    from tapebus.consumer import Consumer, Context
    from tapebus.events import Event, EventType
    from tapebus.hookspecs import hookimpl
    from tapebus.publisher import Publisher
    from tapebus.runtime import Runtime
    from tapebus.tape import Tape

    __version__: str

__all__ = [
    "Config",
    "Consumer",
    "Context",
    "Event",
    "EventType",
    "Publisher",
    "Runtime",
    "Tape",
    "__version__",
    "hookimpl",
    "read_secret",
]

_HOME = {
    "Config": "tapebus.config",
    "Consumer": "tapebus.consumer",
    "Context": "tapebus.consumer",
    "Event": "tapebus.events",
    "EventType": "tapebus.events",
    "Publisher": "tapebus.publisher",
    "Runtime": "tapebus.runtime",
    "Tape": "tapebus.tape",
    "hookimpl": "tapebus.hookspecs",
    "read_secret": "tapebus.config",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(_load(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'tapebus' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tapebus")
    except PackageNotFoundError:
        return "0+unknown"


def _load(module: str) -> Any:
    """Import `module`; a compiled part that was never built becomes one message saying what to do."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.startswith("tapebus.") and missing != module:
            raise ImportError(
                f"tapebus is not compiled: run `pip install -e .` at the repository root ({missing} is missing)",
                name=missing,
            ) from error
        raise

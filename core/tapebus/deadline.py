"""Calls into a plugin that may never return: waited for with a deadline, and named when it passes."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from tapebus.errors import PluginError, TapebusError
from tapebus.threads import show_name

T = TypeVar("T")
#: Innermost frames named in a message.
FRAMES = 4


class Overdue(TapebusError):
    """A call into a plugin did not return in time; its thread is left behind."""


def _place(thread: int | None) -> str:
    frame = sys._current_frames().get(thread or 0)
    frames = traceback.extract_stack(frame)[-FRAMES:] if frame is not None else []
    return " > ".join(f"{each.filename}:{each.lineno} {each.name}" for each in frames) or "an unknown place"


def stack_of(thread: int | None) -> str:
    """The Python stack of the thread with this identifier, innermost call last; empty where there is none."""
    frame = sys._current_frames().get(thread or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


def within(seconds: float, what: str, call: Callable[[], T]) -> T:
    """``call()``, on a thread of its own. Raises what it raises, and `Overdue` naming `what` and where it
    stands when it has not returned after `seconds`.

    Python cannot end a thread, so a call that is overdue keeps its thread until the process ends.
    What would end the process (SystemExit and the like) becomes a `PluginError`.
    """
    outcome: list[Any] = []

    def run() -> None:
        show_name()
        try:
            outcome[:] = [True, call()]
        except BaseException as error:
            outcome[:] = [False, error]

    thread = threading.Thread(target=run, name=f"tapebus-call: {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise Overdue(f"{what} did not return within {seconds:g} s; it stands at {_place(thread.ident)}")
    fine, found = outcome
    if fine:
        return found  # type: ignore[no-any-return]
    if isinstance(found, Exception):
        raise found
    raise PluginError(f"{what} raised {type(found).__name__}: {found}") from found

"""A loop whose clock jumps to the next timer as soon as nothing else is left to do: hours pass in seconds.

Client and server run on the same loop over real sockets, so that "nothing is left to do" is a fact and no guess.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

#: Real seconds in which the kernel hands over what one end of a local connection has sent to the other.
DELIVERY_S = 0.002


class _Selector(selectors.DefaultSelector):
    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if found or timeout == 0:
            return found
        found = super().select(timeout if timeout is None else min(timeout, DELIVERY_S))
        if not found and timeout is not None:
            self.now += max(timeout, 0.0)
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def wall(self) -> float:
        """Wall-clock seconds to go with `time`."""
        return 1.7e9 + self._virtual.now


def run(main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)

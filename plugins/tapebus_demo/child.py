"""What every process of the demo shares: its command line, its end, and the account it gives."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Any

import msgspec
import zmq


class Order(msgspec.Struct, frozen=True):
    """What a process is told to be, as JSON on its command line; ``amount`` is a rate or a number of events."""

    role: str
    endpoint: str
    feed: str
    seed: int
    amount: int = 0
    seconds: float = 0.0
    ticks: str = ""


class Parent:
    """The demo on the other side of stdin: it says ``go`` once, and its end (EOF) is the end of this process.

    That way no process is left behind, however the demo ends.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN | select.POLLHUP)
        self.gone = False

    def wait_for_go(self) -> bool:
        """Report that everything is prepared, then wait; False when the demo ended instead."""
        _say({"ready": True})
        self.gone = not os.read(0, 64)
        return not self.gone

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds`; True when this process is to end."""
        if not self.gone and self._poll.poll(max(0.0, seconds) * 1e3):
            self.gone = not os.read(0, 64)
        return self.gone

    def wait_until(self, moment: float) -> bool:
        """As `wait`, until the monotonic time `moment`."""
        return self.wait(moment - time.monotonic())


class Subscription:
    """The live feed of the bus as decoded envelopes."""

    def __init__(self, endpoint: str, *topics: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        for topic in topics:
            self._socket.setsockopt(zmq.SUBSCRIBE, f"bitten.{topic}".encode())
        self._socket.connect(endpoint)

    def receive(self, seconds: float) -> list[dict[str, Any]]:
        """What has come; waits at most `seconds` for the first."""
        found: list[dict[str, Any]] = []
        if self._socket.poll(max(0, int(seconds * 1e3))):
            try:
                while len(found) < 256:
                    found.append(msgspec.json.decode(self._socket.recv_multipart(zmq.DONTWAIT)[1]))
            except zmq.Again:
                pass
        return found

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def report(account: dict[str, Any]) -> None:
    """The last line of a process: its own books, to be compared with those of the bus."""
    _say(account)


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()

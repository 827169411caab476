"""Supervises one ``process`` consumer: starts its child, listens, kills it when it hangs, starts it again."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from tapebus.config import Config
from tapebus.consumer import Consumer
from tapebus.events import DeadLetter
from tapebus.failpoints import failpoint
from tapebus.worker import Orders

log = logging.getLogger("tapebus.supervisor")
#: A child that reports nothing for this long is killed; the first report may take START_S.
DEADLINE_S, START_S = 5.0, 20.0
BACKOFF_S, BACKOFF_MAX_S = 0.2, 30.0


class ProcessConsumer(threading.Thread):
    """Looks to the statistics like a fence; the child may hang, leak, abort or be killed."""

    def __init__(
        self,
        plugin: str,
        consumer: Consumer,
        config: Config,
        endpoint: str,
        start: int,
        bury: Callable[[DeadLetter], None],
    ) -> None:
        super().__init__(name=f"tapebus-{consumer.name}", daemon=True)
        self.plugin = plugin
        self.consumer = consumer
        table = config.plugin(plugin)
        self._orders = Orders(config, plugin, consumer.name, endpoint, start, int(table.get("memory_bytes", 0)))
        self._deadline_s = float(table.get("deadline_s", DEADLINE_S))
        self._bury = bury
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self.cursor = start
        self.handled = self.errors = self.over_budget = self.restarts = 0
        self.last_error = ""
        self.state = "starting"
        self.history: list[tuple[float, str]] = []

    def run(self) -> None:
        backoff = BACKOFF_S
        while not self._stopping.is_set():
            begun = time.monotonic()
            why = self._one_life()
            if self._stopping.is_set():
                break
            self.restarts += 1
            self.last_error = why
            self._become("restarting")
            log.warning("consumer %s: its process %s; starting it again from its cursor", self.consumer.name, why)
            backoff = BACKOFF_S if time.monotonic() - begun > 30 else min(backoff * 2, BACKOFF_MAX_S)
            self._stopping.wait(backoff)

    def _become(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self.history = [*self.history[-19:], (time.time(), state)]

    def _one_life(self) -> str:
        failpoint("supervisor.before_child")
        child = subprocess.Popen(
            [sys.executable, "-m", "tapebus.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._child = child
        failpoint("supervisor.after_child")
        assert child.stdin is not None and child.stdout is not None
        with child.stdout, contextlib.suppress(BrokenPipeError):
            child.stdin.write(msgspec.json.encode(self._orders) + b"\n")
            buffer = b""
            wait = START_S
            while True:
                ready, _, _ = select.select([child.stdout], [], [], wait)
                if not ready:
                    child.kill()
                    child.wait()
                    return f"made no progress for {wait:g} s and was killed"
                piece = os.read(child.stdout.fileno(), 65536)
                if not piece:
                    break
                wait = self._deadline_s
                *lines, buffer = (buffer + piece).split(b"\n")
                for line in lines:
                    self._hear(line)
        code = child.wait()
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _hear(self, line: bytes) -> None:
        failpoint("supervisor.on_report")
        report: dict[str, Any] = msgspec.json.decode(line)
        if "dead" in report:
            self._bury(msgspec.convert(report["dead"], DeadLetter, strict=False))
            return
        self.cursor = report["cursor"]
        self.handled = report["handled"]
        self.errors = report["errors"]
        self.last_error = report["last_error"] or self.last_error
        self._become(report["state"])

    def pause(self) -> None:
        raise ValueError("a consumer in its own process cannot be paused: disable its plugin")

    resume = pause

    def stop(self) -> None:
        """Ask the child to finish its batch and end; kill it after two seconds."""
        self._stopping.set()
        child = self._child
        if child is None or child.stdin is None:
            return
        with contextlib.suppress(OSError):
            child.stdin.close()
        try:
            child.wait(2.0)
        except subprocess.TimeoutExpired:
            child.kill()

"""Supervises one ``process`` consumer: starts its child, listens, kills it when it hangs, starts it again."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from tapebus.breaker import Breaker
from tapebus.config import Config, Plugins
from tapebus.consumer import Consumer
from tapebus.events import CRASHED, TIMEOUT, DeadLetter
from tapebus.failpoints import VARIABLE, failpoint
from tapebus.threads import show_name
from tapebus.worker import EXIT_MEMORY, Orders, needed

log = logging.getLogger("tapebus.supervisor")
BACKOFF_S = 0.2
#: Longest pause before the next life: after one without any progress, and after one with some.
BACKOFF_MAX_S, BACKOFF_PROGRESS_S = 30.0, 2.0
#: Seconds a child has to finish when it is asked to.
STOP_S = 2.0
#: A silence is counted in this many pieces per deadline: more than one at a time, and this process itself stood still.
LOOKS = 5
#: Variables every program needs to find its way; a child gets no other but those its own table names.
ENVIRONMENT = ("PATH", "PYTHONPATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", VARIABLE)


class ProcessConsumer(threading.Thread):
    """Looks to the statistics like a fence; the child may hang, leak, abort or be killed.

    An event in whose hands the child dies ``faults.deaths`` times becomes a dead letter and is skipped. What the
    child says is none of the event's fault (a full disk, a bus that is away) does not count, nor does its silence
    while the bus itself was stopped.
    """

    def __init__(
        self,
        plugin: str,
        consumer: Consumer,
        config: Config,
        endpoint: str,
        start: int,
        bury: Callable[[DeadLetter], None],
        purge: Callable[[list[int]], None],
    ) -> None:
        super().__init__(name=f"tapebus-{consumer.name}", daemon=True)
        self.plugin = plugin
        self.consumer = consumer
        self.breaker = Breaker(consumer.faults)
        self.breaker.become("starting", "")
        self.hanging = ""
        self.cursor = start
        self.handled = self.errors = self.over_budget = self.restarts = 0
        self.last_error = ""
        #: Health and metrics as the plugin told them last.
        self.told: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self._environment = environment(config.plugin(plugin))
        self._orders = Orders(_only(config, plugin), plugin, consumer.name, endpoint, start, os.getpid())
        self._start_s = config.bus.start_s
        self._bury = bury
        self._purge = purge
        self._stop_at = 0.0
        self._wanted = "running"
        self._bell_read, self._bell_write = os.pipe()
        self._child: subprocess.Popen[bytes] | None = None
        #: What earlier lives have counted.
        self._base = (0, 0, 0)
        #: First and last event in the child's hands, the one it was seen at last, and the letter it settles.
        self._trying = (0, 0)
        self._at = self._settling = 0
        self._type = ""
        #: What the child gave as the reason why it cannot work, or ended.
        self._excuse = ""
        self._deaths: dict[int, int] = {}
        self._again: dict[int, DeadLetter] = {}

    @property
    def state(self) -> str:
        return self.breaker.state

    # -- lives -------------------------------------------------------------------------------------

    def run(self) -> None:
        show_name()
        backoff = BACKOFF_S
        while self._wanted != "stopped":
            if self._wanted == "paused":
                self._rest(None)
                continue
            cursor, begun = self.cursor, time.monotonic()
            reason, why = self._one_life()
            if self._wanted != "running":
                if self._wanted == "again":
                    backoff, self._wanted = BACKOFF_S, "running"
                continue
            self.restarts += 1
            self.last_error = why
            self.breaker.become("restarting", why)
            log.warning("consumer %s: its process %s; starting it again from its cursor", self.consumer.name, why)
            if self._blame(reason, why) or time.monotonic() - begun > BACKOFF_MAX_S:
                backoff = BACKOFF_S
            self._rest(backoff)
            backoff = min(backoff * 2, BACKOFF_PROGRESS_S if self.cursor > cursor else BACKOFF_MAX_S)
        os.close(self._bell_read)

    def _rest(self, seconds: float | None) -> None:
        if _ready([self._bell_read], seconds):
            os.read(self._bell_read, 4096)

    def _ring(self, wanted: str) -> None:
        self._wanted = wanted
        self._stop_at = time.monotonic() + STOP_S
        with contextlib.suppress(OSError):
            os.write(self._bell_write, b"!")

    def _blame(self, reason: str, why: str) -> bool:
        """Charge the end of a child to the event it had in its hands; whether that one is now out of the way."""
        first, last = self._trying
        settling, self._settling = self._again.pop(self._settling, None), 0
        self._trying = (0, 0)
        if settling is not None:
            self._bury(msgspec.structs.replace(settling, id=0, reason=reason, detail=why, at=time.time()))
            self._purge([settling.id])
            return True
        # a child that stands still was seen at its last event, one that dies need not have been
        suspect = self._at if reason == TIMEOUT and self._at else first if first == last else 0
        self._orders.careful_to = max(self._orders.careful_to, last)
        if suspect <= self.cursor:
            return False
        count = self._deaths[suspect] = self._deaths.get(suspect, 0) + 1
        if count < self.consumer.faults.deaths:
            return False
        del self._deaths[suspect]
        place = f"plugin.{self.plugin}"
        detail = f"its process {why}, {count} times"
        self._bury(DeadLetter(place, reason, detail, suspect, self._type, time.time(), consumer=self.consumer.name))
        self._orders.skip = [*(seq for seq in self._orders.skip if seq > self.cursor), suspect]
        self.errors += 1
        self._base = (self._base[0], self._base[1] + 1, self._base[2])
        log.error("consumer %s: bus_seq %d is buried: %s", self.consumer.name, suspect, detail)
        return True

    def _one_life(self) -> tuple[str, str]:
        """Run one child to its end: the reason code and what happened."""
        self._base = (self.handled, self.errors, self.over_budget)
        self._at, self._excuse = 0, ""
        failpoint("supervisor.before_child")
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "tapebus.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=self._environment,
                # a group of its own: what it has started ends with it
                start_new_session=True,
            )
        except OSError as error:
            return CRASHED, f"cannot be started: {error.strerror}"
        assert child.stdin is not None and child.stdout is not None
        self._child = child
        failpoint("supervisor.after_child")
        with child.stdin, child.stdout:
            try:
                child.stdin.write(msgspec.json.encode(self._orders) + b"\n")
                outcome = self._listen(child)
            except BrokenPipeError:
                outcome = None
            except OSError as error:
                # no descriptor left to watch it with
                child.kill()
                self._innocent(f"cannot be watched: {error.strerror}")
                outcome = CRASHED, self._excuse
            except (msgspec.MsgspecError, KeyError, TypeError, IndexError) as error:
                child.kill()
                outcome = CRASHED, f"reported nonsense ({type(error).__name__}) and was killed"
            ended = self._bury_child(child)
            return outcome or ended

    def _listen(self, child: subprocess.Popen[bytes]) -> tuple[str, str] | None:
        """Hear the child until it ends (None) or has to be ended (why)."""
        assert child.stdout is not None
        fd, wait, silence = child.stdout.fileno(), self._start_s, 0.0
        with _ending(child) as ended:
            buffer = b""
            while True:
                begun, patience = time.monotonic(), min(wait / LOOKS, wait - silence)
                if self._wanted != "running":
                    patience = max(0.0, min(patience, self._stop_at - begun))
                ready = _ready([fd, ended, self._bell_read], patience)
                if self._bell_read in ready:
                    os.read(self._bell_read, 4096)
                    self._tell(child)
                elif not ready:
                    silence += patience
                    if silence >= wait or (self._wanted != "running" and time.monotonic() >= self._stop_at):
                        child.kill()
                        return TIMEOUT, f"made no progress for {wait:g} s and was killed"
                elif fd in ready:
                    piece = os.read(fd, 65536)
                    if not piece:
                        # usually the end; a child that only closed its output cannot be heard any more
                        if not _ready([ended], STOP_S):
                            child.kill()
                        return None
                    wait, silence = self.consumer.faults.deadline_s, 0.0
                    *lines, buffer = (buffer + piece).split(b"\n")
                    for line in lines:
                        self._hear(line)
                else:
                    return None

    def _tell(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        with contextlib.suppress(OSError):
            if self._wanted == "running":
                again = [[each.id, each.bus_seq] for each in list(self._again.values())]
                child.stdin.write(msgspec.json.encode({"again": again}) + b"\n")
            else:
                child.stdin.close()

    def _bury_child(self, child: subprocess.Popen[bytes]) -> tuple[str, str]:
        """Wait for the end of the child, and end what it has left behind."""
        # not reaped yet, so that its number cannot be somebody else's
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
        if code == EXIT_MEMORY:
            return CRASHED, f"needed more than its {self.consumer.faults.memory_mb} MB"
        if self._excuse:
            return CRASHED, self._excuse
        return CRASHED, f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _hear(self, line: bytes) -> None:
        failpoint("supervisor.on_report")
        report: dict[str, Any] = msgspec.json.decode(line)
        if "dead" in report:
            self._bury(msgspec.convert(report["dead"], DeadLetter, strict=False))
        elif "trying" in report:
            self._trying = (report["trying"][0], report["trying"][1])
            self._at, self._type = self._trying[0], report["type"]
            self._excuse = ""
        elif "at" in report:
            if report["at"]:
                self._at, self._type = report["at"], report["type"]
        elif "health" in report:
            self.told = (report["health"], report["metrics"])
        elif "excuse" in report:
            self._innocent(report["excuse"])
        elif "settling" in report:
            self._settling = report["settling"]
        elif "settled" in report:
            self._settling = 0
            for number in report["settled"]:
                self._again.pop(number, None)
            self._purge(report["settled"])
        else:
            self._take(report)

    def _innocent(self, excuse: str) -> None:
        """Whatever is in the child's hands has no part in what happens to it next."""
        self._orders.careful_to = max(self._orders.careful_to, self._trying[1])
        self._trying = (0, 0)
        self._at = self._settling = 0
        self._excuse = self.last_error = excuse
        log.warning("consumer %s: its process %s", self.consumer.name, excuse)

    def _take(self, report: dict[str, Any]) -> None:
        if report["cursor"] > self.cursor:
            self.cursor = self._orders.start = report["cursor"]
            self._deaths = {seq: count for seq, count in self._deaths.items() if seq > self.cursor}
        self.handled = self._base[0] + report["handled"]
        self.errors = self._base[1] + report["errors"]
        self.over_budget = self._base[2] + report["over_budget"]
        self.last_error = report["last_error"] or self.last_error
        self.breaker.opened = report["opened"]
        if self._wanted == "running":
            # what a child says on its way out does not matter any more
            self.breaker.become(report["state"], report["reason"])
        if report["first"] and self._again and self._child is not None:
            self._tell(self._child)

    # -- steering, from any thread -------------------------------------------------------------------

    def pause(self) -> None:
        """End the child; its cursor stands still."""
        self._ring("paused")
        self.breaker.become("paused", "asked for")

    def resume(self) -> None:
        """Start the child, anew where there is one, from its cursor."""
        self._ring("again" if self.breaker.state != "paused" else "running")

    def redeliver(self, letters: list[DeadLetter]) -> None:
        """Ask for these dead letters to be handled once more."""
        self._again.update({each.id: each for each in letters})
        self._ring("running" if self._wanted == "again" else self._wanted)

    def stop(self) -> None:
        """Ask the child to finish its batch and end; its thread kills it after two seconds."""
        self._ring("stopped")


def _ready(fds: list[int], seconds: float | None) -> list[int]:
    """Which of `fds` can be read within so many seconds; select() would refuse the numbers of a bus with many peers."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(None if seconds is None else math.ceil(seconds * 1000))]


@contextlib.contextmanager
def _ending(child: subprocess.Popen[bytes]) -> Iterator[int]:
    """A descriptor that becomes readable when the child ends, whoever still holds its output open."""
    if hasattr(os, "pidfd_open"):
        fds = [os.pidfd_open(child.pid)]
    else:
        # nothing ever comes out of this pipe: the end of the output has to do
        fds = [*os.pipe()]
    try:
        yield fds[0]
    finally:
        for fd in fds:
            os.close(fd)


def _only(config: Config, plugin: str) -> Config:
    """`config` without what is other plugins' business."""
    enabled = [plugin, *needed(config, plugin)]
    tables = {name: table for name, table in config.plugins.tables.items() if name in enabled}
    return msgspec.structs.replace(config, plugins=Plugins(enabled, tables), sources=[])


def environment(table: Any) -> dict[str, str]:
    """The variables a child gets: the common ones, and those its own table takes a secret from."""
    names = {*ENVIRONMENT, *_named(table)}
    return {name: value for name, value in os.environ.items() if name in names or name.startswith("LC_")}


def _named(table: Any) -> Iterator[str]:
    if isinstance(table, dict):
        if set(table) == {"env"}:
            yield str(table["env"])
        for each in table.values():
            yield from _named(each)
    elif isinstance(table, list):
        for each in table:
            yield from _named(each)

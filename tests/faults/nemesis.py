"""The nemesis: a schedule of faults that follows from a seed alone, and the hands that do them to a bus.

`schedule` is a pure function, so the same seed is the same trouble again; a longer run begins like a shorter one.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from fault_plugins import DERIVED, slow_down
from preload import built, has_compiler
from producers import Producer

#: Faults by name with their weight in the lottery.
KINDS = {
    "kill": 4,
    "pause": 3,
    "restart": 2,
    "worker": 2,
    "full": 2,
    "clock": 2,
    "slow": 2,
    "garbage": 3,
    "flood": 1,
    "sockets": 2,
}
#: What the data directory has room for while `full` takes the rest away, in bytes.
DISK = 256 << 20
#: Descriptors the bus may have, and idle connections that `sockets` opens to it.
DESCRIPTORS, IDLE = 160, 200
DAY = 86400
#: Seconds a bus may take to come up or go down: an upper bound, never a claim about speed.
PATIENCE = 30.0


@dataclass(frozen=True)
class Step:
    """One fault: `at` seconds after the start, lasting `seconds`; `chance` is the seed of its details."""

    at: float
    kind: str
    seconds: float
    chance: int


def schedule(seed: int, seconds: float) -> list[Step]:
    """The faults of one run, in order of time."""
    chance = random.Random(seed)
    found: list[Step] = []
    at = 0.0
    while True:
        at += chance.uniform(0.1, 1.2)
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        step = Step(round(at, 3), kind, round(chance.uniform(0.1, 1.5), 3), chance.randrange(1 << 31))
        if at >= seconds:
            return found
        found.append(step)


class Nemesis:
    """Does the steps of a schedule; whatever lasts is taken back by `end`. Used by one thread."""

    def __init__(self, bus: Any, directory: Path) -> None:
        self.bus = bus
        self.directory = directory
        self.clock = directory / "clock"
        self.filler = bus.data_dir / "filler"
        #: Floods that were let loose, with their ledgers.
        self.floods: list[Producer] = []
        self.done: dict[str, int] = {}
        #: Faults that cannot be made on this machine, with the reason.
        self.impossible: dict[str, str] = {}
        self.restarts = 0
        self._idle: list[socket.socket] = []
        #: What ends when, in order of being begun.
        self._lasting: list[tuple[float, Any]] = []
        self._prepare()

    def _prepare(self) -> None:
        self.bus.data_dir.mkdir(mode=0o700)
        mounted = (
            os.geteuid() == 0
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0700", "tmpfs", str(self.bus.data_dir)],
                capture_output=True,
                check=False,
            ).returncode
        )
        if not mounted:
            self.impossible["full"] = "only root may mount a small disk"
        if has_compiler():
            self._shift(0)
            self.bus.variables |= {"LD_PRELOAD": str(built("clock")), "CLOCK_SHIFT": str(self.clock)}
        else:
            self.impossible["clock"] = "no C compiler"
        if shutil.which("prlimit"):
            self.bus.command = ["prlimit", f"--nofile={DESCRIPTORS}", *self.bus.command]
        self._mounted = mounted

    def close(self) -> None:
        """Take everything back and release what this machine lent."""
        self.end()
        for each in self.floods:
            each.kill()
        if self._mounted:
            if self.bus.process is not None:
                self.bus.kill()
            subprocess.run(["umount", "--lazy", str(self.bus.data_dir)], check=True)

    # -- time ------------------------------------------------------------------------------------

    def run(self, steps: list[Step], seconds: float) -> None:
        """Do all `steps`, each at its time or as soon as the one before it lets go."""
        pause = threading.Event()
        begun = time.monotonic()
        for step in [*steps, Step(seconds, "", 0.0, 0)]:
            while (left := begun + step.at - time.monotonic()) > 0:
                self._take_back(time.monotonic())
                self.keep_alive()
                pause.wait(min(left, 0.05))
            self._take_back(time.monotonic())
            if step.kind and step.kind not in self.impossible:
                getattr(self, f"do_{step.kind}")(step, random.Random(step.chance))
                self.done[step.kind] = self.done.get(step.kind, 0) + 1

    def _lasts(self, step: Step, take_back: Any) -> None:
        self._lasting.append((time.monotonic() + step.seconds, take_back))

    def _take_back(self, now: float) -> None:
        over = [entry for entry in self._lasting if entry[0] <= now]
        self._lasting = [entry for entry in self._lasting if entry[0] > now]
        for _, take_back in over:
            take_back()

    def end(self) -> None:
        """Take back all that lasts."""
        self._take_back(float("inf"))

    def keep_alive(self) -> None:
        """Start the bus again when it has ended by itself, which only a full disk excuses."""
        process = self.bus.process
        if process is None or process.poll() is None:
            return
        assert self.filler.exists(), f"the bus ended with code {process.returncode}:\n{self.bus.output()}"
        self.bus.spawn()
        self.restarts += 1

    # -- faults ----------------------------------------------------------------------------------

    def do_kill(self, step: Step, chance: random.Random) -> None:
        self.bus.process.kill()
        self.bus.process.wait()
        self.bus.spawn()
        self.restarts += 1

    def do_pause(self, step: Step, chance: random.Random) -> None:
        process = self.bus.process
        process.send_signal(signal.SIGSTOP)
        self._lasts(step, lambda: process.send_signal(signal.SIGCONT))

    def do_restart(self, step: Step, chance: random.Random) -> None:
        process = self.bus.process
        process.send_signal(signal.SIGCONT)
        process.send_signal(chance.choice((signal.SIGTERM, signal.SIGINT)))
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = Path(f"/proc/{process.pid}/status").read_text()
            raise AssertionError(f"asked to stop, the bus runs on:\n{self.bus.output()}\n{status}") from None
        # before its handlers are in place a signal ends the process at once
        output = self.bus.output()
        # an interpreter that is interrupted while it starts says so itself, and ends with 1
        early = code == 1 and "init_import_site" in output and output.rstrip().endswith("KeyboardInterrupt")
        assert early or code in (0, 130, -signal.SIGTERM, -signal.SIGINT) or self.filler.exists(), (code, output)
        self.bus.spawn()
        self.restarts += 1

    def do_worker(self, step: Step, chance: random.Random) -> None:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{self.bus.process.pid}/task").iterdir():
                for pid in (task / "children").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)

    def do_full(self, step: Step, chance: random.Random) -> None:
        fd = os.open(self.filler, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            space = os.fstatvfs(fd)
            with contextlib.suppress(OSError):
                os.posix_fallocate(fd, 0, space.f_bavail * space.f_frsize)
        finally:
            os.close(fd)
        self._lasts(step, lambda: self.filler.unlink(missing_ok=True))

    def do_clock(self, step: Step, chance: random.Random) -> None:
        self._shift(chance.choice((-365 * DAY, -DAY, -1, 3600, 30 * DAY, 3650 * DAY)))

    def _shift(self, seconds: int) -> None:
        """Move the clock of the bus to so many seconds from the true one; in place, for it is mapped."""
        fd = os.open(self.clock, os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(fd, struct.pack("=q", seconds), 0)
        os.close(fd)

    def do_slow(self, step: Step, chance: random.Random) -> None:
        name = chance.choice(sorted(DERIVED))
        slow_down(self.bus, name, chance.choice((0.01, 0.2, 1.0)))
        self._lasts(step, lambda: slow_down(self.bus, name, 0))

    def do_flood(self, step: Step, chance: random.Random) -> None:
        source = f"flood-{len(self.floods)}"
        self.floods.append(Producer(self.bus.acked, source, self.directory, window=0, count=100_000))

    def do_sockets(self, step: Step, chance: random.Random) -> None:
        for _ in range(IDLE):
            idle = socket.socket()
            idle.setblocking(False)
            idle.connect_ex(_address(chance.choice((self.bus.acked, self.bus.ingest, self.bus.feed))))
            self._idle.append(idle)
        self._lasts(step, self._hang_up)

    def _hang_up(self) -> None:
        for each in self._idle:
            # half of them vanish without a goodbye
            if each.fileno() % 2:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.close()
        self._idle = []

    def do_garbage(self, step: Step, chance: random.Random) -> None:
        """Bad frames on both ways in, and bytes that are no ZeroMQ at all."""
        with zmq.Context() as context, context.socket(zmq.PUSH) as push, context.socket(zmq.DEALER) as dealer:
            for each, endpoint in ((push, self.bus.ingest), (dealer, self.bus.acked)):
                each.setsockopt(zmq.LINGER, 100)
                each.setsockopt(zmq.SNDTIMEO, 0)
                each.connect(endpoint)
                for _ in range(chance.randrange(1, 200)):
                    with contextlib.suppress(zmq.Again):
                        each.send_multipart(bad_frames(chance))
        for endpoint in (self.bus.ingest, self.bus.acked, self.bus.feed):
            with contextlib.suppress(OSError), socket.create_connection(_address(endpoint), 0.2) as raw:
                raw.sendall(chance.choice((b"GET / HTTP/1.1\r\n\r\n", b"\xff" + chance.randbytes(64), b"\x16\x03\x01")))


def bad_frames(chance: random.Random) -> list[bytes]:
    """One message that no decoder accepts, in one or several parts."""
    kind = chance.randrange(6)
    if kind == 0:
        return [chance.randbytes(chance.randrange(0, 300))]
    if kind == 1:
        # the head of a frame of the protocol, and nonsense behind it
        return [bytes([chance.randrange(1, 12), 0, 1, 0]) + chance.randbytes(chance.randrange(0, 80))]
    if kind == 2:
        return [b"\xdf\xff\xff\xff\xff" + chance.randbytes(20)]
    if kind == 3:
        return [b'{"event_type": "market_data", "timestamp": 1e999, "source": "x", "data": {' + b"[" * 500]
    if kind == 4:
        return [chance.randbytes(8) for _ in range(chance.randrange(2, 50))]
    return [b"\x84\xaaevent_type\xa1x\xa9timestamp\xc0\xa6source\xa1x\xa4data\x80"]


def _address(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


if __name__ == "__main__":
    for line in schedule(int(sys.argv[1]), float(sys.argv[2])):
        print(f"{line.at:8.3f} s  {line.kind:8} {line.seconds:6.3f} s")

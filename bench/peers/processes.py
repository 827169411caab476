"""Processes of a run: servers and producers, none of which outlives it."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.harness import Child, Wrong, die_with_parent

PRODUCERS = 2
#: What producers and consumers agree on: the name of the stream or subject; commands of a pipeline to Redis, and events
#: of a batch frame; commands of a pipeline whose entries hold a batch each; messages that JetStream acknowledges at
#: once, and how many of them may wait for it.
STREAM = "events"
BATCH = 100
PACKED_PIPELINE = 10
FLOW, WINDOW = 500, 2000
_START_S = 15.0


def _end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def directory() -> Iterator[Path]:
    """A temporary directory on the disk the bus's own runs use; its path is short enough for a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="tb-", ignore_cleanup_errors=True) as path:
        yield Path(path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(command: Sequence[str], log: Path, ready: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` until the block ends; raises `Wrong` with the end of its `log` when `ready` stays False."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
    try:
        deadline = time.monotonic() + _START_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise Wrong(f"{command[0]} did not start: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.02)
        yield process
    finally:
        _end(process)


def shares(count: int, number: int = PRODUCERS) -> list[int]:
    """`count` events spread over so many producers."""
    return [count // number + (i < count % number) for i in range(number)]


def frames_of(count: int, batch: int) -> int:
    """How many frames of up to `batch` events the producers fill, each its own."""
    return sum(-(-part // batch) for part in shares(count))


class Producers:
    """Processes that send `count` events between them; ready when the block begins, sending after `go`."""

    def __init__(self, kind: str, endpoint: str, count: int, number: int = PRODUCERS) -> None:
        self._all: list[Child] = []
        for seed, part in enumerate(shares(count, number), 1):
            self._all.append(Child("bench.peers.producers", kind, endpoint, str(part), str(seed)))

    def __enter__(self) -> Producers:
        try:
            for each in self._all:
                each.hear()
        except BaseException:
            self.__exit__()
            raise
        return self

    def go(self) -> None:
        """Let all of them begin."""
        for each in self._all:
            each.say("go")

    def sent(self) -> dict[str, tuple[int, int]]:
        """Wait for their end: source → events sent and their chain; raises `Wrong` when one failed."""
        out: dict[str, tuple[int, int]] = {}
        for each in self._all:
            source, count, chain = json.loads(each.hear())
            out[source] = (count, chain)
        return out

    def __exit__(self, *_: object) -> None:
        for each in self._all:
            # who has not ended by now waits for a peer that is gone
            each.kill()

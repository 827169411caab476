"""The tape thread: when it commits, and what it writes into a commit."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tapebus import tapewriter
from tapebus._ingest import Ingest
from tapebus._ring import Ring
from tapebus._topics import Topics
from tapebus.tapewriter import MAX_BLOCK_BYTES, TapeWriter

sys.path.insert(0, str(Path(__file__).parent))
from bus_support import wait_until

INTERVAL_MS = 20
BIG = b"x" * (MAX_BLOCK_BYTES // 8)


def commits_of(runtime: Any) -> list[tuple[float, Any]]:
    """Every commit from now on, with the moment it began."""
    seen: list[tuple[float, Any]] = []
    commit = runtime.store.commit

    def noted(what: Any) -> None:
        seen.append((runtime.tape._begun_at, what))
        commit(what)

    runtime.store.commit = noted
    return seen


def publish(bus: Any, count: int) -> None:
    """`count` events, each of them on disk before the next, and again as many without waiting."""
    runtime = bus.runtime
    for n in range(count):
        runtime.publish("user_action", {"user_id": "u", "action": str(n)})
        wait_until(lambda want=n + 1: runtime.tape.done_seq >= want, "a commit")
    for n in range(count):
        runtime.publish("user_action", {"user_id": "u", "action": str(n)})
    wait_until(lambda: runtime.tape.done_seq >= 2 * count, "all commits")


def test_commits_begin_no_nearer_to_each_other_than_the_interval(embed: Callable[..., Any]) -> None:
    bus = embed(["schema", "store"], bus=f"commit_interval_ms = {INTERVAL_MS}")
    seen = commits_of(bus.runtime)
    publish(bus, 5)
    begun = [at for at, _ in seen]
    assert sum(len(each.blocks) for _, each in seen) >= 5
    assert min(b - a for a, b in pairwise(begun)) >= INTERVAL_MS / 1e3


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[float]]]:
    """``filled(frames, frame)``: how long a tape thread that has just committed rests with that in its ring."""
    ring = Ring(Topics(), 1 << 15)
    ingest = Ingest(ring, 1)
    own = ring.producer(b"tests".ljust(16, b"\0"), 0, "tests", sequenced=False)
    receiver = threading.Thread(target=ingest.run, daemon=True)
    receiver.start()
    tape = TapeWriter(ring, ingest, None, lambda error: None, dict, lambda *words: None, interval=0.1)
    rests: list[float] = []
    monkeypatch.setattr(tapewriter.time, "sleep", rests.append)

    def fill(frames: int, frame: bytes) -> list[float]:
        pause = threading.Event()
        before = ring.fill[0]
        for _ in range(frames):
            ring.inject(frame, own)
        while ring.fill[0] < before + frames:
            pause.wait(0.001)
        tape._begun_at = time.monotonic() + 3600.0
        tape._gather()
        return rests

    yield fill
    ingest.stop()
    receiver.join(10.0)
    ring.stop()


def event(action: bytes) -> bytes:
    wire = {
        "event_type": "user_action",
        "timestamp": 1.0,
        "source": "tests",
        "data": {"user_id": "u", "action": action},
    }
    return msgspec.msgpack.encode(wire)


def test_a_little_waits_for_more_and_a_whole_block_does_not(filled: Callable[..., list[float]]) -> None:
    assert len(filled(3, event(b"a"))) == 1
    assert len(filled(9, event(BIG))) == 1


def test_as_many_small_frames_as_a_block_may_have_events_do_not_wait(filled: Callable[..., list[float]]) -> None:
    assert filled(tapewriter.MAX_BLOCK_EVENTS, event(b"a")) == []


def test_counters_are_written_when_they_change_and_only_those(embed: Callable[..., Any]) -> None:
    bus = embed(["schema", "store"])
    runtime = bus.runtime
    seen = commits_of(runtime)
    runtime.publish("user_action", {"user_id": "u", "action": "fine"})
    wait_until(lambda: runtime.tape.done_seq == 1, "the first event")
    runtime.publish("market_data", {"symbol": "EURUSD"})
    wait_until(runtime.store.counters, "the counter")
    runtime.publish("user_action", {"user_id": "u", "action": "fine"})
    wait_until(lambda: runtime.tape.done_seq >= 3, "the last event")
    written = [each.counters for _, each in seen if each.counters]
    assert len(written) == 1 and list(written[0].values()) == [1], written
    assert runtime.store.counters() == runtime.statistics.durable_counters() == written[0]

"""The ring with its ingest thread: what is handed in comes out once, in order, with its unit and its account."""

from __future__ import annotations

import subprocess
import sys
import threading

import msgspec
import pytest

from bus_support import wait_until
from tapebus._ingest import Ingest
from tapebus._ring import Ring
from tapebus._topics import Topics
from tapebus.blocks import BlockView, corr_hash, find_corr
from tapebus.store import ProducerBook, Unit


def frame(*numbers: int) -> bytes:
    return msgspec.msgpack.encode(
        [
            {"event_type": "a", "timestamp": n, "correlation_id": f"c{n}", "priority": "high", "data": {}}
            for n in numbers
        ]
    )


def drain(ring: Ring, mails: int):
    """Let an ingest thread take `mails` frames while this thread packs them."""
    ingest = Ingest(ring, 1)
    thread = threading.Thread(target=ingest.run, daemon=True)
    thread.start()
    found, taken = [], 0
    while ingest.mail_waiting or ring.fill[0]:
        taken += 1
        if ring.wait(1000):
            found.append(ring.pack(max_events=3))
    ingest.stop()
    thread.join(10)
    assert not thread.is_alive() and taken >= 1 and mails
    return found


@pytest.mark.parametrize("entries", [2, 64])
def test_frames_and_units_come_out_once_and_in_order_even_through_a_tiny_ring(entries):
    ring = Ring(Topics(), entries, next_seq=11)
    me = ring.producer(b"m" * 16, 0, "me", sequenced=False)
    units = [Unit("c", n) for n in range(20)]
    for n, unit in enumerate(units):
        ring.inject(frame(2 * n, 2 * n + 1) if n % 3 else b"", me, unit)
    packs = drain(ring, 20)
    assert [unit for _, each, _ in packs for unit in each] == units
    blocks = [block for block, _, _ in packs if block is not None]
    expected = [m for n in range(20) if n % 3 for m in (2 * n, 2 * n + 1)]
    times, seq = [], 11
    for block in blocks:
        assert block.first_seq == seq and block.urgent == block.count
        view = BlockView(block.payload, block.first_seq)
        for i in range(block.count):
            found = msgspec.msgpack.decode(view.raw(seq + i))
            times.append(found["timestamp"])
            assert i in find_corr(block.corr, corr_hash(found["correlation_id"]))
        assert (block.min_time, block.max_time) == (times[-block.count], times[-1])
        seq += block.count
    assert times == expected and ring.last_seq == seq - 1
    book = ring.account(me)
    assert book.stored == book.watermark == book.highest_seq == len(expected)
    assert ring.fill == (0, 0)


def test_an_account_carries_over_from_the_tape_and_is_opened_once():
    ring = Ring(Topics(), 2, max_producers=1)
    book = ProducerBook(b"p" * 16, 3, "s", 9, 5, 12, {"ingest.malformed": 3}, {"client.ring_full": 1})
    index = ring.producer(b"p" * 16, 3, book=book)
    assert ring.account(index) == book and ring.is_sequenced(index)
    assert ring.producer(b"p" * 16, 3) == index
    assert ring.producer(b"q" * 16, 3) == -1


def test_a_stopped_ring_wakes_its_taker_and_is_empty():
    ring = Ring(Topics(), 2)
    assert ring.pack() is None and not ring.stopped
    ring.stop()
    assert ring.wait() is False and ring.stopped
    with pytest.raises(ValueError, match="power of two"):
        Ring(Topics(), 3)


TAKEN = """
from tapebus._ring import Ring
from tapebus._topics import Topics

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

before = anonymous()
ring = Ring(Topics(), 1 << 18)
print(anonymous() - before, *ring.fill)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells how much memory is used on Linux only")
def test_the_memory_of_a_ring_is_taken_at_once_and_not_during_its_first_lap():
    # in a process of its own: here an earlier ring may have left the memory behind
    done = subprocess.run([sys.executable, "-c", TAKEN], capture_output=True, text=True, check=True)
    taken, *fill = map(int, done.stdout.split())
    assert taken > 100 * (1 << 18)
    assert fill == [0, 0]


def overfill(ring: Ring) -> None:
    """Six frames through a ring of four entries: four of them stay in it."""
    ingest = Ingest(ring, 1)
    thread = threading.Thread(target=ingest.run, daemon=True)
    thread.start()
    for waiting in (2, 1, 0):
        wait_until(lambda: ring.fill[0] == 4, "the ring to fill")
        wait_until(lambda waiting=waiting: ingest.mail_waiting == waiting, "the mailbox to move up")
        if waiting:
            assert ring.pack(max_events=2) is not None
    ingest.stop()
    thread.join(10)


def test_a_ring_that_goes_away_lets_go_of_what_it_still_held():
    ring = Ring(Topics(), 4)
    me = ring.producer(b"m" * 16, 0, "me", sequenced=False)
    unit = object()
    before = sys.getrefcount(unit)
    for _ in range(6):
        ring.inject(frame(1, 2), me, unit)
    overfill(ring)
    ring.inject(frame(1), me, unit)
    assert ring.fill[0] == 4 and sys.getrefcount(unit) == before + 5
    del ring
    assert sys.getrefcount(unit) == before


def test_a_time_in_words_may_be_any_time_until_it_is_decoded():
    ring = Ring(Topics(), 4)
    me = ring.producer(b"m" * 16, 0, "me", sequenced=False)
    events = [{"event_type": "a", "timestamp": time, "data": {}} for time in (5, "2025-08-11T00:00:00")]
    ring.inject(msgspec.msgpack.encode(events), me)
    [(block, _, _)] = drain(ring, 1)
    assert (block.min_time, block.max_time) == (float("-inf"), float("inf"))

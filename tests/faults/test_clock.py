"""The wall clock of a running bus leaps by years: order, dedup, credit and retention go on as if it did not."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zmq
from peer import Peer, encoded

from tapebus import Tape, wire

YEAR = 365 * 86400.0
SOURCE = Path(__file__).with_name("wallclock.c")


class Clock:
    """The wall clock of one bus, as an offset to the real one; its steady clocks are left alone."""

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None or not sys.platform.startswith("linux"):
            pytest.skip("the clock of a process can be shifted on Linux with a C compiler only")
        self.library, self.file = directory / "wallclock.so", directory / "offset"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", self.library, SOURCE, "-ldl"], check=True)
        self.set(0.0)

    def set(self, offset: float) -> None:
        self.offset = offset
        with self.file.open("r+b" if self.file.exists() else "xb") as file:
            file.write(struct.pack("=q", int(offset)))

    def environ(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.library), "WALLCLOCK": str(self.file)}


#: Frames that arrive before and after a leap of the clock, packed together: the first event of each block, and how
#: much later than that its last one was received.
PACKED = """
import struct, sys, threading
from tapebus._ingest import Ingest
from tapebus._ring import Ring
from tapebus._topics import Topics
from tapebus.blocks import BlockView

ring = Ring(Topics(), 64)
me = ring.producer(b"m" * 16, 0, "me", sequenced=False)
ingest = Ingest(ring, 1)
thread = threading.Thread(target=ingest.run)
thread.start()
for offset in map(int, sys.argv[2:]):
    with open(sys.argv[1], "r+b") as file:
        file.write(struct.pack("=q", offset))
    filled = ring.fill[0]
    for n in range(2):
        ring.inject(b'{"event_type":"a","timestamp":1,"source":"s","data":{}}', me)
    while ring.fill[0] < filled + 2:
        ring.wait(10)
ingest.stop()
thread.join()
while packed := ring.pack():
    view = BlockView(packed[0].payload, packed[0].first_seq)
    span = view.received_at(packed[0].last_seq) - view.received_at(packed[0].first_seq)
    assert abs(packed[0].max_received - packed[0].min_received - span) < 1e-5
    print(packed[0].first_seq, round(span / 60))
"""


def test_a_leap_of_the_clock_between_two_waiting_frames_begins_a_block(data_dir):
    clock = Clock(data_dir)
    offsets = (0, 3600, 2 * 3600, 4 * 3600, 3 * 3600, 3 * 3600)
    command = [sys.executable, "-c", PACKED, str(clock.file), *map(str, offsets)]
    done = subprocess.run(command, env=os.environ | clock.environ(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [tuple(map(int, line.split())) for line in done.stdout.splitlines()] == [(1, 120), (7, 0), (9, 0)]


def leap(chance: Any) -> float:
    return chance.choice((-YEAR, 10 * YEAR, -1.0, 3600.0, -3600.0, 86400.0 * 40, -86400.0 * 40, 0.0)) + chance.random()


def test_leaps_of_the_clock_change_nothing_but_the_time_of_reception(make_bus, size, chance, figures, data_dir):
    clock = Clock(data_dir)
    # two days may be kept: a clock that decided would remove everything at the first leap of ten years
    bus = make_bus(["schema", "store"], "[plugins.store]\nmax_age_days = 2\nseal_events = 1\n")
    plain = bus.environ
    bus.environ = lambda: plain() | clock.environ()
    bus.start()
    leaps, each = size(4, 40, 200), 400
    total = leaps * each + 600
    events = encoded("one", 1, total)
    felt, restarts = set(), 0
    with zmq.Context() as context:
        peer = Peer(context, bus.acked, "one", events)
        peer.connect()
        for n in range(leaps):
            clock.set(leap(chance))
            peer.finish((n + 1) * each, step=50)
            # what the bus has already stays known across any leap
            peer.batch(max(1, peer.durable - 300), peer.durable)
            peer.pongs = 0
            peer.send(wire.PING, wire.S_HELLO.pack(0))
            peer.hear(lambda: peer.pongs == 1)
            assert peer.nacks == []
            felt.add(round(clock.offset))
            if n % 4 == 3:
                restarts += 1
                if n % 8 == 3:
                    bus.kill()
                else:
                    assert bus.stop() == 0
                bus.start()
                assert peer.connect() == (n + 1) * each
        peer.finish(total, step=50)
        peer.drop()
    # upkeep comes soon after a start, here at the wildest time there is; it looks at ages before it seals
    clock.set(50 * YEAR)
    bus.kill()
    sealed = Tape.open(bus.data_dir).stats()["blocks_sealed"]
    bus.start()
    bus.wait_for(lambda stats: stats["store"]["blocks_sealed"] > sealed, "to seal blocks")
    book = next(book for book in bus.stats()["producers"] if book["source"] == "one")
    assert bus.stop() == 0
    with Tape.open(bus.data_dir) as tape:
        assert tape.first_seq == 1, "removed early"
        found = [event for event in tape.read(topics=["market_data"])]
    assert [event.data.volume for event in found] == list(range(1, total + 1))
    assert [event.timestamp for event in found] == [1.7e9 + n for n in range(1, total + 1)]
    assert [event.raw for event in found] == events
    assert [event.bus_seq for event in found] == sorted(event.bus_seq for event in found)
    assert (book["stored"], book["unexplained"], book["in_flight"]) == (total, 0, 0)
    years = {round((event.received_at - found[0].received_at) / YEAR) for event in found}
    assert len(years) > 1, "the bus has not felt the leaps"
    figures.update(leaps=leaps, restarts=restarts, events=len(found), inversions=0, removed_early=0, years=len(years))

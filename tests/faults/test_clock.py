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

"""The Nth write or sync of the store fails while producers publish: nothing acknowledged is lost, whatever happens."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ledger import Checker
from preload import DATA, META, SYNC, Faults
from producers import Producer, finish

from bus_support import wait_until

CALLS = {"data": DATA, "meta": META, "sync": SYNC}
SHORT = -1
IO_ERROR = 74
#: Events per second of each producer: so many that the store is never idle.
RATE = 1000
SMALL = "[plugins.store]\ninitial_bytes = 1048576\nseal_events = 500\n"


class Rig:
    """A bus whose disk calls can fail, and two producers that outlive it."""

    def __init__(self, bus: Any, directory: Path) -> None:
        self.bus = bus
        self.faults = Faults(directory, bus.data_dir / "tape")
        bus.variables |= self.faults.variables
        bus.start()
        self.producers = [Producer(bus.acked, source, directory, rate=RATE) for source in ("elite_guard", "webapp")]
        self.checker = Checker(bus.data_dir, [each.ledger for each in self.producers])
        self.go_on()

    def go_on(self) -> None:
        """Wait until every producer has more acknowledged than now."""
        before = [each.acked for each in self.producers]
        wait_until(
            lambda: all(each.acked > old for each, old in zip(self.producers, before, strict=True)), "acknowledgements"
        )

    def ended(self) -> bool:
        return self.bus.process.poll() is not None

    def check(self) -> None:
        """All that was acknowledged is on the tape, once and in order. Only while the bus is away."""
        for each in self.producers:
            each.ledger.read_on()
        self.checker.read_on()
        verdict = self.checker.verdict()
        assert not verdict.wrong, verdict

    def finish(self) -> dict[str, Any]:
        """Let the producers end; the books close."""
        ends = finish(self.producers)
        whole = Checker(self.bus.data_dir, [each.ledger for each in self.producers])
        whole.read_on()
        verdict = whole.verdict(self.bus.stats())
        assert not verdict.wrong, verdict
        assert verdict.stored == sum(each["published"] for each in ends)
        assert self.bus.stop() == 0
        # a call that failed damages nothing, and is not taken for damage
        assert "saving what is sound" not in self.bus.log.read_text()
        return {"stored": verdict.stored, "lost": verdict.lost}

    def close(self) -> None:
        for each in self.producers:
            each.kill()
        self.faults.close()


@pytest.fixture
def rig(make_bus: Callable[..., Any], tmp_path: Path) -> Iterator[Rig]:
    made = Rig(make_bus(["schema", "store"], SMALL), tmp_path)
    yield made
    made.close()


def cases(numbers: range, calls: list[str]) -> list[tuple[str, int]]:
    """Each number once with each call in the large sizes, in turn in the quick one."""
    if len(numbers) < 10:
        return [(calls[n % len(calls)], n) for n in numbers]
    return [(call, n) for n in numbers for call in calls]


@pytest.mark.timeout(7200)
def test_after_an_io_error_the_bus_acknowledges_nothing_more_and_ends_with_74(rig, size, figures):
    recoveries = []
    plan = cases(size(range(1, 7), range(1, 41, 4), range(1, 201)), list(CALLS))
    for call, n in plan:
        rig.faults.order(CALLS[call], errno.EIO, n, times=1 << 30)
        wait_until(rig.ended, f"the end of the bus after {call} number {n} failed")
        assert rig.bus.process.returncode == IO_ERROR, rig.bus.output()
        assert rig.faults.failed >= 1
        rig.faults.none()
        rig.check()
        begun = time.monotonic()
        rig.bus.start()
        rig.go_on()
        recoveries.append(time.monotonic() - begun)
    figures |= {"cycles": len(plan), "first_ack_s_max": round(max(recoveries), 2)} | rig.finish()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("error", [errno.EINTR, SHORT], ids=["eintr", "short"])
def test_an_interrupted_or_short_write_is_repeated_or_ends_the_bus_but_loses_nothing(rig, size, figures, error):
    ended = 0
    plan = cases(size(range(1, 5), range(1, 41, 4), range(1, 201)), ["data", "meta"] + ["sync"] * (error > 0))
    for call, n in plan:
        rig.faults.order(CALLS[call], error, n)
        wait_until(lambda: rig.faults.failed or rig.ended(), f"{call} number {n} to fail")
        # an error that ends the bus does so before another acknowledgement
        wait_until(lambda before=[each.acked for each in rig.producers]: rig.ended() or moved(rig, before), "an end")
        rig.faults.none()
        if rig.ended():
            assert rig.bus.process.returncode == IO_ERROR, rig.bus.output()
            ended += 1
            rig.check()
            rig.bus.start()
            rig.go_on()
    figures |= {"cycles": len(plan), "ended": ended} | rig.finish()


def moved(rig: Rig, before: list[int]) -> bool:
    return all(each.acked > old for each, old in zip(rig.producers, before, strict=True))


@pytest.mark.timeout(7200)
def test_a_full_disk_stops_acknowledgements_and_passes(rig, size, figures):
    plan = cases(size(range(1, 5), range(1, 41, 4), range(1, 201)), ["data", "sync"])
    for call, n in plan:
        rig.faults.order(CALLS[call], errno.ENOSPC, n, times=2)
        wait_until(lambda: rig.faults.failed == 2 or rig.ended(), f"{call} number {n} to fail twice")
        assert not rig.ended(), rig.bus.output()
        rig.faults.none()
        rig.go_on()
    assert "acknowledging stops until there is room" in rig.bus.output()
    figures |= {"cycles": len(plan)} | rig.finish()


@pytest.mark.timeout(7200)
def test_a_first_start_that_fails_anywhere_can_be_tried_again(make_bus, tmp_path, size, figures):
    """Every call on the way to the first acknowledgement fails once, each in a data directory of its own."""
    numbers = size([2, 19], list(range(1, 31, 3)), list(range(1, 31)))
    ended = 0
    for n in numbers:
        bus = make_bus(["schema", "store"])
        directory = tmp_path / str(n)
        directory.mkdir()
        faults = Faults(directory, bus.data_dir / "tape")
        bus.variables |= faults.variables
        faults.order(DATA | META | SYNC, errno.EIO, n)
        bus.spawn()
        producer = Producer(bus.acked, "elite_guard", directory, count=50)
        try:
            wait_until(lambda bus=bus, one=producer: bus.process.poll() is not None or one.acked == 50, "an end")
            if bus.process.poll() is not None:
                assert bus.process.returncode == IO_ERROR, (n, bus.output())
                assert "Traceback" not in bus.output()
                ended += 1
                faults.none()
                bus.start()
            finish([producer])
            checker = Checker(bus.data_dir, [producer.ledger])
            checker.read_on()
            verdict = checker.verdict(bus.stats())
            assert not verdict.wrong, verdict
            assert verdict.stored == 50
            assert bus.stop() == 0
        finally:
            producer.kill()
            faults.close()
    figures |= {"starts": len(numbers), "ended": ended}

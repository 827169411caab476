"""All faults at once, in an order that follows from a seed: afterwards every event is accounted for, exactly."""

from __future__ import annotations

import pytest
from fault_plugins import DERIVED, TRIGGERS, install
from ledger import Checker
from nemesis import KINDS, Nemesis, schedule
from producers import Producer, finish

from bus_support import wait_until

#: Events per second of each producer.
RATES = {"elite_guard": 300, "webapp": 300, "mt5_adapter": 500, "mt5_feed": 2000}


def test_the_same_seed_is_the_same_trouble_and_a_longer_run_begins_like_a_shorter_one():
    assert schedule(7, 60) == schedule(7, 60) != schedule(8, 60)
    short = schedule(7, 10)
    assert schedule(7, 60)[: len(short)] == short
    assert {step.kind for step in schedule(7, 600)} == set(KINDS)


def run(bus, directory, seed, seconds, totals):
    """One run; adds up what was found."""
    directory.mkdir()
    install(bus, directory / "plugins")
    nemesis = Nemesis(bus, directory)
    steps = schedule(seed, seconds)
    producers: list[Producer] = []
    try:
        bus.start()
        producers = [Producer(bus.acked, source, directory, rate=rate) for source, rate in RATES.items()]
        wait_until(lambda: all(each.acked for each in producers), "the first acknowledgements")
        nemesis.run(steps, seconds)
        nemesis.end()
        nemesis.keep_alive()
        bus.wait_for(lambda stats: True, "to answer when all is over")
        finish(producers + nemesis.floods)
        checker = Checker(bus.data_dir, [each.ledger for each in producers + nemesis.floods], TRIGGERS)
        wait_until(lambda: checker.read_on() == 0 and not checker.underived(), "every derived event", 120.0)
        stats = bus.wait_for(lambda stats: not stats["bus"]["unexplained"], "to close its books")
        verdict = checker.verdict(stats)
        assert not verdict.wrong, verdict
        assert bus.stop() == 0, bus.output()
    finally:
        for each in producers:
            each.kill()
        nemesis.close()
    for key, value in {**verdict.figures(), "restarts": nemesis.restarts, "faults": len(steps)}.items():
        totals[key] = totals.get(key, 0) + value
    for kind, count in nemesis.done.items():
        totals["done"][kind] = totals["done"].get(kind, 0) + count
    totals["impossible"].update(nemesis.impossible)


@pytest.mark.timeout(14400)
def test_any_mix_of_faults_leaves_nothing_unexplained(make_bus, tmp_path, size, seed, figures):
    runs, seconds = size((1, 8.0), (10, 30.0), (100, 60.0))
    totals = {"done": {}, "impossible": {}}
    for number in range(runs):
        bus = make_bus(["schema", "store", *DERIVED], "[plugins.store]\nmax_dead = 100000")
        try:
            run(bus, tmp_path / str(number), seed + number, seconds, totals)
        except BaseException:
            print(f"this run again: --seed {seed + number}")
            raise
    figures.update(runs=runs, seconds_each=seconds, **totals)

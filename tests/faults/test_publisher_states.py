"""publish() in eight states of the bus: what a call costs, that none raises, and that the books close."""

from __future__ import annotations

import contextlib
import time

import pytest
from bus_states import STATES, Child, entering

from tapebus import Publisher, Tape

#: Multiples of the targets (2, 10 and 100 µs) that even a machine with other work must keep; the figures say more.
GENEROUS = {"p50": 10 * 2, "p99": 20 * 10, "p99.9": 50 * 100}


def assert_closed(found, calls, odd):
    stats = found["stats"]
    dropped = stats["dropped"]
    assert found["wrong"] == 0
    assert stats["published"] == calls + 1
    assert dropped.get("client.encode", 0) == odd
    assert found["kept"] == calls + 1 - sum(dropped.values())
    assert found["kept"] == stats["acked"] + stats["in_flight"]
    assert set(dropped) <= {"client.encode", "client.ring_full", "client.spool_full"}


@pytest.mark.parametrize("state", STATES)
def test_no_state_of_the_bus_is_felt_by_the_one_who_publishes(state, make_bus, tmp_path, size, figures):
    calls, odd = size(5_000, 200_000, 1_000_000), size(1000, 1000, 10_000)
    kept = {}
    with entering(state, make_bus) as bus, contextlib.ExitStack() as held:
        children = {
            source: held.enter_context(Child(bus, calls, odd, spool))
            for source, spool in (("plain", ""), ("spooling", str(tmp_path / "spool")))
        }
        for child in children.values():
            child.hear()
        bus.fault()
        for source, child in children.items():
            child.say("go")
            found = child.hear()
            assert_closed(found, calls, odd)
            kept[source] = found["kept"]
            figures[source] = {**found["us"], "odd": found["odd_us"], "dropped": found["stats"]["dropped"]}
            if calls >= 200_000:
                assert all(found["us"][key] <= bound for key, bound in GENEROUS.items()), found["us"]
        if bus.mend is not None:
            bus.mend()
            for source, child in children.items():
                child.say("flush")
                after = child.hear()
                assert after["flushed"] and after["stats"]["acked"] == kept[source]
        for child in children.values():
            child.say("exit")
            child.hear()
            assert child.process.wait(30) == 0
        if hasattr(bus.bus, "data_dir"):
            for source, found in stored(bus.bus).items():
                assert len(found) == kept[source] and found == sorted(set(found))
            assert bus.bus.stats()["bus"]["unexplained"] == 0


def stored(bus):
    """The numbers on the tape by source, in their order there."""
    found = {"plain": [], "spooling": []}
    with Tape.open(bus.data_dir) as tape:
        for event in tape.read(topics=["signal_generated"]):
            found[event.source].append(int(event.data.signal_id.rpartition("_")[2]))
    return found


def test_a_bus_that_stands_still_gets_each_event_once_and_each_producer_once(make_bus, size, figures):
    still_s = size(3, 60, 60)
    with entering("stopped", make_bus) as state, Publisher("elite_guard", state.endpoint) as pub:
        assert pub.publish("market_data", _quote(0)) and pub.flush(30)
        state.fault()
        began, n = time.monotonic(), 0
        while time.monotonic() < began + still_s:
            n += 1
            assert pub.publish("market_data", _quote(n))
            time.sleep(0.005)
        figures.update(still_s=still_s, events=n)
        state.mend()
        assert pub.flush(60)
        with Tape.open(state.bus.data_dir) as tape:
            assert [event.data.volume for event in tape.read(topics=["market_data"])] == list(range(n + 1))
        (book,) = [each for each in state.bus.stats()["producers"] if each["source"] == "elite_guard"]
        assert (book["stored"], book["in_flight"], book["unexplained"]) == (n + 1, 0, 0)


def _quote(n):
    return {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2, "volume": float(n)}

"""The fence around a consumer: what fails is buried, everything else is handled exactly once."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapebus import fence as fence_module
from tapebus.consumer import Consumer, FaultPolicy
from tapebus.events import GenericEvent
from tapebus.fence import Fence, PluginContext


def event(seq: int) -> GenericEvent:
    return GenericEvent(bus_seq=seq, timestamp=float(seq), source="t", event_type="a", data={})


class Bench:
    """A fence whose handler fails on the sequence numbers in `bad`."""

    def __init__(self, bad=(), error=ValueError, emit=False, **options):
        self.bad, self.error, self.emit = set(bad), error, emit
        self.seen, self.units, self.dead = [], [], []
        self.context = PluginContext("p", {}, Path("."), {}, lambda: 7.0)
        consumer = Consumer(name="c", topics=("*",), handler=self.handle, **options)
        self.fence = Fence(consumer, "p", self.context, 0, [], self.send)

    def send(self, unit, frame):
        self.units.append((unit, frame))
        self.dead += unit.dead

    def handle(self, batch):
        for each in batch:
            if each.bus_seq in self.bad:
                raise self.error(f"no {each.bus_seq}")
            self.seen.append(each.bus_seq)
            if self.emit:
                self.context.emit("derived", {"n": each.bus_seq}, cause=each)
                self.context.state["last"] = b"%d" % each.bus_seq


@given(st.integers(1, 40), st.sets(st.integers(1, 40)), st.sampled_from([ValueError, SystemExit, KeyboardInterrupt]))
def test_every_event_is_handled_once_except_those_that_fail_which_are_buried(count, bad, error):
    bench = Bench(bad, error)
    bench.fence.offer([event(i) for i in range(1, count + 1)], count)
    assert bench.seen == [i for i in range(1, count + 1) if i not in bad]
    assert [letter.bus_seq for letter in bench.dead] == sorted(i for i in bad if i <= count)
    assert all(letter.place == "plugin.p" and letter.reason == "error" for letter in bench.dead)
    assert (bench.fence.cursor, bench.fence.handled, bench.fence.errors) == (count, len(bench.seen), len(bench.dead))


def test_the_breaker_opens_waits_tries_one_event_and_closes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(fence_module.time, "monotonic", lambda: now[0])
    bench = Bench({1, 2, 3, 4}, faults=FaultPolicy(error_ratio=0.5, window=4, retry_s=1.0, retry_max_s=4.0))
    events = [event(i) for i in range(1, 8)]
    bench.fence.offer(events, 7)
    assert (bench.fence.state, bench.fence.cursor, bench.fence.ready) == ("open", 3, False)
    now[0] += 1.0
    assert bench.fence.ready and bench.fence.state == "half-open"
    bench.fence.offer(events, 7)
    assert (bench.fence.state, bench.fence.cursor) == ("open", 4)
    now[0] += 1.9
    assert not bench.fence.ready, "the second pause is twice as long"
    now[0] += 0.1
    assert bench.fence.ready
    bench.fence.offer(events, 7)
    assert (bench.fence.state, bench.fence.cursor, bench.seen) == ("running", 7, [5, 6, 7])


def test_a_breaker_opened_by_an_urgent_event_skips_nothing_that_waits():
    bench = Bench({9}, lanes=True, faults=FaultPolicy(error_ratio=0.0, window=4))
    bench.fence.offer_ahead([event(8), event(9), event(10)])
    assert (bench.fence.state, bench.fence.cursor) == ("open", 0)
    bench.fence.resume()
    bench.fence.offer([event(i) for i in range(1, 12)], 11)
    assert bench.seen == [8, 1, 2, 3, 4, 5, 6, 7, 10, 11]
    assert [letter.bus_seq for letter in bench.dead] == [9]


def test_a_unit_holds_what_was_emitted_the_state_and_the_cursor_they_belong_to():
    bench = Bench({2}, emit=True)
    bench.fence.offer([event(1), event(2), event(3)], 5)
    [(unit, frame)] = bench.units
    assert (unit.consumer, unit.cursor, unit.namespace, unit.state) == ("c", 5, "p", {"last": b"3"})
    assert frame[:5] == b"\xdd\0\0\0\2" and b"bus:1" in frame and b"bus:3" in frame
    bench.fence.offer([], 6)
    assert len(bench.units) == 1, "a cursor alone is not written at once"
    bench.fence.close_unit(force=True)
    assert bench.units[1][0].cursor == 6 and bench.units[1][1] == b""


@pytest.mark.parametrize("error", [None, SystemExit])
def test_save_is_called_before_a_unit_is_closed_and_its_failure_keeps_the_unit_open_and_opens_the_breaker(error):
    bench = Bench(emit=True)
    failing = [error]

    def save():
        if failing[0]:
            raise failing[0]("no")
        bench.context.state["saved"] = b"1"

    bench.fence.consumer.save = save
    bench.fence.offer([event(1)], 1)
    assert bench.fence.state == ("running" if error is None else "open")
    failing[0] = None
    bench.fence.resume()
    bench.fence.offer([event(2)], 2)
    assert [unit.cursor for unit, _ in bench.units] == ([1, 2] if error is None else [2])
    assert bench.units[-1][0].state == {"last": b"2", "saved": b"1"}
    assert sum(frame.count(b"derived") for _, frame in bench.units) == 2


class Suspicious(Bench):
    """Fails before its first event, after its last one, or at what it looked up by its place."""

    def __init__(self, when, **options):
        super().__init__(**options)
        self.when = when

    def handle(self, batch):
        if self.when == "before":
            raise ConnectionError("no database")
        if self.when == "index":
            self.seen.append(batch[0].bus_seq)
            batch[1]
            raise ValueError("the second")
        self.seen += [each.bus_seq for each in batch]
        if self.when == "after":
            raise ConnectionError("no flush")


def test_a_handler_that_fails_before_its_first_event_buries_none_and_opens_the_breaker():
    bench = Suspicious("before")
    bench.fence.offer([event(i) for i in range(1, 4)], 3)
    assert (bench.fence.state, bench.fence.cursor, bench.dead) == ("open", 0, [])
    assert "before it looked at an event: ConnectionError: no database" in bench.fence.breaker.reason
    bench.when = "never"
    bench.fence.resume()
    bench.fence.offer([event(i) for i in range(1, 4)], 3)
    assert (bench.seen, bench.fence.cursor) == ([1, 2, 3], 3)


def test_a_handler_that_fails_after_its_last_event_buries_the_whole_batch():
    bench = Suspicious("after")
    bench.fence.offer([event(i) for i in range(1, 4)], 3)
    assert [letter.bus_seq for letter in bench.dead] == [1, 2, 3]
    assert (bench.fence.state, bench.fence.cursor, bench.fence.handled, bench.fence.errors) == ("running", 3, 0, 3)


def test_a_handler_that_looks_events_up_is_charged_with_the_last_one_it_looked_at():
    bench = Suspicious("index")
    bench.fence.offer([event(1), event(2)], 2)
    assert [letter.bus_seq for letter in bench.dead] == [2]
    assert (bench.fence.handled, bench.fence.cursor) == (1, 2)


def test_a_handler_that_empties_its_batch_gets_each_event_once():
    bench = Bench()
    bench.fence.consumer.handler = lambda batch: bench.seen.extend(batch.events.pop(0) for _ in range(len(batch)))
    bench.fence.offer([event(1), event(2)], 2)
    assert ([each.bus_seq for each in bench.seen], bench.fence.handled, bench.fence.cursor) == ([1, 2], 2, 2)


def test_dead_letters_commit_with_the_cursor_that_passed_their_events():
    bench = Bench({2}, emit=True)
    bench.fence.offer([event(1), event(2), event(3)], 3)
    [(unit, _)] = bench.units
    assert (unit.cursor, [letter.bus_seq for letter in unit.dead]) == (3, [2])
    assert unit.dead[0].consumer == "c"


def test_a_letter_is_settled_with_the_effects_of_its_event_and_replaced_when_it_fails_again():
    bench = Bench({1, 2}, emit=True)
    bench.fence.offer([event(1), event(2), event(3)], 3)
    first, second = (msgspec.structs.replace(letter, id=n) for n, letter in enumerate(bench.dead, 7))
    bench.bad = {2}
    bench.units.clear()
    bench.fence.redeliver([first, second])
    bench.fence.redeliver([first])
    assert bench.fence.asked_again
    bench.fence.settle(lambda seq: event(seq))
    (mended, frame), (failed, nothing) = bench.units
    assert (mended.settled, mended.dead, mended.cursor, b"bus:1" in frame) == ([7], [], 3, True)
    assert (failed.settled, [letter.bus_seq for letter in failed.dead], nothing) == ([8], [2], b"")
    assert not bench.fence.asked_again
    bench.fence.redeliver([second])
    bench.fence.settle(lambda seq: None)
    assert "no longer on the tape" in bench.units[-1][0].dead[0].detail

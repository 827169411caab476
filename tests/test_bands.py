"""Passing over events that change nothing, against the same in plain Python."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tapebus.bands import Band, Bands
from tapebus.events import EventType, GenericEvent, Registry

INF = math.inf


class Tick(msgspec.Struct, frozen=True, gc=False):
    name: str
    low: float
    high: float
    size: float = 0.0


class Word(msgspec.Struct, frozen=True, gc=False):
    text: str


CLASSES = Registry([EventType("tick", Tick), EventType("word", Word)]).classes
NUMBERS = st.sampled_from([-INF, -1.0, 0.0, 1.0, 2.0, 3.0, INF, math.nan])
TICKS = st.builds(
    lambda name, low, high, time: CLASSES["tick"](timestamp=time, source="", data=Tick(name, low, high)),
    st.sampled_from(["a", "b", "nobody"]),
    NUMBERS,
    NUMBERS,
    st.floats(0, 10),
)
OTHERS = st.sampled_from(
    [
        CLASSES["word"](timestamp=0.0, source="", data=Word("x")),
        GenericEvent(event_type="tick", timestamp=0.0, source="", data={"name": "a", "low": 1.0, "high": 2.0}),
    ]
)
BOUNDS = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS)


def band(bounds: tuple[float, ...]) -> Band:
    made = Band()
    made.low_first, made.high_first, made.low_second, made.high_second = bounds
    return made


@given(st.lists(st.one_of(TICKS, TICKS, TICKS, OTHERS)), BOUNDS, BOUNDS, st.one_of(st.just(INF), st.floats(0, 10)))
def test_what_is_passed_over_and_what_is_kept_of_it_are_as_said(events, a, b, until):
    bands = {"a": band(a), "b": band(b)}
    quiet = Bands(bands, "name", "low", "high")
    assert quiet.learn(CLASSES["tick"](timestamp=0.0, source="", data=Tick("", 0.0, 0.0)))
    quiet.until = until
    stopped, kept = [], {"a": (0, 0.0, None), "b": (0, 0.0, None)}
    expected: list[Any] = []
    for event in events:
        if type(event) is not CLASSES["tick"] or not event.timestamp < until:
            expected.append(event)
        elif event.data.name in kept:
            low1, high1, low2, high2 = a if event.data.name == "a" else b
            first, second = event.data.low, event.data.high
            if low1 <= first <= high1 and low2 <= second <= high2 and not first > second:
                kept[event.data.name] = (kept[event.data.name][0] + 1, event.timestamp, event.data)
            else:
                expected.append(event)
    rest = iter(events)
    while (event := quiet.skip(rest)) is not None:
        stopped.append(event)
    assert [id(each) for each in stopped] == [id(each) for each in expected]
    assert {name: (each.seen, each.time, each.last) for name, each in bands.items()} == kept


@given(BOUNDS, st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9))))
def test_a_band_that_takes_numbers_is_wide_enough_for_all_of_them_and_no_wider(bounds, numbers):
    made = band(bounds)
    for n, (first, second) in enumerate(numbers):
        made.take(first, second, float(n), n)
    expected = list(bounds)
    for first, second in numbers:
        # a bound that is no number stays what it is
        expected = [
            first if first < expected[0] else expected[0],
            first if first > expected[1] else expected[1],
            second if second < expected[2] else expected[2],
            second if second > expected[3] else expected[3],
        ]
    found = (made.low_first, made.high_first, made.low_second, made.high_second)
    assert repr(found) == repr(tuple(expected)) and made.seen == len(numbers)
    assert not numbers or (made.time, made.last) == (len(numbers) - 1.0, len(numbers) - 1)


def test_nothing_is_passed_over_before_an_example_and_none_is_learned_of_a_payload_without_the_fields():
    tick = CLASSES["tick"](timestamp=0.0, source="", data=Tick("a", 1.0, 2.0))
    quiet = Bands({"a": Band()}, "name", "low", "top")
    assert not quiet.learn(tick) and quiet.event is None
    assert not quiet.learn(GenericEvent(event_type="tick", timestamp=0.0, source="", data={}))
    assert quiet.skip(iter([tick])) is tick


def test_a_key_or_number_of_another_kind_is_left_to_the_handler():
    quiet = Bands({"a": Band()}, "name", "low", "high")
    made = CLASSES["tick"]
    assert quiet.learn(made(timestamp=0.0, source="", data=Tick("a", 1.0, 2.0)))
    for data in (Tick("a", 1, 2), Tick("a", None, 2.0), {"name": "a"}):  # type: ignore[arg-type]
        odd = made(timestamp=0.0, source="", data=data)
        assert quiet.skip(iter([odd])) is odd
    late = made(timestamp=1, source="", data=Tick("a", 1.0, 2.0))
    assert quiet.skip(iter([late])) is late

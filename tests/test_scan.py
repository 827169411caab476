"""The scan of frames against the strict decoders of msgspec and the standard library."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tapebus._scan import (
    ALIASED_FLAG,
    EXTENSION_FLAG,
    JSON_FLAG,
    NONFINITE_FLAG,
    NOT_UTF8_FLAG,
    UNTIMED_FLAG,
    WIDE_FLAG,
    scan,
)
from tapebus._topics import Topics
from tapebus.blocks import corr_hash

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
EVENTS = st.fixed_dictionaries(
    {
        "event_type": st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).filter(
            lambda name: 1 <= len(name.encode()) <= 100
        ),
        "timestamp": st.floats(0, 1e11),
        "data": st.dictionaries(TEXT, VALUES, max_size=4),
    },
    optional={"correlation_id": TEXT, "priority": st.sampled_from(["low", "normal", "high", "critical"])},
)
LEVELS = {"low": 0, "normal": 1, "high": 2, "critical": 3}


def encode_json(value) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(" , ", " : ")).encode()


def encode_escaped(value) -> bytes:
    return b"\n" + json.dumps(value, indent=1).encode() + b"\r\n"


ENCODERS = {msgspec.msgpack.encode: msgspec.msgpack.decode, encode_json: json.loads, encode_escaped: json.loads}


@given(st.lists(EVENTS, min_size=1, max_size=5), st.sampled_from(list(ENCODERS)))
def test_every_event_is_found_with_its_bytes_type_time_priority_and_correlation(events, encode):
    frame = encode(events)
    items = scan(Topics(), frame)
    assert isinstance(items, list) and len(items) == len(events)
    for item, event in zip(items, events, strict=True):
        assert ENCODERS[encode](frame[item["offset"] : item["offset"] + item["size"]]) == event
        assert (item["topic"], item["time"]) == (event["event_type"], event["timestamp"])
        assert item["priority"] == LEVELS[event.get("priority", "normal")]
        correlation = event.get("correlation_id")
        assert item["corr"] == (corr_hash(correlation) if correlation else 0)
        # a key that needs unescaping might be an alias
        assert item["flags"] & ~ALIASED_FLAG == (0 if encode is msgspec.msgpack.encode else JSON_FLAG)


def decoded(frame: bytes):
    try:
        return msgspec.msgpack.decode(frame) if frame[:1] >= b"\x80" else msgspec.json.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, OverflowError, RecursionError):
        return None


@given(
    EVENTS, st.booleans(), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3), st.integers(0, 9)
)
@example({"event_type": "a", "timestamp": 1.0, "data": {}}, True, [], 0)
def test_a_damaged_frame_never_breaks_the_scan_and_a_good_one_is_never_refused(event, packed, changes, cut):
    frame = bytearray((msgspec.msgpack.encode if packed else msgspec.json.encode)([event, event]))
    for place, value in changes:
        frame[place % len(frame)] = value
    frame = bytes(frame[: len(frame) - cut])
    found = scan(Topics(), frame)
    good = decoded(frame)
    if isinstance(found, list):
        # the pieces lie inside the frame, in order, without overlapping
        ends = [0] + [item["offset"] + item["size"] for item in found]
        assert all(item["offset"] >= end for item, end in zip(found, ends, strict=False)) and ends[-1] <= len(frame)
    elif isinstance(good, list) and good and all(isinstance(each, dict) for each in good):
        # keys that need unescaping are not recognised, keys other than strings are refused on purpose
        names = [each.get("event_type") for each in good]
        keys = [key for each in good for level in (each, each.get("data")) if isinstance(level, dict) for key in level]
        assert (
            b"\\" in frame
            or not all(isinstance(name, str) and 1 <= len(name.encode()) <= 100 for name in names)
            or any(ord(letter) < 32 or letter == "\x7f" for name in names for letter in name)
            or (not all(isinstance(key, str) for key in keys))
        ), found


@given(st.binary(max_size=200), st.sampled_from([b"", b"{", b"[{", b"\x81", b"\xdd\0\0\0\1\x82\xaaevent_type"]))
def test_arbitrary_bytes_give_a_reason_or_events(noise, start):
    assert isinstance(scan(Topics(), start + noise), (str, list))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("encode", [msgspec.msgpack.encode, encode_json])
def test_numbers_that_are_not_finite_are_marked(encode, number):
    [item] = scan(Topics(), encode({"event_type": "a", "timestamp": 1.0, "data": {"deep": [number]}}))
    assert item["flags"] & NONFINITE_FLAG
    [item] = scan(Topics(), encode({"event_type": "a", "timestamp": number, "data": {}}))
    assert item["flags"] & NONFINITE_FLAG and item["flags"] & UNTIMED_FLAG


def test_extensions_other_than_timestamps_are_marked():
    frame = msgspec.msgpack.encode({"event_type": "a", "timestamp": 1.0, "data": {"x": msgspec.msgpack.Ext(5, b"ab")}})
    assert scan(Topics(), frame)[0]["flags"] & EXTENSION_FLAG


@pytest.mark.parametrize("encode", [msgspec.msgpack.encode, encode_json])
def test_only_a_payload_that_spells_a_field_otherwise_is_marked_whatever_the_number_of_aliases(encode):
    topics = Topics()
    aliases = {topic: [f"{topic}_{i}" for i in range(900)] for topic in ("a", "b", "c")}
    for topic, names in aliases.items():
        topics.register(topic, names)
    for topic, names in aliases.items():
        for key in (names[0], names[-1], "px", "a_0"):
            [item] = scan(topics, encode({"event_type": topic, "timestamp": 1.0, "data": {key: 1}}))
            assert bool(item["flags"] & ALIASED_FLAG) == (key in names), key


def test_depth_and_number_of_events_are_limited():
    event = {"event_type": "a", "timestamp": 1.0, "data": {}}
    deep = json.dumps({**event, "data": json.loads("[" * 60 + "]" * 60)}).encode()
    assert "deeper" in scan(Topics(), deep)
    assert "deeper" in scan(Topics(), msgspec.msgpack.encode(json.loads(deep)))
    assert len(scan(Topics(), encode_json([event] * 4), 4)) == 4
    assert "more events" in scan(Topics(), encode_json([event] * 5), 4)
    assert "event_type" in scan(Topics(), encode_json({**event, "event_type": "x" * 101}))


def test_the_table_of_types_continues_the_numbering_of_the_tape():
    topics = Topics()
    topics.load({1: "a", 2: "b"})
    assert (topics.add("b"), topics.add("c"), topics.after(1), len(topics)) == (2, 3, {2: "b", 3: "c"}, 3)
    with pytest.raises(ValueError, match="not empty"):
        topics.load({})
    with pytest.raises(ValueError, match="hole"):
        Topics().load({2: "b"})


@pytest.mark.parametrize("name", [b"AB\xb9DE", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82"])
def test_an_event_type_that_is_not_utf8_is_refused(name):
    frame = msgspec.msgpack.encode({"event_type": "?" * len(name), "timestamp": 1.0, "source": "t", "data": {}})
    topics = Topics()
    assert "UTF-8" in scan(topics, frame.replace(b"?" * len(name), name))
    assert len(topics) == 0


def test_a_json_event_type_with_a_lone_surrogate_is_refused():
    assert "UTF-8" in scan(Topics(), rb'{"event_type":"a\ud800","timestamp":1,"source":"t","data":{}}')


@pytest.mark.parametrize("letter", ["\0", "\n", "\x1b", "\x7f"])
@pytest.mark.parametrize("encode", [msgspec.msgpack.encode, msgspec.json.encode])
def test_an_event_type_with_a_control_character_is_refused(letter, encode):
    assert "control" in scan(Topics(), encode({"event_type": f"a{letter}b", "timestamp": 1.0, "data": {}}))


def test_escaped_keys_of_the_envelope_are_known():
    plain = rb'{"event_type":"a","timestamp":2.5,"correlation_id":"c","priority":"low","data":{"px":1}}'
    topics = Topics()
    topics.register("a", ["px"])
    [expected] = scan(topics, plain)
    escaped = plain
    for key in (b"event_type", b"timestamp", b"correlation_id", b"priority", b"data"):
        escaped = escaped.replace(b'"%b"' % key, b'"\\u%04x%b"' % (key[0], key[1:]))
    [found] = scan(topics, escaped)
    assert expected["flags"] & ALIASED_FLAG
    assert {**found, "size": 0} == {**expected, "size": 0}


@pytest.mark.parametrize("encode", ["json", "msgpack"])
def test_of_a_key_that_comes_twice_the_last_one_counts(encode):
    def frame(*pairs):
        if encode == "json":
            return b"{" + b",".join(msgspec.json.encode(key) + b":" + msgspec.json.encode(v) for key, v in pairs) + b"}"
        return bytes([0x80 | len(pairs)]) + b"".join(msgspec.msgpack.encode(part) for pair in pairs for part in pair)

    first = [("event_type", "a"), ("timestamp", 1.0), ("correlation_id", "x"), ("priority", "high"), ("data", {})]
    second = [("event_type", "b"), ("timestamp", "now"), ("correlation_id", None), ("priority", 7)]
    [item] = scan(Topics(), frame(*first, *second))
    assert (item["topic"], item["corr"], item["priority"]) == ("b", 0, 1) and item["flags"] & UNTIMED_FLAG
    [item] = scan(Topics(), frame(*second, *first))
    assert (item["topic"], item["time"], item["priority"]) == ("a", 1.0, 2) and not item["flags"] & UNTIMED_FLAG
    assert "event_type" in scan(Topics(), frame(*first, ("event_type", 5)))


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**400, 99999999999999999999])
def test_integers_that_64_bits_cannot_hold_are_marked(number):
    [item] = scan(Topics(), encode_json({"event_type": "a", "timestamp": 1.0, "data": {"deep": [number]}}))
    assert item["flags"] & WIDE_FLAG


@pytest.mark.parametrize("number", [2**64 - 1, -(2**63), 1e300, 12345678901234567890.5])
def test_numbers_that_64_bits_hold_are_not_marked(number):
    [item] = scan(Topics(), encode_json({"event_type": "a", "timestamp": 1.0, "data": {"deep": [number]}}))
    assert not item["flags"] & WIDE_FLAG


@pytest.mark.parametrize("seconds", [0, 5, 200, 60_000, 4_000_000_000, 2**40, -1, -100, -1000, -(2**31), -(2**40)])
def test_whole_seconds_of_every_width_are_times(seconds):
    for encode in (msgspec.msgpack.encode, msgspec.json.encode):
        [item] = scan(Topics(), encode({"event_type": "a", "timestamp": seconds, "data": {}}))
        assert item["time"] == seconds and not item["flags"] & UNTIMED_FLAG


@pytest.mark.parametrize("encode", [msgspec.msgpack.encode, encode_json])
@pytest.mark.parametrize("wrong", [b"\xff?", b"\xc0\x80", b"\xf5?", b"?\xe2"])
def test_text_that_is_not_utf8_is_marked_wherever_it_stands(encode, wrong):
    event = {"event_type": "a", "timestamp": 1.0, "source": "??", "x??": "??", "data": {"n??": 1, "deep": [{"??": 2}]}}
    frame = encode(event)
    places = [place for place in range(len(frame)) if frame[place : place + 2] == b"??"]
    assert len(places) == 5
    for place in places:
        [item] = scan(Topics(), frame[:place] + wrong + frame[place + 2 :])
        assert item["flags"] & NOT_UTF8_FLAG
    [item] = scan(Topics(), frame.replace(b"??", "é".encode()))
    assert not item["flags"] & NOT_UTF8_FLAG


DECIMALS = st.builds(
    lambda whole, fraction: f"{whole}.{fraction}" if fraction else str(whole),
    st.integers(0, 10**12) | st.integers(1_600_000_000, 2_000_000_000),
    st.text("0123456789", max_size=12),
)


@given(DECIMALS | st.floats(0, 1e18, allow_nan=False).map(repr) | st.integers(0, 1 << 64).map(str))
@example("1763750000.1234567")
@example("9007199254740993")
@example("9007199254.740993")
@example("9007199254740992.5")
@settings(max_examples=1000)
def test_a_time_in_json_is_the_nearest_double_as_every_decoder_reads_it(text):
    found = scan(Topics(), b'{"event_type":"a","timestamp":%b}' % text.encode())
    assert found[0]["time"] == float(text)


SPECIAL = [b'"', b"\\", b"\x1f", b"\x00", b"\x7f", b"!", b"[", b"]", "é".encode(), "😀".encode()]


@pytest.mark.parametrize("special", SPECIAL)
def test_the_end_of_a_json_string_is_found_at_every_distance(special):
    for before in range(20):
        for after in range(20):
            text = b"a" * before + special + b"b" * after
            frame = b'{"event_type":"a","note":"%b","data":{}}' % text
            try:
                expected = isinstance(json.loads(frame), dict)
            except ValueError:
                expected = False
            found = scan(Topics(), frame)
            # what comes after a backslash is for the decoder to judge, where a string ends is not
            assert isinstance(found, list) == (expected or (special == b"\\" and after > 0))
            if isinstance(found, list):
                assert (found[0]["offset"], found[0]["size"]) == (0, len(frame))

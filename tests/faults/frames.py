"""Frames of every kind of wrong, and what must become of them, judged without the code under test.

`Frames` mixes recorded and made-up frames, damages them, and writes others from a grammar with wrong productions.
`expected` decodes a frame with the standard library and msgspec and applies the rules of docs/wire-format.md.
"""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import msgspec

from tapebus_schema.examples import EXAMPLES

MAX_DEPTH = 32
# fmt: off
TOKENS = [
    b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 400, b"18446744073709551616", b"\\ud800", b"\\u0000", b"\\u0065",
    b"\\q",
    b"\xef\xbb\xbf", b"\0", b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"[" * 40, b"]" * 40, b'{"a":' * 40, b"}" * 40,
    b'"event_type":5,', b'"event_type":"x",', b'"data":[],', b'"timestamp":"soon",', b'"data":{"symbol":null},',
    b",,", b'"',
    b"\xcb\x7f\xf8\0\0\0\0\0\0", b"\xca\xff\x80\0\0", b"\xd4\x05\0", b"\xc7\x0c\xff" + bytes(12),
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\x91" * 40, b"\x81\x01" * 40, b"\xc1", b"\xcf" + b"\xff" * 8,
    b"\xaaevent_type\x05", b"\xa4data\x90", b"\xa4data\x81\x01\x02", b"\xc0", b"\x80", b"\x90", b" \r\n\t",
    b"//", b"0x10",
]
NAMES = [*EXAMPLES, "a", "x.y", "", "\0", "é" * 50, "é" * 51, "n" * 101, "nobody_registered_this"]
ODD = [
    None, True, 0, -1, 2**63, 2**64 - 1, -(2**63), 1e308, -0.0, "", "soon", "1.5", "2025-08-11T00:00:00",
    "\0", "\U0001f600",
    [], {}, [[]], {"": {}}, [1.5, "a", None], "x" * 300,
]
# fmt: on


def recorded(shared_data: Path) -> list[bytes]:
    """Frames as the programs that were recorded would send them: bare, and inside an envelope."""
    lines = []
    for file in sorted(shared_data.glob("*/*.jsonl")) + sorted(shared_data.glob("wire/*.txt")):
        lines += file.read_bytes().splitlines()[:200]
    found = [line for line in lines if line]
    for n, line in enumerate(list(found)):
        try:
            data = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        found.append(msgspec.json.encode(event(list(EXAMPLES)[n % len(EXAMPLES)], data, data.get("timestamp", 1.0))))
    return found


def event(name: Any, data: Any, timestamp: Any = 1_700_000_000.0, **more: Any) -> dict[str, Any]:
    return {"event_type": name, "timestamp": timestamp, "source": "fuzz", "data": data, **more}


def made_up() -> list[bytes]:
    """Sound frames: every registered type in both encodings, alone and in batches, and an unregistered one."""
    events = [event(name, data, correlation_id="c1", priority="high") for name, data in EXAMPLES.items()]
    events.append(event("nobody_registered_this", {"n": 1, "list": [1, {"deep": "er"}]}, user_id=None))
    out = []
    for encode in (msgspec.json.encode, msgspec.msgpack.encode):
        out += [encode(each) for each in events]
        out += [encode(events[n : n + 3]) for n in range(len(events))]
        out.append(encode(events * 4))
    out += [b"\xdd" + struct.pack(">I", 2) + msgspec.msgpack.encode(events[0]) * 2]
    out += [json.dumps(each, indent=2).encode() for each in events]
    return out


class Frames:
    """An endless mix of frames; the same `chance` gives the same ones."""

    def __init__(self, chance: random.Random, seeds: list[bytes]) -> None:
        self.chance = chance
        self.seeds = seeds

    def next(self) -> bytes:
        kind = self.chance.random()
        if kind < 0.1:
            return self.chance.choice(self.seeds)
        if kind < 0.7:
            return self._damaged(self.chance.choice(self.seeds))
        if kind < 0.95:
            return self._grammar()
        return self.chance.randbytes(self.chance.randrange(1, 40))

    def _damaged(self, frame: bytes) -> bytes:
        chance, out = self.chance, bytearray(frame)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            place = chance.randrange(len(out) + 1)
            match chance.randrange(7):
                case 0 if place < len(out):
                    out[place] ^= 1 << chance.randrange(8)
                case 1 if place < len(out):
                    out[place] = chance.choice(b'\0\x7f\x80\xff\xc1"\\{}[],:0')
                case 2:
                    del out[place : place + chance.choice((1, 1, 2, 8, 64))]
                case 3:
                    out[place:place] = chance.choice(TOKENS)
                case 4:
                    out[place:place] = out[place : place + chance.randrange(1, 64)]
                case 5:
                    del out[place:]
                case _:
                    other = chance.choice(self.seeds)
                    out[place:] = other[chance.randrange(len(other)) :]
        return bytes(out[: 64 << 10]) or b" "

    def quick(self) -> bytes:
        """A seed with a piece cut out, replaced or cut off: cheap, for runs that look for crashes only."""
        random = self.chance.random
        frame = self.seeds[int(random() * len(self.seeds))]
        first = int(random() * len(frame))
        last = first + int(random() * random() * 20)
        kind = random()
        if kind < 0.3:
            return frame[:first] + frame[last:] or b" "
        if kind < 0.4:
            return frame[: first + 1]
        if kind < 0.7:
            return frame[:first] + bytes((int(random() * 256),)) + frame[first + 1 :]
        return frame[:first] + TOKENS[int(random() * len(TOKENS))] + frame[last:]

    def _grammar(self) -> bytes:
        chance = self.chance
        events = [self._event() for _ in range(chance.choice((1, 1, 1, 2, 5)))]
        value: Any = events if len(events) > 1 or chance.random() < 0.2 else events[0]
        match chance.randrange(4):
            case 0:
                frame = msgspec.msgpack.encode(value)
            case 1:
                frame = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
            case 2:
                frame = json.dumps(value).encode()
            case _:
                frame = msgspec.json.encode(value)
        if chance.random() < 0.2:
            name = chance.choice((b"event_type", b"data", b"timestamp", b"correlation_id"))
            frame = frame.replace(name, b"\\u%04x" % name[0] + name[1:], 1)
        return frame

    def _event(self) -> dict[str, Any]:
        chance = self.chance
        name = chance.choice(NAMES)
        data: Any = dict(EXAMPLES.get(name, {"n": 1}))
        if chance.random() < 0.5:
            data[chance.choice([*data, "price", "lots", "extra"])] = chance.choice(ODD)
        if chance.random() < 0.1:
            data = chance.choice(ODD)
        if chance.random() < 0.1:
            for _ in range(chance.choice((5, 29, 30, 31, 32, 33, 60))):
                data = {"d": data}
        out = event(name, data)
        if chance.random() < 0.3:
            out[chance.choice([*out, "correlation_id", "user_id", "priority", "event_id", "extra"])] = chance.choice(
                ODD
            )
        if chance.random() < 0.1:
            del out[chance.choice(list(out))]
        return out


# -- what must become of a frame ----------------------------------------------------------------------


class Pairs(list[tuple[str, Any]]):
    """A JSON object with all its pairs, also those with the same key."""


def _lenient(frame: bytes) -> Any:
    """The frame as the most permissive reader has it; `ValueError` when there is none."""
    if frame[:1] >= b"\x80":
        return msgspec.msgpack.decode(frame)
    text = frame.decode()
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark")
    return json.loads(text, object_pairs_hook=Pairs, parse_int=lambda digits: 0)


def _depth(value: Any) -> int:
    """How deep the deepest value lies below this one."""
    if isinstance(value, Pairs):
        value = [each for _, each in value]
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=-1)
    return 0


def _is_event(value: Any) -> bool:
    pairs = value if isinstance(value, Pairs) else list(value.items()) if isinstance(value, dict) else None
    if pairs is None or not all(isinstance(key, str) for key, _ in pairs):
        return False
    last = dict(pairs)
    name, data = last.get("event_type"), last.get("data")
    if not isinstance(name, str) or any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return False
    try:
        if not 1 <= len(name.encode()) <= 100:
            return False
    except UnicodeEncodeError:
        return False
    if isinstance(data, dict) and not all(isinstance(key, str) for key in data):
        return False
    return _depth(value) <= MAX_DEPTH


def expected(frame: bytes) -> int | None:
    """How many events a sound frame holds; 0 for one that must not be taken, None where both is right.

    Both is right for what only looks like an event: it is refused at once, or stored and then a dead letter.
    """
    try:
        found = _lenient(frame)
    except (ValueError, TypeError, RecursionError):
        return None
    events = found if isinstance(found, list) and not isinstance(found, Pairs) else [found]
    if not events or not all(map(_is_event, events)):
        # a map that names a key twice shows a decoder the last one only
        return None if frame[:1] >= b"\x80" and _repeats(frame) else 0
    if frame[:1] >= b"\x80" and _repeats(frame):
        return None
    return len(events)


def _repeats(frame: bytes) -> bool:
    return any(frame.count(key) > 1 for key in (b"event_type", b"data")) or frame.count(b"\x81\x01") > 1


def strict(raw: bytes, json_encoded: bool) -> Any:
    """One event as a strict decoder has it, or None."""
    try:
        return msgspec.json.decode(raw) if json_encoded else msgspec.msgpack.decode(raw)
    except (ValueError, TypeError, RecursionError):
        return None


def speakable(value: Any) -> bool:
    """Whether every reader can have this value: finite, within 64 bits, no extension."""
    if isinstance(value, dict):
        return all(map(speakable, value.values()))
    if isinstance(value, list):
        return all(map(speakable, value))
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    return not isinstance(value, msgspec.msgpack.Ext)

"""Decode blocks into typed events: whole runs at once, one by one only where something is odd."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from tapebus._decode import SINGLE_RUN, InOrder, gather, run_checks, stamp, stamp_at
from tapebus._scan import EXTENSION_FLAG, JSON_FLAG, NONFINITE_FLAG, WIDE_FLAG
from tapebus._topics import Topics
from tapebus.blocks import BlockView
from tapebus.events import ENVELOPE_KEYS, Event, EventType, GenericEvent, Registry
from tapebus.store import Block

#: Events a reader decodes at first; four times as many with each further piece of a block.
FIRST_SLICE = 64
_ENVELOPE_DEFAULTS = {"timestamp": 0.0, "source": ""}


class Fault(NamedTuple):
    """One event that did not pass: its index in the slice, a short reason, and the message."""

    index: int  # type: ignore[assignment]
    reason: str
    detail: str
    event: Event | None


class Codec:
    """Decoders for the types of one registry. One instance per thread; not fork-sensitive.

    With `reject_unknown` an event of a type nobody registered is a fault.
    """

    def __init__(self, registry: Registry, topics: Topics | None = None, reject_unknown: bool = False) -> None:
        self.registry = registry
        union: Any = registry.union()
        self._pack_list = msgspec.msgpack.Decoder(list[union])
        self._json_list = msgspec.json.Decoder(list[union])
        self._pack_any = msgspec.msgpack.Decoder()
        self._json_any = msgspec.json.Decoder()
        self._checks: list[Any] = []
        self._known = -1
        self.topics = topics if topics is not None else Topics()
        self._reject_unknown = reject_unknown

    def copy(self) -> Codec:
        """The same for another thread."""
        return Codec(self.registry, self.topics, self._reject_unknown)

    def register_topics(self) -> None:
        """Give every registered type a topic number and its aliases; done once, by the owner of the table."""
        for name, event_type in self.registry.types.items():
            self.topics.register(name, event_type.aliases)

    def _checks_by_topic(self) -> list[Any]:
        if self._known != len(self.topics):
            self._known = len(self.topics)
            names = self.topics.after(0)
            self._checks = [None, *(self._check(name) for name in names.values())]
        return self._checks

    def _check(self, name: str) -> Any:
        """The rule of an event type, None for a type without one."""
        found = self.registry.types.get(name)
        if found is None or found.check is None or found.in_order is None:
            return found.check if found is not None else None
        return InOrder(found.check, self.registry.classes[name], found.payload, *found.in_order)

    # -- live ------------------------------------------------------------------------------------

    def decode(self, view: BlockView, start: int = 0, stop: int = 0xFFFFFFFF) -> tuple[list[Event | None], list[Fault]]:
        """The events `start` to `stop` of `view` with None where one failed, and what failed.

        A fault of an event whose type has the policy ``pass`` keeps the event where it could be typed.
        """
        faults: list[Fault] = []
        return self._live(view, start, stop, start, faults), faults

    def _live(self, view: BlockView, start: int, stop: int, origin: int, faults: list[Fault]) -> list[Event | None]:
        """The events `start` to `stop`; faults are numbered from `origin`."""
        events: list[Event | None] = []
        for kind, first, count, buffer in gather(self.topics, view, start, stop):
            found: list[Any]
            if kind == SINGLE_RUN:
                found = [self._single(view, first, buffer, faults, first - origin)]
            else:
                try:
                    found = (self._json_list if kind else self._pack_list).decode(buffer)
                except Exception:
                    found = self._misfits(view, first, count, origin, faults)
                else:
                    stamp(found, view, first)
                    for i, reason in run_checks(found, view, first, self._checks_by_topic()) or ():
                        self._broken(found, i, reason, faults, first + i - origin)
            events += found
        return events

    def _misfits(self, view: BlockView, first: int, count: int, origin: int, faults: list[Fault]) -> list[Event | None]:
        """The events of a run that does not decode as a whole: halved until those are alone that do not fit."""
        if count == 1:
            return [self._single(view, first, view.raw(view.first_seq + first), faults, first - origin)]
        half, stop = first + count // 2, first + count
        return self._live(view, first, half, origin, faults) + self._live(view, half, stop, origin, faults)

    def _broken(self, found: list[Any], i: int, reason: str, faults: list[Fault], index: int) -> None:
        event = found[i]
        faults.append(Fault(index, "schema", reason, event))
        if self.registry.types[event.event_type].policy != "pass":
            found[i] = None

    def _single(self, view: BlockView, i: int, raw: bytes, faults: list[Fault], index: int) -> Event | None:
        """One event the slow way: unregistered, spelled otherwise, or broken."""
        seq = view.first_seq + i
        flags = view.flags(seq)
        try:
            if flags & NONFINITE_FLAG:
                raise _Refused("nonfinite", "holds NaN or an infinity")
            if flags & EXTENSION_FLAG:
                raise _Refused("extension", "holds a MessagePack extension type")
            if flags & WIDE_FLAG:
                raise _Refused("wide", "holds an integer that 64 bits cannot")
            event = self.from_dict((self._json_any if flags & JSON_FLAG else self._pack_any).decode(raw))
        except _Refused as refused:
            faults.append(Fault(index, refused.reason, str(refused), None))
            return None
        except (Exception, SystemExit) as error:
            faults.append(Fault(index, "schema", f"{type(error).__name__}: {error}"[:500], None))
            return None
        if self._reject_unknown and isinstance(event, GenericEvent):
            faults.append(Fault(index, "unknown_type", f"nobody registered {event.event_type!r}"[:500], None))
            return None
        stamp([event], view, i)
        event_type = self.registry.types.get(event.event_type)  # type: ignore[attr-defined]
        if event_type is not None and event_type.check is not None:
            checks = self._checks_by_topic() if view.topic(seq) else [event_type.check]
            reason = run_checks([event], view, i, checks)
            if reason:
                faults.append(Fault(index, "schema", reason[0][1], event))
                return event if event_type.policy == "pass" else None
        return event

    def from_dict(self, wire: dict[str, Any]) -> Event:
        """A typed event from one decoded envelope: aliases renamed, then legacy values prepared.

        Raises `msgspec.ValidationError` when it does not fit its type; an unregistered type
        becomes a `GenericEvent`.
        """
        event_type = self.registry.types.get(wire["event_type"])
        wire.pop("@bus_seq", None)
        wire.pop("@origin", None)
        if event_type is None:
            return msgspec.convert(wire, GenericEvent)
        data = wire.get("data")
        if isinstance(data, dict):
            wire["data"] = canonical(event_type, data)
        cls = self.registry.classes[event_type.name]
        try:
            return msgspec.convert(wire, cls)
        except msgspec.ValidationError:
            if event_type.prepare is None or not isinstance(data, dict):
                raise
            wire["data"] = canonical(event_type, event_type.prepare(dict(data)))
            wire["timestamp"] = _seconds(wire.get("timestamp"))
            return msgspec.convert(wire, cls)

    # -- readers ---------------------------------------------------------------------------------

    def decode_block(
        self, block: Block, topics: dict[int, str], after: int = 0, wanted: set[int] | None = None
    ) -> list[Event]:
        """Every event of `block` above `after` (of the topic numbers `wanted`), typed where possible."""
        return list(self.events(block, topics, after, block.last_seq, wanted))

    def events(
        self,
        block: Block,
        topics: dict[int, str],
        after: int,
        until: int,
        wanted: set[int] | None = None,
        among: list[int] | None = None,
        reverse: bool = False,
    ) -> Iterator[Event]:
        """The events of `block` with ``after < bus_seq <= until``, newest first if `reverse`; decoded as taken.

        Only those of the topic numbers `wanted`, and only at the offsets `among`, where these are given. What does not
        fit its type comes back as a `GenericEvent` with the payload as it is.
        """
        self._know(topics)
        view = BlockView(block.payload, block.first_seq)
        start, stop = max(0, after + 1 - block.first_seq), min(block.count, max(0, until + 1 - block.first_seq))
        everything = wanted is None and among is None
        places = range(start, stop) if everything else view.places(start, stop, wanted, among)
        for first, last in _slices(len(places), reverse):
            found = self._typed(view, places[first:last])
            yield from reversed(found) if reverse else found

    def _know(self, topics: dict[int, str]) -> None:
        """Take over the numbers that the tape has given to event types."""
        if len(self.topics) < len(topics):
            self.topics = Topics()
            self.topics.load(topics)
            for name in topics.values():
                if name in self.registry.types:
                    self.topics.register(name, self.registry.types[name].aliases)
            self._known = -1

    def _typed(self, view: BlockView, places: range | list[int]) -> list[Event]:
        """The events at `places` of `view`."""
        if isinstance(places, range):
            found, _ = self.decode(view, places.start, places.stop)
            return [
                event if event is not None else self._generic(view, i) for i, event in zip(places, found, strict=True)
            ]
        part = view.take(places)
        found, _ = self.decode(part)
        events = [event if event is not None else self._generic(part, i) for i, event in enumerate(found)]
        # so that an event keeps alive what was taken with it, and not its whole block
        part.spread(view, places)
        stamp_at(events, part, places)
        return events

    def _generic(self, view: BlockView, i: int) -> Event:
        seq = view.first_seq + i
        raw = view.raw(seq)
        try:
            # the standard library reads the NaN that strict decoders refuse
            wire = json.loads(raw) if view.flags(seq) & JSON_FLAG else self._pack_any.decode(raw)
            wire = {**_ENVELOPE_DEFAULTS, **{k: v for k, v in wire.items() if k in ENVELOPE_KEYS}}
            if not isinstance(wire.get("data"), dict):
                wire["data"] = {"value": wire.get("data")}
            wire["timestamp"] = _seconds(wire["timestamp"])
            event: Event = msgspec.convert(wire, GenericEvent, strict=False)
        except Exception:
            name = self.topics.name(view.topic(seq))
            event = GenericEvent(event_type=name, timestamp=0.0, source="", data={})
        stamp([event], view, i)
        return event


def _slices(count: int, reverse: bool) -> Iterator[tuple[int, int]]:
    """Growing pieces of `count` things, from the end if `reverse`: who takes few pays for few."""
    done, size = 0, FIRST_SLICE
    while done < count:
        size = min(size, count - done)
        yield (count - done - size, count - done) if reverse else (done, done + size)
        done, size = done + size, size * 4


class _Refused(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def canonical(event_type: EventType, data: dict[str, Any]) -> dict[str, Any]:
    """`data` with every alias renamed; a canonical field that is present and not None wins."""
    aliases = event_type.aliases
    out = {key: value for key, value in data.items() if key not in aliases}
    for key, value in data.items():
        name = aliases.get(key)
        if name is not None and out.get(name) is None:
            out[name] = value
    return out


def _seconds(value: Any) -> float:
    """Unix seconds from what legacy programs write: a number, a numeric string or ISO 8601 (naive is UTC)."""
    from datetime import UTC, datetime

    if isinstance(value, (int, float)):
        return float(value)
    if value is None:
        raise ValueError("timestamp is missing")
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f"timestamp {str(value)[:40]!r} is neither Unix seconds nor ISO 8601") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

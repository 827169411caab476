"""The event envelope, the registry of event types, and what an invalid event becomes.

The core knows envelopes, not trading: payload types are registered by plugins through
``tapebus_register_event_types``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from operator import or_
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from tapebus.errors import PluginError

Policy = Literal["reject", "quarantine", "pass"]
PRIORITIES = ("low", "normal", "high", "critical")

#: Wire names of the fields the bus itself fills in; whatever a producer puts there is overwritten.
_PRIVATE = {"bus_seq": "@bus_seq", "origin": "@origin"}
ENVELOPE_KEYS = (
    "event_type",
    "timestamp",
    "source",
    "data",
    "correlation_id",
    "user_id",
    "session_id",
    "event_id",
    "causation_id",
)


class Event(Struct, frozen=True, gc=False, kw_only=True, rename=_PRIVATE):
    """One typed message, immutable after creation; safe to share between threads.

    ``timestamp`` is Unix seconds on the producer's clock (event time); ``bus_seq`` is the place
    on the tape (order), 0 until the bus has given one. ``data`` is the typed payload, or a plain
    ``dict`` for an event type nobody registered. Keep the fields you need rather than the event:
    an event keeps the bytes of its whole batch alive through ``origin``.
    """

    bus_seq: int = 0
    origin: Any = None
    timestamp: float
    source: str
    correlation_id: str | None = None
    user_id: str | None = None
    session_id: str | None = None
    event_id: str | None = None
    causation_id: str | None = None

    @property
    def raw(self) -> bytes:
        """The bytes as published (JSON or MessagePack), unknown extra fields included."""
        return b"" if self.origin is None else self.origin.raw(self.bus_seq)

    @property
    def received_at(self) -> float:
        """Unix seconds at which the bus received the event; 0.0 where unknown."""
        return 0.0 if self.origin is None else self.origin.received_at(self.bus_seq)


class GenericEvent(Event, frozen=True, gc=False, kw_only=True):
    """An event whose type nobody registered: ``data`` is a plain ``dict``."""

    event_type: str
    data: dict[str, Any]


class EventType(Struct, frozen=True):
    """One event type: its payload struct, the spellings it accepts and the rules it must obey.

    ``aliases`` maps a spelling found on the wire to the canonical field of ``payload``.
    ``check(event)`` returns a reason when a rule over several fields is broken, else ``None``;
    it runs on the dispatcher thread for each event of the type and must be fast and pure.
    ``in_order`` names two number fields of the payload; where the first is not above the second ``check`` need not be
    asked, which saves its time for events that come by the hundred thousand.
    ``prepare(data)`` may change the plain ``dict`` of a payload that did not decode as it is
    (legacy time formats, numbers as strings) before the second, last try.
    ``policy`` says what becomes of an invalid event: ``reject`` (dead letter, delivered nowhere),
    ``quarantine`` (dead letter and live feed, no consumer) or ``pass`` (delivered, and counted).
    """

    name: str
    payload: type[Struct]
    aliases: dict[str, str] = {}
    check: Callable[[Any], str | None] | None = None
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    policy: Policy = "reject"
    doc: str = ""
    in_order: tuple[str, str] | None = None


#: Why a plugin could not handle an event: its handler raised, came no further, or its process ended.
ERROR, TIMEOUT, CRASHED = PLUGIN_REASONS = ("error", "timeout", "crashed")


class DeadLetter(Struct, frozen=True, omit_defaults=True):
    """An event that could not be decoded, validated or handled.

    ``place`` is where (``schema``, ``plugin.<name>`` or ``ingest``), ``reason`` a short code and
    ``detail`` the message for people. ``raw`` is kept (at most 64 KiB) only when the event has no
    place on the tape (``bus_seq`` 0); otherwise the bytes are already there. ``id`` is given by the store.
    ``consumer`` is the one that failed, where it was a plugin's (then ``reason`` is one of `PLUGIN_REASONS`).
    """

    place: str
    reason: str
    detail: str = ""
    bus_seq: int = 0
    event_type: str = ""
    at: float = 0.0
    raw: bytes = b""
    id: int = 0
    consumer: str = ""


class Registry:
    """Every registered event type with its decoder classes; built once at start-up, then read-only."""

    def __init__(self, types: Iterable[EventType] = ()) -> None:
        self.types: dict[str, EventType] = {}
        self.classes: dict[str, type[Event]] = {}
        for each in types:
            self.add(each)

    def add(self, event_type: EventType) -> None:
        """Register one type; raises `PluginError` when the name is taken."""
        if event_type.name in self.types:
            raise PluginError(f"event type {event_type.name!r} is registered twice: disable one of the plugins")
        if not {*(event_type.in_order or ())} <= {*event_type.payload.__struct_fields__}:
            raise PluginError(f"event type {event_type.name!r}: in_order names fields its payload does not have")
        self.types[event_type.name] = event_type
        self.classes[event_type.name] = msgspec.defstruct(  # type: ignore[assignment]
            "".join(part.title() for part in event_type.name.replace(".", "_").split("_")),
            [("data", event_type.payload)],
            bases=(Event,),
            tag_field="event_type",
            tag=event_type.name,
            namespace={"event_type": event_type.name},
            frozen=True,
            gc=False,
            kw_only=True,
            rename=_PRIVATE,
        )

    def union(self) -> Any:
        """The tagged union of all registered event classes, as a type for msgspec decoders."""
        return reduce(or_, self.classes.values()) if self.classes else GenericEvent


class Wire(Struct, omit_defaults=True, kw_only=True):
    """The envelope as a producer writes it; ``None`` values are left out."""

    event_type: str
    timestamp: float
    source: str
    data: Any
    correlation_id: str | None = None
    user_id: str | None = None
    session_id: str | None = None
    event_id: str | None = None
    causation_id: str | None = None
    priority: str | UnsetType = UNSET


def derive(
    source: str,
    event_type: str,
    data: Any,
    *,
    now: float,
    cause: Event | None = None,
    timestamp: float | None = None,
    correlation_id: str | None = None,
    user_id: str | None = None,
    priority: str | None = None,
) -> Wire:
    """The envelope of an event a plugin emits: time and correlation id default to those of `cause`, else `now`."""
    if timestamp is None:
        timestamp = cause.timestamp if cause is not None else now
    if correlation_id is None and cause is not None:
        correlation_id = cause.correlation_id
    return Wire(
        event_type=event_type,
        timestamp=timestamp,
        source=source,
        data=data,
        correlation_id=correlation_id,
        user_id=user_id,
        causation_id=f"bus:{cause.bus_seq}" if cause is not None else None,
        priority=UNSET if priority is None else priority,
    )


def to_dict(event: Event) -> dict[str, Any]:
    """The canonical envelope of `event` as plain values (``None`` left out), plus ``bus_seq``."""
    out: dict[str, Any] = {"event_type": event.event_type}  # type: ignore[attr-defined]
    for key in ENVELOPE_KEYS[1:]:
        value = getattr(event, key)
        if value is None:
            continue
        out[key] = {k: v for k, v in msgspec.to_builtins(value).items() if v is not None} if key == "data" else value
    out["bus_seq"] = event.bus_seq
    return out

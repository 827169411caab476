"""Second try for payloads written by older programs: numbers as strings, other time formats, lower case.

A value is changed only when its meaning is certain. Whatever cannot be interpreted stays as it is,
so that the decoder names it as the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any

from msgspec import Struct, inspect

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_BROKER = re.compile(r"\d{4}\.\d{2}\.\d{2} \d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?")
#: Times above this many seconds (year 5138) are milliseconds, microseconds or nanoseconds.
_MAX_SECONDS = 1e11

#: Spellings of the two directions, upper case and without a prefix such as ``ORDER_TYPE_``; 0 and 1 are MT5's.
_DIRECTIONS = {"BUY": "BUY", "LONG": "BUY", "B": "BUY", "0": "BUY", "SELL": "SELL", "SHORT": "SELL", "S": "SELL"}
_DIRECTIONS["1"] = "SELL"
_PREFIX = re.compile(r"^(ORDER_TYPE_|POSITION_TYPE_|DEAL_TYPE_|SIGNALTYPE\.|DIRECTION\.)")

#: What terminals write into ``type`` when it names the message and not the direction.
_MESSAGES = frozenset(
    [
        "tick",
        "fire",
        "confirmation",
        "heartbeat",
        "heartbeat_metrics",
        "position_closed",
        "hybrid_event",
        "handshake",
        "disconnect",
        "ping",
        "pong",
        "close_ticket",
        "close_all",
        "wake",
        "signal",
        "signal_snapshot",
        "pattern",
        "trade",
        "trade_executed",
        "trade_confirmed",
        "fire_command",
        "signal_generated",
        "pattern_detected",
    ]
)
#: Fields that say when something happened; only these may be replaced by ``broker_time``. A signal must
#: not lose its expiry that way.
_OCCURRED = frozenset(("timestamp", "execution_time", "open_time"))

Coercion = Callable[[Any], Any]


def number(value: Any) -> Any:
    """A decimal string as a float; anything else unchanged (``nan`` and ``1,5`` are no numbers)."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    return value


def integer(value: Any) -> Any:
    """A string of digits or a whole float as an int; anything else unchanged."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,19}", value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def text(value: Any) -> Any:
    """An integer id as a string; anything else unchanged."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def boolean(value: Any) -> Any:
    """``0``, ``1``, ``"true"`` and ``"false"`` as a bool; anything else unchanged."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    return bool(value) if isinstance(value, int) and value in (0, 1) else value


def time(value: Any) -> Any:
    """Unix seconds from ISO 8601 (UTC where no offset is given) or from milli-, micro- or nanoseconds.

    Broker time strings stay as they are: their offset is unknown here, see `broker_seconds`.
    """
    value = number(value)
    if isinstance(value, str):
        if _BROKER.fullmatch(value):
            return value
        try:
            moment = datetime.fromisoformat(value.strip())
        except ValueError:
            return value
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        for divisor in (1, 1e3, 1e6, 1e9):
            if 0 <= value / divisor <= _MAX_SECONDS:
                return value / divisor
    return value


def broker_seconds(value: str, utc_offset_hours: float) -> float | None:
    """Unix seconds of ``YYYY.MM.DD HH:MM[:SS]`` on a server clock `utc_offset_hours` ahead of UTC; None if none."""
    try:
        moment = datetime.fromisoformat(value.replace(".", "-", 2)).replace(tzinfo=UTC)
    except ValueError:
        return None
    return moment.timestamp() - utc_offset_hours * 3600


def choice(options: Mapping[str, str], value: Any) -> Any:
    """The option that equals `value` but for case; anything else unchanged."""
    return options.get(value.strip().lower(), value) if isinstance(value, str) else value


def direction(value: Any) -> Any:
    """BUY or SELL from the spellings of terminals and exchanges; anything else unchanged."""
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return _DIRECTIONS.get(_PREFIX.sub("", str(value).strip().upper()), value)
    return value


def rename(data: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """`data` under canonical names; a canonical name that is already there wins over its aliases."""
    out = dict(data)
    for alias, name in aliases.items():
        if alias in out and out.get(name) is None:
            out[name] = out.pop(alias)
    return out


class Prepare:
    """The ``prepare`` function of one payload type; callable, stateless, safe to share between threads.

    `broker_offset` is the UTC offset of the broker's server clock in hours. Without it a broker time
    string is kept verbatim in ``broker_time`` and the typed time stays empty: the two clocks never mix.
    """

    def __init__(
        self,
        payload: type[Struct],
        aliases: Mapping[str, str],
        nested: Mapping[type[Struct], Mapping[str, str]] | None = None,
        broker_offset: float | None = None,
    ) -> None:
        self.aliases = dict(aliases)
        self.broker_offset = broker_offset
        self._payload = payload
        self._nested = nested or {}

    @cached_property
    def _known(self) -> tuple[dict[str, tuple[Coercion | None, bool]], set[str]]:
        """How to coerce each field and whether it is optional, and which are times.

        Looked up at the first payload that needs it: for all types together it takes longer than opening a tape.
        """
        fields: dict[str, tuple[Coercion | None, bool]] = {}
        times: set[str] = set()
        for field in inspect.type_info(self._payload).fields:  # type: ignore[attr-defined]
            name = field.encode_name
            fields[name] = (self._coercion(field.type, self._nested), not field.required)
            if _is_time(field.type):
                times.add(name)
        return fields, times

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """A new dict with canonical names and every value that could be interpreted."""
        fields, times = self._known
        out = rename(data, self.aliases)
        if "direction" in fields and str(out.get("direction")).lower() in _MESSAGES:
            del out["direction"]
        for name, (coerce, optional) in fields.items():
            if name not in out:
                continue
            value = out[name]
            if optional and (value is None or value == ""):
                del out[name]
            elif coerce is not None:
                out[name] = coerce(value)
        for name in times & out.keys():
            self._broker_time(out, name, "broker_time" in fields)
        return out

    def _broker_time(self, out: dict[str, Any], name: str, has_place: bool) -> None:
        value = out[name]
        if not isinstance(value, str) or not _BROKER.fullmatch(value) or broker_seconds(value, 0) is None:
            return
        keeps = has_place and name in _OCCURRED
        if keeps:
            out.setdefault("broker_time", value)
        if self.broker_offset is not None:
            out[name] = broker_seconds(value, self.broker_offset)
        elif keeps:
            del out[name]

    def _coercion(self, kind: inspect.Type, nested: Mapping[type[Struct], Mapping[str, str]]) -> Coercion | None:
        if _is_time(kind):
            return time
        kind = _plain(kind)
        if isinstance(kind, inspect.LiteralType):
            if {"BUY", "SELL"} <= set(kind.values):
                return direction
            return partial(choice, {str(value).lower(): str(value) for value in kind.values})
        if isinstance(kind, inspect.ListType):
            return self._elements(_plain(kind.item_type), nested)
        if isinstance(kind, inspect.DictType) and isinstance(_plain(kind.value_type), inspect.FloatType):
            return partial(_each_value, number)
        for form, coerce in _SIMPLE:
            if isinstance(kind, form):
                return coerce
        return None

    def _elements(self, item: inspect.Type, nested: Mapping[type[Struct], Mapping[str, str]]) -> Coercion | None:
        if isinstance(item, inspect.StructType):
            aliases = nested.get(item.cls, {})
            return partial(_each, Prepare(item.cls, aliases, nested, self.broker_offset), dict)
        if isinstance(item, inspect.TupleType):
            return partial(_each, partial(_each, number, object), (list, tuple))
        return None


_SIMPLE: tuple[tuple[type[inspect.Type], Coercion], ...] = (
    (inspect.FloatType, number),
    (inspect.IntType, integer),
    (inspect.BoolType, boolean),
    (inspect.StrType, text),
)


def _plain(kind: inspect.Type) -> inspect.Type:
    """`kind` without metadata and without ``None``."""
    if isinstance(kind, inspect.Metadata):
        return _plain(kind.type)
    if isinstance(kind, inspect.UnionType):
        return _plain(next(each for each in kind.types if not isinstance(each, inspect.NoneType)))
    return kind


def _is_time(kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.UnionType):
        return any(_is_time(each) for each in kind.types)
    return isinstance(kind, inspect.Metadata) and (kind.extra or {}).get("kind") == "time"


def _each(coerce: Coercion, wanted: Any, values: Any) -> Any:
    if not isinstance(values, (list, tuple)):
        return values
    return [coerce(value) if isinstance(value, wanted) else value for value in values]


def _each_value(coerce: Coercion, values: Any) -> Any:
    return {key: coerce(value) for key, value in values.items()} if isinstance(values, dict) else values


def spellings(groups: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """``{canonical: [aliases]}`` turned into ``{alias: canonical}``."""
    return {alias: name for name, aliases in groups.items() for alias in aliases}

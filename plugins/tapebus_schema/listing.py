"""The event types as JSON Schema, for producers in other languages and for people."""

from __future__ import annotations

from typing import Any

import msgspec

from tapebus.errors import UsageError
from tapebus.events import ENVELOPE_KEYS, EventType
from tapebus_schema.catalog import NESTED, default_types, nearest
from tapebus_schema.examples import EXAMPLES

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REQUIRED = ("event_type", "timestamp", "source", "data")


def json_schema(event_type_name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of the whole envelope of one event type, spellings included.

    Aliases appear as properties with ``x-alias-of``; a required field is satisfied by any of its
    spellings. It describes what decodes at once: the second try for legacy values (numbers as
    strings, other time formats) and the rules over several fields are wider and stricter than it.
    Raises `UsageError` for an unknown name.
    """
    types = {each.name: each for each in default_types()}
    found = types.get(event_type_name)
    if found is None:
        raise UsageError(f"no event type {event_type_name!r}; {nearest(event_type_name, types)}")
    return _schema(found)


def json_schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of every event type by name."""
    return {each.name: _schema(each) for each in default_types()}


def _schema(event_type: EventType) -> dict[str, Any]:
    _, components = msgspec.json.schema_components([event_type.payload], ref_template="#/$defs/{name}")
    name = event_type.payload.__name__
    components[name]["examples"] = [EXAMPLES[event_type.name]]
    components[name] = _with_aliases(components[name], event_type.aliases)
    for nested, aliases in NESTED.items():
        if nested.__name__ in components:
            components[nested.__name__] = _with_aliases(components[nested.__name__], aliases)
    text = {"anyOf": [{"type": "string", "maxLength": 200}, {"type": "null"}], "default": None}
    properties: dict[str, Any] = {key: text for key in ENVELOPE_KEYS}
    properties["event_type"] = {"const": event_type.name}
    properties["timestamp"] = {"type": "number", "description": "Unix seconds on the producer's clock"}
    properties["source"] = {"type": "string", "maxLength": 100, "description": "name of the producing component"}
    properties["data"] = {"$ref": f"#/$defs/{name}"}
    return {
        "$schema": DIALECT,
        "title": event_type.name,
        "description": event_type.doc,
        "type": "object",
        "properties": properties,
        "required": list(_REQUIRED),
        "x-policy": event_type.policy,
        "$defs": components,
    }


def _with_aliases(schema: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    properties = dict(schema["properties"])
    groups: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        groups.setdefault(name, []).append(alias)
        properties[alias] = {**schema["properties"][name], "x-alias-of": name}
    required = [name for name in schema.get("required", []) if name not in groups]
    either = [
        {"anyOf": [{"required": [spelling]} for spelling in (name, *groups[name])]}
        for name in schema.get("required", [])
        if name in groups
    ]
    out = {**schema, "properties": properties, "required": required}
    return {**out, "allOf": either} if either else out

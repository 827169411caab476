"""Reading payloads by field name, so that the plugin needs no other plugin's structs."""

from __future__ import annotations

from typing import Any

import msgspec


def get(data: Any, *names: str) -> Any:
    """The first of the fields `names` of a payload that is there and not None."""
    for name in names:
        value = data.get(name) if isinstance(data, dict) else getattr(data, name, None)
        if value is not None and value is not msgspec.UNSET:
            return value
    return None


def direction(data: Any) -> str:
    """BUY, SELL or nothing, whatever the field is called."""
    return str(get(data, "direction", "type") or "").upper()

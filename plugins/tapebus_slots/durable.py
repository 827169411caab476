"""Where slot tables live in the plugin's durable state, so that a commit writes only what changed.

A table is one entry; of the long lists of what ended and what fired each line is an entry of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import msgspec

from tapebus_slots.slot import Ended
from tapebus_slots.table import SlotTable

_TABLE = "table:"
_LINES: dict[str, Any] = {"ended": tuple[str, str, Ended], "fired": tuple[str, str, float]}


def load(state: Mapping[str, bytes]) -> dict[str, SlotTable]:
    """Every table in `state` by user."""
    tables: dict[str, SlotTable] = {}
    for key in state:
        if key.startswith(_TABLE):
            table = msgspec.msgpack.decode(state[key], type=SlotTable)
            table.unsaved = [(kind, each) for kind in _LINES for each in getattr(table, kind)]
            tables[table.user_id] = table
    for kind, form in _LINES.items():
        lines = [msgspec.msgpack.decode(state[key], type=form) for key in state if key.startswith(f"{kind}:")]
        for user, key, value in sorted(lines, key=lambda line: line[2].at if kind == "ended" else line[2]):
            if user in tables:
                getattr(tables[user], kind)[key] = value
    return tables


def last_time(tables: Iterable[SlotTable], heartbeats: bool = True) -> float:
    """The latest event time the tables know of, 0 where they know none."""
    times = [0.0]
    for table in tables:
        times += [view.heartbeat_at or 0.0 for view in table.accounts.values() if heartbeats]
        times += [slot.since for slot in table.slots.values()] + [each.at for each in table.ended.values()]
    return max(times)


class Keeper:
    """Writes tables into `state`; remembers what it wrote, so an unchanged table costs no commit."""

    def __init__(self, state: MutableMapping[str, bytes]) -> None:
        self._state = state
        self._written: dict[str, bytes] = {}

    def save(self, table: SlotTable) -> None:
        """Write what is new in `table`."""
        for kind, key in table.unsaved:
            value = getattr(table, kind).get(key)
            name = f"{kind}:{table.user_id}:{key}"
            if value is not None:
                self._state[name] = msgspec.msgpack.encode((table.user_id, key, value))
            elif name in self._state:
                del self._state[name]
        table.unsaved.clear()
        fields = msgspec.structs.asdict(table)
        for name in (*_LINES, "unsaved"):
            del fields[name]
        self.put(_TABLE + table.user_id, msgspec.msgpack.encode(fields))

    def put(self, key: str, value: bytes) -> None:
        """Write one entry where it differs from what was written last."""
        if self._written.get(key) != value:
            self._written[key] = self._state[key] = value

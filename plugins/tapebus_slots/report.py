"""What ``tapebus slots`` shows, as plain data: read from the plugin's durable state, whether or not a bus runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapebus_slots import durable
from tapebus_slots.slot import Ended, Slot
from tapebus_slots.table import SlotTable
from tapebus_slots.witnesses import why

#: Released slots shown per user, newest first.
RELEASED = 10


def report(state: Mapping[str, bytes], now: float, heartbeat_max_age: float, empty: dict[str, int]) -> dict[str, Any]:
    """Every user's slots and accounts as of the last commit; ages in seconds at `now`.

    `empty` gives the maximum of users the configuration knows and the bus has not heard of.
    """
    tables = durable.load(state)
    for user, maximum in empty.items():
        tables.setdefault(user, SlotTable(user, maximum))
    return {
        "kill_switch": state.get("kill_switch") == b"on",
        "users": [_user(table, now, heartbeat_max_age) for _, table in sorted(tables.items())],
    }


def _user(table: SlotTable, now: float, heartbeat_max_age: float) -> dict[str, Any]:
    disputes = table.disputes()
    return {
        "user_id": table.user_id,
        "slots": f"{table.used}/{table.maximum}",
        "slots_used": table.used,
        "slots_max": table.maximum,
        "over_limit": table.used > table.maximum,
        "reconcile": list(table.witnesses) if table.reconcile else [],
        "accounts": [
            {
                "account": name,
                "heartbeat_age_s": _age(view.heartbeat_at, now),
                "stale": view.heartbeat_at is None or now - view.heartbeat_at > heartbeat_max_age,
                "broker_count": view.said,
                "listed": view.listed,
                "complete": view.complete,
                "balance": view.balance,
                "equity": view.equity,
            }
            for name, view in table.accounts.items()
        ],
        "held": [_slot(table, slot, now, disputes.get(slot.key, "")) for slot in table.slots.values()],
        "released": [_ended(key, each, now) for key, each in reversed(list(table.ended.items())[-RELEASED:])],
    }


def _slot(table: SlotTable, slot: Slot, now: float, dispute: str) -> dict[str, Any]:
    found = table.witnesses_of(slot, now)
    return {
        "slot": slot.key,
        "state": slot.state,
        "symbol": slot.symbol,
        "direction": slot.direction,
        "lots": slot.lots,
        "age_s": _age(slot.since, now),
        "fire_id": slot.fire_id,
        "signal_id": slot.signal_id,
        "ticket": slot.ticket,
        "position_id": slot.position_id,
        "account": slot.account,
        "why": why(slot, found),
        "dispute": dispute,
        "witnesses": {
            name: {
                "believes": witness.believes,
                "weight": witness.weight,
                "says": witness.says,
                "age_s": _age(witness.at, now),
                "evidence": witness.evidence,
            }
            for name, witness in found.items()
        },
    }


def _ended(key: str, ended: Ended, now: float) -> dict[str, Any]:
    return {
        "slot": key,
        "method": ended.method,
        "age_s": _age(ended.at, now),
        "ticket": ended.ticket,
        "evidence": list(ended.evidence),
    }


def _age(at: float | None, now: float) -> float | None:
    return None if at is None else round(max(0.0, now - at), 3)

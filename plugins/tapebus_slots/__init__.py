"""Slots and the auto-fire gate: which trading positions are held, and whether a signal may open another.

Consumes signals, fires, their answers, closes, heartbeats and quotes; emits ``gate_verdict``,
``slot_reserved``, ``slot_opened``, ``slot_released``, ``reconcile_requested``, ``alert`` and, only
with ``auto_fire = true``, ``fire_command``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from tapebus.consumer import Consumer, Context
from tapebus.events import EventType
from tapebus.hookspecs import hookimpl
from tapebus_slots.engine import Engine

if TYPE_CHECKING:
    import click

TOPICS = (
    "signal_generated",
    "fire_command",
    "trade_executed",
    "trade_confirmed",
    "position_closed",
    "ea_heartbeat",
    "balance_update",
    "market_data",
    "user_action",
    "user_fire_mode",
    "pattern_status",
    "calibration",
    "symbol_specification",
)

#: The engine of each context by its identity: several buses in one process share no positions.
_engines: dict[int, Engine] = {}


class ReconcileRequested(Struct, frozen=True, omit_defaults=True):
    """Somebody should look: weak evidence says that the slots may not be what the broker holds."""

    user_id: str
    reasons: list[str]
    slots_used: int
    slots_max: int
    fire_ids: list[str] = []


@hookimpl
def tapebus_register_event_types() -> list[EventType]:
    """The one event type that is this plugin's own."""
    return [EventType("reconcile_requested", ReconcileRequested, doc="weak evidence asks for a fresh snapshot")]


@hookimpl
def tapebus_register_consumers(context: Context) -> list[Consumer]:
    """One inline consumer: signals of one batch must see the slots taken by the signals before them."""
    engine = _engines[id(context)] = Engine(context)
    return [
        Consumer(
            name="slots",
            topics=TOPICS,
            handler=engine.handle,
            mode="inline",
            save=engine.save,
            tick=30.0,
            on_tick=engine.on_tick,
        )
    ]


@hookimpl
def tapebus_register_commands(cli: click.Group) -> None:
    """Add ``tapebus slots`` and ``tapebus whatif``."""
    from tapebus_slots.cli import slots
    from tapebus_slots.whatif_cli import whatif

    cli.add_command(slots)
    cli.add_command(whatif)


@hookimpl
def tapebus_health(context: Context) -> dict[str, Any]:
    """Degraded while over the limit, stopped by the kill switch, or waiting for a reconciliation."""
    engine = _engines.get(id(context))
    if engine is None:
        return {"status": "error", "message": "not started"}
    notes = ["kill switch is on"] if engine.decider.kill_switch else []
    for table in list(engine.tables.values()):
        if table.used > table.maximum:
            notes.append(f"user {table.user_id}: {table.used}/{table.maximum} slots, gate closed")
        if table.disputed:
            notes.append(f"user {table.user_id}: witnesses disagree about {', '.join(table.disputed[:5])}")
        elif table.reconcile:
            notes.append(f"user {table.user_id}: waiting for a complete heartbeat ({', '.join(table.witnesses)})")
    return {"status": "degraded" if notes else "ok", "message": "; ".join(notes) or _used(engine)}


@hookimpl
def tapebus_metrics(context: Context) -> dict[str, int | float | str]:
    """Slots in use of slots allowed, over all users, and how often the gate decided and fired."""
    engine = _engines.get(id(context))
    if engine is None:
        return {}
    return {
        "slots": _used(engine),
        "gate_verdicts": engine.decider.verdicts,
        "auto_fires": engine.decider.fires,
        "kill_switch": int(engine.decider.kill_switch),
    }


@hookimpl
def tapebus_stop(context: Context) -> None:
    """Forget the engine; everything durable is in the context's state."""
    _engines.pop(id(context), None)


def _used(engine: Engine) -> str:
    tables = list(engine.tables.values())
    if not tables:
        return f"0/{engine.config.max_slots}"
    return f"{sum(table.used for table in tables)}/{sum(table.maximum for table in tables)}"

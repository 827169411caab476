"""Alerts: rules over the running bus and over what flows through it, each raised once and cleared once.

Consumes what its rules need, emits ``alert``. Nothing is measured per quote: topics that may be busy are looked at a
batch at a time, everything else once a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tapebus.consumer import Consumer, Context
from tapebus.hookspecs import hookimpl
from tapebus_alerts.engine import Engine

if TYPE_CHECKING:
    import click

#: The engine of each context by its identity: several buses in one process share no alerts.
_engines: dict[int, Engine] = {}


@hookimpl
def tapebus_register_consumers(context: Context) -> list[Consumer]:
    """The consumers that the rules need, all inline."""
    engine = _engines[id(context)] = Engine(context)
    return engine.consumers()


@hookimpl
def tapebus_health(context: Context) -> dict[str, Any]:
    """Degraded while an alert is raised."""
    engine = _engines.get(id(context))
    if engine is None:
        return {"status": "error", "message": "not started"}
    raised = engine.raised
    rules = len(engine.watches)
    return (
        {"status": "degraded", "message": ", ".join(raised)}
        if raised
        else {"status": "ok", "message": f"{rules} rules"}
    )


@hookimpl
def tapebus_metrics(context: Context) -> dict[str, int | float | str]:
    """How many rules there are, and how many alerts are raised."""
    engine = _engines.get(id(context))
    return {} if engine is None else {"rules": len(engine.watches), "raised": len(engine.raised)}


@hookimpl
def tapebus_register_commands(cli: click.Group) -> None:
    """Add ``tapebus alerts``."""
    from tapebus_alerts.cli import alerts

    cli.add_command(alerts)


@hookimpl
def tapebus_stop(context: Context) -> None:
    """Forget the engine; everything durable is in the context's state."""
    _engines.pop(id(context), None)

"""The analytics plugin: what outcomes say about patterns and about stated confidence, and what they do not say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tapebus.consumer import Consumer, Context
from tapebus.hookspecs import hookimpl
from tapebus_analytics.engine import TOPICS, Analyst

if TYPE_CHECKING:
    import click

#: By identity of the context, which the analyst keeps alive: one process may embed several buses.
_analysts: dict[int, Analyst] = {}


@hookimpl
def tapebus_register_consumers(context: Context) -> list[Consumer]:
    analyst = _analysts[id(context)] = Analyst(context)
    # inline: a thread would be woken for every block with a user action in it, and a fit takes milliseconds at most
    return [Consumer(name="analytics", topics=TOPICS, handler=analyst.handle, save=analyst.save, start="first")]


@hookimpl
def tapebus_metrics(context: Context) -> dict[str, int | float | str]:
    analyst = _analysts.get(id(context))
    return analyst.metrics() if analyst is not None else {}


@hookimpl
def tapebus_health(context: Context) -> dict[str, Any]:
    analyst = _analysts.get(id(context))
    if analyst is None:
        return {"status": "error", "message": "not started"}
    off = analyst.disabled()
    message = f"{len(analyst.patterns)} patterns, disabled: {', '.join(off) or 'none'}"
    return {"status": "ok", "message": message[:300]}


@hookimpl
def tapebus_stop(context: Context) -> None:
    _analysts.pop(id(context), None)


@hookimpl
def tapebus_register_commands(cli: click.Group) -> None:
    """Add ``tapebus analytics``."""
    from tapebus_analytics.cli import analytics

    cli.add_command(analytics)

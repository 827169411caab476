"""The outcomes plugin: every signal, fired or not, is followed to its end on the price that closes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tapebus.consumer import Consumer, Context
from tapebus.hookspecs import hookimpl
from tapebus_outcomes.tracker import Tracker

if TYPE_CHECKING:
    import click

__all__ = ["Tracker"]

#: By identity of the context, which the tracker keeps alive: one process may embed several buses.
_trackers: dict[int, Tracker] = {}


@hookimpl
def tapebus_register_consumers(context: Context) -> list[Consumer]:
    tracker = _trackers[id(context)] = Tracker(context)
    return [
        Consumer(
            name="outcomes",
            topics=tracker.topics,
            handler=tracker.handle,
            save=tracker.save,
            mode="inline",
            start="now",
        )
    ]


@hookimpl
def tapebus_metrics(context: Context) -> dict[str, int | float | str]:
    tracker = _trackers.get(id(context))
    return tracker.metrics() if tracker is not None else {}


@hookimpl
def tapebus_health(context: Context) -> dict[str, Any]:
    tracker = _trackers.get(id(context))
    if tracker is None:
        return {"status": "error", "message": "outcomes: not started"}
    figures = tracker.metrics()
    message = (
        f"{figures['open']} open, {figures['resolved']} resolved, {figures['timeouts']} timed out, "
        f"{figures['cancelled']} cancelled, {figures['unknown']} unknown, {figures['ambiguous']} ambiguous"
    )
    return {"status": "ok", "message": message}


@hookimpl
def tapebus_stop(context: Context) -> None:
    _trackers.pop(id(context), None)


@hookimpl
def tapebus_register_commands(cli: click.Group) -> None:
    """Add ``tapebus explain``."""
    from tapebus_outcomes.cli import explain

    cli.add_command(explain)

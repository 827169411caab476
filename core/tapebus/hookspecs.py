"""Every hook a plugin may implement. Hooks run at start-up, on a schedule or on request, never per event."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from tapebus.consumer import Consumer, Context
    from tapebus.events import EventType
    from tapebus.store import StoreReader

hookspec = pluggy.HookspecMarker("tapebus")
hookimpl = pluggy.HookimplMarker("tapebus")

# -- start-up -----------------------------------------------------------------------------------


@hookspec
def tapebus_register_event_types(config: dict[str, Any]) -> list[EventType]:
    """Return the event types this plugin defines; `config` is the plugin's own table."""
    raise NotImplementedError


@hookspec(firstresult=True)
def tapebus_open_store(data_dir: Path, config: dict[str, Any], readonly: bool) -> StoreReader | None:
    """Open the tape in `data_dir`; `config` is ``[plugins.store]``.

    Return a `Store` (or a `StoreReader` when `readonly`). Stops at the first non-None result.
    """


@hookspec
def tapebus_register_consumers(context: Context) -> list[Consumer]:
    """Return this plugin's consumers; `context` is the plugin's own and may be kept."""
    raise NotImplementedError


@hookspec
def tapebus_start(context: Context) -> None:
    """Run once after all consumers are registered and before the first event."""


# -- while running ------------------------------------------------------------------------------


@hookspec
def tapebus_health(context: Context) -> dict[str, Any]:
    """Return ``{"status": "ok" | "degraded" | "error", "message": str}``."""
    raise NotImplementedError


@hookspec
def tapebus_metrics(context: Context) -> dict[str, int | float | str]:
    """Return a few figures by name, shown by ``tapebus stats`` and in ``pm2 monit``."""
    raise NotImplementedError


# -- the command line ---------------------------------------------------------------------------


@hookspec
def tapebus_register_commands(cli: click.Group) -> None:
    """Add commands to the ``tapebus`` command line."""


# -- end ----------------------------------------------------------------------------------------


@hookspec
def tapebus_stop(context: Context) -> None:
    """Run once after the last event; release what `tapebus_start` took."""

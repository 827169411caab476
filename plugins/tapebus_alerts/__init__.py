"""Alerts: rules over the running bus and over what flows through it, raised once and cleared once."""

from __future__ import annotations

from tapebus.consumer import Consumer, Context
from tapebus.hookspecs import hookimpl


@hookimpl
def tapebus_register_consumers(context: Context) -> list[Consumer]:
    """No rule, no consumer."""
    return []

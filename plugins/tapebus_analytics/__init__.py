"""The analytics plugin: what outcomes say about patterns and about stated confidence, and what they do not say."""

from __future__ import annotations

from tapebus.consumer import Consumer, Context
from tapebus.hookspecs import hookimpl


@hookimpl
def tapebus_register_consumers(context: Context) -> list[Consumer]:
    return []

"""Relays signals, outcomes and alerts to Telegram; without a token it only shows what it would send."""

from __future__ import annotations

from typing import Any

from tapebus.consumer import Consumer, Context
from tapebus.hookspecs import hookimpl
from tapebus_telegram.outbox import rendered
from tapebus_telegram.relay import Relay
from tapebus_telegram.secret import Redactor, guard_logs, release_logs
from tapebus_telegram.settings import load, token_of
from tapebus_telegram.transport import BotTransport

__all__ = ["Redactor", "rendered"]

#: Relays by the identity of their context, which each relay keeps alive.
_relays: dict[int, tuple[Relay, Redactor | None]] = {}


@hookimpl
def tapebus_register_consumers(context: Context) -> list[Consumer]:
    settings = load(context.config)
    secret = token_of(settings)
    tapebus_stop(context)
    transport = BotTransport(settings.base_url, secret) if secret is not None else None
    redactor = guard_logs(secret, context.log) if secret is not None else None
    relay = Relay(context, settings, transport)
    _relays[id(context)] = (relay, redactor)
    return [
        Consumer(
            name="telegram",
            topics=settings.relayed(relay.chats),
            handler=relay.handle,
            mode="thread",
            lanes=True,
            start="now",
            save=relay.save,
            tick=1.0,
            on_tick=lambda now: relay.tick(),
        )
    ]


@hookimpl
def tapebus_start(context: Context) -> None:
    """Say once whether anything will leave this machine, and begin to send."""
    relay = _relays[id(context)][0]
    relay.start()
    context.log.info("%s", relay.health()["message"])


@hookimpl
def tapebus_health(context: Context) -> dict[str, Any]:
    found = _relays.get(id(context))
    return found[0].health() if found else {"status": "error", "message": "not started"}


@hookimpl
def tapebus_metrics(context: Context) -> dict[str, int | float | str]:
    found = _relays.get(id(context))
    return found[0].metrics() if found else {}


@hookimpl
def tapebus_stop(context: Context) -> None:
    relay, redactor = _relays.pop(id(context), (None, None))
    if relay is not None:
        relay.close()
    if redactor is not None:
        release_logs(redactor, context.log)

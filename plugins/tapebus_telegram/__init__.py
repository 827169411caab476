"""Relays signals, outcomes and alerts to Telegram and hears commands; without a token it only shows what it would
send.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from tapebus.consumer import Consumer, Context
from tapebus.hookspecs import hookimpl
from tapebus_telegram import board
from tapebus_telegram.markup import Line
from tapebus_telegram.outbox import rendered
from tapebus_telegram.relay import Relay
from tapebus_telegram.secret import Redactor, guard_logs, release_logs
from tapebus_telegram.settings import load, token_of
from tapebus_telegram.transport import BotTransport

if TYPE_CHECKING:
    import click

    from tapebus_telegram.commands import Operators

__all__ = ["Redactor", "rendered"]

_SPECIFIED = "symbols"


class _Plugin:
    """One relay, and who may command it: nobody in a dry run or without ``commands``."""

    def __init__(self, context: Context) -> None:
        settings = load(context.config)
        secret = token_of(settings)
        transport = BotTransport(settings.base_url, secret) if secret is not None else None
        self.context = context
        self.redactor = guard_logs(secret, context.log) if secret is not None else None
        self.relay = Relay(context, settings, transport)
        self.relay.observe = self._see
        self.topics = {*settings.relayed(self.relay.chats), "symbol_specification"}
        self.operators: Operators | None = None
        if settings.commands is not None and transport is not None:
            from tapebus_telegram.commands import Operators

            relay = self.relay
            self.operators = Operators(context, settings.commands, relay.chats, relay.post, self._figures)
            self.topics |= set(board.TOPICS)
        if (known := context.state.get(_SPECIFIED)) is not None:
            self.relay.symbols.restore(msgspec.msgpack.decode(known, type=dict[str, dict[str, str]]))

    def _see(self, event: Any) -> None:
        if event.event_type == "symbol_specification":
            self.relay.symbols.specify(event.data)
            self.context.state[_SPECIFIED] = msgspec.msgpack.encode(self.relay.symbols.specifications())
        elif self.operators is not None:
            self.operators.see(event)

    def _figures(self) -> list[Line]:
        """How the bus and the relay feel, for ``/status``."""
        figures, health = self.context.figures(), self.relay.health()
        bus = figures.get("bus", {})
        lag = max((each["lag_events"] for each in figures.get("consumers", ())), default=0)
        up = board.span(bus.get("uptime_s", 0.0))
        held = f"{self.relay.policy.held} held for a digest"
        return [
            [("bus: ", ""), (f"up {up}, {bus.get('last_seq', 0):,} events, most behind {lag:,}", "b")],
            [("telegram: ", ""), (f"{health['message']}, {held}", "b")],
        ]

    def tick(self) -> None:
        if self.operators is not None:
            self.operators.tick()
        self.relay.tick()

    def save(self) -> None:
        self.relay.save()
        if self.operators is not None:
            self.operators.save()

    def start(self) -> None:
        self.relay.start(*([self.operators.listener.listen] if self.operators is not None else []))

    def health(self) -> dict[str, Any]:
        health = self.relay.health()
        return self.operators.health(health) if self.operators is not None else health

    def metrics(self) -> dict[str, int | float | str]:
        return {**self.relay.metrics(), **(self.operators.metrics() if self.operators is not None else {})}

    def close(self) -> None:
        self.relay.close()
        if self.redactor is not None:
            release_logs(self.redactor, self.context.log)


#: By the identity of their context, which each keeps alive.
_plugins: dict[int, _Plugin] = {}


@hookimpl
def tapebus_register_consumers(context: Context) -> list[Consumer]:
    tapebus_stop(context)
    plugin = _plugins[id(context)] = _Plugin(context)
    return [
        Consumer(
            name="telegram",
            topics=sorted(plugin.topics),
            handler=plugin.relay.handle,
            mode="thread",
            lanes=True,
            start="now",
            save=plugin.save,
            tick=1.0,
            on_tick=lambda now: plugin.tick(),
        )
    ]


@hookimpl
def tapebus_register_commands(cli: click.Group) -> None:
    """Add ``tapebus telegram``."""
    from tapebus_telegram.cli import telegram

    cli.add_command(telegram)


@hookimpl
def tapebus_start(context: Context) -> None:
    """Say once whether anything will leave this machine, and begin to send."""
    plugin = _plugins[id(context)]
    plugin.start()
    context.log.info("%s", plugin.health()["message"])


@hookimpl
def tapebus_health(context: Context) -> dict[str, Any]:
    found = _plugins.get(id(context))
    return found.health() if found else {"status": "error", "message": "not started"}


@hookimpl
def tapebus_metrics(context: Context) -> dict[str, int | float | str]:
    found = _plugins.get(id(context))
    return found.metrics() if found else {}


@hookimpl
def tapebus_stop(context: Context) -> None:
    found = _plugins.pop(id(context), None)
    if found is not None:
        found.close()

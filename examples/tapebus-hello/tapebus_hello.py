"""Counts the quotes of each symbol; the counts survive a restart, exact to the event."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tapebus import Consumer, Context, hookimpl


class Quotes:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.counts = Counter({symbol: int(count) for symbol, count in context.state.items()})
        self.faulty = bool(context.config.get("raise_on_every_event", False))

    def handle(self, batch: Any) -> None:
        for event in batch:
            if self.faulty:
                raise RuntimeError("asked for by [plugins.hello] raise_on_every_event")
            self.counts[event.data.symbol] += 1

    def save(self) -> None:
        for symbol, count in self.counts.items():
            self.context.state[symbol] = b"%d" % count


@hookimpl
def tapebus_register_consumers(context: Context) -> list[Consumer]:
    quotes = Quotes(context)
    return [Consumer(name="hello", topics=["market_data"], handler=quotes.handle, save=quotes.save, start="first")]


@hookimpl
def tapebus_metrics(context: Context) -> dict[str, int | float | str]:
    return {f"quotes.{symbol}": int(count) for symbol, count in context.state.items()}

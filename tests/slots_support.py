"""One terminal on a bench: the few events of a broker account spelled out, for tests of slots."""

from __future__ import annotations

import msgspec

import tapebus_schema
import tapebus_slots
from tapebus.events import Registry
from tapebus.testing import PluginBench

REGISTRY = Registry([*tapebus_schema.tapebus_register_event_types({}), *tapebus_slots.tapebus_register_event_types()])
UUID = "COMMANDER_DEV_001"
T0 = 1_758_500_000.0


def bench(**config):
    """The plugin on a bench that checks each emitted payload: one that is not valid would be a dead letter."""
    made = PluginBench(tapebus_slots, REGISTRY, config, name="slots")
    emit = made.context.emit

    def checked(event_type, data, **more):
        msgspec.convert(msgspec.to_builtins(data), REGISTRY.types[event_type].payload)
        emit(event_type, data, **more)

    made.context.emit = checked
    return made


class Terminal:
    """A bench with the few events of one terminal spelled out."""

    def __init__(self, **config):
        self.bench = bench(**config)
        self.now = T0

    def send(self, event_type, data, **envelope):
        self.now += 1
        self.bench.feed([self.bench.event(event_type, self.now, data, **envelope)])

    def fire(self, fire_id, symbol="EURUSD", direction="BUY", mode="AUTO", **more):
        data = {"fire_id": fire_id, "symbol": symbol, "direction": direction, "lot": 0.1, **more}
        self.send("fire_command", {**data, "execution_mode": mode})

    def answer(self, fire_id, status, **more):
        self.send("trade_executed", {"fire_id": fire_id, "status": status, "target_uuid": UUID, **more})

    def close(self, ticket, volume=0.1, **more):
        data = {"ticket": ticket, "symbol": "EURUSD", "volume": volume, "close_price": 1.17, "profit": 10.0}
        self.send("position_closed", {**data, "reason": "TP_HIT", "target_uuid": UUID, **more})

    def heartbeat(self, positions, count=None, after=30.0, balance=10_000.0, **more):
        self.now += after
        count = len(positions) if count is None else count
        data = {"target_uuid": UUID, "balance": balance, "equity": balance, "open_positions": count}
        self.send("ea_heartbeat", {**data, "positions": positions, **more})

    def emitted(self, event_type):
        return [wire.data for wire in self.bench.emitted if wire.event_type == event_type]

    def alerts(self, name):
        return [each for each in self.emitted("alert") if each["name"].startswith(f"{name}:")]

    @property
    def table(self):
        return tapebus_slots._engines[id(self.bench.context)].table("default")

    def metrics(self):
        return tapebus_slots.tapebus_metrics(context=self.bench.context)["slots"]

    def opened(self, n):
        for i in range(n):
            self.fire(f"f{i}")
            self.answer(f"f{i}", "FILLED", ticket=100 + i, price=1.1 + i / 1000)
        return [position(100 + i, fire_id=f"f{i}", open_price=1.1 + i / 1000) for i in range(n)]


def position(ticket, symbol="EURUSD", direction="BUY", volume=0.1, open_price=1.1, **more):
    data = {"ticket": ticket, "symbol": symbol, "direction": direction, "volume": volume}
    return {**data, "open_price": open_price, **more}

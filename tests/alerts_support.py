"""The plugin of alerts under a clock and figures of the test's own."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import tapebus_alerts
import tapebus_schema
from tapebus.events import Registry
from tapebus.testing import PluginBench

REGISTRY = Registry(tapebus_schema.tapebus_register_event_types({}))


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


#: A Wednesday noon: every market is open.
NOON = at("2026-01-14 12:00")


class Desk:
    """The plugin under a clock of the test's own, with figures of the test's own where a rule asks for them."""

    def __init__(self, *rules: dict[str, Any], now: float = NOON, **shared: Any) -> None:
        self.now = now
        config = {"rules": list(rules)} if rules else {}
        self.bench = PluginBench(tapebus_alerts, REGISTRY, config, name="alerts")
        self.bench.context.shared = shared
        self.bench.restart()
        self.errors, self.handled, self.lag_events, self.lag_ms = 0, 0, 0, 0.0
        self.counts: dict[str, Any] = {"dropped": {}, "dead_letters": {}, "unexplained": 0, "lost": 0}
        self.feed_lost = 0
        self.full = False
        self.wait(1)

    def figures(self) -> dict[str, Any]:
        state = "store full" if self.full else "running"
        row = {"name": "slow", "plugin": "other", "state": "running", "errors": self.errors, "handled": self.handled}
        return {
            "bus": {**self.counts, "dropped": dict(self.counts["dropped"]), "state": state},
            "consumers": [{**row, "lag_events": self.lag_events, "lag_ms": self.lag_ms}],
            "feed": {"lost": self.feed_lost},
            "producers": [],
        }

    def wait(self, seconds: int) -> None:
        """Let the clock go on, with a look each second."""
        for _ in range(seconds):
            self.now += 1.0
            self.look()

    def look(self) -> None:
        self.bench.context.told = self.figures()
        self.bench.tick(self.now)

    def leap(self, seconds: float, step: float = 25.0) -> None:
        """Let the clock go on fast, without a pause so long that it would count as one."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            self.look()

    def event(self, event_type: str, data: dict[str, Any], timestamp: float | None = None, **envelope: Any) -> None:
        made = self.bench.event(event_type, self.now if timestamp is None else timestamp, data, **envelope)
        self.bench.feed([made])

    def quote(self, symbol: str = "EURUSD", timestamp: float | None = None, **envelope: Any) -> None:
        self.event("market_data", {"symbol": symbol, "bid": 1.1, "ask": 1.2}, timestamp, **envelope)

    def heartbeat(self, terminal: str = "T1", equity: float = 1000.0, balance: float = 1000.0) -> None:
        data = {"target_uuid": terminal, "balance": balance, "equity": equity, "open_positions": 0, "positions": []}
        self.event("ea_heartbeat", data)

    def outcome(self, r: float, fired: bool = True, **more: Any) -> None:
        data = {
            "signal_id": "S",
            "symbol": "EURUSD",
            "direction": "BUY",
            "pattern_type": "P",
            "confidence": 85.0,
            "outcome": "WIN" if r > 0 else "LOSS",
            "opened_at": self.now - 60,
            "closed_at": self.now,
            "duration_s": 60.0,
            "quotes_seen": 10,
            "fired": fired,
            "r": r,
            **more,
        }
        self.event("signal_outcome", data)

    def slots(self, used: int, most: int = 10, user: str = "u1", kind: str = "slot_reserved") -> None:
        data: dict[str, Any] = {"fire_id": "F", "symbol": "EURUSD", "direction": "BUY", "user_id": user}
        if kind == "slot_released":
            data |= {"method": "closed", "evidence": []}
        self.event(kind, data | {"slots_used": used, "slots_max": most})

    def signal(self) -> None:
        data = {"signal_id": "S", "symbol": "EURUSD", "direction": "BUY", "confidence": 85.0, "pattern_type": "P"}
        self.event("signal_generated", data)

    def restart(self) -> None:
        self.bench.restart()

    @property
    def told(self) -> list[str]:
        """What was told since it was asked last, as ``state name``."""
        found = [f"{each.data['state']} {each.data['name']}" for each in self.bench.emitted]
        self.bench.emitted.clear()
        return found

    @property
    def last(self) -> dict[str, Any]:
        data: dict[str, Any] = dict(self.bench.emitted[-1].data)
        return data


SILENCE = {"kind": "silence", "name": "quiet", "topic": "market_data", "threshold": 30.0, "session": "fx"}

"""From a signal to its verdict and, where the gate lets it through, to the order.

Holds what the gate needs besides the slot table and the quotes: the configuration of each user and
the kill switch. Runs on the engine's consumer thread only.
"""

from __future__ import annotations

import hashlib
from base64 import b32encode
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from tapebus.consumer import Context
from tapebus_slots import config as configuration
from tapebus_slots.gate import Account, Signal, SlotView, Verdict, evaluate
from tapebus_slots.payload import direction, get
from tapebus_slots.sizing import Quote
from tapebus_slots.slot import AccountView, Change, Slot
from tapebus_slots.table import SlotTable

_SWITCH = "kill_switch"


class Decider:
    """Decides on signals; the caller publishes the slot changes that `on_signal` returns."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = configuration.load(context.config)
        self.kill_switch = context.state.get(_SWITCH) == b"on"
        self.verdicts = 0
        self.fires = 0
        self._configs: dict[str, configuration.Config] = {}
        #: Event type to handler, for the events that concern only the gate.
        self.handlers: dict[str, Callable[[Any], None]] = {"user_action": self.on_action}

    def config_of(self, user: str) -> configuration.Config:
        found = self._configs.get(user)
        if found is None:
            found = self._configs[user] = configuration.for_user(self.context.config, self.config, user)
        return found

    def users(self, owner: str, named: bool) -> list[str]:
        """The users a signal is judged for; `owner` is whose it is, `named` whether it says so itself."""
        return [owner]

    def on_signal(
        self, event: Any, table: SlotTable, quotes: Mapping[str, Quote], target: str | None
    ) -> list[Change | None]:
        """Judge the signal for the user of `table`, and fire it at the terminal `target` where nothing forbids it."""
        signal = _signal(event)
        verdict = evaluate(signal, _account(table), self._view(table), quotes, self.config_of(table.user_id))
        self.verdicts += 1
        self.context.emit("gate_verdict", _payload(signal, verdict, table), cause=event, user_id=table.user_id)
        return [self._fire(table, signal, verdict, event, target)] if verdict.fire else []

    def _fire(
        self, table: SlotTable, signal: Signal, verdict: Verdict, event: Any, target: str | None
    ) -> Change | None:
        """Send the order and hold its slot at once: the next signal of this batch must see it held."""
        fire_id = short_fire_id(signal.signal_id, table.user_id)
        table.remember_fired(signal.signal_id, event.timestamp)
        self.fires += 1
        command = {
            "fire_id": fire_id,
            "signal_id": signal.signal_id,
            "symbol": signal.symbol,
            "direction": signal.direction,
            "entry": 0.0,
            "sl": signal.sl,
            "tp": signal.tp,
            "lot": float(verdict.lots),
            "user_id": table.user_id,
            "execution_mode": "AUTO",
            "status": "queued",
        }
        if target is not None:
            command["target_uuid"] = target
        self.context.emit("fire_command", command, cause=event, user_id=table.user_id, priority="high")
        slot = Slot(
            fire_id,
            "RESERVED",
            event.timestamp,
            signal.symbol,
            signal.direction,
            fire_id,
            signal.signal_id,
            lots=float(verdict.lots),
            risk=str(verdict.risk),
        )
        return table.reserve(slot)

    def on_action(self, event: Any) -> None:
        """The kill switch; durable at once, announced only when it moves."""
        data = event.data
        action = data.get("action") if type(data) is dict else data.action
        if action not in ("kill_switch_on", "kill_switch_off"):
            return
        wanted = action == "kill_switch_on"
        if wanted == self.kill_switch:
            return
        self.kill_switch = wanted
        self.context.state[_SWITCH] = b"on" if wanted else b"off"
        self.context.emit(
            "alert",
            {
                "name": "kill_switch",
                "severity": "warning" if wanted else "info",
                "message": f"auto-fire kill switch {action[12:]} by {event.user_id or 'unknown'}",
                "state": "raised" if wanted else "cleared",
                "component": "slots",
            },
            cause=event,
        )

    def save(self) -> None:
        """Write what changed into the state; called before the unit of work closes."""

    def _view(self, table: SlotTable) -> SlotView:
        held: dict[str, set[str]] = {}
        risk, unknown = Decimal(0), 0
        for slot in table.slots.values():
            held.setdefault(slot.symbol, set()).add(slot.direction)
            if slot.risk is None:
                unknown += 1
            else:
                risk += Decimal(slot.risk)
        return SlotView(table.used, table.maximum, held, risk, unknown, table.fired, self.kill_switch)


def short_fire_id(signal_id: str, user_id: str) -> str:
    """18 characters that fit an order comment; the same for the same signal and user."""
    digest = hashlib.blake2b(f"{user_id}\0{signal_id}".encode(), digest_size=10).digest()
    return "a-" + b32encode(digest).decode("ascii").lower()


def _signal(event: Any) -> Signal:
    data = event.data
    return Signal(
        signal_id=data.signal_id,
        symbol=data.symbol,
        direction=direction(data),
        confidence=data.confidence,
        sl=get(data, "sl"),
        tp=get(data, "tp"),
        entry=get(data, "entry", "entry_price") or None,
        pattern=get(data, "pattern_type", "pattern"),
        at=event.timestamp,
    )


def _account(table: SlotTable) -> Account | None:
    """The figures the gate decides on: of several accounts the poorest, and the oldest heartbeat."""
    views: list[AccountView] = [view for view in table.accounts.values() if view.balance is not None]
    beats = [view.heartbeat_at for view in table.accounts.values() if view.heartbeat_at is not None]
    if not views:
        return Account(heartbeat_at=min(beats)) if beats else None
    poorest = min(views, key=lambda view: view.balance or 0.0)
    return Account(poorest.balance, poorest.equity, min(beats) if beats else None)


def _payload(signal: Signal, verdict: Verdict, table: SlotTable) -> dict[str, Any]:
    return {
        "signal_id": signal.signal_id,
        "user_id": table.user_id,
        "fire": verdict.fire,
        "reasons": list(verdict.reasons),
        "rules": [{"name": r.name, "limit": r.limit, "actual": r.actual, "passed": r.passed} for r in verdict.rules],
        "lots": float(verdict.lots),
        "risk": float(verdict.risk),
        "slots_used": table.used,
    }

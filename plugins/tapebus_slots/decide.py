"""From a signal to its verdict and, where the gate lets it through, to the order.

Runs on the engine's consumer thread only; the engine publishes the slot changes that come back.
"""

from __future__ import annotations

import hashlib
import time
from base64 import b32encode
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from tapebus.consumer import Context
from tapebus_slots.config import Config
from tapebus_slots.desk import SWITCH, Desk
from tapebus_slots.gate import Verdict, evaluate
from tapebus_slots.payload import direction, get
from tapebus_slots.sizing import ZERO, Quote, conversion, loss_per_lot
from tapebus_slots.slot import AccountView, Change, Slot
from tapebus_slots.table import SlotTable
from tapebus_slots.view import Account, Held, Known, Signal, SlotView, suffix
from tapebus_trading.money import UP, exact


class Decider:
    """Decides on signals of one bus, with what its `desk` knows."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.desk = Desk(context.config, context.shared, context.state)
        self.config = self.desk.config
        self.verdicts = 0
        self.fires = 0
        #: Event type to handler, for the events that concern only the gate.
        self.handlers: dict[str, Callable[[Any], None]] = {"user_action": self.on_action, **self.desk.handlers}

    @property
    def kill_switch(self) -> bool:
        return self.desk.kill_switch

    def config_of(self, user: str) -> Config:
        return self.desk.config_of(user)

    def users(self, owner: str, named: bool) -> list[str]:
        """The users a signal is judged for; `owner` is whose it is, `named` whether it says so itself."""
        return [owner] if named else self.desk.watchers(owner)

    def on_signal(
        self, event: Any, table: SlotTable, quotes: Mapping[str, Quote], target: str | None
    ) -> list[Change | None]:
        """Judge the signal for the user of `table`, and fire it at the terminal `target` where nothing forbids it."""
        signal = read_signal(event)
        numbers = (view.number for view in table.accounts.values() if view.number)
        # what no bus has received was not kept waiting by one
        late = time.time() - event.timestamp if event.received_at else None
        account, known = account_of(table), self.desk.known(*table.accounts, *numbers, lateness=late)
        config = self.config_of(table.user_id).counted_in(None if account is None else account.currency)
        view = slot_view(table, quotes, signal.at, config, known)
        verdict = evaluate(signal, account, view, quotes, config, known)
        self.verdicts += 1
        payload = verdict_payload(signal, verdict, table.user_id, table.used)
        chain = event.correlation_id or signal.signal_id
        self.context.emit("gate_verdict", payload, cause=event, correlation_id=chain, user_id=table.user_id)
        return [self._fire(table, signal, verdict, event, target)] if verdict.fire else []

    def _fire(
        self, table: SlotTable, signal: Signal, verdict: Verdict, event: Any, target: str | None
    ) -> Change | None:
        """Send the order and hold its slot at once: the next signal of this batch must see it held."""
        fire_id = short_fire_id(signal.signal_id, table.user_id)
        table.remember_fired(signal.signal_id, event.timestamp)
        self.fires += 1
        plan = verdict.plan
        levels = {"sl": _number(plan.sl), "tp": _number(plan.tp)}
        command = {
            "fire_id": fire_id,
            "signal_id": signal.signal_id,
            "symbol": signal.symbol,
            "direction": signal.direction,
            "entry": 0.0,
            **levels,
            "lot": float(verdict.lots),
            "user_id": table.user_id,
            "execution_mode": "AUTO",
            "status": "queued",
        }
        if target is not None:
            command["target_uuid"] = target
        chain = event.correlation_id or signal.signal_id
        self.context.emit(
            "fire_command", command, cause=event, correlation_id=chain, user_id=table.user_id, priority="high"
        )
        slot = Slot(
            fire_id,
            "RESERVED",
            event.timestamp,
            signal.symbol,
            signal.direction,
            fire_id,
            signal.signal_id,
            lots=float(verdict.lots),
            sl=levels["sl"],
            loss_per_lot=str(plan.loss),
            margin_per_lot=None if plan.margin is None else str(plan.margin),
        )
        return table.reserve(slot)

    def on_action(self, event: Any) -> None:
        """The kill switch; durable at once, announced only when it moves."""
        data = event.data
        action = data.get("action") if type(data) is dict else data.action
        if action not in SWITCH or not self.desk.switch(action):
            return
        on = self.desk.kill_switch
        who = event.user_id or get(data, "user_id") or "unknown"
        self.context.emit(
            "alert",
            {
                "name": "kill_switch",
                "severity": "warning" if on else "info",
                "message": f"auto-fire kill switch {action[12:]} by {who}",
                "state": "raised" if on else "cleared",
                "component": "slots",
            },
            cause=event,
        )

    def on_fire_mode(self, event: Any, user: str) -> None:
        """New limits of `user`; see `Desk.on_fire_mode`."""
        self.desk.on_fire_mode(event, user)


def short_fire_id(signal_id: str, user_id: str) -> str:
    """18 characters that fit an order comment; the same for the same signal and user."""
    digest = hashlib.blake2b(f"{user_id}\0{signal_id}".encode(), digest_size=10).digest()
    return "a-" + b32encode(digest).decode("ascii").lower()


def read_signal(event: Any) -> Signal:
    """The gate's view of a ``signal_generated`` event; a level of 0 means that there is none."""
    data = event.data
    return Signal(
        signal_id=data.signal_id,
        symbol=data.symbol,
        direction=direction(data),
        confidence=data.confidence,
        sl=get(data, "sl") or None,
        tp=get(data, "tp") or None,
        entry=get(data, "entry", "entry_price") or None,
        pattern=get(data, "pattern_type", "pattern"),
        at=event.timestamp,
        expires_at=get(data, "expires_at"),
    )


def account_of(table: SlotTable) -> Account | None:
    """The figures the gate decides on: of several accounts the poorest, and the oldest heartbeat."""
    views: list[AccountView] = [view for view in table.accounts.values() if view.balance is not None]
    beats = [view.heartbeat_at for view in table.accounts.values() if view.heartbeat_at is not None]
    oldest = min(beats) if beats else None
    if not views:
        return Account(heartbeat_at=oldest) if beats else None
    poorest = min(views, key=_base)
    return Account(poorest.balance, poorest.equity, oldest, poorest.free_margin, poorest.currency)


def _base(view: AccountView) -> float:
    """What risk is a share of: the smaller of balance and equity."""
    balance = view.balance or 0.0
    return balance if view.equity is None else min(balance, view.equity)


def slot_view(table: SlotTable, quotes: Mapping[str, Quote], now: float, config: Config, known: Known) -> SlotView:
    """The slots of `table` as the gate counts them at the event time `now`."""
    figures = [view.margin_at for view in table.accounts.values() if view.margin_at is not None]
    shown_at = max(figures) if figures else 0.0
    held = [_held(slot, shown_at, quotes, now, config, known) for slot in table.slots.values()]
    return SlotView(table.used, table.maximum, held, table.fired)


def _held(slot: Slot, shown_at: float, quotes: Mapping[str, Quote], now: float, config: Config, known: Known) -> Held:
    lots = None if slot.lots is None else exact(slot.lots)
    loss = None if slot.loss_per_lot is None else Decimal(slot.loss_per_lot)
    if loss is None and slot.sl and slot.open_price:
        loss = _loss(slot, quotes, now, config, known)
    risk = None if loss is None or lots is None else UP.multiply(loss, lots)
    margin = ZERO
    if slot.margin_per_lot is not None and lots is not None and slot.since >= shown_at:
        margin = UP.multiply(Decimal(slot.margin_per_lot), lots)
    return Held(slot.symbol, slot.direction, lots, risk, margin)


def _loss(slot: Slot, quotes: Mapping[str, Quote], now: float, config: Config, known: Known) -> Decimal | None:
    """Account currency lost per lot from the opening to the stop; a stop that locks in a gain risks nothing."""
    symbol = known.symbols.get(slot.symbol, known.broker)
    if symbol is None:
        return None
    side = 1 if slot.direction == "BUY" else -1
    distance = max(ZERO, (exact(slot.open_price or 0) - exact(slot.sl or 0)) * side)
    age = config.max_conversion_age_s
    rate = conversion(symbol.quote, config.account_currency, quotes, now, age, suffix(slot.symbol, symbol))
    return loss_per_lot(distance, symbol, rate, exact(config.commission_per_lot), exact(config.slippage_per_lot))


def verdict_payload(signal: Signal, verdict: Verdict, user: str, used: int) -> dict[str, Any]:
    """The data of a ``gate_verdict`` event."""
    plan = verdict.plan
    data: dict[str, Any] = {
        "signal_id": signal.signal_id,
        "user_id": user,
        "fire": verdict.fire,
        "reasons": list(verdict.reasons),
        "rules": [{"name": r.name, "limit": r.limit, "actual": r.actual, "passed": r.passed} for r in verdict.rules],
        "lots": float(verdict.lots),
        "risk": float(verdict.risk),
        "slots_used": used,
        "confidence": verdict.confidence,
    }
    if verdict.calibrated is not None:
        data["calibrated"] = verdict.calibrated
    if plan.margin is not None and verdict.lots:
        data["margin"] = float(UP.multiply(plan.margin, verdict.lots))
    return data


def _number(value: Decimal | None) -> float | None:
    return None if value is None else float(value)

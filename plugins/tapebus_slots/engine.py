"""Turns events into slot changes and verdicts, and keeps the tables durable.

Runs on one consumer thread only. Payloads are read by field name, so the plugin needs no other
plugin's structs.
"""

from __future__ import annotations

import hashlib
from base64 import b32encode
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec

from tapebus.consumer import Context
from tapebus_slots import config as configuration
from tapebus_slots.gate import Account, Signal, SlotView, Verdict, evaluate
from tapebus_slots.matching import Position
from tapebus_slots.sizing import Quote
from tapebus_slots.table import AccountView, Change, Slot, SlotTable, Snapshot

SUCCESS = frozenset({"success", "filled", "ok", "done", "executed", "open", "opened", "partially_filled"})
REFUSED = frozenset(
    [
        "failed",
        "rejected",
        "reject",
        "insufficient_margin",
        "invalid_stops",
        "invalid_volume",
        "invalid_price",
        "hedge_blocked",
        "max_positions",
        "no_money",
        "market_closed",
        "trade_disabled",
        "cancelled",
        "canceled",
    ]
)
#: Outcomes nobody knows until the next snapshot.
DOUBTFUL = frozenset({"timeout", "unknown", "disconnected", "error"})
#: MT5 return codes that decide where the status is silent, or contradicts it (a timeout may have filled).
RETCODES = {
    **dict.fromkeys((10008, 10009, 10010, 10025), "done"),
    **dict.fromkeys((10011, 10012, -11), "timeout"),
    **dict.fromkeys((10006, 10007, 10013, 10014, 10015, 10016, 10017, 10018, 10019, 10022, 10026, 10027), "rejected"),
    **dict.fromkeys((10029, 10030, *range(10032, 10036), 10040, *range(10042, 10047)), "rejected"),
}
_TABLE = "table:"
_SWITCH = "kill_switch"
#: A tick this much later than the last event means a replay: event time decides, not the wall clock.
_REPLAY_LAG_S = 86_400.0


class Engine:
    """All slot tables, the last quotes and the kill switch of one bus."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = configuration.load(context.config)
        self.quotes: dict[str, Quote] = {}
        self.tables: dict[str, SlotTable] = {}
        self.users: dict[str, str] = dict(self.config.accounts)
        self.kill_switch = context.state.get(_SWITCH) == b"on"
        self.clock = 0.0
        self.verdicts = 0
        self.fires = 0
        self._configs: dict[str, configuration.Config] = {}
        self._saved: dict[str, bytes] = {}
        self._touched = False
        self._quote_class: type[Any] | None = None
        self._new_quotes: dict[str, Any] = {}
        self._load()
        self._handlers: dict[str, Callable[[Any], None]] = {
            "signal_generated": self.on_signal,
            "fire_command": self.on_fire,
            "trade_executed": self.on_executed,
            "trade_confirmed": self.on_executed,
            "position_closed": self.on_closed,
            "ea_heartbeat": self.on_heartbeat,
            "balance_update": self.on_balance,
            "user_action": self.on_action,
        }

    # -- events ---------------------------------------------------------------------------------

    def handle(self, batch: Any) -> None:
        """One batch in bus order; quotes are put by, and read only when somebody asks for them."""
        new, quote_class, last = self._new_quotes, self._quote_class, None
        try:
            for event in batch:
                if type(event) is quote_class:
                    last = new[event.data.symbol] = event
                elif event.event_type == "market_data":
                    quote_class = self._quote_class = type(event)
                    last = new[event.data.symbol] = event
                else:
                    if last is not None:
                        self.clock = last.timestamp
                    kind = event.event_type
                    # of the actions of users only the kill switch matters, and that is no part of a table
                    self._touched = self._touched or kind != "user_action"
                    self._handlers[kind](event)
                    last = event
        finally:
            self._read_quotes()
            if last is not None:
                self.clock = last.timestamp

    def _read_quotes(self) -> None:
        """Take the new quotes over; an event is not kept, for it keeps its whole batch in memory."""
        for symbol, event in self._new_quotes.items():
            data = event.data
            if data.bid is not None and data.ask is not None:
                self.quotes[symbol] = Quote(data.bid, data.ask, event.timestamp)
        self._new_quotes.clear()

    def on_signal(self, event: Any) -> None:
        data = event.data
        table = self.table(self.user(event))
        config = self.config_of(table.user_id)
        signal = Signal(
            signal_id=data.signal_id,
            symbol=data.symbol,
            direction=_direction(data),
            confidence=data.confidence,
            sl=_get(data, "sl"),
            tp=_get(data, "tp"),
            entry=_get(data, "entry", "entry_price") or None,
            pattern=_get(data, "pattern_type", "pattern"),
            at=event.timestamp,
        )
        self._read_quotes()
        verdict = evaluate(signal, _account(table), self._view(table), self.quotes, config)
        self.verdicts += 1
        self.context.emit(
            "gate_verdict",
            {
                "signal_id": signal.signal_id,
                "user_id": table.user_id,
                "fire": verdict.fire,
                "reasons": list(verdict.reasons),
                "rules": [
                    {"name": r.name, "limit": r.limit, "actual": r.actual, "passed": r.passed} for r in verdict.rules
                ],
                "lots": float(verdict.lots),
                "risk": float(verdict.risk),
                "slots_used": table.used,
            },
            cause=event,
            user_id=table.user_id,
        )
        if verdict.fire:
            self._fire(table, signal, verdict, event)

    def _fire(self, table: SlotTable, signal: Signal, verdict: Verdict, event: Any) -> None:
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
        target = next((uuid for uuid, user in self.users.items() if user == table.user_id), None)
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
        self._publish(table, [table.reserve(slot)], event)

    def on_fire(self, event: Any) -> None:
        data = event.data
        status = (_get(data, "status") or "queued").lower()
        held = self._holder(data)
        table = held or self.table(self.user(event))
        self._bind(_get(data, "target_uuid"), table)
        if status.startswith("closed") or status in REFUSED or status in DOUBTFUL:
            self._answer(table, event, status)
            return
        auto = (_get(data, "execution_mode") or "").upper() == "AUTO"
        if not (auto or self.config_of(table.user_id).track_manual) or not data.fire_id:
            return
        slot = Slot(
            data.fire_id,
            "RESERVED",
            event.timestamp,
            data.symbol,
            _direction(data),
            data.fire_id,
            _get(data, "signal_id"),
            lots=_get(data, "lot", "lots", "volume"),
        )
        self._publish(table, [table.reserve(slot)], event)

    def on_executed(self, event: Any) -> None:
        data = event.data
        table = self._holder(data) or self.table(self.user(event))
        uuid = _get(data, "target_uuid")
        self._bind(uuid, table)
        balance = _get(data, "balance")
        if balance is not None:
            self._balance(table, uuid, balance, _get(data, "equity"))
        self._answer(table, event, _status(data))

    def _answer(self, table: SlotTable, event: Any, status: str) -> None:
        """What an answer to a fire says about its slot; FILLED opens it, only CLOSED and refusals free it."""
        data, at = event.data, event.timestamp
        ticket = _get(data, "ticket") or None
        slot = table.find(_get(data, "fire_id"), ticket, _get(data, "position_id"))
        evidence = f"status:{status}@{event.bus_seq}"
        changes: list[Change | None] = []
        if status in SUCCESS:
            changes += table.opened(self._opened_slot(event, ticket))
        elif status.startswith("closed") and "partial" not in status:
            changes.append(table.release(slot, status, (evidence,), at))
        elif status in REFUSED and slot is not None:
            if ticket is None and slot.ticket is None:
                changes.append(table.release(slot, "rejected", (evidence,), at))
            elif slot.state in ("RESERVED", "UNKNOWN"):
                # Refused, yet with a ticket: there may be a position (levels not set, for example).
                slot.ticket = ticket
                table.doubt(slot, evidence, at)
        elif status in DOUBTFUL and slot is not None and slot.state == "RESERVED":
            table.doubt(slot, evidence, at)
        self._publish(table, changes, event)

    def _opened_slot(self, event: Any, ticket: int | None) -> Slot:
        data = event.data
        fire_id = _get(data, "fire_id")
        return Slot(
            fire_id or f"ticket-{ticket}",
            "OPEN",
            event.timestamp,
            _get(data, "symbol") or "",
            _direction(data),
            fire_id,
            _get(data, "signal_id"),
            ticket,
            _get(data, "position_id"),
            _get(data, "magic"),
            _get(data, "open_price", "price"),
            lots=_get(data, "lot", "lots", "volume"),
            account=_get(data, "target_uuid"),
        )

    def on_closed(self, event: Any) -> None:
        data = event.data
        table = self._holder(data) or self.table(self.user(event))
        slot = table.find(_get(data, "fire_id"), _get(data, "ticket"), _get(data, "position_id"))
        evidence = f"position_closed@{event.bus_seq}"
        self._publish(table, [table.closed(slot, _get(data, "volume"), evidence, event.timestamp)], event)

    def on_heartbeat(self, event: Any) -> None:
        data = event.data
        table = self.table(self.user(event))
        config = self.config_of(table.user_id)
        account = str(_get(data, "target_uuid", "account_number") or "")
        positions = _get(data, "positions")
        snapshot = Snapshot(
            account,
            event.timestamp,
            _get(data, "open_positions"),
            None if positions is None else tuple(_position(each) for each in positions),
            f"snapshot@{event.bus_seq}",
        )
        changes = table.snapshot(snapshot, self.clock, config.heartbeat_max_age_s, config.snapshot_grace_s)
        if _get(data, "balance") is not None:
            self._balance(table, account, data.balance, _get(data, "equity"))
        self._publish(table, changes, event)

    def on_balance(self, event: Any) -> None:
        balance = _get(event.data, "balance", "new_balance")
        if balance is not None:
            table = self.table(self.user(event))
            self._balance(table, _get(event.data, "target_uuid"), balance, _get(event.data, "equity"))
            self._publish(table, [], event)

    def on_action(self, event: Any) -> None:
        data = event.data
        action = data.get("action") if type(data) is dict else data.action
        if action not in ("kill_switch_on", "kill_switch_off"):
            return
        wanted = action == "kill_switch_on"
        if wanted == self.kill_switch:
            return
        self.kill_switch = wanted
        self.context.state[_SWITCH] = b"on" if wanted else b"off"
        who = event.user_id or "unknown"
        self._alert("kill_switch", wanted, "warning", f"auto-fire kill switch {action[12:]} by {who}", event)

    def on_tick(self, now: float) -> None:
        """The reconcile cycle: unanswered fires, old positions, silent terminals."""
        if self.clock and now - self.clock > _REPLAY_LAG_S:
            now = self.clock
        self._touched = True
        for table in self.tables.values():
            config = self.config_of(table.user_id)
            table.review(now, config.answer_timeout_s, config.stale_age_s, config.heartbeat_max_age_s)
            self._publish(table, [], None, now)

    # -- who and what ---------------------------------------------------------------------------

    def user(self, event: Any) -> str:
        """Whose event this is: named, else by the terminal, else the configured user."""
        named = event.user_id or _get(event.data, "user_id")
        if named:
            return str(named)
        return self.users.get(_get(event.data, "target_uuid") or "", self.config.user_id)

    def table(self, user: str) -> SlotTable:
        table = self.tables.get(user)
        if table is None:
            table = self.tables[user] = SlotTable(user, self.config_of(user).max_slots)
        return table

    def config_of(self, user: str) -> configuration.Config:
        found = self._configs.get(user)
        if found is None:
            found = self._configs[user] = configuration.for_user(self.context.config, self.config, user)
        return found

    def _holder(self, data: Any) -> SlotTable | None:
        """The table that already holds what `data` talks about."""
        key = (_get(data, "fire_id"), _get(data, "ticket") or None, _get(data, "position_id"))
        uuid = _get(data, "target_uuid")
        for table in self.tables.values():
            slot = table.find(*key)
            if slot is not None and (slot.key == key[0] or slot.account in (None, uuid) or uuid is None):
                return table
        return None

    def _bind(self, uuid: str | None, table: SlotTable) -> None:
        """Learn which user a terminal trades for; what it reported before that moves to the user."""
        if not uuid or uuid in self.users:
            return
        self.users[uuid] = table.user_id
        for other in self.tables.values():
            if other is table or uuid not in other.accounts:
                continue
            table.accounts[uuid] = other.accounts.pop(uuid)
            for key in [key for key, slot in other.slots.items() if slot.account == uuid]:
                table.slots.setdefault(key, other.slots.pop(key))

    def _balance(self, table: SlotTable, account: str | None, balance: float, equity: float | None) -> None:
        name = account or next(iter(table.accounts), "")
        table.balance(name, balance, equity, self.config_of(table.user_id).balance_jump)

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

    # -- output ---------------------------------------------------------------------------------

    def _publish(
        self, table: SlotTable, changes: list[Change] | list[Change | None], cause: Any, now: float | None = None
    ) -> None:
        for change in changes:
            # A slot whose symbol nobody told yet occupies; it is announced when a snapshot names it.
            if change is not None and change.slot.symbol:
                self.context.emit(
                    f"slot_{change.kind}", _payload(table, change), cause=cause, timestamp=now, user_id=table.user_id
                )
        over = table.used > table.maximum
        if over != table.over_limit:
            table.over_limit = over
            text = f"{table.used}/{table.maximum} slots in use for user {table.user_id}"
            hint = ": the gate stays closed until positions close" if over else ": within the limit again"
            self._alert(f"slots_over_limit:{table.user_id}", over, "critical", text + hint, cause, now)
        if table.reconcile and not table.asked:
            data: dict[str, Any] = {
                "user_id": table.user_id,
                "reasons": list(table.witnesses),
                "fire_ids": list(table.slots),
            }
            data |= {"slots_used": table.used, "slots_max": table.maximum}
            self.context.emit("reconcile_requested", data, cause=cause, timestamp=now, user_id=table.user_id)
        table.asked = table.reconcile

    def _alert(
        self, name: str, raised: bool, severity: str, message: str, cause: Any, now: float | None = None
    ) -> None:
        self.context.emit(
            "alert",
            {
                "name": name,
                "severity": severity if raised else "info",
                "message": message,
                "state": "raised" if raised else "cleared",
                "component": "slots",
            },
            cause=cause,
            timestamp=now,
        )

    # -- durability -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write the tables that changed; they commit with the cursor and with what was emitted."""
        if not self._touched:
            return  # only quotes came, and those are not kept
        self._touched = False
        for user, table in self.tables.items():
            packed = msgspec.msgpack.encode(table)
            if self._saved.get(user) != packed:
                self._saved[user] = packed
                self.context.state[_TABLE + user] = packed
        users = msgspec.msgpack.encode(self.users)
        if self._saved.get("") != users:
            self._saved[""] = users
            self.context.state["users"] = users

    def _load(self) -> None:
        for key in list(self.context.state):
            if key.startswith(_TABLE):
                table = msgspec.msgpack.decode(self.context.state[key], type=SlotTable)
                table.maximum = self.config_of(table.user_id).max_slots
                self.tables[table.user_id] = table
        known = self.context.state.get("users")
        if known:
            self.users = msgspec.msgpack.decode(known, type=dict[str, str]) | self.users


def short_fire_id(signal_id: str, user_id: str) -> str:
    """18 characters that fit an order comment; the same for the same signal and user."""
    digest = hashlib.blake2b(f"{user_id}\0{signal_id}".encode(), digest_size=10).digest()
    return "a-" + b32encode(digest).decode("ascii").lower()


def _get(data: Any, *names: str) -> Any:
    """The first of the fields `names` of a payload that is there and not None."""
    for name in names:
        value = data.get(name) if isinstance(data, dict) else getattr(data, name, None)
        if value is not None and value is not msgspec.UNSET:
            return value
    return None


def _status(data: Any) -> str:
    """The status of an answer in lower case; a return code decides where there is none or the outcome is open."""
    status = str(_get(data, "status") or "").lower()
    by_code = RETCODES.get(_get(data, "retcode") or 0, "")
    return by_code if by_code and (not status or (status in REFUSED and by_code == "timeout")) else status


def _direction(data: Any) -> str:
    return str(_get(data, "direction", "type") or "").upper()


def _position(each: Any) -> Position:
    return Position(
        ticket=_get(each, "ticket"),
        symbol=_get(each, "symbol") or "",
        direction=_direction(each),
        position_id=_get(each, "position_id"),
        fire_id=_get(each, "fire_id"),
        open_price=_get(each, "open_price"),
        volume=_get(each, "volume"),
        magic=_get(each, "magic"),
        open_time=_get(each, "open_time"),
    )


def _account(table: SlotTable) -> Account | None:
    """The figures the gate decides on: of several accounts the poorest, and the oldest heartbeat."""
    views: list[AccountView] = [view for view in table.accounts.values() if view.balance is not None]
    beats = [view.heartbeat_at for view in table.accounts.values() if view.heartbeat_at is not None]
    if not views:
        return Account(heartbeat_at=min(beats)) if beats else None
    poorest = min(views, key=lambda view: view.balance or 0.0)
    return Account(poorest.balance, poorest.equity, min(beats) if beats else None)


def _payload(table: SlotTable, change: Change) -> dict[str, Any]:
    slot = change.slot
    common: dict[str, Any] = {
        "fire_id": slot.key,
        "symbol": slot.symbol,
        "direction": slot.direction,
        "user_id": table.user_id,
        "slots_used": table.used,
        "slots_max": table.maximum,
        "signal_id": slot.signal_id,
        "ticket": slot.ticket,
    }
    if change.kind == "opened":
        common["position_id"] = slot.position_id
    if change.kind == "released":
        common |= {"method": change.method, "evidence": list(change.evidence)}
    return {key: value for key, value in common.items() if value is not None}

"""Turns events into slot changes, and keeps the tables durable. Runs on one consumer thread only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from tapebus.consumer import Context
from tapebus_slots import config as configuration
from tapebus_slots import durable
from tapebus_slots.answers import POSITION_CLOSED, read
from tapebus_slots.decide import Decider
from tapebus_slots.matching import Position
from tapebus_slots.payload import direction, get
from tapebus_slots.sizing import Quote
from tapebus_slots.slot import Change, Close, Slot, Snapshot
from tapebus_slots.table import SlotTable

#: A tick this much later than the last event means a replay: event time decides, not the wall clock.
_REPLAY_LAG_S = 86_400.0


class Engine:
    """All slot tables and the last quotes of one bus; the gate is its `decider`."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.decider = Decider(context)
        self.config = self.decider.config
        self.quotes: dict[str, Quote] = {}
        self.tables = durable.load(context.state)
        self.users: dict[str, str] = dict(self.config.accounts)
        self.clock = 0.0
        #: The latest time the tables know of: what a tick goes by until there is an event.
        self._before = durable.last_time(self.tables.values())
        #: The latest time that two events in a row have reached: one clock that is ahead does not move it, nor does
        #: an event that comes late.
        self._agreed = durable.last_time(self.tables.values(), heartbeats=False)
        self._keeper = durable.Keeper(context.state)
        self._touched = False
        self._quote_class: type[Any] | None = None
        self._new_quotes: dict[str, Any] = {}
        known = context.state.get("users")
        if known:
            self.users = msgspec.msgpack.decode(known, type=dict[str, str]) | self.users
        for user, table in self.tables.items():
            table.maximum = self.config_of(user).max_slots
        self._handlers: dict[str, Callable[[Any], None]] = {
            "signal_generated": self.on_signal,
            "fire_command": self.on_fire,
            "trade_executed": self.on_executed,
            "trade_confirmed": self.on_executed,
            "position_closed": self.on_closed,
            "ea_heartbeat": self.on_heartbeat,
            "balance_update": self.on_balance,
            "user_fire_mode": self.on_fire_mode,
            **self.decider.handlers,
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
                    self._handlers[kind](event)
                    if kind != "user_action":  # of those only the kill switch matters, which is no part of a table
                        self._touched = True
                        self._agreed = max(self._agreed, min(self.clock, event.timestamp))
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
        """Judge a signal for each user it concerns; the slots it takes are held before the next signal is read."""
        self._read_quotes()
        named = event.user_id or get(event.data, "user_id")
        for user in self.decider.users(self.user(event), bool(named)):
            table = self.table(user)
            target = next((uuid for uuid, owner in self.users.items() if owner == user), None)
            changes = self.decider.on_signal(event, table, self.quotes, target)
            if changes:
                self._publish(table, changes, event)

    def on_fire(self, event: Any) -> None:
        data = event.data
        status = (get(data, "status") or "queued").lower()
        known = event.user_id or get(data, "user_id") or get(data, "target_uuid") in self.users
        table = self.table(self.user(event)) if known else self._holder(event)
        self._bind(get(data, "target_uuid"), table)
        if read(status, None) not in ("pending", "filled", "already"):
            self._answer(table, event)
            return
        auto = (get(data, "execution_mode") or "").upper() == "AUTO"
        if not (auto or self.config_of(table.user_id).track_manual) or not data.fire_id:
            return
        slot = Slot(
            data.fire_id,
            "RESERVED",
            event.timestamp,
            data.symbol,
            direction(data),
            data.fire_id,
            get(data, "signal_id"),
            lots=get(data, "lot", "lots", "volume"),
            sl=get(data, "sl") or None,
        )
        self._publish(table, [table.reserve(slot, event.bus_seq, status)], event)

    def on_executed(self, event: Any) -> None:
        data = event.data
        table = self._holder(event)
        self._bind(get(data, "target_uuid"), table)
        balance = get(data, "balance")
        if balance is not None:
            self._balance(table, balance, event)
        self._answer(table, event)

    def _answer(self, table: SlotTable, event: Any) -> None:
        """What an answer to a fire says about its slot; FILLED opens it, only CLOSED and refusals free it."""
        data, at, seq = event.data, event.timestamp, event.bus_seq
        ticket, retcode = get(data, "ticket") or None, get(data, "retcode")
        slot = table.find(get(data, "fire_id"), ticket, get(data, "position_id"), get(data, "target_uuid"))
        answer = read(get(data, "status"), retcode)
        says = str(get(data, "status") or f"retcode {retcode}").lower()
        changes: list[Change | None] = []
        if answer != "filled":
            changes += table.named(slot, ticket, answer == "closed")
        if answer == "filled":
            changes += table.opened(self._opened_slot(event, ticket), seq, says)
        elif slot is None:
            pass  # of a fire that takes no slot, or is over
        elif answer == "closed":
            grace = self.config_of(table.user_id).snapshot_grace_s
            changes.append(table.gone(slot, says, says, (f"status:{says}@{seq}",), at, seq, grace))
        elif answer == "refused":
            changes += table.refused(slot, ticket, says, at, seq)
        elif answer == "already" and retcode == POSITION_CLOSED:
            slot.heard("gone", "the broker says already closed", at, "strong", seq, after=True)
            table.ask(f"already_closed:{slot.key}")
        elif slot.state == "RESERVED" and answer == "unknown":
            slot.ticket = slot.ticket or ticket
            table.doubt(slot, says, at, seq)
        elif slot.state == "RESERVED" and answer in ("retry", "pending"):
            # Whoever sent it may send it again: it has the time of an answer once more.
            slot.since = at if answer == "retry" else slot.since
            slot.heard("held", says, at, "weak", seq, after=True)
        self._publish(table, changes, event)

    def _opened_slot(self, event: Any, ticket: int | None) -> Slot:
        data = event.data
        fire_id = get(data, "fire_id")
        return Slot(
            fire_id or f"ticket-{ticket}",
            "OPEN",
            event.timestamp,
            get(data, "symbol") or "",
            direction(data),
            fire_id,
            get(data, "signal_id"),
            ticket,
            get(data, "position_id"),
            get(data, "magic"),
            get(data, "open_price", "price"),
            lots=get(data, "lot", "lots", "volume"),
            account=get(data, "target_uuid"),
        )

    def on_closed(self, event: Any) -> None:
        data = event.data
        table = self._holder(event)
        slot = table.find(get(data, "fire_id"), get(data, "ticket"), get(data, "position_id"), get(data, "target_uuid"))
        grace = self.config_of(table.user_id).snapshot_grace_s
        close = _close(event)
        whole = slot is not None and (close.lots or 0.0) >= (slot.opened_lots or 0.0)
        changes: list[Change | None] = [*table.named(slot, get(data, "ticket"), whole)]
        if changes and not get(data, "fire_id"):
            slot = table.find(None, get(data, "ticket"), get(data, "position_id"), get(data, "target_uuid"))
        if slot is not None and slot.guessed and whole and not get(data, "fire_id"):
            # what was taken for its position is closed, which is no word about the order
            changes += table.part(slot, event.timestamp)
            slot = table.find(None, get(data, "ticket"), get(data, "position_id"), get(data, "target_uuid"))
        self._publish(table, [*changes, table.closed(slot, close, grace)], event)

    def on_heartbeat(self, event: Any) -> None:
        data = event.data
        table = self.table(self.user(event))
        config = self.config_of(table.user_id)
        account = str(get(data, "target_uuid", "account_number") or "")
        positions = get(data, "positions")
        snapshot = Snapshot(
            account,
            event.timestamp,
            get(data, "open_positions"),
            None if positions is None else tuple(_position(each) for each in positions),
            event.bus_seq,
            str(get(data, "broker_time", "timestamp") or ""),
        )
        if get(data, "balance") is not None:  # first: a complete list answers what the balance asks
            self._balance(table, data.balance, event)
        latest = max(self.clock, self._agreed)
        changes = table.snapshot(snapshot, self.clock, latest, config.heartbeat_max_age_s, config.snapshot_grace_s)
        view = table.accounts[account]
        view.number = get(data, "account_number") or view.number
        self._publish(table, changes, event)

    def on_balance(self, event: Any) -> None:
        balance = get(event.data, "balance", "new_balance")
        if balance is not None:
            table = self.table(self.user(event))
            self._balance(table, balance, event)
            self._publish(table, [], event)

    def on_fire_mode(self, event: Any) -> None:
        """New limits of a user hold from here on; a lower number of slots may leave the table over its limit."""
        user = self.user(event)
        self.decider.on_fire_mode(event, user)
        table = self.table(user)
        table.maximum = self.config_of(user).max_slots
        self._publish(table, [], event)

    def on_tick(self, now: float) -> None:
        """The reconcile cycle: unanswered fires, old positions, silent terminals."""
        clock = self.clock or self._before
        if clock and now - clock > _REPLAY_LAG_S:
            now = clock
        self._touched = True
        for table in self.tables.values():
            config = self.config_of(table.user_id)
            table.review(now, config.answer_timeout_s, config.stale_age_s, config.heartbeat_max_age_s)
            self._publish(table, [], None, now)

    # -- who and what ---------------------------------------------------------------------------

    def user(self, event: Any) -> str:
        """Whose event this is: named, else by the terminal, else the configured user."""
        named = event.user_id or get(event.data, "user_id")
        if named:
            return str(named)
        return self.users.get(get(event.data, "target_uuid") or "", self.config.user_id)

    def table(self, user: str) -> SlotTable:
        table = self.tables.get(user)
        if table is None:
            table = self.tables[user] = SlotTable(user, self.config_of(user).max_slots)
        return table

    def config_of(self, user: str) -> configuration.Config:
        return self.decider.config_of(user)

    def _holder(self, event: Any) -> SlotTable:
        """The table that holds what `event` talks about, else that of its user.

        Fires of two users may have one id, for copied signals have: that of the event's own user comes first, and
        what one terminal holds is nothing that another speaks of.
        """
        data = event.data
        key = (get(data, "fire_id"), get(data, "ticket") or None, get(data, "position_id"))
        uuid = get(data, "target_uuid")
        user, bound = self.user(event), self.users.get(uuid or "")
        for table in sorted(self.tables.values(), key=lambda each: each.user_id != user):
            if bound not in (None, table.user_id) and table.user_id in self.users.values():
                continue  # who has a terminal of his own gets no answers from that of another
            slot = table.find(*key, uuid)
            if slot is not None and (slot.account in (None, uuid) or uuid is None):
                return table
        return self.table(user)

    def _bind(self, uuid: str | None, table: SlotTable) -> None:
        """Learn which user a terminal trades for; what it reported before that moves to the user."""
        if not uuid or uuid in self.users:
            return
        self.users[uuid] = table.user_id
        for other in self.tables.values():
            if other is table or uuid not in other.accounts:
                continue
            table.accounts[uuid] = other.accounts.pop(uuid)
            for slot in [slot for slot in other.slots.values() if slot.account == uuid]:
                del other.slots[slot.key]
                if slot.key in table.slots:
                    slot.key = f"{slot.key}@{uuid}"  # two brokers number alike
                table.slots.setdefault(slot.key, slot)

    def _balance(self, table: SlotTable, balance: float, event: Any) -> None:
        """New figures of one account; of which, cannot be told where a user has several and it names none."""
        data, names = event.data, list(table.accounts)
        number = get(data, "account_number")
        name = get(data, "target_uuid") or next((each for each in names if table.accounts[each].number == number), None)
        if name is None and len(names) <= 1:
            name = names[0] if names else ""
        if name is not None:
            jump = self.config_of(table.user_id).balance_jump
            latest = max(self.clock, self._agreed)
            if not table.balance(name, balance, get(data, "equity"), jump, event.timestamp, event.bus_seq, latest):
                return
            view, margin = table.accounts[name], get(data, "free_margin")
            view.currency = get(data, "currency") or view.currency
            if margin is not None:
                view.free_margin, view.margin_at = margin, event.timestamp

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
        self._disputes(table, cause, now)
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

    def _disputes(self, table: SlotTable, cause: Any, now: float | None) -> None:
        """Witnesses that contradict each other are shown to a person before anything is released."""
        found = table.disputes()
        new = [key for key in found if key not in table.disputed]
        name = f"slots_disagree:{table.user_id}"
        if new:
            text = "; ".join(f"slot {key}: {found[key]}" for key in new)[:1500]
            self._alert(name, True, "warning", f"user {table.user_id}, nothing released: {text}", cause, now)
            for key in new:
                table.ask(f"disagreement:{key}")
        elif table.disputed and not found:
            text = f"user {table.user_id}: the witnesses of every slot agree again"
            self._alert(name, False, "info", text, cause, now)
        table.disputed = list(found)

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
        """Write what changed; it commits with the cursor and with what was emitted."""
        if not self._touched:
            return  # only quotes came, and those are not kept
        self._touched = False
        for table in self.tables.values():
            self._keeper.save(table)
        self._keeper.put("users", msgspec.msgpack.encode(self.users))


def _position(each: Any) -> Position:
    return Position(
        ticket=get(each, "ticket"),
        symbol=get(each, "symbol") or "",
        direction=direction(each),
        position_id=get(each, "position_id"),
        # a position opened by hand comes with an empty one
        fire_id=get(each, "fire_id") or None,
        open_price=get(each, "open_price"),
        volume=get(each, "volume"),
        magic=get(each, "magic"),
        open_time=get(each, "open_time", "broker_time"),
        comment=get(each, "comment") or "",
    )


def _close(event: Any) -> Close:
    data = event.data
    lots, reason = get(data, "volume", "lot", "lots"), get(data, "reason") or ""
    fields = ("ticket", "position_id", "close_price", "profit", "timestamp", "broker_time")
    mark = ":".join(str(each) for each in (lots, reason, *(get(data, name) for name in fields)))
    return Close(lots, event.timestamp, event.bus_seq, f"closed {lots} {reason}".rstrip(), mark)


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

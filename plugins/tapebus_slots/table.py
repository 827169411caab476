"""The slot table of one user: which trading positions are held, and what may release them.

Only strong evidence (a close, a refusal) or two consecutive complete snapshots release a slot.
Weak evidence (a balance jump, age, a smaller count, silence) is noted as a witness and nothing more:
a lost slot lets the gate open one position too many, a slot held too long only skips a signal.

No clock and no I/O in here; every time is event time in Unix seconds. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from tapebus_slots.matching import Position, match

State = Literal["RESERVED", "OPEN", "RELEASING", "UNKNOWN"]
#: Snapshots in a row that must lack a position before its slot is released.
SNAPSHOTS_TO_RELEASE = 2
#: Finished fires and witnesses remembered, oldest forgotten first.
REMEMBERED = 1024
WITNESSES = 8
_VOLUME_EPSILON = 1e-9


class Slot(Struct, omit_defaults=True):
    """One held slot; a FREE slot is one that is not in the table. ``key`` names it: the fire id, or a ticket."""

    key: str
    state: State
    since: float
    symbol: str = ""
    direction: str = ""
    fire_id: str | None = None
    signal_id: str | None = None
    ticket: int | None = None
    position_id: int | None = None
    magic: int | None = None
    open_price: float | None = None
    open_time: float | str | None = None
    lots: float | None = None
    risk: str | None = None
    account: str | None = None
    missing: list[str] = []
    witnesses: list[str] = []


class Snapshot(Struct, frozen=True):
    """One heartbeat's view of the account. ``count`` is what it says, ``positions`` what it lists."""

    account: str
    at: float
    count: int | None
    positions: tuple[Position, ...] | None
    evidence: str = ""

    @property
    def complete(self) -> bool:
        return self.positions is not None and self.count == len(self.positions)


class Change(Struct, frozen=True):
    """What an input did to one slot. ``method`` and ``evidence`` are set for a release."""

    kind: Literal["reserved", "opened", "released"]
    slot: Slot
    method: str = ""
    evidence: tuple[str, ...] = ()


class AccountView(Struct, omit_defaults=True):
    """The last figures of one broker account."""

    balance: float | None = None
    equity: float | None = None
    heartbeat_at: float | None = None
    count: int | None = None


class SlotTable(Struct):
    """All slots of one user, and the accounts they are held in."""

    user_id: str
    maximum: int
    slots: dict[str, Slot] = {}
    accounts: dict[str, AccountView] = {}
    #: Fires that ended: key to [method, time]. A late confirmation must not open them again.
    ended: dict[str, tuple[str, float]] = {}
    fired: dict[str, float] = {}
    witnesses: list[str] = []
    #: A reconciliation is wanted / was already asked for.
    reconcile: bool = False
    asked: bool = False
    over_limit: bool = False

    @property
    def local(self) -> int:
        """Slots held here; every state in the table occupies, RESERVED and UNKNOWN included."""
        return len(self.slots)

    @property
    def used(self) -> int:
        """The occupancy: the larger of what is held here and what the broker reports. May exceed ``maximum``.

        Fires sent and positions opened after the broker's last count come on top of that count:
        otherwise a count without a list would let every signal until the next heartbeat through.
        """
        counts = [view.count for view in self.accounts.values() if view.count]
        if not counts:
            return self.local
        return max(self.local, sum(counts) + sum(1 for slot in self.slots.values() if self._uncounted(slot)))

    def _uncounted(self, slot: Slot) -> bool:
        view = self._view(slot)
        counted_at = None if view is None else view.heartbeat_at
        return slot.state == "RESERVED" or (slot.state == "OPEN" and counted_at is not None and slot.since > counted_at)

    def _view(self, slot: Slot) -> AccountView | None:
        if slot.account is not None:
            return self.accounts.get(slot.account)
        return next(iter(self.accounts.values())) if len(self.accounts) == 1 else None

    # -- strong evidence ------------------------------------------------------------------------

    def reserve(self, slot: Slot) -> Change | None:
        """Hold a slot for a fire that was sent; None where it is already held or already over."""
        if slot.key in self.slots or slot.key in self.ended:
            return None
        self.slots[slot.key] = slot
        return Change("reserved", slot)

    def opened(self, slot: Slot) -> list[Change]:
        """A fill: the position is open and occupies its slot. A fill is never a close."""
        ended = self.ended.get(slot.key)
        if ended is not None and ended[0] != "rejected":
            return []
        changes = []
        held = self.slots.get(slot.key)
        twin = self.find(None, slot.ticket, slot.position_id)
        if held is None and twin is not None:
            held = twin
        elif twin is not None and twin is not held:
            # A snapshot saw the position before its confirmation arrived: one position, one slot.
            del self.slots[twin.key]
            changes.append(Change("released", twin, "merged", (f"same_position:{slot.key}",)))
        if held is None:
            self.ended.pop(slot.key, None)
            self.slots[slot.key] = held = slot
        elif held.state in ("OPEN", "RELEASING"):
            _learn(held, slot)
            return changes
        else:
            _learn(held, slot)
            held.since = slot.since
        held.state = "OPEN"
        held.missing = []
        changes.append(Change("opened", held))
        return changes

    def release(self, slot: Slot | None, method: str, evidence: Iterable[str], at: float) -> Change | None:
        """Free `slot`; idempotent, None where it is not held (any more)."""
        if slot is None or self.slots.get(slot.key) is not slot:
            return None
        del self.slots[slot.key]
        self.ended[slot.key] = (method, at)
        while len(self.ended) > REMEMBERED:
            del self.ended[next(iter(self.ended))]
        return Change("released", slot, method, (*evidence, *slot.witnesses))

    def closed(self, slot: Slot | None, volume: float | None, evidence: str, at: float) -> Change | None:
        """A reported close: of the full volume it releases, of a part the slot stays with what is left."""
        if slot is None:
            return None
        if volume is not None and slot.lots is not None and 0 < volume < slot.lots - _VOLUME_EPSILON:
            slot.lots = round(slot.lots - volume, 8)
            return None
        change = self.release(slot, "position_closed", (evidence,), at)
        view = self._view(slot)
        if change and view and view.count and view.heartbeat_at is not None and slot.since <= view.heartbeat_at < at:
            view.count -= 1  # the broker counted it before it closed
        return change

    def doubt(self, slot: Slot, witness: str, at: float) -> None:
        """Nobody knows what became of the request: it occupies its slot until reconciled."""
        slot.state = "UNKNOWN"
        slot.since = at
        slot.missing = []
        self.witness(witness, slot)

    # -- snapshots ------------------------------------------------------------------------------

    def snapshot(self, snapshot: Snapshot, now: float, max_age: float, grace: float) -> list[Change]:
        """Take over a heartbeat. An incomplete one may only change the count, never release.

        One more than `max_age` seconds behind `now` (the time of the event before it) or not newer
        than the last one is no evidence; `grace`: seconds a position must be older than the snapshot
        before its absence means anything.
        """
        if snapshot.account not in self.accounts:
            self.accounts[snapshot.account] = self.accounts.pop("", AccountView())
        view = self.accounts[snapshot.account]
        if view.heartbeat_at is not None and view.heartbeat_at > now + max_age:
            view.heartbeat_at = None  # stamped by a clock that was ahead: it must not mute the heartbeats after it
        if snapshot.at < now - max_age or (view.heartbeat_at is not None and snapshot.at <= view.heartbeat_at):
            return []
        before, view.heartbeat_at = view.count, snapshot.at
        view.count = max(snapshot.count or 0, len(snapshot.positions or ())) if snapshot.count is not None else before
        mine = [slot for slot in self.slots.values() if self._in(slot, snapshot.account)]
        pairs, strangers = match(mine, snapshot.positions or ())
        changes = [change for slot, position in pairs for change in self._seen(slot, position, snapshot)]
        if not snapshot.complete:
            for slot in mine:
                _calm(slot)
            if before is not None and snapshot.count is not None and snapshot.count < before:
                self.witness(f"count_decreased:{before}->{snapshot.count}")
            return changes
        self.reconcile = False
        found = {slot.key for slot, _ in pairs}
        for slot in mine:
            if slot.key not in found:
                changes += self._missed(slot, snapshot, grace)
        for position in strangers:
            changes += self._adopt(position, snapshot, grace)
        self.witnesses = []
        return changes

    def _in(self, slot: Slot, account: str) -> bool:
        """Whether a snapshot of `account` can speak about `slot`."""
        return slot.account == account or (slot.account is None and len(self.accounts) <= 1)

    def _seen(self, slot: Slot, position: Position, snapshot: Snapshot) -> list[Change]:
        slot.account = snapshot.account
        waiting = slot.state in ("RESERVED", "UNKNOWN") or not slot.symbol
        known = slot.ticket is not None
        slot.ticket = position.ticket
        slot.position_id = position.position_id if position.position_id is not None else slot.position_id
        slot.magic = position.magic if position.magic is not None else slot.magic
        slot.open_price = position.open_price if position.open_price is not None else slot.open_price
        slot.open_time = position.open_time if position.open_time is not None else slot.open_time
        slot.lots = position.volume if position.volume is not None else slot.lots
        slot.symbol, slot.direction = position.symbol or slot.symbol, position.direction or slot.direction
        slot.state = "OPEN"
        slot.missing = []
        if not waiting:
            return []
        slot.since = slot.since if known else snapshot.at
        return [Change("opened", slot)]

    def _missed(self, slot: Slot, snapshot: Snapshot, grace: float) -> list[Change]:
        if slot.state == "RESERVED" or snapshot.at < slot.since + grace:
            return []
        slot.missing = [*slot.missing, snapshot.evidence or f"snapshot@{snapshot.at}"]
        if len(slot.missing) < SNAPSHOTS_TO_RELEASE:
            if slot.state == "OPEN":
                slot.state = "RELEASING"
            return []
        change = self.release(slot, "snapshot", slot.missing, snapshot.at)
        return [] if change is None else [change]

    def _adopt(self, position: Position, snapshot: Snapshot, grace: float) -> list[Change]:
        """A position nobody announced occupies a slot too: the broker's list is the truth."""
        key = position.fire_id or f"ticket-{position.ticket}"
        ended = self.ended.get(key) or self.ended.get(f"ticket-{position.ticket}")
        if key in self.slots:
            key = f"ticket-{position.ticket}"
        if key in self.slots or (ended is not None and snapshot.at < ended[1] + grace):
            return []
        self.ended.pop(key, None)
        slot = Slot(key, "OPEN", snapshot.at, fire_id=position.fire_id)
        self.slots[key] = slot
        self._seen(slot, position, snapshot)
        return [Change("opened", slot)]

    # -- weak evidence and time -----------------------------------------------------------------

    def witness(self, text: str, slot: Slot | None = None) -> None:
        """Note weak evidence and ask for a reconciliation; releases nothing."""
        if slot is not None:
            slot.witnesses = [*slot.witnesses, text][-WITNESSES:]
        self.witnesses = [*self.witnesses, text][-WITNESSES:]
        self.reconcile = True

    def balance(self, account: str, balance: float, equity: float | None, jump: float) -> None:
        """New account figures; a move of at least `jump` with slots held is a witness (deposits move it too)."""
        view = self.accounts.setdefault(account, AccountView())
        before, view.balance = view.balance, balance
        view.equity = equity if equity is not None else view.equity
        if before is not None and self.slots and abs(balance - before) >= jump:
            self.witness(f"balance_jump:{balance - before:+.2f}")

    def review(self, now: float, answer_timeout: float, stale_age: float, heartbeat_age: float) -> None:
        """The periodic look at the clock: unanswered fires become UNKNOWN, old or silent ones get a witness."""
        for slot in self.slots.values():
            if slot.state == "RESERVED" and now - slot.since >= answer_timeout:
                self.doubt(slot, "no_answer", now)
            elif now - slot.since >= stale_age and "age" not in slot.witnesses:
                self.witness("age", slot)
        if not self.slots or "silence" in self.witnesses:
            return
        beats = [view.heartbeat_at for view in self.accounts.values() if view.heartbeat_at is not None]
        if beats and now - max(beats) > heartbeat_age:
            self.witness("silence")

    def find(self, fire_id: str | None, ticket: int | None, position_id: int | None) -> Slot | None:
        """The slot of a fire, position or ticket, in this order of trust."""
        if fire_id is not None and fire_id in self.slots:
            return self.slots[fire_id]
        for name, value in (("fire_id", fire_id), ("position_id", position_id), ("ticket", ticket)):
            if value is None:
                continue
            for slot in self.slots.values():
                if getattr(slot, name) == value:
                    return slot
        return None

    def remember_fired(self, signal_id: str, at: float) -> None:
        """A signal fires once, however often it is published."""
        self.fired[signal_id] = at
        while len(self.fired) > REMEMBERED:
            del self.fired[next(iter(self.fired))]


def _learn(held: Slot, new: Slot) -> None:
    """Take over what `new` knows and `held` does not; a newer ticket replaces a renewed one."""
    for name in ("ticket", "position_id", "magic", "open_price", "lots", "account"):
        value = getattr(new, name)
        if value is not None:
            setattr(held, name, value)
    for name in ("symbol", "direction", "signal_id", "fire_id"):
        if not getattr(held, name):
            setattr(held, name, getattr(new, name))


def _calm(slot: Slot) -> None:
    """An incomplete snapshot breaks the run of complete ones."""
    slot.missing = []
    if slot.state == "RELEASING":
        slot.state = "OPEN"

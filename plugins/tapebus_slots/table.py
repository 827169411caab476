"""The slot table of one user: which trading positions are held, and what may release them.

Only strong evidence (a close, a refusal) or two consecutive complete snapshots release a slot.
Weak evidence (a balance move, age, a smaller count, silence) asks for a reconciliation and nothing more:
a lost slot lets the gate open one position too many, a slot held too long only skips a signal.

No clock and no I/O in here; every time is event time in Unix seconds. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from tapebus_slots.matching import Position, match
from tapebus_slots.slot import AccountView, Change, Close, Ended, Slot, Snapshot, Weight, Witness
from tapebus_slots.witnesses import SNAPSHOTS_TO_SETTLE, dispute, testimony, witnesses

#: Finished fires and fired signals remembered, oldest forgotten first.
REMEMBERED = 1024
#: A heartbeat this many seconds ahead of everything else was stamped by a wrong clock; less may be late messages.
AHEAD_S = 900.0
#: Reasons for a reconciliation, former tickets and close reports kept at most.
KEPT = 8


class SlotTable(Struct):
    """All slots of one user, and the accounts they are held in.

    ``ended`` and ``fired`` may be long and change by single entries: ``unsaved`` names those that changed.
    """

    user_id: str
    maximum: int
    slots: dict[str, Slot] = {}
    accounts: dict[str, AccountView] = {}
    #: Fires that ended, by slot key. A late confirmation must not open them again.
    ended: dict[str, Ended] = {}
    fired: dict[str, float] = {}
    unsaved: list[tuple[str, str]] = []
    #: Why a reconciliation is wanted; whether it was already asked for.
    witnesses: list[str] = []
    reconcile: bool = False
    asked: bool = False
    over_limit: bool = False
    #: Slots whose witnesses contradict each other, as the raised alert names them.
    disputed: list[str] = []

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
        view = self.view(slot)
        counted_at = None if view is None else view.heartbeat_at
        return slot.state == "RESERVED" or (slot.state == "OPEN" and counted_at is not None and slot.since > counted_at)

    def view(self, slot: Slot) -> AccountView | None:
        """The account of `slot`, where that is known or there is only one."""
        if slot.account is not None:
            return self.accounts.get(slot.account)
        return next(iter(self.accounts.values())) if len(self.accounts) == 1 else None

    def _account(self, name: str) -> AccountView:
        """The account called `name`; what was told of one without a name is taken to be of the first that has one."""
        if name not in self.accounts:
            self.accounts[name] = self.accounts.pop("", AccountView())
        return self.accounts[name]

    def witnesses_of(self, slot: Slot, now: float) -> dict[str, Witness]:
        """What each witness says of `slot`."""
        return witnesses(slot, self.view(slot), now)

    def disputes(self) -> dict[str, str]:
        """What the witnesses of each slot contradict each other in, by slot key."""
        found = {key: dispute(slot, self.view(slot)) for key, slot in self.slots.items()}
        return {key: text for key, text in found.items() if text}

    # -- orders and their answers ---------------------------------------------------------------

    def reserve(self, slot: Slot, seq: int = 0, says: str = "sent") -> Change | None:
        """Hold a slot for a fire that was sent; None where it is already held or already over."""
        held = self.slots.get(slot.key)
        if held is not None:
            if held.state == "RESERVED":
                held.heard("held", says, slot.since, "weak", seq, after=True)
            return None
        if slot.key in self.ended:
            return None
        slot.opened_lots, slot.sent_at = slot.lots, slot.since
        slot.heard("held", says, slot.since, "weak", seq)
        self.slots[slot.key] = slot
        return Change("reserved", slot)

    def opened(self, slot: Slot, seq: int = 0, says: str = "filled") -> list[Change]:
        """A fill: the position is open and occupies its slot. A fill is never a close."""
        held = self.slots.get(slot.key)
        ended = self._ended(slot.key, slot.ticket, slot.position_id, slot.account) if held is None else None
        if ended is not None and not ended.may_open(slot.since):
            return []
        changes: list[Change] = []
        twin = self._claimant(slot, held)
        if held is None and twin is not None and twin.fire_id is None:
            held, twin = twin, None  # a list had the position before anybody told its fire
        if held is None:
            self._forget(slot.key)
            self.slots[slot.key] = held = slot.nameless()
        if held.guessed and (twin is not None or held.unlike(slot)):
            changes += self._leave(held)
        if twin is not None:
            changes += self._take_over(twin, held, slot.since)
        held.learn(slot)
        held.guess = held.guess and held.ticket != slot.ticket
        if held.status is None or held.status.believes != "gone" or held.status.at < slot.since:
            held.heard("held", says, slot.since, "strong", seq, after=True)
        if held.state in ("RESERVED", "UNKNOWN"):
            if held.all_closed:
                # The report of the close was faster than the confirmation, which alone knew what was opened.
                freed = self.release(held, "position_closed", _reports(held), slot.since)
                return [*changes, freed] if freed is not None else changes
            held.state, held.since, held.absent = "OPEN", slot.since, {}
        return [*changes, *self._announce(held)]

    def _claimant(self, slot: Slot, held: Slot | None) -> Slot | None:
        """Another slot that a list gave the position of `slot`, without a word of the terminal that it is so."""
        for each in self.slots.values():
            same = each.ticket == slot.ticket if slot.position_id is None else each.position_id == slot.position_id
            same = same and (slot.account is None or each.account in (None, slot.account))
            if each is not held and same and slot.ticket is not None and (each.fire_id is None or each.guessed):
                return each
        return None

    def _leave(self, held: Slot) -> list[Change]:
        """The position `held` was taken for is another's: it gets a slot of its own name."""
        key = f"ticket-{held.ticket}"
        other = replace(held, key=key, fire_id=None, signal_id=None, status=None, announced=False, closes={})
        other.opened_lots, other.measured_at, other.former_tickets = held.lots, held.listed_at, []
        held.forget_position()
        if key in self.slots:
            return []
        self.slots[key] = other
        return self._announce(other)

    def named(self, slot: Slot | None, ticket: int | None, whole: bool) -> list[Change]:
        """The terminal names the ticket of `slot`: a position it was only taken for is left where it names another.

        A former ticket may be that of the same position, unless the `whole` of it is closed.
        """
        if slot is None or ticket is None or not slot.guessed or ticket == slot.ticket:
            return []
        return [] if ticket in slot.former_tickets and not whole else self._leave(slot)

    def part(self, slot: Slot, at: float) -> list[Change]:
        """The order of `slot` and the position it was taken for go separate ways; the order is in doubt again."""
        changes = self._leave(slot)
        self.doubt(slot, "position of another", at)
        return changes

    def _take_over(self, twin: Slot, held: Slot, at: float) -> list[Change]:
        """The position `twin` was taken for is that of `held`; a `twin` without an order of its own is gone."""
        held.take_position(twin)
        if twin.fire_id is None:
            del self.slots[twin.key]
            return [Change("released", twin, "merged", (f"same_position:{held.key}",))]
        twin.forget_position()
        self.doubt(twin, "position of another", max(at, twin.since))
        return []

    def _announce(self, slot: Slot) -> list[Change]:
        """The opening of `slot`, once, and not before somebody has told its symbol."""
        if slot.announced or not slot.symbol:
            return []
        slot.announced = True
        return [Change("opened", slot)]

    def refused(self, slot: Slot, ticket: int | None, says: str, at: float, seq: int) -> list[Change]:
        """A refusal frees a slot that waits for its answer; with a ticket, or of an open position, it is a doubt."""
        changes: list[Change] = []
        if ticket is None and slot.guessed:
            changes = self._leave(slot)
        elif slot.state in ("OPEN", "RELEASING"):
            slot.heard("unsure", f"{says} after it was open", at, "strong", seq, after=True)
            self.ask(f"contradiction:{slot.key}")
            return []
        if ticket is None and slot.ticket is None:
            slot.heard("gone", says, at, "strong", seq, after=True)
            freed = self.release(slot, "rejected", (f"status:{says}@{seq}",), at)
            return [*changes, freed] if freed is not None else changes
        # Refused, yet with a ticket: there may be a position (levels not set, for example).
        slot.ticket = slot.ticket or ticket
        self.doubt(slot, f"{says} with ticket {slot.ticket}", at, seq)
        return changes

    def doubt(self, slot: Slot, says: str, at: float, seq: int = 0) -> None:
        """Nobody knows what became of the request: it occupies its slot until reconciled."""
        slot.heard("unsure", says, at, "weak", seq, after=True)
        slot.state, slot.since, slot.absent = "UNKNOWN", at, {}
        self.ask(f"{says.replace(' ', '_')}:{slot.key}")

    def release(self, slot: Slot | None, method: str, evidence: Iterable[str], at: float) -> Change | None:
        """Free `slot`; idempotent, None where it is not held (any more)."""
        if slot is None or self.slots.get(slot.key) is not slot:
            return None
        proof = (*evidence, *testimony(self.witnesses_of(slot, at)))
        del self.slots[slot.key]
        self.ended[slot.key] = Ended(
            method, at, slot.ticket, slot.position_id, slot.account, proof, slot.state in ("OPEN", "RELEASING")
        )
        self.unsaved.append(("ended", slot.key))
        _bound(self.ended, "ended", self.unsaved)
        view = self.view(slot)
        if view is not None and view.heartbeat_at is not None and slot.since <= view.heartbeat_at:
            view.expected = max(0, view.expected - 1)
            if view.count and slot.listed_at == view.heartbeat_at and method != "snapshot":
                view.count -= 1  # the broker counted it before it closed
        return Change("released", slot, method, proof)

    def closed(self, slot: Slot | None, close: Close, grace: float) -> Change | None:
        """A reported close. The slot is free when the closes add up to what was opened; until then a part is left.

        A list from more than `grace` seconds after the close that still has the position contradicts it.
        """
        if slot is None or close.mark in slot.closes:
            return None
        slot.closes[close.mark] = close
        if slot.all_closed:
            return self.gone(slot, "position_closed", close.says, _reports(slot), close.at, close.seq, grace)
        left = slot.left
        if left is None:
            slot.heard("unsure", f"{close.says}, of unknown volume", close.at, "strong", close.seq, after=True)
            self.ask(f"close_of_unknown_volume:{slot.key}")
        else:
            slot.lots = left if slot.lots is None else min(left, slot.lots)
            slot.heard("held", f"{close.says}, in part", close.at, "strong", close.seq, after=True)
        return None

    def gone(
        self, slot: Slot, method: str, says: str, evidence: Iterable[str], at: float, seq: int, grace: float
    ) -> Change | None:
        """Strong evidence that the position of `slot` is closed: frees it unless a later list still had it."""
        slot.heard("gone", says, at, "strong", seq, after=True)
        if slot.listed_at is not None and slot.listed_at > at + grace:
            slot.listings = 0
            self.ask(f"closed_but_listed:{slot.key}")
            return None
        return self.release(slot, method, evidence, at)

    # -- snapshots ------------------------------------------------------------------------------

    def snapshot(self, snapshot: Snapshot, now: float, latest: float, max_age: float, grace: float) -> list[Change]:
        """Take over a heartbeat. An incomplete one may only change the count, never release.

        One more than `max_age` seconds behind `now` (the time of the event before it) or not newer than the last
        one is no evidence, and one whose mark is no later than the last one's is that one again: no second proof.
        `latest` is the latest time that is sure to have come. `grace`: seconds a position must be older than the
        snapshot before its absence means anything, and that lie between two proofs (what waited somewhere arrives
        in one go).
        """
        view = self._account(snapshot.account)
        if view.heartbeat_at is not None and view.heartbeat_at > latest + AHEAD_S:
            view.heartbeat_at = None  # stamped by a clock that was ahead: it must not mute the heartbeats after it
        if snapshot.at < now - max_age or (view.heartbeat_at is not None and snapshot.at <= view.heartbeat_at):
            return []
        before, again = view.count, snapshot.mark != "" and snapshot.mark <= view.mark
        mine = [slot for slot in self.slots.values() if slot.account in (None, snapshot.account)]
        self._count(view, snapshot, mine, grace)
        pairs, strangers = match(mine, snapshot.positions or (), snapshot.at if snapshot.complete else None)
        changes: list[Change] = []
        for each in pairs:
            if each.named and each.slot.guessed and each.position.ticket != each.slot.ticket:
                if snapshot.complete:  # which has what it was taken for as well
                    each.slot.forget_position()
                else:
                    changes += self._leave(each.slot)
            each.slot.guess = each.likely or (each.slot.guess and not each.named)
            changes += self._seen(each.slot, each.position, snapshot, again)
        found = {each.slot.key for each in pairs}
        unlisted = [slot for slot in mine if slot.key not in found]
        if not snapshot.complete:
            for slot in unlisted:
                slot.not_listed(snapshot)
            if before is not None and snapshot.count is not None and snapshot.count < before:
                self.ask(f"count_decreased:{before}->{snapshot.count}")
            if self.slots:
                self.ask(f"incomplete:{len(snapshot.positions or ())}_of_{snapshot.count}")
            return changes
        if not any(slot.state == "OPEN" for slot in unlisted):
            view.moved = 0.0  # whatever moved it, it closed nothing
        self.reconcile, self.asked, self.witnesses = False, False, []
        for slot in unlisted if not again else ():
            changes += self._missed(slot, snapshot, grace)
        for position in strangers:
            changes += self._adopt(position, snapshot, grace)
        return changes

    def _count(self, view: AccountView, snapshot: Snapshot, mine: list[Slot], grace: float) -> None:
        view.heartbeat_at, view.seq, view.mark = snapshot.at, snapshot.seq, snapshot.mark
        view.said, view.listed = snapshot.count, len(snapshot.positions or ())
        if snapshot.count is not None:
            view.count = max(snapshot.count, view.listed)
        view.expected = sum(
            1
            for slot in mine
            if slot.state in ("OPEN", "RELEASING") and slot.since + grace <= snapshot.at and self.view(slot) is view
        )

    def _seen(self, slot: Slot, position: Position, snapshot: Snapshot, again: bool = False) -> list[Change]:
        slot.account = snapshot.account
        waiting, known = slot.state in ("RESERVED", "UNKNOWN"), slot.ticket is not None
        if slot.ticket is not None and position.ticket != slot.ticket:
            slot.former_tickets = [*slot.former_tickets, slot.ticket][-KEPT:]
        slot.ticket = position.ticket
        for name in ("position_id", "magic", "open_price", "open_time"):
            value = getattr(position, name)
            if value is not None:
                setattr(slot, name, value)
        slot.lots = position.volume if position.volume is not None else slot.lots
        slot.symbol, slot.direction = position.symbol or slot.symbol, position.direction or slot.direction
        slot.state, slot.absent, slot.listed_at = "OPEN", {}, snapshot.at
        weight: Weight = "snapshot" if snapshot.complete else "weak"
        slot.listed = Witness("held", f"listed as ticket {position.ticket}", snapshot.at, weight, [snapshot.seq])
        slot.listings += snapshot.complete and not again
        status = slot.status
        if slot.listings >= SNAPSHOTS_TO_SETTLE and status is not None and status.believes == "gone":
            slot.heard("unsure", f"{status.says}, overruled by two complete lists", status.at, "weak", 0, after=True)
            slot.opened_lots, slot.measured_at = slot.lots, snapshot.at
        if waiting:
            slot.since = slot.since if known else snapshot.at
        return self._announce(slot)

    def _missed(self, slot: Slot, snapshot: Snapshot, grace: float) -> list[Change]:
        """One more complete snapshot without `slot`; where its account is unknown, every account must lack it."""
        slot.listings = 0
        if slot.state == "RESERVED" or snapshot.at < slot.since + grace:
            return []
        seen = slot.absent.get(snapshot.account, [])
        if seen and snapshot.at < seen[-1][1] + grace:
            return []
        seen = [*seen, (snapshot.seq, snapshot.at)][-SNAPSHOTS_TO_SETTLE:]
        slot.absent = {**slot.absent, snapshot.account: seen}
        says = f"absent from {len(seen)} of {SNAPSHOTS_TO_SETTLE} complete lists"
        slot.listed = Witness("gone", says, snapshot.at, "snapshot", [seq for seq, _ in seen])
        accounts = list(self.accounts) if slot.account is None else [slot.account]
        if any(len(slot.absent.get(account, ())) < SNAPSHOTS_TO_SETTLE for account in accounts):
            slot.state = "RELEASING" if slot.state == "OPEN" else slot.state
            self.ask(f"absent:{slot.key}")
            return []
        evidence = [f"snapshot@{seq}" for account in accounts for seq, _ in slot.absent[account]]
        change = self.release(slot, "snapshot", evidence, snapshot.at)
        return [] if change is None else [change]

    def _adopt(self, position: Position, snapshot: Snapshot, grace: float) -> list[Change]:
        """A position nobody announced occupies a slot too: the broker's list is the truth."""
        key = position.fire_id or f"ticket-{position.ticket}"
        ended = self._ended(key, position.ticket, position.position_id, snapshot.account)
        if key in self.slots:
            key = f"ticket-{position.ticket}"
        if key in self.slots and self.slots[key].account not in (None, snapshot.account):
            key = f"{key}@{snapshot.account}"  # two brokers number alike
        if key in self.slots or (ended is not None and snapshot.at < ended.at + grace):
            return []
        self._forget(key)
        slot = Slot(key, "OPEN", snapshot.at, fire_id=position.fire_id)
        slot.opened_lots, slot.measured_at = position.volume, snapshot.at
        if ended is not None:
            slot.heard("gone", f"was released: {ended.method.replace('_', ' ')}", ended.at, "strong", 0)
            self.ask(f"closed_but_listed:{key}")
        self.slots[key] = slot
        return self._seen(slot, position, snapshot)

    # -- weak evidence and time -----------------------------------------------------------------

    def ask(self, reason: str) -> None:
        """Ask for a reconciliation; releases nothing."""
        if reason not in self.witnesses:
            self.witnesses = [*self.witnesses, reason][-KEPT:]
        self.reconcile = True

    def balance(
        self,
        account: str,
        balance: float,
        equity: float | None,
        jump: float,
        at: float = 0.0,
        seq: int = 0,
        latest: float = 0.0,
    ) -> bool:
        """New account figures; a move of at least `jump` with slots held is a witness (deposits move it too).

        False where they are older than those known, unless those are from after `latest`: a clock that is ahead.
        """
        view = self._account(account)
        if view.balance_at is not None and at < view.balance_at <= latest:
            return False
        before, view.balance = view.balance, balance
        view.balance_at, view.balance_seq = at, seq
        view.equity = equity if equity is not None else view.equity
        if before is not None and self.slots and abs(balance - before) >= jump:
            view.moved, view.moved_at, view.moved_seq = balance - before, at, seq
            self.ask(f"balance_jump:{balance - before:+.2f}")
        return True

    def review(self, now: float, answer_timeout: float, stale_age: float, heartbeat_age: float) -> None:
        """The periodic look at the clock: unanswered fires become UNKNOWN, old or silent ones ask for a snapshot."""
        for slot in self.slots.values():
            if slot.state == "RESERVED" and now - slot.since >= answer_timeout:
                self.doubt(slot, "no answer", now)
            elif now - slot.since >= stale_age and not slot.aged:
                slot.aged = True
                self.ask(f"age:{slot.key}")
        beats = [view.heartbeat_at for view in self.accounts.values() if view.heartbeat_at is not None]
        if self.slots and beats and now - max(beats) > heartbeat_age:
            self.ask("silence")

    # -- looking up -----------------------------------------------------------------------------

    def find(
        self, fire_id: str | None, ticket: int | None, position_id: int | None, account: str | None = None
    ) -> Slot | None:
        """The slot of a fire, position or ticket, in this order of trust; never one of another fire.

        Tickets and positions of another account than `account` are others, for brokers number alike.
        """
        if fire_id is not None and fire_id in self.slots:
            return self.slots[fire_id]
        mine = [
            slot
            for slot in self.slots.values()
            if not _other_fire(slot, fire_id) and (account is None or slot.account in (None, account))
        ]
        for name, value in (("fire_id", fire_id), ("position_id", position_id), ("ticket", ticket)):
            for slot in mine if value is not None else ():
                if getattr(slot, name) == value:
                    return slot
        return next((slot for slot in mine if ticket is not None and ticket in slot.former_tickets), None)

    def _ended(self, key: str, ticket: int | None, position_id: int | None, account: str | None) -> Ended | None:
        """What became of the slot called `key`, or else of this very position."""
        found = self.ended.get(key)
        if found is not None or (ticket is None and position_id is None):
            return found
        for each in reversed(self.ended.values()):
            same = each.position_id == position_id if position_id is not None else each.ticket == ticket
            if same and (each.account is None or account is None or each.account == account):
                return each
        return None

    def _forget(self, key: str) -> None:
        if self.ended.pop(key, None) is not None:
            self.unsaved.append(("ended", key))

    def remember_fired(self, signal_id: str, at: float) -> None:
        """A signal fires once, however often it is published."""
        self.fired[signal_id] = at
        self.unsaved.append(("fired", signal_id))
        _bound(self.fired, "fired", self.unsaved)


def _other_fire(slot: Slot, fire_id: str | None) -> bool:
    return slot.fire_id is not None and fire_id is not None and slot.fire_id != fire_id


def _reports(slot: Slot) -> list[str]:
    return [f"position_closed@{each.seq}" for each in slot.closes.values()]


def _bound(kept: dict[str, Any], name: str, unsaved: list[tuple[str, str]]) -> None:
    while len(kept) > REMEMBERED:
        oldest = next(iter(kept))
        del kept[oldest]
        unsaved.append((name, oldest))

"""What the witnesses of a slot say, whether they disagree, and why the slot is still held.

Fire status and ticket list testify about one position and are kept with its slot; the heartbeat's count and the
balance testify about a whole account, and the age about nothing but time.
"""

from __future__ import annotations

from tapebus_slots.slot import AccountView, Slot, Witness

#: Complete snapshots in a row that must lack a position before its slot is released, or list it before a report
#: that it is closed counts as mistaken.
SNAPSHOTS_TO_SETTLE = 2


def witnesses(slot: Slot, view: AccountView | None, now: float) -> dict[str, Witness]:
    """Every witness that has something to say about `slot`; `view` is its account where that is known."""
    found = {"status": slot.status, "tickets": slot.listed}
    if view is not None and slot.state in ("OPEN", "RELEASING"):
        found["count"] = _count(slot, view)
        found["balance"] = _balance(slot, view)
    found["age"] = _age(slot, now)
    return {name: witness for name, witness in found.items() if witness is not None}


def _count(slot: Slot, view: AccountView) -> Witness | None:
    """The heartbeat's count cannot say which position is gone; where its list is complete, the list does."""
    if view.said is None or view.heartbeat_at is None or slot.since > view.heartbeat_at:
        return None
    says = f"counts {view.said}, {view.expected} held"
    missing = view.said < view.expected
    if slot.listed is not None and view.complete:
        missing = slot.listed.believes == "gone"
    return Witness("gone" if missing else "held", says, view.heartbeat_at, "weak", [view.seq])


def _balance(slot: Slot, view: AccountView) -> Witness | None:
    if view.moved and slot.since <= view.moved_at:
        return Witness("unsure", f"moved by {view.moved:+,.2f}", view.moved_at, "weak", [view.moved_seq])
    if view.balance is None or view.balance_at is None or slot.since > view.balance_at:
        return None
    evidence = [view.balance_seq] if view.balance_seq else []
    return Witness("held", f"{view.balance:,.2f}, no move unanswered", view.balance_at, "weak", evidence)


def _age(slot: Slot, now: float) -> Witness:
    age = max(0.0, now - slot.since)
    evidence = slot.status.evidence[-1:] if slot.status is not None else []
    return Witness("unsure" if slot.aged else "held", f"since {span(age)}", now, "weak", evidence)


def dispute(slot: Slot, view: AccountView | None) -> str:
    """The contradiction between witnesses that say held and witnesses that say gone; empty where there is none.

    The balance and the age are never sure of anything, so they only ask for a reconciliation.
    """
    short = view is not None and view.said is not None and view.said < view.expected
    if not short and not any(each is not None and each.believes == "gone" for each in (slot.status, slot.listed)):
        return ""  # nearly always
    sides = {"held": "", "gone": ""}
    count = _count(slot, view) if view is not None and slot.state in ("OPEN", "RELEASING") else None
    for name, witness in (("status", slot.status), ("tickets", slot.listed), ("count", count)):
        if witness is None or witness.believes == "unsure" or sides[witness.believes]:
            continue
        place = "".join(f" @{seq}" for seq in witness.evidence[-1:])
        sides[witness.believes] = f"{NAMES[name]} says {witness.believes} ({witness.says}{place})"
    return "; ".join(sides.values()) if all(sides.values()) else ""


NAMES = {"status": "fire status", "tickets": "ticket list", "count": "EA count", "balance": "balance", "age": "age"}


def testimony(found: dict[str, Witness]) -> list[str]:
    """The witnesses as short texts, for the evidence of a release."""
    return [
        f"{name}:{witness.believes}:{witness.says}" + "".join(f"@{seq}" for seq in witness.evidence[-1:])
        for name, witness in found.items()
        if name != "age" or witness.believes != "held"
    ]


def why(slot: Slot, found: dict[str, Witness]) -> str:
    """One sentence: what keeps the slot held and what would release it."""
    status, listed = found.get("status"), found.get("tickets")
    absences = max((len(seqs) for seqs in slot.absent.values()), default=0)
    if status is not None and status.believes == "gone":
        return f"reported closed, yet listed since: {SNAPSHOTS_TO_SETTLE} complete snapshots in a row will settle it"
    if absences:
        return f"absent from {absences} complete snapshot: {SNAPSHOTS_TO_SETTLE} in a row release it"
    if slot.state == "RESERVED":
        return "the order is out and not answered yet"
    if slot.state == "UNKNOWN":
        return f"nobody knows what became of the order: {SNAPSHOTS_TO_SETTLE} complete snapshots decide"
    if listed is not None and listed.believes == "held":
        return "the broker lists it"
    if listed is not None and listed.believes == "unsure":
        return "the last list was incomplete, which proves nothing"
    return "filled, and nothing has reported it closed"


def span(seconds: float) -> str:
    """A duration for people, at most two units."""
    seconds = int(seconds)
    for size, unit, small, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // small:02d}{name}"
    return f"{seconds}s"

"""What a slot table is made of: slots, what witnesses say of them, accounts, snapshots, and what became of a slot.

Everything here is data that goes into the plugin's durable state or out with its events. Times are event
time in Unix seconds, ``evidence`` names events by their ``bus_seq``.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from tapebus_slots.matching import Position
from tapebus_trading.money import exact

State = Literal["RESERVED", "OPEN", "RELEASING", "UNKNOWN"]
#: Events remembered by one witness.
EVIDENCE = 8
#: What a witness believes of a position; `unsure` only ever asks for a better witness.
Belief = Literal["held", "gone", "unsure"]
#: `strong`: said of this very position. `snapshot`: a complete list. `weak`: may have many causes.
Weight = Literal["strong", "snapshot", "weak"]


class Witness(Struct, omit_defaults=True):
    """What one source believes of one position, in words, since when, and which events made it believe so."""

    believes: Belief
    says: str
    at: float
    weight: Weight
    evidence: list[int] = []


class Close(Struct, frozen=True, array_like=True):
    """A reported close of `lots`; ``mark`` is the same where the same report comes again."""

    lots: float | None
    at: float
    seq: int
    says: str
    mark: str


class Slot(Struct, omit_defaults=True):
    """One held slot; a FREE slot is one that is not in the table. ``key`` names it: the fire id, or a ticket.

    ``lots`` is what is left of ``opened_lots``; ``closes`` has the reports of what was closed. Where the lots were
    read from a list at ``measured_at``, older closes are already out of them.
    ``status`` is what messages about this fire or position said last, ``listed`` what the last list said of it.
    """

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
    account: str | None = None
    sent_at: float | None = None
    sl: float | None = None
    #: As sized, in account currency; None where the gate did not size it.
    loss_per_lot: str | None = None
    margin_per_lot: str | None = None
    opened_lots: float | None = None
    measured_at: float | None = None
    closes: dict[str, Close] = {}
    former_tickets: list[int] = []
    status: Witness | None = None
    listed: Witness | None = None
    #: Complete snapshots in a row that lack it (``bus_seq``, time), by account; how many that list it.
    absent: dict[str, list[tuple[int, float]]] = {}
    listings: int = 0
    #: When a list last had it; whether its opening was announced; whether its age was asked about.
    listed_at: float | None = None
    announced: bool = False
    guess: bool = False
    aged: bool = False

    @property
    def left(self) -> float | None:
        """Lots opened less lots closed, exact; None while nobody has told both."""
        counted = [each for each in self.closes.values() if self.measured_at is None or each.at > self.measured_at]
        if self.opened_lots is None or any(each.lots is None for each in counted):
            return None
        return float(exact(self.opened_lots) - sum(exact(each.lots or 0) for each in counted))

    @property
    def all_closed(self) -> bool:
        """Whether the reported closes add up to all that was opened."""
        left = self.left
        return bool(self.closes) and left is not None and left <= 0

    def heard(self, believes: Belief, says: str, at: float, weight: Weight, seq: int, *, after: bool = False) -> None:
        """Take over what a message about this position says; with `after` the events before it stay evidence too."""
        before = self.status.evidence if after and self.status is not None else []
        self.status = Witness(believes, says, at, weight, [*before, *([seq] if seq else [])][-EVIDENCE:])

    def nameless(self) -> Slot:
        """This slot without its position."""
        return replace(self, ticket=None, position_id=None, open_price=None)

    @property
    def guessed(self) -> bool:
        """Whether only its likeness to the order made a list's position that of this fire."""
        return self.guess and self.ticket is not None and self.fire_id is not None

    def unlike(self, filled: Slot) -> bool:
        """Whether the position this slot was taken for is not the one that was `filled`: another price, or ticket.

        A later list may know a later ticket of the same position.
        """
        if None not in (self.open_price, filled.open_price) and self.open_price != filled.open_price:
            return True
        return self.ticket != filled.ticket and (self.listed_at or 0.0) < filled.since

    def forget_position(self) -> None:
        """Back to what was known before a list's position was taken for that of this fire."""
        former = self.former_tickets
        for name in _POSITION:
            setattr(self, name, None)
        self.ticket, self.former_tickets = (former[-1], former[:-1]) if former else (None, [])
        self.listings, self.lots, self.guess, self.closes = 0, self.opened_lots, False, {}

    def take_position(self, other: Slot) -> None:
        """Hold the position that `other` was taken to hold."""
        for name in _POSITION:
            setattr(self, name, getattr(other, name))

    def learn(self, new: Slot) -> None:
        """Take over what a confirmation knows and this slot does not; a list from later knows the ticket better."""
        late = self.listed_at is not None and self.listed_at >= new.since
        if late and self.ticket is not None and new.ticket not in (None, self.ticket, *self.former_tickets):
            self.former_tickets = [*self.former_tickets, new.ticket or 0]
        elif self.ticket is None or not late:
            self.ticket = new.ticket if new.ticket is not None else self.ticket
        for name in ("position_id", "magic", "open_price", "account"):
            value = getattr(new, name)
            if value is not None:
                setattr(self, name, value)
        for name in ("symbol", "direction", "signal_id", "fire_id"):
            if not getattr(self, name):
                setattr(self, name, getattr(new, name))
        if new.lots is not None:
            self.opened_lots, self.measured_at = new.lots, None
            self.lots = new.lots if self.listed_at is None else self.lots

    def not_listed(self, snapshot: Snapshot) -> None:
        """An incomplete list lacks it, which proves nothing and breaks the run of complete ones."""
        self.absent = {account: seqs for account, seqs in self.absent.items() if account != snapshot.account}
        if self.state == "RELEASING":
            self.state = "OPEN"
        if self.state != "RESERVED":
            self.listed = Witness("unsure", "not in an incomplete list", snapshot.at, "weak", [snapshot.seq])


#: The fields of a slot that belong to the position it was found to hold.
_POSITION = (
    *("ticket", "former_tickets", "position_id", "open_price", "open_time", "lots"),
    *("listed", "listed_at", "listings"),
)


class Snapshot(Struct, frozen=True):
    """One heartbeat's view of the account. ``count`` is what it says, ``positions`` what it lists.

    ``mark`` is the terminal's own time stamp: a relay may send one observation twice under two times.
    """

    account: str
    at: float
    count: int | None
    positions: tuple[Position, ...] | None
    seq: int = 0
    mark: str = ""

    @property
    def complete(self) -> bool:
        return self.positions is not None and self.count == len(self.positions)


class Change(Struct, frozen=True):
    """What an input did to one slot. ``method`` and ``evidence`` are set for a release."""

    kind: Literal["reserved", "opened", "released"]
    slot: Slot
    method: str = ""
    evidence: tuple[str, ...] = ()


class Ended(Struct, frozen=True, array_like=True):
    """How a slot became free, kept so that late news of it opens nothing."""

    method: str
    at: float
    ticket: int | None = None
    position_id: int | None = None
    account: str | None = None
    evidence: tuple[str, ...] = ()
    was_open: bool = True

    def may_open(self, at: float) -> bool:
        """Whether a fill at `at` is news: of an order refused before, or one given up that was carried out later."""
        return self.method == "rejected" or (self.method == "snapshot" and not self.was_open and at > self.at)


class AccountView(Struct, omit_defaults=True):
    """The last figures of one broker account, and what its count and its balance say about slots.

    ``count`` follows closes reported since the heartbeat; ``short`` is how many positions fewer than held
    the heartbeat itself counted. ``moved`` is a move of the balance that no complete list has answered yet.
    """

    balance: float | None = None
    equity: float | None = None
    heartbeat_at: float | None = None
    count: int | None = None
    number: str | None = None
    mark: str = ""
    said: int | None = None
    listed: int | None = None
    expected: int = 0
    seq: int = 0
    balance_at: float | None = None
    balance_seq: int = 0
    moved: float = 0.0
    moved_at: float = 0.0
    moved_seq: int = 0
    free_margin: float | None = None
    margin_at: float | None = None
    currency: str | None = None

    @property
    def complete(self) -> bool:
        return self.said is not None and self.said == self.listed

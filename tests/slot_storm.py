"""A broker and the way to it: what is really open, and messages that come late, twice, out of order or never.

The broker knows nothing of slots; a slot table is judged by it. Messages only say what was true when they were sent.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count
from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tapebus_slots
from slots_support import bench

#: An order reaches the broker within so many seconds or not at all: less than a bus waits for the answer.
ORDER_LIFE_S = 25.0
ACCOUNT = "EA"


@dataclass
class Position:
    """One open position. ``identifier`` never changes, the ticket may; ``fire_id`` is empty for one opened by hand."""

    ticket: int
    identifier: int
    fire_id: str
    symbol: str
    direction: str
    lots: Decimal
    price: float
    opened_at: float


@dataclass
class Broker:
    """``names``: how its list tells whose a position is (``fire_id``, ``comment``, ``identifier`` or ``nothing``)."""

    names: str = "fire_id"
    now: float = 1_758_500_000.0
    positions: dict[int, Position] = field(default_factory=dict)
    orders: dict[str, tuple[str, str, float]] = field(default_factory=dict)
    #: Sent and not delivered yet: (event type, time of sending, data).
    wire: list[tuple[str, float, dict[str, Any]]] = field(default_factory=list)
    number: int = 0

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.orders = {fire: order for fire, order in self.orders.items() if self.now - order[2] <= ORDER_LIFE_S}

    def send(self, event_type: str, **data: Any) -> None:
        self.wire.append((event_type, self.now, {key: value for key, value in data.items() if value is not None}))

    def order(self, symbol: str, direction: str) -> tuple[str, float, dict[str, Any]]:
        """A fire on its way; the event that the bus itself publishes."""
        self.number += 1
        fire = f"fire-{self.number}"
        self.orders[fire] = (symbol, direction, self.now)
        data = {"fire_id": fire, "symbol": symbol, "direction": direction, "lot": 0.1, "execution_mode": "AUTO"}
        return "fire_command", self.now, data

    def fill(self, fire: str, how: str) -> None:
        """Carry an order out. `how`: told as ``filled``, without lots (``brief``), as ``timeout``, or in ``part``."""
        symbol, direction, _ = self.orders.pop(fire)
        position = self._open(fire, symbol, direction, Decimal("0.06" if how == "part" else "0.1"))
        told = {"fire_id": fire, "symbol": symbol, "direction": direction}
        if how == "timeout":
            self.send("trade_executed", **told, status="FAILED", retcode=10012)
            return
        lots = None if how == "brief" else float(position.lots)
        self.send("trade_executed", **told, status="FILLED", ticket=position.ticket, volume=lots, price=position.price)

    def refuse(self, fire: str, how: str) -> None:
        """Do not carry an order out. `how`: told as ``rejected``, as ``timeout``, or ``silent``."""
        del self.orders[fire]
        if how == "rejected":
            self.send("trade_executed", fire_id=fire, status="REJECTED", retcode=10019)
        elif how == "timeout":
            self.send("trade_executed", fire_id=fire, status="ERROR", retcode=10012)

    def by_hand(self, symbol: str, direction: str) -> None:
        self._open("", symbol, direction, Decimal("0.1"))

    def _open(self, fire: str, symbol: str, direction: str, lots: Decimal) -> Position:
        self.number += 1
        price = 1.1 + self.number % 7 / 1000
        made = Position(self.number, self.number, fire, symbol, direction, lots, price, self.now)
        self.positions[made.ticket] = made
        return made

    def close(self, ticket: int, part: bool, how: str) -> None:
        """Close a position, or `part` of it. `how`: told by ``report``, by ``status``, by ``both``, or ``silent``."""
        position = self.positions[ticket]
        lots = position.lots / 2 if part and position.lots > Decimal("0.02") else position.lots
        whole = lots == position.lots
        if how in ("report", "both"):
            told = {"ticket": ticket, "symbol": position.symbol, "volume": float(lots), "close_price": 1.2}
            fire = position.fire_id if self.names == "fire_id" else None
            mine = position.identifier if self.names == "identifier" else None
            self.send(
                "position_closed",
                **told,
                profit=float(self.number),
                reason="TP_HIT" if whole else "PARTIAL_CLOSE",
                target_uuid=ACCOUNT,
                fire_id=fire,
                position_id=mine,
                timestamp=self.now,
            )
        if how in ("status", "both") and position.fire_id:
            status = "CLOSED_TP" if whole else "CLOSED_PARTIAL"
            self.send("trade_executed", fire_id=position.fire_id, status=status, ticket=ticket)
        del self.positions[ticket]
        if not whole:
            position.lots -= lots
            self._renew(position)

    def swap(self, ticket: int) -> None:
        """The overnight swap opens a position anew under another ticket."""
        self._renew(self.positions.pop(ticket))

    def _renew(self, position: Position) -> None:
        self.number += 1
        position.ticket = self.number
        self.positions[position.ticket] = position

    def heartbeat(self, listed: int | None = None, counted: int = 0) -> None:
        """The account as it is; an incomplete one lists the first `listed` positions or counts `counted` more."""
        rows = [self._row(each) for each in self.positions.values()]
        self.send(
            "ea_heartbeat",
            target_uuid=ACCOUNT,
            balance=10_000.0 + self.number % 5 * 20,
            equity=10_000.0,
            open_positions=len(rows) + counted,
            positions=rows[: len(rows) if listed is None else listed],
            timestamp=self.now,
        )

    def _row(self, position: Position) -> dict[str, Any]:
        row: dict[str, Any] = {
            "ticket": position.ticket,
            "symbol": position.symbol,
            "direction": position.direction,
            "open_price": position.price,
            "volume": float(position.lots),
            "open_time": position.opened_at,
        }
        if self.names == "fire_id":
            row["fire_id"] = position.fire_id
        elif self.names == "comment":
            row["comment"] = position.fire_id
        elif self.names == "identifier":
            row["position_id"] = position.identifier
        return row


STRONG = {"rejected", "position_closed", "snapshot", "closed_tp"}
NAMES = ("fire_id", "comment", "identifier", "nothing")
FILLS = ("filled", "filled", "brief", "timeout", "part")
REFUSALS = ("rejected", "timeout", "silent")
CLOSES = ("report", "status", "both", "silent")
SYMBOLS = st.sampled_from(["EURUSD", "XAUUSD"])
DIRECTIONS = st.sampled_from(["BUY", "SELL"])
SECONDS = st.integers(1, 20)
PLACE = st.integers(0, 1_000)


class SlotStorm(RuleBasedStateMachine):
    """``bench`` holds the plugin, ``broker`` the truth and what is on its way."""

    steps = count()
    messages = count()

    @initialize(names=st.sampled_from(NAMES))
    def begins(self, names):
        self.bench = bench()
        self.broker = Broker(names)
        self.ticked = self.broker.now
        self.read = 0
        self.live: dict[str, bool] = {}
        self.arrived: list[tuple[str, float, dict[str, Any]]] = []

    @property
    def table(self):
        return tapebus_slots._engines[id(self.bench.context)].table("default")

    def arrives(self, *messages):
        """The messages as one batch; then what was emitted is compared with the truth of this moment."""
        for each in messages:
            next(SlotStorm.messages)
            self.arrived.append(each)
        self.bench.feed([self.bench.event(kind, at, data) for kind, at, data in messages])
        self.compare()

    def passes(self, seconds):
        """Time goes by; the bus looks at its clock every thirty seconds."""
        next(SlotStorm.steps)
        self.broker.wait(seconds)
        if self.broker.now - self.ticked >= 30:
            self.ticked = self.broker.now
            self.bench.tick(self.broker.now)
            self.bench.consumers[0].save()
            self.compare()

    def compare(self):
        # a list that does not tell whose a position is leaves open which of two equal orders became it; one that
        # names nothing that stays, which of two equal positions has a new ticket. Their number is judged below
        told = self.broker.names in ("fire_id", "comment")
        held = {position.fire_id for position in self.broker.positions.values() if told}
        tickets = self.broker.positions if self.broker.names != "nothing" else ()
        for wire in self.bench.emitted[self.read :]:
            kind, data = wire.event_type, wire.data
            if not kind.startswith("slot_"):
                continue
            key = data["fire_id"]
            if kind == "slot_released":
                assert self.live.pop(key, None) is not None, f"{key} was released twice"
                if data["method"] != "merged":
                    assert data["method"] in STRONG and data["evidence"]
                    assert key not in held, f"{key} was released by {data['method']} while the broker holds it"
                    assert data.get("ticket") not in tickets
            else:
                assert kind == "slot_reserved" or not self.live.get(key), f"{key} was opened twice"
                self.live[key] = kind == "slot_opened"
        self.read = len(self.bench.emitted)

    # -- the broker -----------------------------------------------------------------------------

    @rule(symbol=SYMBOLS, direction=DIRECTIONS, seconds=SECONDS)
    def an_order_goes_out(self, symbol, direction, seconds):
        self.passes(seconds)
        self.arrives(self.broker.order(symbol, direction))

    @precondition(lambda self: self.broker.orders)
    @rule(place=PLACE, how=st.sampled_from(FILLS), seconds=SECONDS)
    def an_order_is_filled(self, place, how, seconds):
        fire = list(self.broker.orders)[place % len(self.broker.orders)]
        self.passes(min(seconds, 3))
        if fire in self.broker.orders:
            self.broker.fill(fire, how)

    @precondition(lambda self: self.broker.orders)
    @rule(place=PLACE, how=st.sampled_from(REFUSALS))
    def an_order_is_not_filled(self, place, how):
        next(SlotStorm.steps)
        self.broker.refuse(list(self.broker.orders)[place % len(self.broker.orders)], how)

    @rule(symbol=SYMBOLS, direction=DIRECTIONS, seconds=SECONDS)
    def somebody_opens_by_hand(self, symbol, direction, seconds):
        self.passes(seconds)
        self.broker.by_hand(symbol, direction)

    @precondition(lambda self: self.broker.positions)
    @rule(place=PLACE, part=st.booleans(), how=st.sampled_from(CLOSES), seconds=SECONDS)
    def a_position_closes(self, place, part, how, seconds):
        self.passes(seconds)
        self.broker.close(list(self.broker.positions)[place % len(self.broker.positions)], part, how)

    @precondition(lambda self: self.broker.positions)
    @rule(place=PLACE, seconds=SECONDS)
    def a_ticket_is_renewed(self, place, seconds):
        self.passes(seconds)
        self.broker.swap(list(self.broker.positions)[place % len(self.broker.positions)])

    @rule(seconds=SECONDS)
    def a_complete_heartbeat_is_sent(self, seconds):
        self.passes(seconds)
        self.broker.heartbeat()

    @rule(listed=st.integers(0, 3), counted=st.integers(1, 9), seconds=SECONDS)
    def an_incomplete_heartbeat_is_sent(self, listed, counted, seconds):
        self.passes(seconds)
        self.broker.heartbeat(listed, counted)

    # -- the way --------------------------------------------------------------------------------

    @precondition(lambda self: self.broker.wire)
    @rule(place=PLACE, again=st.booleans())
    def a_message_arrives(self, place, again):
        next(SlotStorm.steps)
        place %= len(self.broker.wire)
        self.arrives(self.broker.wire[place])
        if not again:
            del self.broker.wire[place]

    @precondition(lambda self: self.broker.wire)
    @rule()
    def all_messages_arrive_in_order(self):
        next(SlotStorm.steps)
        messages, self.broker.wire = self.broker.wire, []
        self.arrives(*messages)

    @precondition(lambda self: self.broker.wire)
    @rule(place=PLACE)
    def a_message_is_lost(self, place):
        next(SlotStorm.steps)
        del self.broker.wire[place % len(self.broker.wire)]

    @rule()
    def the_bus_is_killed(self):
        next(SlotStorm.steps)
        before = msgspec.to_builtins(self.table)
        self.bench.restart()
        assert msgspec.to_builtins(self.table) == before

    @rule(lost=st.booleans())
    def it_calms_down(self, lost):
        """Two complete fresh snapshots later the slots are what the broker holds, whatever was lost."""
        messages, self.broker.wire = self.broker.wire, []
        if not lost and messages:
            self.arrives(*messages)
        self.passes(31)
        self.passes(31)
        for _ in range(2):
            self.passes(30)
            self.broker.heartbeat()
            self.arrives(self.broker.wire.pop())
        assert sorted(slot.ticket for slot in self.table.slots.values()) == sorted(self.broker.positions)
        assert {slot.state for slot in self.table.slots.values()} <= {"OPEN"}
        assert self.table.used == len(self.broker.positions)
        assert self.table.disputed == []
        assert not self.table.reconcile

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def the_occupancy_is_never_below_the_truth(self):
        fired = [each for each in self.broker.positions.values() if each.fire_id]
        assert self.table.used >= len(fired) + len(self.broker.orders)

    @invariant()
    def more_than_the_limit_is_a_state_with_an_alert(self):
        alerts = [wire.data for wire in self.bench.emitted if wire.event_type == "alert"]
        over = [each["state"] for each in alerts if each["name"] == "slots_over_limit:default"]
        assert (over[-1:] == ["raised"]) == (self.table.used > self.table.maximum) == self.table.over_limit


def blow(seed: int, steps: int) -> SlotStorm:
    """A storm of `steps` steps whose every chance comes from `seed`; what always holds is asserted after each."""
    chance = random.Random(seed)
    storm = SlotStorm()
    storm.begins(chance.choice(NAMES))
    for _ in range(steps):
        _one_step(storm, chance)
        storm.the_occupancy_is_never_below_the_truth()
        storm.more_than_the_limit_is_a_state_with_an_alert()
    storm.it_calms_down(lost=chance.random() < 0.5)
    return storm


def _one_step(storm: SlotStorm, chance: random.Random) -> None:
    broker = storm.broker
    when: dict[str, Any] = {"seconds": chance.randint(1, 20)}
    what = {"symbol": chance.choice(("EURUSD", "XAUUSD")), "direction": chance.choice(("BUY", "SELL"))}
    place: dict[str, Any] = {"place": chance.randint(0, 1000)}
    likely: list[tuple[int, Any, dict[str, Any]]] = [
        (2, storm.an_order_goes_out, what | when),
        (1, storm.somebody_opens_by_hand, what | when),
        (2, storm.a_complete_heartbeat_is_sent, when),
        (1, storm.an_incomplete_heartbeat_is_sent, when | {"listed": chance.randint(0, 3), "counted": 1}),
        (1, storm.the_bus_is_killed, {}),
    ]
    if broker.orders:
        likely.append((3, storm.an_order_is_filled, place | when | {"how": chance.choice(FILLS)}))
        likely.append((1, storm.an_order_is_not_filled, place | {"how": chance.choice(REFUSALS)}))
    if broker.positions:
        part, how = chance.random() < 0.5, chance.choice(CLOSES)
        likely.append((2, storm.a_position_closes, place | when | {"part": part, "how": how}))
        likely.append((1, storm.a_ticket_is_renewed, place | when))
    if broker.wire:
        likely.append((3, storm.a_message_arrives, place | {"again": chance.random() < 0.5}))
        likely.append((1, storm.all_messages_arrive_in_order, {}))
        likely.append((1, storm.a_message_is_lost, place))
    (_, act, arguments) = chance.choices(likely, [weight for weight, _, _ in likely])[0]
    act(**arguments)

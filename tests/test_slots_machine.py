"""A storm of orders, fills, closes and heartbeats, late, twice, out of order or never, judged by the broker."""

from __future__ import annotations

from itertools import count

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import tapebus_slots
from slot_storm import Broker
from slots_support import bench

STRONG = {"rejected", "position_closed", "snapshot", "closed_tp"}
SYMBOLS = st.sampled_from(["EURUSD", "XAUUSD"])
DIRECTIONS = st.sampled_from(["BUY", "SELL"])
SECONDS = st.integers(1, 20)
PLACE = st.integers(0, 1_000)


class SlotStorm(RuleBasedStateMachine):
    """``bench`` holds the plugin, ``broker`` the truth and what is on its way."""

    steps = count()
    messages = count()

    @initialize(names=st.sampled_from(["fire_id", "comment", "identifier", "nothing"]))
    def begins(self, names):
        self.bench = bench()
        self.broker = Broker(names)
        self.ticked = self.broker.now
        self.read = 0
        self.live: dict[str, bool] = {}
        self.opened: set[int] = set()

    @property
    def table(self):
        return tapebus_slots._engines[id(self.bench.context)].table("default")

    def arrives(self, *messages):
        """The messages as one batch; then what was emitted is compared with the truth of this moment."""
        for _ in messages:
            next(SlotStorm.messages)
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
        # an account whose list does not tell whose a position is leaves open which of two equal orders became it
        told = self.broker.names in ("fire_id", "comment")
        held = {position.fire_id for position in self.broker.positions.values() if told}
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
                    assert data.get("ticket") not in self.broker.positions
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
    @rule(place=PLACE, how=st.sampled_from(["filled", "filled", "brief", "timeout", "part"]), seconds=SECONDS)
    def an_order_is_filled(self, place, how, seconds):
        fire = list(self.broker.orders)[place % len(self.broker.orders)]
        self.passes(min(seconds, 3))
        if fire in self.broker.orders:
            self.broker.fill(fire, how)

    @precondition(lambda self: self.broker.orders)
    @rule(place=PLACE, how=st.sampled_from(["rejected", "timeout", "silent"]))
    def an_order_is_not_filled(self, place, how):
        next(SlotStorm.steps)
        self.broker.refuse(list(self.broker.orders)[place % len(self.broker.orders)], how)

    @rule(symbol=SYMBOLS, direction=DIRECTIONS, seconds=SECONDS)
    def somebody_opens_by_hand(self, symbol, direction, seconds):
        self.passes(seconds)
        self.broker.by_hand(symbol, direction)

    @precondition(lambda self: self.broker.positions)
    @rule(place=PLACE, part=st.booleans(), how=st.sampled_from(["report", "status", "both", "silent"]), seconds=SECONDS)
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


def test_no_storm_frees_a_held_slot_or_keeps_a_free_one():
    SlotStorm.steps, SlotStorm.messages = count(), count()
    run_state_machine_as_test(SlotStorm, settings=settings(max_examples=260, stateful_step_count=50, deadline=None))
    assert next(SlotStorm.steps) >= 10_000

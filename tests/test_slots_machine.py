"""Random histories of fires, answers, closes, snapshots and crashes against a plain model of the account."""

from __future__ import annotations

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import tapebus_schema
import tapebus_slots
from tapebus.events import Registry
from tapebus.testing import PluginBench

REGISTRY = Registry(tapebus_schema.tapebus_register_event_types({}))
STRONG = {"rejected", "position_closed", "snapshot", "closed_tp"}


class SlotMachine(RuleBasedStateMachine):
    """``pending`` are fires without an answer, ``broker`` the positions really open (ticket to fire)."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = PluginBench(tapebus_slots, REGISTRY, {}, name="slots")
        self.now = 1_758_500_000.0
        self.number = 0
        self.pending: list[str] = []
        self.broker: dict[int, str] = {}
        self.lots: dict[int, float] = {}
        self.gone: set[str] = set()
        self.seen = 0

    def send(self, event_type, data, after=1.0):
        self.now += after
        self.bench.feed([self.bench.event(event_type, self.now, data)])

    def released(self):
        return [wire.data for wire in self.bench.emitted if wire.event_type == "slot_released"]

    @property
    def table(self):
        engine = tapebus_slots._engines[id(self.bench.context)]
        return engine.table("default")

    def listed(self):
        return [
            {
                "ticket": ticket,
                "symbol": "EURUSD",
                "direction": "BUY",
                "open_price": 1.1,
                "volume": self.lots[ticket],
                "fire_id": fire,
            }
            for ticket, fire in self.broker.items()
        ]

    def heartbeat(self, positions, count, balance=10_000.0):
        data = {"target_uuid": "EA", "balance": balance, "equity": balance}
        self.send("ea_heartbeat", {**data, "open_positions": count, "positions": positions}, after=30.0)

    @rule()
    def fires(self):
        self.number += 1
        fire = f"f{self.number}"
        self.pending.append(fire)
        data = {"fire_id": fire, "symbol": "EURUSD", "direction": "BUY", "lot": 0.1, "execution_mode": "AUTO"}
        self.send("fire_command", data)

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def fills(self, data):
        fire = self.pending.pop(data.draw(st.integers(0, len(self.pending) - 1)))
        self.number += 1
        self.broker[self.number], self.lots[self.number] = fire, 0.1
        self.send("trade_executed", {"fire_id": fire, "status": "FILLED", "ticket": self.number, "price": 1.1})

    @precondition(lambda self: self.pending)
    @rule()
    def is_refused(self):
        fire = self.pending.pop(0)
        self.gone.add(fire)
        self.send("trade_executed", {"fire_id": fire, "status": "REJECTED"})

    @precondition(lambda self: self.broker)
    @rule(data=st.data(), times=st.integers(1, 3), by_status=st.booleans())
    def closes_and_is_told_several_times(self, data, times, by_status):
        ticket = data.draw(st.sampled_from(sorted(self.broker)))
        fire, lots = self.broker.pop(ticket), self.lots.pop(ticket)
        self.gone.add(fire)
        for _ in range(times):
            if by_status:
                self.send("trade_executed", {"fire_id": fire, "status": "CLOSED_TP", "ticket": ticket})
            else:
                close = {"ticket": ticket, "fire_id": fire, "symbol": "EURUSD", "volume": lots, "close_price": 1.2}
                self.send("position_closed", {**close, "profit": 1.0, "reason": "TP_HIT", "target_uuid": "EA"})

    @precondition(lambda self: self.broker)
    @rule(data=st.data())
    def closes_in_part_with_a_new_ticket(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.broker)))
        if self.lots[ticket] <= 0.02:
            return
        self.number += 1
        fire, lots = self.broker.pop(ticket), self.lots.pop(ticket)
        self.broker[self.number], self.lots[self.number] = fire, round(lots - 0.01, 2)
        close = {"ticket": ticket, "fire_id": fire, "symbol": "EURUSD", "volume": 0.01, "close_price": 1.2}
        self.send("position_closed", {**close, "profit": 1.0, "reason": "MANUAL", "target_uuid": "EA"})
        self.complete_snapshots(1)

    @precondition(lambda self: self.broker)
    @rule(data=st.data())
    def closes_unseen_and_two_snapshots_show_it(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.broker)))
        self.gone.add(self.broker.pop(ticket))
        del self.lots[ticket]
        self.complete_snapshots(2)

    @rule(n=st.integers(1, 3))
    def complete_snapshots(self, n):
        for _ in range(n):
            self.heartbeat(self.listed(), len(self.broker))

    @precondition(lambda self: self.broker)
    @rule(data=st.data(), incomplete=st.booleans())
    def one_complete_snapshot_is_wrong(self, data, incomplete):
        """One snapshot that lacks an open position proves nothing, nor do two with an incomplete one between."""
        lacking = data.draw(st.sampled_from(sorted(self.broker)))
        wrong = [each for each in self.listed() if each["ticket"] != lacking]
        self.complete_snapshots(1)
        self.heartbeat(wrong, len(wrong))
        if incomplete:
            self.heartbeat(wrong, len(wrong) + 1)
            self.heartbeat(wrong, len(wrong))
        self.complete_snapshots(1)

    @rule(keep=st.integers(0, 2), claimed=st.integers(0, 12), jump=st.sampled_from([0, -500, 500]))
    def weak_evidence(self, keep, claimed, jump):
        """An incomplete snapshot, a balance jump, hours of silence: none of them may release."""
        before = dict(self.table.slots)
        positions = self.listed()[:keep]
        count = claimed if claimed != len(positions) else claimed + 1
        self.heartbeat(positions, count, 10_000.0 + jump)
        balance = {"account_number": "1", "balance": 10_000.0 - jump, "equity": 10_000.0}
        self.send("balance_update", balance)
        self.bench.tick(self.now + 5 * 3600)
        assert set(before) <= set(self.table.slots)

    @rule()
    def crashes(self):
        self.bench.consumers[0].save()
        before = msgspec.msgpack.encode(self.table)
        self.bench.restart()
        assert msgspec.msgpack.encode(self.table) == before

    @invariant()
    def exactly_what_is_pending_or_open_is_held(self):
        assert set(self.table.slots) == {*self.pending, *self.broker.values()}
        assert self.table.local == len(self.pending) + len(self.broker)
        assert self.table.used >= self.table.local

    @invariant()
    def every_release_happens_once_and_by_strong_evidence(self):
        released = self.released()
        assert sorted(each["fire_id"] for each in released) == sorted(self.gone)
        assert {each["method"] for each in released} <= STRONG
        assert all(each["evidence"] for each in released)


SlotMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSlotHistories = SlotMachine.TestCase

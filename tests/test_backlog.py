"""The queue between two threads against a plain list: nothing is lost, nothing changes places."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tapebus.backlog import Backlog


class Item(NamedTuple):
    first_seq: int
    last_seq: int
    weight: int
    urgent: int = 0


class BacklogModel(RuleBasedStateMachine):
    """The tape is a list; the taker must see exactly its items, also after being lapped or sent back.

    An item may be handed over before it is on the tape; until `commit` it cannot be read there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Item] = []
        self.committed = 0
        self.open: list[bool] = []
        self.backlog = Backlog(10, 0, 0, self.load, on_tape=lambda: self.committed)
        self.taken = 0

    def load(self, after):
        return iter([item for item in self.tape if after < item.last_seq <= self.committed])

    def make(self, count, weight):
        last = self.tape[-1].last_seq if self.tape else 0
        self.tape.append(Item(last + 1, last + count, weight))
        return self.tape[-1]

    @precondition(lambda self: not self.open)
    @rule(count=st.integers(1, 4), weight=st.integers(1, 12))
    def put(self, count, weight):
        item = self.make(count, weight)
        self.committed = item.last_seq
        self.backlog.put(item)

    @precondition(lambda self: not self.open)
    @rule(count=st.integers(1, 4), weight=st.integers(1, 12))
    def put_early(self, count, weight):
        self.open = [self.backlog.put_early(self.make(count, weight))]

    @precondition(lambda self: self.open)
    @rule()
    def commit(self):
        self.committed = self.tape[-1].last_seq
        if not self.open.pop():
            self.backlog.put(self.tape[-1])

    @rule()
    def get(self):
        item = self.backlog.get(0)
        if item is not None:
            assert item == self.tape[self.taken]
            self.taken += 1
            assert self.backlog.cursor == item.last_seq

    @rule(back=st.integers(0, 3))
    def rewind(self, back):
        self.taken = max(0, self.taken - back)
        self.backlog.rewind(self.tape[self.taken - 1].last_seq if self.taken else 0)

    def teardown(self):
        if self.open:
            self.commit()
        for _ in range(2 * len(self.tape) + 2):
            self.get()
        assert self.taken == len(self.tape) and self.backlog.drained and self.backlog.lag == 0


TestBacklog = BacklogModel.TestCase


def test_what_only_moves_the_cursor_does_not_pile_up():
    backlog = Backlog(2, 0, 0, lambda after: iter(()))
    items = [SimpleNamespace(first_seq=n, last_seq=n, weight=w) for n, w in ((1, 1), (2, 0), (3, 0), (4, 0), (5, 1))]
    for item in items:
        backlog.put(item)
    assert [backlog.get(0).last_seq for _ in range(3)] == [1, 4, 5]
    assert backlog.get(0) is None and not backlog.lapped


def test_a_lossy_queue_drops_the_oldest_and_counts_their_events():
    backlog = Backlog(2, 0, 0, None, lossy=True)
    for n in range(4):
        backlog.put(Item(2 * n + 1, 2 * n + 2, 1))
    assert [backlog.get(0).first_seq, backlog.get(0).first_seq, backlog.get(0)] == [5, 7, None]
    assert backlog.lost == 4
    backlog.close()
    assert backlog.get(None) is None


def test_the_giver_waits_for_a_taker_that_is_behind_but_not_for_one_that_reads_from_the_tape():
    backlog = Backlog(10, 0, 0, lambda after: iter(()))
    backlog.put(Item(1, 1, 6))
    backlog.give_way(6, 3600)
    giver = threading.Thread(target=backlog.give_way, args=(5, 3600), daemon=True)
    giver.start()
    assert giver.is_alive()
    backlog.get(0)
    giver.join(60)
    assert not giver.is_alive()
    for n in range(2, 5):
        backlog.put(Item(n, n, 6))
    assert backlog.lapped
    backlog.give_way(0, 3600)

"""The queue between two threads against a plain list: nothing is lost, nothing changes places."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tapebus.backlog import Backlog


class Item(NamedTuple):
    first_seq: int
    last_seq: int
    weight: int
    urgent: int = 0


class BacklogModel(RuleBasedStateMachine):
    """The tape is a list; the taker must see exactly its items, also after being lapped or sent back."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Item] = []
        self.backlog = Backlog(10, 0, 0, self.load)
        self.taken = 0

    def load(self, after):
        return iter([item for item in self.tape if item.last_seq > after])

    @rule(count=st.integers(1, 4), weight=st.integers(1, 12))
    def put(self, count, weight):
        last = self.tape[-1].last_seq if self.tape else 0
        self.tape.append(Item(last + 1, last + count, weight))
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
        for _ in range(2 * len(self.tape) + 2):
            self.get()
        assert self.taken == len(self.tape) and self.backlog.drained and self.backlog.lag == 0


TestBacklog = BacklogModel.TestCase


def test_a_lossy_queue_drops_the_oldest_and_counts_their_events():
    backlog = Backlog(2, 0, 0, None, lossy=True)
    for n in range(4):
        backlog.put(Item(2 * n + 1, 2 * n + 2, 1))
    assert [backlog.get(0).first_seq, backlog.get(0).first_seq, backlog.get(0)] == [5, 7, None]
    assert backlog.lost == 4
    backlog.close()
    assert backlog.get(None) is None

"""The queue of the Telegram relay against a plain list, and what its journal remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tapebus_telegram.journal import Call, Journal, Sent
from tapebus_telegram.outbox import Entry, Outbox, rendered, settle
from tapebus_telegram.render import Message

LIMIT, KEEP = 6, 4


def entry(seq: int, chat: int = 1, priority: int = 1, group: str = "", **more: Any) -> Entry:
    key = f"{seq:016d}/{chat}"
    return Entry(key, chat, "alert", f"<b>{seq}</b>", str(seq), priority, seq, seq, float(seq), group, **more)


class OutboxModel(RuleBasedStateMachine):
    """The model is a list of (priority, chat, seq) in order of arrival; the state is saved and read back at will."""

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, bytes] = {}
        self.box = Outbox(self.state, LIMIT, KEEP)
        self.model: list[tuple[int, int, int]] = []
        self.seq = self.dropped = self.sent = 0

    @rule(chat=st.integers(1, 3), priority=st.integers(0, 3))
    def add(self, chat: int, priority: int) -> None:
        self.seq += 1
        self.box.add(entry(self.seq, chat, priority))
        self.model.append((priority, chat, self.seq))
        if len(self.model) > LIMIT:
            lowest = min(each[0] for each in self.model)
            self.model.remove(next(each for each in self.model if each[0] == lowest))
            self.dropped += 1

    @rule(closed=st.sets(st.integers(1, 3)))
    def send(self, closed: set[int]) -> None:
        found, at = self.box.next(lambda each: 5.0 if each.chat in closed else 0.0, 1.0)
        open_ones = [each for each in self.model if each[1] not in closed]
        if not open_ones:
            assert found is None and at == (5.0 if self.model else float("inf"))
            return
        urgent = max(each[0] for each in open_ones)
        expected = next(each for each in open_ones if each[0] == urgent)
        assert found is not None and (found.priority, found.chat, found.bus_seq) == expected
        self.box.finish(found, "sent")
        self.model.remove(expected)
        self.sent += 1

    @rule()
    def crash_after_saving(self) -> None:
        self.box.save()
        self.box = Outbox(self.state, LIMIT, KEEP)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def park_and_release(self, data: st.DataObject) -> None:
        """A parked message waits until it is released, whatever its priority."""
        self.seq += 1
        if len(self.model) == LIMIT:
            return
        self.box.add(entry(self.seq, 2, 3), parked=True)
        found, _ = self.box.next(lambda each: 0.0, 1.0)
        assert found is None or found.bus_seq != self.seq
        self.box.release()
        self.model.append((3, 2, self.seq))

    @invariant()
    def the_books_close(self) -> None:
        assert self.box.waiting == len(self.model)
        assert [each.bus_seq for each in self.box.entries()] == [seq for _, _, seq in self.model]
        assert (self.box.counts["sent"], self.box.counts["dropped"]) == (self.sent, self.dropped)
        for chat in (1, 2, 3):
            assert self.box.waiting_for(chat) == sum(each[1] == chat for each in self.model)


OutboxModel.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
test_the_outbox_behaves_like_a_list = OutboxModel.TestCase


def test_the_message_on_its_way_is_never_the_one_that_is_dropped() -> None:
    box = Outbox({}, 2, 10)
    first = entry(1, priority=0)
    box.add(first)
    box.flying = first.key
    for seq in (2, 3, 4):
        box.add(entry(seq, priority=2))
    assert [each.bus_seq for each in box.entries()] == [1, 4]


def test_an_outage_of_any_length_takes_no_more_room_than_the_queue() -> None:
    box = Outbox({}, 50, 10)
    box.add(entry(1, priority=3))
    for seq in range(2, 5000):
        box.add(entry(seq, priority=1))
    assert box.waiting == 50
    assert max(len(box._lowest), len(box._heads[1]), len(box._arrival), len(box._numbers)) <= 202


def test_finished_messages_are_kept_as_far_as_asked_and_readable_from_the_saved_state() -> None:
    state: dict[str, bytes] = {}
    box = Outbox(state, 100, 3)
    for seq in range(1, 6):
        box.add(entry(seq))
        box.finish(box.entries()[0], "sent")
    box.add(entry(6))
    box.save()
    assert [(each["status"], each["text"]) for each in rendered(state)] == [
        ("sent", "3"),
        ("sent", "4"),
        ("sent", "5"),
        ("queued", "6"),
    ]
    shorter = Outbox(state, 100, 2)
    shorter.finish(shorter.entries()[0], "sent")
    shorter.save()
    assert sorted(each["text"] for each in rendered(state)) == ["5", "6"]


@pytest.mark.parametrize("restart", [False, True])
def test_a_message_that_leaves_late_is_not_the_last_word_on_its_subject(restart: bool) -> None:
    state: dict[str, bytes] = {}
    box = Outbox(state, 10, 10)
    raised, cleared = entry(1, group="RAISED\nlag"), entry(2, group="CLEARED\nlag")
    for each in (raised, cleared):
        box.add(each)
    box.finish(raised, "sent")
    box.save()
    box = Outbox(state, 10, 10) if restart else box
    assert box.latest("1", "RAISED\nlag") is None
    found = box.latest("1", "CLEARED\nlag")
    assert found is not None and found.bus_seq == 2


def test_a_merge_into_a_finished_message_is_saved_where_that_is_kept() -> None:
    state: dict[str, bytes] = {}
    box = Outbox(state, 10, 10)
    for seq in (1, 2, 3):
        box.finish(entry(seq, group=f"g{seq}"), "dry_run")
    box.save()
    box.merge(box.latest("1", "g2") or entry(0), Message("<b>n</b>", "n", 1, "g2"), 9)
    box.save()
    assert [each["text"] for each in rendered(state)] == ["1", "n\n(×2)", "3"]


@pytest.mark.parametrize(("message_id", "edits"), [(41, 41), (0, 0)])
def test_what_was_merged_since_the_call_becomes_an_edit_or_without_a_number_a_message(
    message_id: int, edits: int
) -> None:
    box = Outbox({}, 10, 10)
    box.add(entry(1, group="g"))
    sent = Sent(entry(1).key, "1|g", 1, message_id, 1)
    box.merge(box.entries()[0], Message("<b>n</b>", "n", 1, "g"), 5)
    settle(box, box.entries()[0], sent)
    (more,) = box.entries()
    assert (more.edits, more.repeats, more.last_seq, more.text()) == (edits, 2, 5, "<b>n</b>\n(×2)")
    assert box.latest("1", "g") is more


def test_the_journal_knows_after_a_crash_what_was_sent_what_was_called_and_until_when_to_wait(tmp_path: Path) -> None:
    path = tmp_path / "telegram.journal"
    journal = Journal(path)
    journal.begun("k1", -5, 10.0)
    journal.over(-5, 10.5, Sent("k1", "-5|g", 7, 41, 2))
    journal.begun("k2", -5, 12.0)
    journal.over(-5, 12.5, halt=42.5)
    journal.begun("k3", 6, 50.0)
    journal.close()
    for damage in (b"", b'{"over":{"ch', b"\n\xff\xfe"):
        with path.open("ab") as file:
            file.write(damage)
        again = Journal(path)
        assert again.find("k1") == again.group("-5|g") == Sent("k1", "-5|g", 7, 41, 2)
        assert again.find("k2") is None and again.halted_until == 42.5
        assert list(again.calls) == [Call(-5, 10.5), Call(-5, 12.5)] and again.in_flight == Call(6, 50.0, "k3")
        again.close()


def test_the_journal_stays_small_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "telegram.journal"
    journal = Journal(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tapebus_telegram.journal.os.fsync", lambda descriptor: None)
        for seq in range(12_000):
            journal.begun(f"k{seq}", 1, float(seq))
            journal.over(1, float(seq), Sent(f"k{seq}", "1|g", seq, seq))
    journal.close()
    assert path.stat().st_size < 2_000_000 and path.stat().st_mode & 0o777 == 0o600
    again = Journal(path)
    assert again.find("k11999") is not None and again.find("k1") is None and again.group("1|g") is not None
    again.close()

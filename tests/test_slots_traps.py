"""One case for each way in which a slot was once freed wrongly, or never: tables of short stories with their end."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from slots_support import T0, Terminal, position
from tapebus_slots.decide import short_fire_id


class Story(NamedTuple):
    """What happens, the slots in use afterwards, and by which methods slots were released."""

    name: str
    tell: Callable[[Terminal], None]
    slots: str
    released: list[str] = []
    config: dict[str, object] = {}


def beat(terminal, positions, times=1, **more):
    for _ in range(times):
        terminal.heartbeat(positions, **more)


def filled(t):
    t.opened(3)


def closed_status(t):
    t.opened(1)
    t.answer("f0", "CLOSED_TP", ticket=100)


def closed_by_report(t):
    t.opened(1)
    t.close(100, fire_id="f0")


def empty_list(t):
    t.opened(2)
    beat(t, [], 2)


def beyond_the_limit(t):
    beat(t, [*t.opened(10), *(position(900 + i, "XAUUSD") for i in range(6))], 2)


def fires_beyond_the_limit(t):
    for i in range(16):
        t.fire(f"f{i}")


def old(t):
    t.opened(1)
    t.now += 5 * 3600
    t.bench.tick(t.now)
    t.bench.tick(t.now + 30)


def balance_moves(t):
    positions = t.opened(1)
    for balance in (10_000.0, 10_500.0, 9_000.0):
        t.send("balance_update", {"account_number": "1", "balance": balance, "equity": balance})
    beat(t, positions, balance=9_500.0)


def renewed_ticket(t):
    t.fire("f0")
    t.answer("f0", "success", ticket=85051741, price=1.1, volume=0.05)
    beat(t, [position(85051741, volume=0.05, magic=7)])
    t.close(85051741, volume=0.01)
    beat(t, [position(85051856, volume=0.04, magic=7)], 3)


def renewed_ticket_in_the_comment(t):
    t.fire("f0", symbol="GBPUSD")
    t.answer("f0", "success", ticket=85051741)
    beat(t, [position(85051856, "GBPUSD", volume=0.1, comment="from #85051741")], 3)


def renewed_ticket_same_identifier(t):
    t.fire("f0")
    t.answer("f0", "success", ticket=5, position_id=77)
    for ticket in (5, 6, 7):
        beat(t, [position(ticket, position_id=77, open_price=ticket)])


def close_under_a_former_ticket(t):
    renewed_ticket_same_identifier(t)
    t.close(5)


def two_by_hand(t):
    """Positions opened by hand come with an empty fire id; they must not be taken for one another."""
    both = [position(1, fire_id="", open_price=1.1), position(2, fire_id="", open_price=1.1)]
    beat(t, both)
    beat(t, both[1:], 2)
    assert [each["ticket"] for each in t.emitted("slot_released")] == [1]


def count_above_list(t):
    positions = t.opened(3)
    for listed in (positions[:1], [], positions[:2]) * 3:
        beat(t, listed, count=3)


def incomplete_between(t):
    positions = t.opened(2)
    beat(t, positions[:1])
    beat(t, positions[:1], count=2)
    beat(t, positions[:1])


def long_fire_id_cut(t):
    fire = "ELITE_RAPID_KALMAN_QUICKFIRE_1757993286"
    t.fire(fire)
    t.bench.tick(t.now + 31)
    t.now += 31
    beat(t, [position(9, comment=fire[:26])], 2)
    t.answer(fire, "FILLED", ticket=9)


def short_id_in_comment(t):
    fire = short_fire_id("ELITE_RAPID_KALMAN_QUICKFIRE_1757993286", "u")
    t.fire(fire)
    t.fire("other")
    beat(t, [position(9, comment=f"tapebus {fire}")], 2)
    assert [each["fire_id"] for each in t.emitted("slot_opened")] == [fire]


TRAPS = [
    Story("0.1 a fill opens and never closes", filled, "3/10"),
    Story("0.1 a closed status closes", closed_status, "0/10", ["closed_tp"]),
    Story("0.1 a reported close closes", closed_by_report, "0/10", ["position_closed"]),
    Story("0.1 an empty complete list means no positions", empty_list, "0/10", ["snapshot", "snapshot"]),
    Story("0.2 more than the limit is shown as it is", beyond_the_limit, "16/10"),
    Story("0.2 the table takes fires beyond the limit", fires_beyond_the_limit, "16/10"),
    Story("0.3 age releases nothing", old, "1/10"),
    Story("0.4 a balance move releases nothing", balance_moves, "1/10"),
    Story("0.5 a partial close renews the ticket, by its opening", renewed_ticket, "1/10"),
    Story("0.5 a partial close renews the ticket, by its comment", renewed_ticket_in_the_comment, "1/10"),
    Story("0.5 a swap renews the ticket, by its identifier", renewed_ticket_same_identifier, "1/10"),
    Story("0.5 a close may name a former ticket", close_under_a_former_ticket, "0/10", ["position_closed"]),
    Story("0.5 positions without a fire are told apart", two_by_hand, "1/10", ["snapshot"]),
    Story("0.6 a count above the list releases nothing", count_above_list, "3/10"),
    Story("0.6 an incomplete list breaks the run of complete ones", incomplete_between, "2/10"),
    Story("0.19 the begin of a long fire id in the comment is enough", long_fire_id_cut, "1/10"),
    Story("0.19 a short fire id is found whole in the comment", short_id_in_comment, "2/10"),
]


def grace_not_over(t):
    t.opened(1)
    beat(t, [], 2, after=1)


def two_lists_at_once(t):
    """What waited in a queue arrives in one go: one look at the account, not two."""
    t.opened(1)
    beat(t, [], after=30)
    beat(t, [], 3, after=0)


def same_observation_again(t):
    t.opened(1)
    beat(t, [], 4, timestamp=T0 + 40)


def older_observation_later(t):
    t.opened(1)
    beat(t, [], timestamp=T0 + 40)
    beat(t, [], timestamp=T0 + 10)


def another_account(t):
    t.opened(1)
    beat(t, [], 3, target_uuid="EA2")


def known_account_of_two(t):
    positions = t.opened(1)
    beat(t, [], target_uuid="EA2")
    beat(t, positions)
    beat(t, [], 2)


def unknown_account_of_two(t):
    """Nobody said which of two accounts got the order: both must lack it."""
    beat(t, [])
    beat(t, [], target_uuid="EA2")
    t.fire("f0")
    t.bench.tick(t.now + 31)
    t.now += 31
    beat(t, [], 2)
    assert t.metrics() == "1/10"
    beat(t, [], 2, target_uuid="EA2")


def refused_while_open(t):
    """The refusal of a later command (a change of levels) is no word about the position."""
    t.opened(1)
    t.answer("f0", "FAILED", retcode=10016)


def refused_with_ticket(t):
    t.fire("f0")
    t.answer("f0", "FAILED", ticket=5)


def refused_before_filled(t):
    t.fire("f0")
    t.answer("f0", "REJECTED")
    t.answer("f0", "FILLED", ticket=5)


def given_up_then_carried_out(t):
    """An order without an answer was absent twice and given up; a fill later than that is news."""
    t.fire("f0")
    t.bench.tick(t.now + 31)
    t.now += 31
    beat(t, [], 2)
    assert t.metrics() == "0/10"
    t.answer("f0", "FILLED", ticket=5)


def late_fill(t):
    t.fire("f0")
    t.close(100, fire_id="f0")
    t.answer("f0", "FILLED", ticket=100)
    t.fire("f0", status="routed")


def told_thrice(t):
    t.opened(1)
    t.close(100, fire_id="f0")
    t.close(100, fire_id="f0")
    t.answer("f0", "CLOSED_TP", ticket=100)
    beat(t, [], 2)


def partial_told_twice(t):
    t.opened(1)
    for _ in range(2):
        t.close(100, volume=0.05, fire_id="f0", timestamp=T0 + 9)


def partial_after_the_list_that_shows_it(t):
    t.opened(1)
    beat(t, [position(100, fire_id="f0", volume=0.05)])
    t.close(100, volume=0.05, fire_id="f0")


def parts_add_up(t):
    t.opened(1)
    for n, volume in enumerate((0.07, 0.01, 0.02)):
        assert t.metrics() == "1/10"
        t.close(100, volume=volume, fire_id="f0", timestamp=T0 + n)


def partly_filled(t):
    t.fire("f0")
    t.answer("f0", "success", retcode=10010, ticket=5, volume=0.06)
    t.close(5, volume=0.06)


def part_before_adoption(t):
    """The terminal's list shows what a partial close left; the report of that close comes later."""
    beat(t, [position(7, volume=0.05)])
    t.now -= 3
    t.close(7, volume=0.05)


def close_from_before_a_list(t):
    """The report says closed, a list from later still has it: they contradict, so nothing is released."""
    beat(t, t.opened(1))
    t.now -= 20
    t.close(100, fire_id="f0")
    assert t.alerts("slots_disagree")[0]["state"] == "raised"


def settled_by_two_lists(t):
    close_from_before_a_list(t)
    t.now += 20
    beat(t, [position(100, fire_id="f0")], 2)
    assert [each["state"] for each in t.alerts("slots_disagree")] == ["raised", "cleared"]


def closed_yet_listed(t):
    t.opened(1)
    t.close(100, fire_id="f0")
    assert t.metrics() == "0/10"
    beat(t, [position(100)])
    assert t.alerts("slots_disagree")[0]["state"] == "raised"


def late_list_of_a_closed_position(t):
    t.opened(1)
    t.close(100, fire_id="f0")
    beat(t, [position(100)], after=1)
    assert len(t.emitted("slot_opened")) == 1


def refused_while_open_without_ticket(t):
    t.fire("f0")
    t.answer("f0", "FILLED")
    t.answer("f0", "REJECTED")


def list_from_before_the_order(t):
    """A position that was there before the order went out is not what became of it."""
    t.fire("f0")
    t.now -= 20
    beat(t, [position(7)], after=10)
    assert t.table.slots["f0"].ticket is None


def list_from_before_a_filled_order(t):
    """Nor where it was opened at the very price of the order."""
    t.fire("f0")
    t.answer("f0", "FILLED", ticket=8, price=1.1)
    t.now -= 20
    beat(t, [position(7, position_id=7, open_price=1.1)], after=10)
    assert t.table.slots["f0"].ticket == 8


def close_under_a_new_ticket(t):
    """An order was taken for a position whose ticket was renewed since; the close names what never changes."""
    t.fire("f0")
    t.answer("f0", "FILLED", ticket=8, price=1.1)
    beat(t, [position(7, position_id=7, open_price=1.1)])
    t.close(12, position_id=7)
    assert t.table.slots["f0"].ticket == 8


def late_message_turns_no_clock_back(t):
    """A message that waited for an hour must not make lists of that hour count as news."""
    beat(t, t.opened(1), after=4_000)
    t.fire("f1", "XAUUSD")
    now = t.now
    t.now -= 3_000
    t.send("balance_update", {"account_number": "1", "balance": 1e4, "equity": 1e4})
    beat(t, [], 2, after=100)
    t.now = now


def close_of_an_unlisted_position(t):
    """The broker's count is only lowered by a close of what the list behind it had."""
    positions = t.opened(2)
    beat(t, positions[:1], count=5)
    t.close(101, fire_id="f1")


def guess_corrected(t):
    """A position opened by hand looked like the order; the confirmation names another ticket."""
    t.fire("f0")
    beat(t, [position(7, open_price=1.2)])
    t.answer("f0", "FILLED", ticket=8, price=1.3)
    assert {slot.ticket: key for key, slot in t.table.slots.items()} == {7: "ticket-7", 8: "f0"}


def guess_closed(t):
    t.fire("f0")
    beat(t, [position(7)])
    t.close(7)
    assert t.table.slots["f0"].state == "UNKNOWN"


def guess_named(t):
    t.fire("f0")
    beat(t, [position(7)])
    t.close(7, volume=0.05)
    beat(t, [position(7, volume=0.05), position(8, comment="f0")])
    t.close(8, volume=0.05)
    assert {slot.ticket for slot in t.table.slots.values()} == {7, 8}


def guess_of_the_wrong_order(t):
    """Two equal orders, one position: the confirmation says whose it is, the other is in doubt again."""
    t.fire("f0")
    t.fire("f1")
    beat(t, [position(7)])
    t.answer("f1", "FILLED", ticket=7)
    assert [t.table.slots[key].state for key in ("f0", "f1")] == ["UNKNOWN", "OPEN"]
    t.now += 1
    beat(t, [position(7)], 2)


def requote(t):
    t.fire("f0")
    t.answer("f0", "FAILED", retcode=10004)


def requote_filled(t):
    requote(t)
    t.answer("f0", "FILLED", ticket=5, retcode=10009)


def already_closed(t):
    t.opened(1)
    t.answer("f0", "FAILED", retcode=10036)


RULES = [
    Story("a list within the grace after the opening proves nothing", grace_not_over, "1/10"),
    Story("lists that arrive together are one proof", two_lists_at_once, "1/10"),
    Story("one observation sent again is one proof", same_observation_again, "1/10"),
    Story("an older observation is no proof", older_observation_later, "1/10"),
    Story("another account says nothing", another_account, "1/10"),
    Story("the account that held it says it", known_account_of_two, "0/10", ["snapshot"]),
    Story("an order of unknown account is sought in all", unknown_account_of_two, "0/10", ["snapshot"]),
    Story("a refusal does not close an open position", refused_while_open, "1/10"),
    Story("a refusal does not close what was filled without a ticket", refused_while_open_without_ticket, "1/10"),
    Story("a list from before the order says nothing of it", list_from_before_the_order, "2/10"),
    Story("nor of what was opened at the same price", list_from_before_a_filled_order, "2/10"),
    Story(
        "a close by position leaves the order that was taken for it",
        close_under_a_new_ticket,
        "1/10",
        ["position_closed"],
    ),
    Story("a late message turns no clock back", late_message_turns_no_clock_back, "2/10"),
    Story(
        "a close of an unlisted position leaves the count", close_of_an_unlisted_position, "5/10", ["position_closed"]
    ),
    Story("a guess is corrected by the confirmation", guess_corrected, "2/10"),
    Story("of two equal orders the confirmed one holds it", guess_of_the_wrong_order, "1/10", ["snapshot"]),
    Story("the close of what was taken for an order leaves the order", guess_closed, "1/10", ["position_closed"]),
    Story("a list that names the order takes it from what it was taken for", guess_named, "2/10"),
    Story("a refusal with a ticket is a doubt", refused_with_ticket, "1/10"),
    Story("a fill after a refusal opens", refused_before_filled, "1/10", ["rejected"]),
    Story("a fill after the order was given up opens", given_up_then_carried_out, "1/10", ["snapshot"]),
    Story("a fill after the close does not open", late_fill, "0/10", ["position_closed"]),
    Story("a close told three ways is one release", told_thrice, "0/10", ["position_closed"]),
    Story("a partial close told twice is one part", partial_told_twice, "1/10"),
    Story("a partial close told late is still a part", partial_after_the_list_that_shows_it, "1/10"),
    Story("parts add up to a close", parts_add_up, "0/10", ["position_closed"]),
    Story("what was filled in part is closed by that part", partly_filled, "0/10", ["position_closed"]),
    Story("a close from before the list it was adopted from", part_before_adoption, "1/10"),
    Story("a close contradicted by a later list", close_from_before_a_list, "1/10"),
    Story("two lists settle a contradiction", settled_by_two_lists, "1/10"),
    Story("a position listed after its close occupies again", closed_yet_listed, "1/10", ["position_closed"]),
    Story(
        "a list from just after the close opens nothing", late_list_of_a_closed_position, "1/10", ["position_closed"]
    ),
    Story("a requote keeps the slot for the next try", requote, "1/10"),
    Story("a requote and then a fill", requote_filled, "1/10"),
    Story("already closed asks, it does not release", already_closed, "1/10"),
]


@pytest.mark.parametrize("story", [*TRAPS, *RULES], ids=lambda story: story.name)
def test_the_slots_in_use_and_their_releases_are_those_of_the_story(story):
    terminal = Terminal(**story.config)
    story.tell(terminal)
    assert terminal.metrics() == story.slots
    assert [each["method"] for each in terminal.emitted("slot_released")] == story.released
    assert all(each["evidence"] for each in terminal.emitted("slot_released"))

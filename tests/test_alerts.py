"""Alert rules: each kind is raised once and cleared once, also over a restart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alerts_support import SILENCE, Desk

# -- terminals, slots, accounts -----------------------------------------------------------------


def test_a_stale_heartbeat_is_told_for_its_terminal_alone():
    desk = Desk({"kind": "heartbeat", "name": "beat"})
    for second in range(121):
        if second % 30 == 0:
            desk.heartbeat("T1")
            if second < 60:
                desk.heartbeat("T2")
        desk.wait(1)
    assert desk.told == ["raised beat:T2"]
    desk.heartbeat("T2")
    desk.wait(2)
    assert desk.told == ["cleared beat:T2"]


def test_a_terminal_that_is_gone_for_good_is_forgotten():
    desk = Desk({"kind": "heartbeat", "name": "beat", "forget_s": 600.0, "session": "any"})
    desk.heartbeat()
    desk.leap(500)
    assert desk.told == ["raised beat:T1"]
    desk.leap(200)
    assert desk.last["message"].startswith("no longer watched")
    assert desk.told == ["cleared beat:T1"]
    assert not [key for key in desk.bench.context.state if key.startswith("terminal:")]


def test_full_slots_are_told_for_each_user_and_again_only_after_there_was_one_free():
    desk = Desk({"kind": "slots", "name": "full"}, {"kind": "slots", "name": "over", "threshold": 0.0})
    for used in (8, 9, 10, 11, 10, 9):
        desk.slots(used)
        desk.slots(3, user="u2")
        desk.wait(1)
    assert desk.told == ["raised full:u1", "raised over:u1", "cleared over:u1", "cleared full:u1"]


def test_a_user_without_any_slots_has_none_full():
    desk = Desk({"kind": "slots", "name": "full"})
    desk.slots(0, 0)
    desk.wait(3)
    assert desk.told == []


def test_a_drawdown_in_r_is_measured_from_the_highest_point_of_fired_signals():
    desk = Desk({"kind": "drawdown", "name": "r", "measure": "r", "threshold": 3.0, "clear_at": 1.0})
    for r, fired in [(2.0, True), (-5.0, False), (-1.0, True), (-1.0, True), (-1.0, True)]:
        desk.outcome(r, fired)
        desk.wait(1)
    assert desk.told == [], "three below the highest point is not more than three"
    desk.outcome(-0.5)
    desk.wait(1)
    assert desk.last["value"] == 3.5
    assert desk.told == ["raised r"]
    desk.outcome(1.5)
    desk.wait(1)
    assert desk.told == [], "below the threshold, yet not at what clears it"
    desk.outcome(1.2)
    desk.wait(1)
    assert desk.told == ["cleared r"]


def test_losses_that_were_imported_are_no_drawdown_of_today():
    desk = Desk({"kind": "drawdown", "name": "r", "measure": "r", "threshold": 3.0, "fired_only": False})
    for _ in range(9):
        desk.outcome(-1.0, origin="truth_log.jsonl:1")
    desk.wait(1)
    assert desk.told == []


def test_a_drawdown_ends_when_its_losses_leave_the_window():
    desk = Desk({"kind": "drawdown", "name": "r", "measure": "r", "threshold": 3.0, "window_s": 600.0})
    desk.outcome(-4.0)
    desk.wait(1)
    desk.restart()
    desk.wait(1)
    assert desk.told == ["raised r"]
    desk.leap(620)
    assert desk.told == ["cleared r"]
    assert not [key for key in desk.bench.context.state if key.startswith("r:")]


def test_the_same_outcome_delivered_again_after_a_crash_counts_once():
    desk = Desk({"kind": "drawdown", "name": "r", "measure": "r", "threshold": 3.0})
    desk.outcome(-2.0)
    desk.bench.seq -= 1
    desk.restart()
    desk.outcome(-2.0)
    desk.wait(2)
    assert desk.told == []


def test_a_drawdown_in_percent_is_equity_against_the_highest_balance_of_the_window():
    rule = {"kind": "drawdown", "name": "pct", "measure": "percent", "threshold": 10.0, "clear_at": 5.0}
    desk = Desk(rule, {"kind": "slots"})
    desk.heartbeat(balance=1000.0, equity=1000.0)
    desk.event("balance_update", {"account_number": "77", "balance": 500.0, "equity": 400.0})
    desk.wait(1)
    assert desk.last["value"] == pytest.approx(20.0)
    assert desk.told == ["raised pct:77"]
    desk.heartbeat(balance=950.0, equity=880.0)
    desk.wait(1)
    assert desk.told == ["raised pct:T1"]
    desk.restart()
    desk.wait(3)
    assert desk.told == [], "the equity is not known yet"
    desk.heartbeat(balance=950.0, equity=920.0)
    desk.wait(1)
    assert desk.told == []
    desk.heartbeat(balance=950.0, equity=960.0)
    desk.wait(1)
    assert desk.told == ["cleared pct:T1"]


# -- the bus's own figures ----------------------------------------------------------------------


def test_a_consumer_that_stays_behind_is_told_and_a_short_delay_is_not():
    desk = Desk({"kind": "lag", "name": "lag", "threshold": 1000.0, "for_s": 10.0, "clear_at": 100.0})
    for lag_ms in (5000.0, 0.0):
        desk.lag_ms = lag_ms
        desk.wait(5)
    assert desk.told == []
    desk.lag_ms = 5000.0
    desk.wait(11)
    desk.lag_ms = 500.0
    desk.wait(20)
    assert desk.told == ["raised lag:slow"]
    desk.lag_ms = 50.0
    desk.wait(10)
    assert desk.told == ["cleared lag:slow"]


def test_lag_in_events_of_chosen_consumers_only():
    desk = Desk(
        {"kind": "lag", "name": "mine", "measure": "events", "threshold": 5, "for_s": 0, "consumers": ["slow"]},
        {"kind": "lag", "name": "others", "measure": "events", "threshold": 5, "for_s": 0, "consumers": ["quick"]},
    )
    desk.lag_events = 6
    desk.wait(1)
    assert desk.last["unit"] == "events"
    assert desk.told == ["raised mine:slow"]


def test_an_error_rate_needs_enough_events_and_passes_with_its_window():
    desk = Desk({"kind": "error_rate", "name": "errors", "threshold": 10.0, "window_s": 60.0, "at_least": 20})
    desk.errors, desk.handled = 5, 5
    desk.wait(5)
    assert desk.told == [], "10 events say nothing"
    desk.handled = 20
    desk.wait(1)
    assert desk.last["value"] == 20.0
    assert desk.told == ["raised errors:slow"]
    desk.wait(70)
    assert desk.told == ["cleared errors:slow"]


@pytest.mark.parametrize("of", ["dropped", "lost", "feed"])
def test_a_loss_is_told_when_it_grows_and_cleared_when_it_has_not_for_a_window(of):
    desk = Desk({"kind": "loss", "name": "loss", "of": of, "window_s": 60.0})

    def lose(count: int) -> None:
        if of == "dropped":
            desk.counts["dropped"] = {"client.full": count}
        elif of == "feed":
            desk.feed_lost = count
        else:
            desk.counts["lost"] = count

    desk.wait(70)
    lose(3)
    desk.wait(1)
    assert desk.last["value"] == 3.0
    assert ("client.full 3" in desk.last["message"]) is (of == "dropped")
    desk.wait(30)
    lose(5)
    desk.wait(50)
    assert desk.told == ["raised loss"]
    desk.wait(20)
    assert desk.told == ["cleared loss"]
    lose(6)
    desk.wait(1)
    assert desk.told == ["raised loss"]


def test_what_was_lost_before_the_plugin_watched_is_not_told_but_what_was_while_it_was_down_is():
    desk = Desk({"kind": "loss", "name": "loss", "of": "dropped"})
    desk.counts["dropped"] = {"client.full": 100}
    fresh = Desk({"kind": "loss", "name": "loss", "of": "dropped"})
    fresh.wait(5)
    assert fresh.told == []
    desk.told  # noqa: B018 - the loss of before
    desk.wait(400)
    desk.told  # noqa: B018
    desk.counts["dropped"] = {"client.full": 103}
    desk.restart()
    desk.wait(1)
    assert desk.last["value"] == 3.0
    assert desk.told == ["raised loss"]


def test_unexplained_events_are_told_for_as_long_as_the_books_do_not_close():
    desk = Desk({"kind": "loss", "name": "books", "of": "unexplained", "for_s": 3.0})
    desk.counts["unexplained"] = 2
    desk.wait(1)
    desk.counts["unexplained"] = 0
    desk.wait(5)
    assert desk.told == []
    desk.counts["unexplained"] = 2
    desk.wait(600)
    assert desk.told == ["raised books"]
    desk.counts["unexplained"] = 0
    desk.wait(1)
    assert desk.told == ["cleared books"]


def test_dead_letters_are_told_when_they_become_many():
    desk = Desk({"kind": "dead_letters", "name": "dead", "threshold": 5, "window_s": 60.0})
    desk.wait(70)
    desk.counts["dead_letters"] = {"schema": 4}
    desk.errors = 1
    desk.wait(5)
    assert desk.told == []
    desk.errors = 3
    desk.wait(1)
    assert desk.last["value"] == 7.0
    assert "schema 4" in desk.last["message"]
    assert "slow failed 3" in desk.last["message"]
    desk.wait(80)
    assert desk.told == ["raised dead", "cleared dead"]


def test_a_full_store_is_a_state():
    desk = Desk({"kind": "store_full", "name": "full", "repeat_s": 60.0})
    desk.full = True
    desk.wait(150)
    assert [each.data.get("reminder", False) for each in desk.bench.emitted] == [False, True, True]
    desk.full = False
    desk.wait(2)
    assert desk.told == ["raised full", "raised full", "raised full", "cleared full"]


# -- once, over restarts ------------------------------------------------------------------------


def test_a_raised_alert_is_not_raised_again_after_a_restart_and_cleared_when_it_is_over():
    desk = Desk(SILENCE, {"kind": "slots", "name": "full"}, {"kind": "heartbeat", "name": "beat"})
    desk.quote()
    desk.heartbeat()
    desk.slots(10)
    desk.wait(70)
    assert sorted(desk.told) == ["raised beat:T1", "raised full:u1", "raised quiet"]
    for _ in range(3):
        desk.restart()
        desk.now += 5
        desk.wait(80)
    assert desk.told == []
    desk.restart()
    for _ in range(10):
        desk.quote()
        desk.wait(1)
    desk.heartbeat()
    desk.slots(9, kind="slot_released")
    desk.wait(2)
    assert sorted(desk.told) == ["cleared beat:T1", "cleared full:u1", "cleared quiet"]
    assert not [key for key in desk.bench.context.state if key.startswith("raised:")]


def test_failing_on_after_a_restart_is_the_same_alert():
    desk = Desk({"kind": "error_rate", "name": "errors", "threshold": 10.0, "window_s": 60.0, "at_least": 20})
    desk.errors, desk.handled = 10, 10
    desk.wait(1)
    assert desk.told == ["raised errors:slow"]
    desk.errors = desk.handled = 0
    desk.restart()
    for _ in range(50):
        desk.errors += 1
        desk.wait(1)
    assert desk.told == []


def test_an_alert_whose_rule_is_gone_is_cleared_after_the_restart():
    desk = Desk({"kind": "store_full", "name": "full"})
    desk.full = True
    desk.wait(2)
    desk.bench.context.config = {"rules": [{"kind": "store_full", "name": "renamed", "for_s": 99.0}]}
    desk.restart()
    desk.wait(2)
    assert desk.told == ["raised full", "cleared full"]


@given(
    st.lists(st.tuples(st.sampled_from(["bad", "good", "unknown", "restart", "pause"]), st.integers(1, 8)), max_size=40)
)
def test_whatever_happens_each_name_is_raised_and_cleared_in_turn(steps):
    desk = Desk(
        {"kind": "lag", "name": "lag", "threshold": 100.0, "clear_at": 50.0, "for_s": 2.0, "clear_for_s": 3.0},
        {"kind": "slots", "name": "full", "for_s": 1.0},
        SILENCE | {"threshold": 4.0, "clear_for_s": 2.0},
        {"kind": "loss", "name": "loss", "of": "dropped", "window_s": 60.0},
    )
    for what, seconds in steps:
        if what == "restart":
            desk.restart()
        elif what == "pause":
            desk.now += 100
        elif what != "unknown":
            bad = what == "bad"
            desk.lag_ms = 200.0 if bad else 20.0
            desk.slots(10 if bad else 5)
            if bad:
                desk.counts["dropped"] = {"client.full": desk.counts["dropped"].get("client.full", 0) + 1}
            else:
                desk.quote()
        desk.wait(seconds)
    turns: dict[str, list[str]] = {}
    for each in desk.bench.emitted:
        turns.setdefault(each.data["name"], []).append(each.data["state"])
    for name, states in turns.items():
        assert states == ["raised", "cleared"] * (len(states) // 2) + ["raised"] * (len(states) % 2), name
    still = {name for name, states in turns.items() if len(states) % 2}
    kept = {key.removeprefix("raised:") for key in desk.bench.context.state if key.startswith("raised:")}
    assert kept == still, "what is kept is what is raised"

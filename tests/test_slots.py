"""Slots over whole event streams: what opens, keeps and frees a trading position."""

from __future__ import annotations

import pytest

import tapebus_slots
from slots_support import UUID, Terminal, position
from tapebus.errors import ConfigError


def test_ten_filled_fires_keep_all_ten_slots():
    terminal = Terminal()
    positions = terminal.opened(10)
    assert terminal.metrics() == "10/10"
    terminal.heartbeat(positions)
    terminal.heartbeat(positions)
    assert terminal.metrics() == "10/10"
    assert terminal.emitted("slot_released") == []
    assert [each["slots_used"] for each in terminal.emitted("slot_reserved")] == list(range(1, 11))


def test_a_partial_close_with_a_renewed_ticket_keeps_the_slot():
    terminal = Terminal()
    terminal.fire("f0")
    terminal.answer("f0", "success", ticket=85051741, price=1.1, volume=0.05)
    terminal.heartbeat([position(85051741, volume=0.05, magic=7)])
    terminal.close(85051741, volume=0.01)
    for _ in range(3):
        terminal.heartbeat([position(85051856, volume=0.04, magic=7)])
    assert terminal.metrics() == "1/10"
    assert terminal.emitted("slot_released") == []
    terminal.close(85051856, volume=0.04)
    assert terminal.metrics() == "0/10"


@pytest.mark.parametrize("listed", [0, 1])
def test_an_incomplete_snapshot_releases_nothing(listed):
    terminal = Terminal()
    positions = terminal.opened(3)
    for _ in range(5):
        terminal.heartbeat(positions[:listed], count=2)
    assert terminal.metrics() == "3/10"
    assert terminal.emitted("slot_released") == []


def test_sixteen_broker_positions_close_the_gate_and_show_sixteen_of_ten():
    terminal = Terminal()
    positions = [*terminal.opened(9), *(position(900 + i) for i in range(7))]
    terminal.heartbeat(positions)
    assert terminal.metrics() == "16/10"
    (alert,) = terminal.alerts("slots_over_limit")
    assert (alert["state"], alert["severity"]) == ("raised", "critical")
    assert tapebus_slots.tapebus_health(context=terminal.bench.context)["status"] == "degraded"
    terminal.heartbeat([])
    terminal.heartbeat([])
    assert terminal.metrics() == "0/10"
    assert [each["state"] for each in terminal.alerts("slots_over_limit")] == ["raised", "cleared"]


def test_a_count_without_a_list_raises_the_occupancy():
    terminal = Terminal()
    terminal.heartbeat([position(1)], count=16)
    assert terminal.metrics() == "16/10"


def test_an_empty_complete_snapshot_means_zero_positions_the_second_time():
    terminal = Terminal()
    terminal.opened(2)
    terminal.heartbeat([])
    assert terminal.metrics() == "2/10"
    terminal.heartbeat([])
    assert terminal.metrics() == "0/10"
    released = terminal.emitted("slot_released")
    assert [each["method"] for each in released] == ["snapshot", "snapshot"]
    assert released[0]["evidence"][:2] == ["snapshot@5", "snapshot@6"]


def test_a_position_that_comes_back_in_the_second_snapshot_keeps_its_slot():
    terminal = Terminal()
    positions = terminal.opened(1)
    for listed in ([], positions, [], positions):
        terminal.heartbeat(listed)
    assert terminal.metrics() == "1/10"


def test_the_same_snapshot_twice_is_one_witness():
    terminal = Terminal()
    terminal.opened(1)
    terminal.heartbeat([])
    terminal.now -= 1
    terminal.heartbeat([], after=0)
    assert terminal.metrics() == "1/10"


@pytest.mark.parametrize("status", ["FAILED", "REJECTED", "INSUFFICIENT_MARGIN", "INVALID_STOPS", "HEDGE_BLOCKED"])
def test_a_refusal_without_a_ticket_releases(status):
    terminal = Terminal()
    terminal.fire("f0")
    terminal.answer("f0", status)
    assert terminal.metrics() == "0/10"
    assert terminal.emitted("slot_released")[0]["method"] == "rejected"


def test_a_failure_with_a_ticket_or_a_timeout_occupies_until_reconciled():
    terminal = Terminal()
    terminal.fire("f0")
    terminal.answer("f0", "FAILED", ticket=5)
    terminal.fire("f1", symbol="XAUUSD")
    terminal.answer("f1", "FAILED", retcode=10012)
    assert terminal.metrics() == "2/10"
    assert len(terminal.emitted("reconcile_requested")) == 1
    terminal.heartbeat([position(5)])
    terminal.heartbeat([position(5)])
    assert terminal.metrics() == "1/10"


@pytest.mark.parametrize("status", ["CLOSED", "CLOSED_TP", "CLOSED_MANUAL"])
def test_closed_statuses_release_and_a_second_report_changes_nothing(status):
    terminal = Terminal()
    terminal.opened(1)
    terminal.answer("f0", status, ticket=100)
    terminal.close(100, fire_id="f0")
    assert terminal.metrics() == "0/10"
    assert len(terminal.emitted("slot_released")) == 1


def test_a_late_confirmation_does_not_reopen_a_closed_position():
    terminal = Terminal()
    terminal.fire("f0")
    terminal.close(100, fire_id="f0")
    terminal.answer("f0", "FILLED", ticket=100)
    assert terminal.metrics() == "0/10"


def test_a_close_frees_at_once_although_the_last_heartbeat_counted_it():
    terminal = Terminal()
    terminal.heartbeat(terminal.opened(10))
    terminal.close(104, fire_id="f4")
    assert terminal.metrics() == "9/10"


def test_an_unanswered_fire_stays_occupied_and_is_reconciled_by_the_position_that_appeared():
    terminal = Terminal()
    terminal.fire("f0")
    terminal.bench.tick(terminal.now + 31)
    assert terminal.metrics() == "1/10"
    assert terminal.emitted("reconcile_requested")[0]["reasons"] == ["no_answer:f0"]
    terminal.heartbeat([position(77)])
    assert terminal.metrics() == "1/10"
    assert terminal.emitted("slot_opened")[0]["ticket"] == 77
    terminal.answer("f0", "FILLED", ticket=77)
    assert terminal.metrics() == "1/10"


def test_weak_evidence_never_releases():
    terminal = Terminal()
    positions = terminal.opened(2)
    terminal.heartbeat(positions)
    terminal.send("balance_update", {"account_number": "1", "balance": 10_250.0, "equity": 10_250.0})
    terminal.heartbeat(positions[:1], count=1, balance=9_000.0, after=30)
    terminal.heartbeat([], count=3)
    terminal.now += 5 * 3600
    terminal.bench.tick(terminal.now)
    assert terminal.metrics() == "3/10"
    assert terminal.emitted("slot_released") == []
    reasons = {reason.split(":")[0] for each in terminal.emitted("reconcile_requested") for reason in each["reasons"]}
    assert "balance_jump" in reasons


def test_manual_fires_take_no_slot_unless_tracked():
    for track, expected in ((False, "0/10"), (True, "1/10")):
        terminal = Terminal(track_manual=track)
        terminal.fire("m0", mode="MANUAL")
        assert terminal.metrics() == expected


def test_queued_and_routed_fires_of_one_id_reserve_once():
    terminal = Terminal()
    terminal.fire("f0", status="queued", user_id="u1")
    terminal.fire("f0", status="routed", target_uuid=UUID)
    terminal.answer("f0", "FILLED", ticket=1)
    terminal.heartbeat([position(1, fire_id="f0")])
    assert terminal.metrics() == "1/10"
    assert {each["user_id"] for each in terminal.emitted("slot_opened")} == {"u1"}


def test_each_user_has_an_own_table_and_limit():
    terminal = Terminal(users={"u2": {"max_slots": 3}}, accounts={"EA1": "u1", "EA2": "u2"})
    terminal.fire("a", user_id="u1")
    terminal.fire("b", user_id="u2")
    used = {each["user_id"]: (each["slots_used"], each["slots_max"]) for each in terminal.emitted("slot_reserved")}
    assert used == {"u1": (1, 10), "u2": (1, 3)}


def test_slots_survive_a_restart():
    terminal = Terminal()
    positions = terminal.opened(4)
    terminal.heartbeat(positions[1:])
    terminal.send("user_action", {"action": "kill_switch_on"}, user_id="u")
    terminal.bench.restart()
    metrics = tapebus_slots.tapebus_metrics(context=terminal.bench.context)
    assert (metrics["slots"], metrics["kill_switch"]) == ("4/10", 1)
    terminal.heartbeat(positions[1:])
    assert terminal.metrics() == "3/10"


def test_a_wrong_key_is_named():
    with pytest.raises(ConfigError, match="max_slot"):
        Terminal(max_slot=3)
    with pytest.raises(ConfigError, match="confidence_band"):
        Terminal(confidence_band=[89.0, 80.0])

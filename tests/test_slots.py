"""Slots over whole event streams: what opens, keeps and frees a trading position."""

from __future__ import annotations

import msgspec
import pytest

import tapebus_slots
from slots_support import T0, UUID, Terminal, position
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
    signal = {"signal_id": "S", "symbol": "GBPUSD", "direction": "BUY", "confidence": 85.0, "pattern_type": "P"}
    terminal.send("signal_generated", signal)
    (verdict,) = terminal.emitted("gate_verdict")
    assert "over_limit" in verdict["reasons"] and verdict["slots_used"] == 16
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


def test_a_list_from_the_seconds_after_a_fill_is_no_proof_that_the_position_is_gone():
    terminal = Terminal()
    terminal.fire("f0")
    terminal.answer("f0", "FILLED", ticket=1)
    terminal.heartbeat([], after=1)
    terminal.heartbeat([])
    assert terminal.metrics() == "1/10"
    terminal.heartbeat([])
    assert terminal.metrics() == "0/10"


def test_lists_that_are_older_than_a_heartbeat_may_be_prove_nothing():
    terminal = Terminal()
    terminal.opened(1)
    for _ in range(3):
        terminal.now += 100
        terminal.send("market_data", {"symbol": "EURUSD", "bid": 1.1, "ask": 1.1})
        terminal.heartbeat([], after=-60)
        assert terminal.metrics() == "1/10"


def test_a_tick_of_the_clock_during_a_replay_goes_by_the_time_of_the_recording():
    terminal = Terminal()
    terminal.fire("f0")
    terminal.bench.tick(T0 + 10 * 86_400)
    assert terminal.table.slots["f0"].state == "RESERVED"
    terminal.bench.tick(terminal.now + 60)
    assert terminal.table.slots["f0"].state == "UNKNOWN"


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


def witnesses(terminal, key):
    table = terminal.table
    return table.witnesses_of(table.slots[key], terminal.now)


def test_each_witness_says_what_it_believes_with_its_weight_time_and_events():
    terminal = Terminal(balance_jump=100.0)
    positions = terminal.opened(2)
    terminal.heartbeat(positions, balance=10_000.0)
    terminal.heartbeat(positions[:1], balance=10_250.0)
    found = {name: (w.believes, w.weight, w.says, w.evidence) for name, w in witnesses(terminal, "f1").items()}
    assert found == {
        "status": ("held", "strong", "filled", [3, 4]),
        "tickets": ("gone", "snapshot", "absent from 1 of 2 complete lists", [6]),
        "count": ("gone", "weak", "counts 1, 2 held", [6]),
        "balance": ("unsure", "weak", "moved by +250.00", [6]),
        "age": ("held", "weak", "since 1m02s", [4]),
    }
    assert witnesses(terminal, "f1")["tickets"].at == terminal.now
    terminal.now += 5 * 3600
    terminal.bench.tick(terminal.now)
    assert witnesses(terminal, "f0")["age"].believes == "unsure"


def test_a_contradiction_is_told_before_the_release_and_the_release_carries_what_each_witness_said():
    terminal = Terminal()
    positions = terminal.opened(1)
    terminal.heartbeat(positions)
    terminal.heartbeat([])
    (alert,) = terminal.alerts("slots_disagree")
    assert alert["state"] == "raised" and alert["severity"] == "warning"
    assert "fire status says held (filled @2); ticket list says gone (absent from 1 of 2" in alert["message"]
    assert "disagreement:f0" in terminal.emitted("reconcile_requested")[-1]["reasons"]
    health = tapebus_slots.tapebus_health(context=terminal.bench.context)
    assert health == {"status": "degraded", "message": "user default: witnesses disagree about f0"}
    terminal.heartbeat([])
    (released,) = terminal.emitted("slot_released")
    assert released["evidence"] == [
        "snapshot@4",
        "snapshot@5",
        "status:held:filled@2",
        "tickets:gone:absent from 2 of 2 complete lists@5",
        "count:gone:counts 0, 1 held@5",
        "balance:held:10,000.00, no move unanswered@5",
    ]
    assert [each["state"] for each in terminal.alerts("slots_disagree")] == ["raised", "cleared"]


def test_a_count_below_what_is_held_contradicts_the_fills_and_a_complete_list_settles_it():
    terminal = Terminal()
    positions = terminal.opened(3)
    terminal.now += 30
    terminal.heartbeat(positions[:1], count=2)
    (alert,) = terminal.alerts("slots_disagree")
    assert all(f"slot f{n}" in alert["message"] and "EA count says gone" in alert["message"] for n in range(3))
    terminal.heartbeat(positions)
    assert [each["state"] for each in terminal.alerts("slots_disagree")] == ["raised", "cleared"]
    assert terminal.metrics() == "3/10"


def test_a_reconciliation_is_asked_for_once_and_again_after_it_was_answered():
    terminal = Terminal()
    positions = terminal.opened(1)
    for balance in (10_000.0, 11_000.0, 12_000.0):
        terminal.send("balance_update", {"account_number": "1", "balance": balance, "equity": balance})
    assert len(terminal.emitted("reconcile_requested")) == 1
    terminal.heartbeat(positions, balance=12_000.0)
    assert not terminal.table.reconcile
    terminal.send("balance_update", {"account_number": "1", "balance": 9e3, "equity": 9e3})
    assert [each["reasons"] for each in terminal.emitted("reconcile_requested")] == [
        ["balance_jump:+1000.00"],
        ["balance_jump:-3000.00"],
    ]


def test_a_balance_belongs_to_the_account_whose_number_it_names():
    terminal = Terminal()
    terminal.heartbeat([], balance=1_000.0, account_number="7")
    terminal.heartbeat([], balance=2_000.0, account_number="8", target_uuid="EA2")
    for number, balance in (("8", 2_500.0), ("9", 1.0)):
        terminal.send("balance_update", {"account_number": number, "balance": balance, "equity": balance})
    assert {name: view.balance for name, view in terminal.table.accounts.items()} == {UUID: 1_000.0, "EA2": 2_500.0}


def test_a_heartbeat_of_a_clock_that_is_ahead_does_not_mute_those_after_it():
    terminal = Terminal()
    positions = terminal.opened(1)
    ahead = {"target_uuid": UUID, "balance": 1e4, "equity": 1e4, "open_positions": 1, "positions": positions}
    terminal.bench.feed([terminal.bench.event("ea_heartbeat", terminal.now + 7200, ahead)])
    terminal.fire("f1")
    terminal.heartbeat(positions)
    terminal.heartbeat([])
    terminal.heartbeat([])
    assert [each["fire_id"] for each in terminal.emitted("slot_released")] == ["f0"]


def test_only_what_changed_is_written_and_the_lists_of_the_past_line_by_line():
    terminal = Terminal()
    terminal.opened(3)
    for n in range(3):
        terminal.close(100 + n, fire_id=f"f{n}")
    state = terminal.bench.context.state
    assert sorted(key for key in state if key.startswith("ended:")) == [f"ended:default:f{n}" for n in range(3)]
    before = dict(state)
    terminal.fire("m", mode="MANUAL")
    assert state == before
    terminal.fire("f3")
    assert [key for key in state if state[key] is not before.get(key)] == ["table:default"]
    terminal.bench.restart()
    terminal.answer("f1", "FILLED", ticket=101)
    assert terminal.metrics() == "1/10"


def test_no_more_than_a_thousand_ended_fires_are_remembered_also_on_disk():
    terminal = Terminal()
    for n in range(1_030):
        terminal.fire(f"f{n}")
        terminal.answer(f"f{n}", "REJECTED")
    lines = [key for key in terminal.bench.context.state if key.startswith("ended:")]
    assert len(lines) == len(terminal.table.ended) == 1_024
    assert "ended:default:f5" not in lines and "ended:default:f1029" in lines


def test_a_count_of_positions_beyond_reason_is_no_heartbeat():
    terminal = Terminal()
    with pytest.raises(msgspec.ValidationError):
        terminal.heartbeat([], count=2**63 - 1)
    terminal.heartbeat([], count=1_000_000)
    terminal.fire("f0")
    assert terminal.metrics() == "1000001/10"


def test_tables_of_an_earlier_version_are_read_and_their_past_is_kept():
    old = {
        "user_id": "default",
        "maximum": 10,
        "slots": {"f1": {"key": "f1", "state": "OPEN", "since": T0, "symbol": "EURUSD", "direction": "BUY"}},
        "accounts": {UUID: {"balance": 1.0, "heartbeat_at": T0}},
        "ended": {"f0": ["position_closed", T0]},
        "fired": {"S1": T0},
        "witnesses": ["silence"],
        "reconcile": True,
        "asked": True,
        "over_limit": False,
    }
    old["slots"]["f1"] |= {"fire_id": "f1", "ticket": 7, "lots": 0.1, "missing": ["snapshot@3"], "witnesses": ["age"]}
    terminal = Terminal()
    terminal.bench.context.state["table:default"] = msgspec.msgpack.encode(old)
    for _ in range(2):
        terminal.bench.restart()
        terminal.answer("f0", "FILLED", ticket=5)
        assert terminal.metrics() == "1/10"
    assert terminal.table.fired == {"S1": T0}
    terminal.close(7, fire_id="f1")
    assert terminal.metrics() == "1/10"
    terminal.answer("f1", "CLOSED_TP")
    assert terminal.metrics() == "0/10"

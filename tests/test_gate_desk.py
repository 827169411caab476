"""The gate inside the plugin: recorded signals, users and their limits, switches that survive a restart."""

from __future__ import annotations

import json
import re
import time
from itertools import islice
from pathlib import Path

import msgspec
import pytest

import tapebus_schema
import tapebus_slots
from gate_support import T0
from tapebus import Publisher, Tape
from tapebus.errors import ConfigError
from tapebus.events import Registry
from tapebus.testing import PluginBench
from tapebus_slots.config import Config

REGISTRY = Registry([*tapebus_schema.tapebus_register_event_types({}), *tapebus_slots.tapebus_register_event_types()])


class Table:
    """A bench of the plugin with the few events of a desk spelled out; every emitted payload must be a valid one."""

    def __init__(self, shared=None, **config):
        values = {"auto_fire": True, "risk_pct": 1.0, **config}
        self.bench = PluginBench(tapebus_slots, REGISTRY, values, name="slots", shared=shared)

    def send(self, event_type, data, at=T0, **envelope):
        self.bench.feed([self.bench.event(event_type, at, data, **envelope)])

    def account(self, balance=10_000.0, at=T0, **more):
        self.send("balance_update", {"account_number": "1", "balance": balance, "equity": balance, **more}, at)

    def quote(self, bid=1.16990, ask=1.17000, symbol="EURUSD", at=T0):
        self.send("market_data", {"symbol": symbol, "bid": bid, "ask": ask}, at)

    def ready(self, at=T0, **more):
        self.account(at=at, **more)
        self.quote(at=at)
        return self

    def signal(self, signal_id="S1", at=T0, envelope=None, **more):
        """The verdicts this signal gets."""
        data = {"signal_id": signal_id, "symbol": "EURUSD", "direction": "BUY", "confidence": 85.0}
        data |= {"pattern_type": "BB_SCALP", "entry": 1.17, "sl": 1.1685, "tp": 1.172, **more}
        before = len(self.emitted("gate_verdict"))
        self.send("signal_generated", data, at, **(envelope or {}))
        return self.emitted("gate_verdict")[before:]

    def emitted(self, event_type):
        found = [wire.data for wire in self.bench.emitted if wire.event_type == event_type]
        for data in found:
            msgspec.convert(data, REGISTRY.types[event_type].payload)
        return found


# -- recorded signals ---------------------------------------------------------------------------


def recorded(shared_data):
    lines = (shared_data / "legacy" / "truth_log_20250811.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [row for row in rows if {"signal_id", "symbol", "direction", "sl", "tp"} <= row.keys()]


def is_the_recorded_bug(row):
    return row["symbol"] == "XAUUSD" and abs(abs(row["entry_price"] - row["sl"]) - 0.001) < 1e-6


@pytest.mark.parametrize("with_quotes", [True, False], ids=["with quotes", "without quotes"])
def test_of_a_recorded_day_all_nine_gold_signals_with_a_stop_of_a_thousandth_are_refused(shared_data, with_quotes):
    rows = recorded(shared_data)
    bugs = {row["signal_id"] for row in rows if is_the_recorded_bug(row)}
    assert len(bugs) == 9
    assert sum(80.0 <= row["confidence"] <= 89.0 for row in rows if is_the_recorded_bug(row)) == 3
    table = Table(risk_pct=5.0)
    table.account()
    for number, row in enumerate(rows):
        at = T0 + number
        entry = row["entry_price"]
        if with_quotes:
            spread = 0.2 if row["symbol"] == "XAUUSD" else entry * 1e-5
            table.quote(entry - spread / 2, entry + spread / 2, row["symbol"], at)
        fields = ("signal_id", "symbol", "direction", "confidence", "pattern_type", "sl", "tp")
        table.signal(at=at, **{key: row[key] for key in fields}, entry=entry)
    verdicts = {each["signal_id"]: each for each in table.emitted("gate_verdict")}
    assert len(verdicts) == len({row["signal_id"] for row in rows}) > 9
    for signal_id in bugs:
        assert not verdicts[signal_id]["fire"]
        assert "sl_inside_spread" in verdicts[signal_id]["reasons"]
    assert not bugs & {fire["signal_id"] for fire in table.emitted("fire_command")}


# -- firing -------------------------------------------------------------------------------------


def test_one_batch_of_signals_never_takes_more_slots_than_there_are():
    table = Table(max_slots=3).ready()
    events = [
        table.bench.event(
            "signal_generated",
            T0,
            {"signal_id": f"ELITE_RAPID_KALMAN_QUICKFIRE_{n}", "symbol": "EURUSD", "direction": "BUY", "entry": 1.17}
            | {"confidence": 85.0, "pattern_type": "P", "sl": 1.1685, "tp": 1.172},
        )
        for n in range(6)
    ]
    table.bench.feed(events)
    verdicts = table.emitted("gate_verdict")
    assert [each["fire"] for each in verdicts] == [True] * 3 + [False] * 3
    assert [each["slots_used"] for each in verdicts] == [0, 1, 2, 3, 3, 3]
    assert verdicts[3]["reasons"] == ["no_free_slot"]
    fires = table.emitted("fire_command")
    assert len({fire["fire_id"] for fire in fires}) == 3
    assert all(len(fire["fire_id"]) <= 20 and fire["execution_mode"] == "AUTO" for fire in fires)
    assert all(fire["lot"] == 0.66 for fire in fires)


def test_the_order_carries_the_levels_the_lots_were_sized_for():
    table = Table().ready()
    table.signal(sl=1.1684999, tp=1.17200001)
    (fire,) = table.emitted("fire_command")
    assert (fire["sl"], fire["tp"], fire["lot"]) == (1.16849, 1.172, 0.66)


def test_verdict_and_order_belong_to_the_chain_of_the_signal_also_where_it_names_none():
    table = Table().ready()
    table.signal("S1"), table.signal("S2", envelope={"correlation_id": "chain"})
    found = [(w.event_type, w.correlation_id) for w in table.bench.emitted if not w.event_type.startswith("slot")]
    assert found == [(kind, chain) for chain in ("S1", "chain") for kind in ("gate_verdict", "fire_command")]


def test_a_signal_published_twice_fires_once_also_after_a_restart():
    table = Table().ready()
    assert table.signal()[0]["fire"]
    table.bench.restart()
    table.quote()
    assert table.signal()[0]["reasons"] == ["already_fired"]


def test_auto_fire_is_off_by_default_and_the_verdict_still_shows_every_rule():
    table = Table(auto_fire=False, risk_pct=5.0).ready()
    (verdict,) = table.signal()
    assert (verdict["fire"], verdict["reasons"], verdict["lots"]) == (False, ["auto_fire_off"], 3.33)
    assert [rule["passed"] for rule in verdict["rules"]].count(False) == 1
    assert [wire.event_type for wire in table.bench.emitted] == ["gate_verdict"]


def test_orders_of_one_batch_share_the_free_margin_the_account_showed_before_them():
    table = Table(leverage=100).ready(free_margin=1_200.0)
    for n in range(3):
        table.signal(f"S{n}")
    assert [fire["lot"] for fire in table.emitted("fire_command")] == [0.66, 0.36]  # 1170 a lot
    assert table.emitted("gate_verdict")[2]["reasons"] == ["margin_exceeded"]
    assert table.emitted("gate_verdict")[0]["margin"] == pytest.approx(772.2)
    table.account(at=T0 + 1, free_margin=500.0)
    assert table.signal("S9", at=T0 + 1)[0]["lots"] == 0.42


def test_what_is_left_after_a_partial_close_is_what_counts_as_open_risk():
    table = Table(risk_pct=8.0, accounts={"U": "default"}).ready()
    table.signal()
    (fire,) = table.emitted("fire_command")
    answer = {"fire_id": fire["fire_id"], "status": "FILLED", "ticket": 7, "price": 1.17, "volume": fire["lot"]}
    table.send("trade_executed", {**answer, "target_uuid": "U"}, T0 + 1)
    close = {"ticket": 7, "symbol": "EURUSD", "volume": fire["lot"] - 1, "close_price": 1.171, "profit": 1.0}
    table.send("position_closed", {**close, "reason": "TP", "target_uuid": "U"}, T0 + 2)
    (verdict,) = table.signal("S2", at=T0 + 2)
    risk = next(rule for rule in verdict["rules"] if rule["name"] == "total_open_risk")
    assert risk["actual"] == pytest.approx(150.0 + verdict["risk"])


def test_an_account_kept_in_another_currency_is_sized_in_it():
    table = Table()
    table.account(currency="EUR")
    table.quote()
    (verdict,) = table.signal()
    assert (verdict["fire"], verdict["lots"]) == (True, 0.77)  # 100 EUR, at 1.1699 USD each
    assert verdict["risk"] == pytest.approx(0.77 * 150 / 1.1699)


def test_an_order_of_a_person_counts_with_the_risk_to_its_stop_once_it_is_filled():
    table = Table(track_manual=True).ready()
    order = {"fire_id": "m1", "symbol": "EURUSD", "direction": "BUY", "lot": 2.0, "sl": 1.1690}
    table.send("fire_command", {**order, "execution_mode": "MANUAL"})

    def open_risk(signal_id):
        (verdict,) = table.signal(signal_id)
        found = next(rule["actual"] for rule in verdict["rules"] if rule["name"] == "total_open_risk")
        return found - verdict["risk"]

    assert open_risk("S1") == pytest.approx(100.0), "nobody knows the price yet: one full trade"
    table.send("trade_executed", {"fire_id": "m1", "status": "FILLED", "ticket": 1, "price": 1.17, "volume": 2.0})
    assert open_risk("S2") == pytest.approx(200.0 + 99.0), "a hundred points of two lots, and the order of S1"
    table.send("fire_command", {**order, "fire_id": "m2", "sl": 1.1710, "execution_mode": "MANUAL"})
    table.send("trade_executed", {"fire_id": "m2", "status": "FILLED", "ticket": 2, "price": 1.17, "volume": 2.0})
    assert open_risk("S3") == pytest.approx(200.0 + 2 * 99.0), "a stop that locks in a gain risks nothing"


# -- users --------------------------------------------------------------------------------------

DESKS = {
    "tiers": {
        "COMMANDER": {"confidence_band": [80.0, 89.0], "risk_pct": 2.0},
        "NIBBLER": {"max_slots": 1, "auto_fire": False},
    },
    "users": {"7": {"tier": "COMMANDER", "confidence_band": [60.0, 70.0]}, "8": {"tier": "NIBBLER"}},
}


def mode(table, user="7", at=T0, **fields):
    table.send("user_fire_mode", {"user_id": user, **fields}, at)


def accounts(table, *users):
    for user in users:
        table.send("balance_update", {"account_number": user, "balance": 1e4, "equity": 1e4}, user_id=user)
    table.quote()
    return table


def test_a_user_has_the_limits_of_the_tier_and_own_ones_over_them():
    table = accounts(Table(**DESKS), "7", "8")
    (verdict,) = table.signal(confidence=65.0, envelope={"user_id": "7"})
    assert (verdict["fire"], verdict["user_id"], verdict["lots"]) == (True, "7", 1.33)
    (verdict,) = table.signal(envelope={"user_id": "7"}, signal_id="S2")
    assert verdict["reasons"] == ["confidence_outside_band"]
    (verdict,) = table.signal(envelope={"user_id": "8"}, signal_id="S3")
    assert verdict["reasons"] == ["auto_fire_off"]


def test_the_latest_fire_mode_of_a_user_wins_also_after_a_restart():
    table = accounts(Table(**DESKS), "7")
    mode(table, auto_fire=False, risk_pct=0.5)
    mode(table, auto_fire=True, confidence_band=[80.0, 89.0], max_slots=2)
    for _ in range(2):
        (verdict,) = table.signal("S0", envelope={"user_id": "7"}, sl=1.1680)
        slots = next(rule for rule in verdict["rules"] if rule["name"] == "slots")
        assert (slots["limit"], verdict["lots"]) == (2, 0.25)
        table.bench.restart()
        table.quote()


def test_a_fire_mode_may_move_a_user_to_another_tier():
    table = accounts(Table(**DESKS), "8")
    mode(table, "8", tier="COMMANDER")
    assert table.signal(envelope={"user_id": "8"})[0]["fire"]
    mode(table, "8", tier="GHOST")
    assert table.signal("S2", envelope={"user_id": "8"})[0]["reasons"] == ["tier_unknown"]


def test_fewer_slots_than_held_is_a_state_that_closes_the_gate():
    table = Table().ready()
    table.signal("S1"), table.signal("S2")
    table.send("user_fire_mode", {"user_id": "default", "max_slots": 1})
    assert table.signal("S3")[0]["reasons"] == ["over_limit"]
    assert table.emitted("alert")[0]["name"] == "slots_over_limit:default"


def test_a_fire_mode_that_makes_no_sense_changes_nothing():
    table = accounts(Table(**DESKS), "7")
    with pytest.raises(ConfigError, match="the lower end comes first"):
        mode(table, confidence_band=[89.0, 80.0])
    assert table.signal(confidence=65.0, envelope={"user_id": "7"})[0]["fire"]


def test_a_signal_of_nobody_is_judged_for_the_default_user_and_everybody_who_lets_signals_be_fired():
    table = accounts(Table(auto_fire=False, users={"7": {"auto_fire": True}, "8": {}}), "default", "7", "8", "9")
    assert [each["user_id"] for each in table.signal("S1")] == ["default", "7"]
    mode(table, "9", auto_fire=True)
    found = table.signal("S2")
    assert [(each["user_id"], each["fire"]) for each in found] == [("default", False), ("7", True), ("9", True)]
    fires = [fire for fire in table.emitted("fire_command") if fire["signal_id"] == "S2"]
    assert len({fire["fire_id"] for fire in fires}) == 2


def test_a_wrong_key_in_a_tier_or_a_user_is_named_at_the_start():
    with pytest.raises(ConfigError, match=r"plugins\.slots\.tiers\.X\.max_slot: unknown key; did you mean 'max_slots'"):
        Table(tiers={"X": {"max_slot": 3}})
    with pytest.raises(ConfigError, match=r"plugins\.slots\.users\.7\.tier = 'COMMANDERS'.*did you mean 'COMMANDER'"):
        Table(tiers={"COMMANDER": {}}, users={"7": {"tier": "COMMANDERS"}})
    with pytest.raises(ConfigError, match=r"plugins\.slots\.users\.7.*risk_pct"):
        Table(users={"7": {"risk_pct": 101}})
    with pytest.raises(ConfigError, match=r"plugins\.slots\.users\.7\] symbols: holds for everybody"):
        Table(users={"7": {"symbols": {}}})


# -- what others found --------------------------------------------------------------------------


def status(table, word, pattern="BB_SCALP"):
    data = {"pattern_type": pattern, "status": word, "reason": "r", "n": 20, "wins": 5}
    table.send("pattern_status", data)


def test_a_disabled_pattern_stays_off_over_a_restart_until_it_comes_back():
    table = Table().ready()
    status(table, "watch")
    assert table.signal("S1")[0]["fire"]
    status(table, "disabled")
    table.bench.restart()
    table.quote()
    assert table.signal("S2")[0]["reasons"] == ["pattern_disabled"]
    assert table.signal("S3", pattern_type="VCB_BREAKOUT")[0]["fire"]
    status(table, "active")
    assert table.signal("S4")[0]["fire"]


def fit(table, *knots, version=1):
    table.send("calibration", {"version": version, "method": "isotonic", "n": 300, "knots": [list(k) for k in knots]})


def test_the_gate_may_judge_by_the_latest_calibration_and_shows_both_figures():
    table = Table(confidence="calibrated").ready()
    assert table.signal("S1")[0]["reasons"] == ["not_calibrated"]
    fit(table, (0.0, 0.0), (100.0, 50.0))
    (verdict,) = table.signal("S2")
    assert (verdict["reasons"], verdict["confidence"], verdict["calibrated"]) == (
        ["confidence_outside_band"],
        85.0,
        42.5,
    )
    fit(table, (80.0, 70.0), (90.0, 90.0), version=2)
    table.bench.restart()
    table.quote()
    (verdict,) = table.signal("S3")
    assert (verdict["fire"], verdict["calibrated"]) == (True, 80.0)


def test_a_calibration_that_runs_backwards_is_refused():
    table = Table().ready()
    with pytest.raises(ValueError, match="ascend"):
        fit(table, (90.0, 50.0), (80.0, 60.0))
    assert "calibrated" not in table.signal()[0]


def test_where_the_broker_must_say_what_a_symbol_is_nothing_fires_before_it_has_said_all():
    table = Table(require_specification=True).ready()
    told = {"digits": 5, "point": 1e-5, "tick_size": 1e-5, "contract_size": 100_000.0, "stops_level": 0.0}
    told |= {"volume_min": 0.01, "volume_step": 0.01, "volume_max": 100.0}
    table.send("symbol_specification", {"symbol": "EURUSD", **told})
    (verdict,) = table.signal()
    assert verdict["reasons"] == ["specification_missing"]
    assert next(each["actual"] for each in verdict["rules"] if each["name"] == "specification") == ["quote"]
    table.send("symbol_specification", {"symbol": "EURUSD", "quote": "USD"})
    table.bench.restart()
    table.ready()
    assert table.signal("S2")[0]["fire"]


def test_what_the_broker_says_of_a_symbol_counts_and_is_kept():
    table = Table().ready()
    table.send("symbol_specification", {"symbol": "EURUSD", "stops_level": 200.0, "volume_limit": 0.0})
    table.bench.restart()
    table.quote()
    (verdict,) = table.signal()
    assert verdict["reasons"] == ["sl_inside_spread"]
    assert [rule["limit"] for rule in verdict["rules"] if rule["name"] == "sl_distance"] == [0.002]


def test_each_broker_has_its_own_facts():
    shared = {"brokers": {"small": {"accounts": ["U"], "symbols": {"EURUSD": {"volume_max": "0.5"}}}}}
    table = Table(shared=shared, accounts={"U": "7"}).ready()
    beat = {"target_uuid": "U", "balance": 1e4, "equity": 1e4, "open_positions": 0, "positions": []}
    table.send("ea_heartbeat", beat)
    assert table.signal("S1", envelope={"user_id": "7"})[0]["lots"] == 0.5
    assert table.signal("S2")[0]["lots"] == 0.66


# -- the kill switch ----------------------------------------------------------------------------


def test_the_kill_switch_stops_firing_across_a_restart_until_it_is_taken_back():
    table = Table().ready()
    table.send("user_action", {"action": "kill_switch_on"}, user_id="u")
    table.bench.restart()
    table.quote()
    assert table.signal("S1")[0]["reasons"] == ["kill_switch_on"]
    table.send("user_action", {"action": "kill_switch_off"}, user_id="u")
    assert table.signal("S2")[0]["fire"]
    assert [each["state"] for each in table.emitted("alert")] == ["raised", "cleared"]


def test_the_kill_switch_of_a_running_bus_is_still_on_after_kill_9(make_bus):
    bus = make_bus(plugins=["schema", "store", "slots"], extra="[plugins.slots]\nauto_fire = true").start()

    def decided(signal_id):
        now = time.time()
        with Publisher(source="test", endpoint=bus.acked) as publisher:
            account = {"account_number": "1", "balance": 1e4, "equity": 1e4}
            publisher.publish("balance_update", account, user_id="default")
            publisher.publish("market_data", {"symbol": "EURUSD", "bid": 1.1699, "ask": 1.17}, timestamp=now)
            data = {"signal_id": signal_id, "symbol": "EURUSD", "direction": "BUY", "confidence": 85.0}
            data |= {"pattern_type": "BB_SCALP", "entry": 1.17, "sl": 1.1685, "tp": 1.172}
            publisher.publish("signal_generated", data, timestamp=now)
            assert publisher.flush(30)
        with Tape.open(bus.data_dir) as tape:
            found = tape.follow(after=0, topics=["gate_verdict"], idle_timeout=30)
            return next(event.data for event in found if event.data.signal_id == signal_id)

    assert decided("S1").fire
    with Publisher(source="telegram", endpoint=bus.acked) as publisher:
        publisher.publish("user_action", {"user_id": "u", "action": "kill_switch_on"})
        assert publisher.flush(30)
    assert decided("S2").reasons == ["kill_switch_on"]
    bus.kill()
    bus.start()
    assert decided("S3").reasons == ["kill_switch_on"]
    with Tape.open(bus.data_dir) as tape:
        fires = [event.data.signal_id for event in tape.read(topics=["fire_command"])]
        alerts = [event.data.state for event in tape.read(topics=["alert"]) if event.data.name == "kill_switch"]
    assert (fires, alerts) == (["S1"], ["raised"])


def test_signals_that_waited_in_a_spool_are_judged_and_not_fired(embed):
    """They come with the quotes of their time, so no age of a quote gives them away."""
    bus = embed(["schema", "store", "slots"], extra="[plugins.slots]\nauto_fire = true")
    with bus.publisher() as publisher:
        publisher.publish("balance_update", {"account_number": "1", "balance": 1e4, "equity": 1e4}, user_id="default")
        for signal_id, at in (("old", time.time() - 600), ("new", time.time())):
            publisher.publish("market_data", {"symbol": "EURUSD", "bid": 1.1699, "ask": 1.17}, timestamp=at)
            data = {"signal_id": signal_id, "symbol": "EURUSD", "direction": "BUY", "confidence": 85.0}
            data |= {"pattern_type": "BB_SCALP", "entry": 1.17, "sl": 1.1685, "tp": 1.172}
            publisher.publish("signal_generated", data, timestamp=at)
        assert publisher.flush(30)
    with bus.tape() as tape:
        found = [event.data for event in islice(tape.follow(after=0, topics=["gate_verdict"], idle_timeout=30), 2)]
    assert {each.signal_id: each.reasons for each in found} == {"old": ["signal_late"], "new": []}


# -- the documentation --------------------------------------------------------------------------


def test_the_readme_names_every_rule_reason_and_key():
    place = Path(tapebus_slots.__file__).parent
    readme = (place / "README.md").read_text()
    sources = "".join((place / name).read_text() for name in ("gate.py", "plan.py", "sizing.py"))
    reasons = set(re.findall(r'"([a-z]+(?:_[a-z]+)+)"', sources)) - {"not_fired_before"}
    assert {"sl_inside_spread", "margin_unknown", "over_limit"} <= reasons
    names = reasons | set(Config.__struct_fields__)
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", readme)] == []

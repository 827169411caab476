"""What other limits would have fired: the same gate over recorded signals, against a count by hand."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice

import pytest
from click.testing import CliRunner

from gate_support import KNOWN, QUOTES, RICH, T0, signal
from tapebus.cli import cli, main
from tapebus_slots.config import Config
from tapebus_slots.sizing import Quote
from tapebus_slots.view import Account
from tapebus_slots.whatif import Change, Result, Simulation, compare

BASE = Config(risk_pct=0.5, max_total_open_risk_pct=50.0, max_per_currency_risk_pct=50.0)


def won(at, r=1.3, pips=20.0):
    return Result("WIN", at, r, pips)


def lost(at):
    return Result("LOSS", at, -1.0, -15.0)


def run(change, rows, config=BASE):
    """A simulation over (confidence, result) a second apart."""
    simulation = Simulation(change)
    for number, (confidence, result) in enumerate(rows):
        simulation.judge(signal(signal_id=f"S{number}", confidence=confidence), result, RICH, QUOTES, config, KNOWN)
    return simulation


def test_a_wider_band_fires_more_and_the_difference_is_shown_by_itself():
    rows = [(85.0, won(T0 + 9)), (76.0, lost(T0 + 9)), (78.0, won(T0 + 9)), (90.0, lost(T0 + 9)), (70.0, None)]
    found = compare(run(Change(), rows), run(Change(confidence_band=(75.0, 92.0)), rows))
    assert (found["configured"]["fires"], found["changed"]["fires"]) == (1, 4)
    assert (found["changed"]["wins"], found["changed"]["losses"], found["changed"]["win_rate"]) == (2, 2, 0.5)
    assert found["changed"]["expectancy_r"] == pytest.approx((1.3 + 1.3 - 1 - 1) / 4)
    assert (found["changed"]["pips"], found["configured"]["pips"]) == (10.0, 20.0)
    assert (found["gained"]["fires"], found["gained"]["wins"], found["given_up"]["fires"]) == (3, 1, 0)
    low, high = found["changed"]["interval"]
    assert (round(low, 4), round(high, 4)) == (0.1500, 0.8500)  # Wilson, 2 of 4
    assert found["configured"]["refused"] == {"confidence_outside_band": 4}


def test_money_is_r_times_what_was_risked_so_twice_the_risk_is_about_twice_the_money():
    rows = [(85.0, won(T0 + 9)), (85.0, lost(T0 + 9))]
    one, two = run(Change(), rows), run(Change(risk_pct=1.0), rows)
    assert one.summary()["money"] == pytest.approx(49.5 * 0.3)
    assert two.summary()["money"] == pytest.approx(99.0 * 0.3)


def test_a_slot_is_held_from_the_fire_to_the_outcome_and_no_longer():
    simulation = Simulation(Change(max_slots=1))
    ends = [T0 + 10, T0 + 15, T0 + 30, None, T0 + 99]
    for number, (at, end) in enumerate(zip((0, 5, 10, 31, 500), ends, strict=True)):
        quotes = {"EURUSD": Quote(1.1699, 1.17, T0 + at)}
        result = None if end is None else won(end)
        given = signal(signal_id=f"S{number}", at=T0 + at)
        simulation.judge(given, result, Account(10_000.0, 10_000.0), quotes, BASE, KNOWN)
    assert list(simulation.fired) == ["S0", "S2", "S3"]
    found = simulation.summary()
    assert (found["refused_because_full"], found["refused_only_because_full"], found["peak_slots"]) == (2, 2, 1)
    assert (found["no_outcome"], found["judged"]) == (1, 5)


def test_a_trade_holds_no_slot_before_it_was_made():
    """Imported signals come after the others although they are older."""
    simulation = Simulation(Change(max_slots=1))
    for at in (900, 0):
        quotes = {"EURUSD": Quote(1.1699, 1.17, T0 + at)}
        given = signal(signal_id=f"S{at}", at=T0 + at)
        simulation.judge(given, won(T0 + at + 60), Account(10_000.0, 10_000.0), quotes, BASE, KNOWN)
    assert list(simulation.fired) == ["S900", "S0"]


def test_only_full_counts_what_nothing_else_would_have_stopped():
    rows = [(85.0, won(T0 + 9)), (85.0, won(T0 + 9)), (10.0, won(T0 + 9))]
    found = run(Change(max_slots=1), rows).summary()
    assert (found["refused_because_full"], found["refused_only_because_full"]) == (2, 1)


def test_figures_of_nothing_are_none():
    found = run(Change(), [(10.0, won(T0))]).summary()
    assert found["win_rate"] is found["interval"] is found["expectancy_r"] is found["pips"] is found["money"] is None


# -- on a tape, while the bus runs --------------------------------------------------------------


def outcome(signal_id, data, at, word):
    r, pips = {"WIN": (4 / 3, 20.0), "LOSS": (-1.0, -15.0), "TIMEOUT": (0.1, 1.5)}[word]
    fields = {key: data[key] for key in ("symbol", "direction", "pattern_type", "confidence", "entry", "sl", "tp")}
    times = {"opened_at": at, "closed_at": at + 600, "duration_s": 600.0, "quotes_seen": 5}
    return {"signal_id": signal_id, **fields, **times, "outcome": word, "r": r, "pips": pips, "fired": False}


def publish_day(publisher, first=T0, name="S"):
    """Forty signals a minute apart, confidence 70 to 95, each third one lost, the last two still open."""
    publisher.publish(
        "balance_update", {"account_number": "1", "balance": 1e4, "equity": 1e4}, timestamp=first, user_id="default"
    )
    rows = []
    for number in range(40):
        at, signal_id = first + 60 * number, f"{name}{number}"
        for age, bid in ((59, 1.0), (2, 1.1699)):
            publisher.publish("market_data", {"symbol": "EURUSD", "bid": bid, "ask": bid + 1e-4}, timestamp=at - age)
        data = {"symbol": "EURUSD", "direction": "BUY", "confidence": 70.0 + (number * 7) % 26, "pattern_type": "P"}
        data |= {"entry": 1.17, "sl": 1.1685, "tp": 1.172}
        publisher.publish("signal_generated", {"signal_id": signal_id, **data}, timestamp=at)
        word = "TIMEOUT" if number % 10 == 9 else "LOSS" if number % 3 == 0 else "WIN"
        rows.append((at, data["confidence"], word if number < 38 else None))
        if number < 38:
            publisher.publish("signal_outcome", outcome(signal_id, data, at, word), timestamp=at + 600)
    assert publisher.flush(30)
    return rows


def by_hand(rows, band, slots):
    """The trades a gate of this band and this many slots takes: (outcome) in order; each holds its slot 600 s."""
    held, taken, full = [], [], 0
    for at, confidence, word in rows:
        held = [end for end in held if end is None or end > at]
        if not band[0] <= confidence <= band[1]:
            continue
        if len(held) >= slots:
            full += 1
            continue
        held.append(None if word is None else at + 600)
        taken.append(word)
    return taken, full


def test_the_command_agrees_with_a_count_by_hand_while_the_bus_runs(embed):
    settings = "[plugins.slots]\nrisk_pct = 0.5\nmax_slots = 4"
    bus = embed(["schema", "store", "slots"], extra=settings)
    with bus.publisher() as publisher:
        rows = publish_day(publisher)
    options = ["--data-dir", str(bus.data_dir), "--config", str(bus.data_dir.parent / "tapebus0.toml")]
    given = ["whatif", *options, "--band", "75-92", "--slots", "8"]
    found = json.loads(CliRunner().invoke(cli, [*given, "--json"], catch_exceptions=False).output)
    assert (found["signals"], found["no_outcome"], found["fills"]) == (40, 2, "assumed")
    for name, band, slots in (("configured", (80, 89), 4), ("changed", (75, 92), 8)):
        taken, full = by_hand(rows, band, slots)
        side = found[name]
        assert side["fires"] == len(taken) > 0
        assert (side["wins"], side["losses"]) == (taken.count("WIN"), taken.count("LOSS"))
        assert (side["others"], side["no_outcome"]) == (taken.count("TIMEOUT"), taken.count(None))
        assert side["refused_only_because_full"] == full
        assert side["sum_r"] == pytest.approx(
            sum({"WIN": 4 / 3, "LOSS": -1, "TIMEOUT": 0.1, None: 0}[word] for word in taken)
        )
    assert found["configured"]["refused_only_because_full"] > 0, "slots were contended for"
    shown = CliRunner().invoke(cli, given, catch_exceptions=False).output
    assert "fills are assumed" in shown and "2 have no outcome yet" in shown
    assert max(map(len, shown.splitlines())) <= 100
    later = CliRunner().invoke(cli, [*given, "--since", str(T0 + 1200), "--json"], catch_exceptions=False).output
    assert json.loads(later)["signals"] == 20


def test_fire_modes_and_disabled_patterns_count_from_the_moment_they_were_told(embed):
    bus = embed(["schema", "store", "slots"], extra="[plugins.slots]\nrisk_pct = 0.1")
    with bus.publisher() as publisher:
        publish_day(publisher)
        band = {"user_id": "default", "confidence_band": [0.0, 100.0], "max_slots": 100}
        publisher.publish("user_fire_mode", band, timestamp=T0 + 5000)
        publish_day(publisher, T0 + 6000, "later")
        publish_day(publisher, T0 + 6000, "later")
        status = {"pattern_type": "P", "status": "disabled", "reason": "r", "n": 20, "wins": 5}
        publisher.publish("pattern_status", status, timestamp=T0 + 9000)
        data = {"signal_id": "last", "symbol": "EURUSD", "direction": "BUY", "confidence": 85.0, "pattern_type": "P"}
        publisher.publish("signal_generated", {**data, "entry": 1.17, "sl": 1.1685, "tp": 1.172}, timestamp=T0 + 9001)
        assert publisher.flush(30)
    given = [
        "whatif",
        "--data-dir",
        str(bus.data_dir),
        "--config",
        str(bus.data_dir.parent / "tapebus0.toml"),
        "--risk",
        "0.2",
        "--json",
    ]
    found = json.loads(CliRunner().invoke(cli, given, catch_exceptions=False).output)
    assert (found["signals"], found["repeated"]) == (81, 40)
    inside = sum(80 <= 70.0 + (number * 7) % 26 <= 89 for number in range(40))
    assert found["configured"]["fires"] == inside + 40, "from the fire mode on every confidence fires"
    assert found["configured"]["refused"] == {
        "confidence_outside_band": 40 - inside,
        "pattern_disabled": 1,
        "quote_missing": 1,
    }


def test_imported_signals_are_judged_with_quotes_that_are_said_to_be_assumed(embed):
    bus = embed(["schema", "store", "slots"])
    data = {"symbol": "EURUSD", "direction": "BUY", "confidence": 85.0, "pattern_type": "P"}
    data |= {"entry": 1.17, "sl": 1.1685, "tp": 1.172}
    with bus.publisher() as publisher:
        for number in range(3):
            made = outcome(f"old{number}", data, T0 + 1000 * number, "WIN") | {"origin": "log.jsonl:1"}
            publisher.publish("signal_outcome", made, timestamp=T0 + 1000 * number + 600)
        assert publisher.flush(30)
    given = ["whatif", "--data-dir", str(bus.data_dir), "--slots", "8", "--json"]
    found = json.loads(CliRunner().invoke(cli, given, catch_exceptions=False).output)
    assert (found["no_account"], found["configured"]["refused"]) == (3, {"account_unknown": 3})
    found = json.loads(CliRunner().invoke(cli, [*given, "--balance", "10000"], catch_exceptions=False).output)
    assert (found["assumed_quotes"], found["configured"]["fires"], found["configured"]["wins"]) == (3, 3, 3)


def test_without_a_change_or_with_a_wrong_band_it_says_what_is_missing(tmp_path, capsys):
    given = ["whatif", "--data-dir", str(tmp_path)]
    assert main(given) == 2
    assert "give --band" in capsys.readouterr().err
    assert main([*given, "--band", "92-75"]) == 2
    assert "75-92" in capsys.readouterr().err


def test_each_user_is_judged_by_what_is_the_users_own(embed):
    users = "[plugins.slots.users.7]\nconfidence_band = [10.0, 20.0]"
    bus = embed(["schema", "store", "slots"], extra=users)
    data = {"symbol": "EURUSD", "direction": "BUY", "confidence": 15.0, "pattern_type": "P"}
    data |= {"entry": 1.17, "sl": 1.1685, "tp": 1.172}
    with bus.publisher() as publisher:
        for at, (user, balance) in enumerate((("7", 5_000.0), ("8", 1.0))):
            account = {"account_number": user, "balance": balance, "equity": balance}
            publisher.publish("balance_update", account, timestamp=T0 + at, user_id=user)
        publisher.publish("market_data", {"symbol": "EURUSD", "bid": 1.1699, "ask": 1.17}, timestamp=T0 + 9)
        publisher.publish("signal_generated", {"signal_id": "S7", **data}, timestamp=T0 + 10, user_id="7")
        publisher.publish("signal_generated", {"signal_id": "S8", **data}, timestamp=T0 + 10, user_id="8")
        publisher.publish("signal_generated", {"signal_id": "all", **data}, timestamp=T0 + 11)
        assert publisher.flush(30)

    def found(user):
        config = str(bus.data_dir.parent / "tapebus0.toml")
        given = [
            "whatif",
            "--data-dir",
            str(bus.data_dir),
            "--config",
            config,
            "--user",
            user,
            "--slots",
            "5",
            "--json",
        ]
        side = json.loads(CliRunner().invoke(cli, given, catch_exceptions=False).output)["configured"]
        return side["judged"], side["fires"], side["refused"]

    assert found("7") == (2, 2, {})
    assert found("8")[:2] == (2, 0) and found("8")[2]["below_min_lot"] == 2
    assert found("default") == (1, 0, {"account_unknown": 1, "confidence_outside_band": 1})


def flawed_day(publisher, count=120):
    """Signals with flaws that only a gate can see, each with the quotes around it."""
    chances = random.Random(11)
    account = {"account_number": "1", "balance": 1e4, "equity": 1e4}
    publisher.publish("balance_update", account, timestamp=T0, user_id="default")
    status = {"pattern_type": "Q", "status": "disabled", "reason": "r", "n": 20, "wins": 5}
    publisher.publish("pattern_status", status, timestamp=T0)
    pairs = {"EURUSD": (1.17, 1e-4), "GBPJPY": (199.4, 0.02), "XAUUSD": (3374.5, 0.2)}
    for number in range(count):
        at = T0 + 200 * number
        symbol = chances.choice(list(pairs))
        price, spread = pairs[symbol]
        age = chances.choice([0.5, 1.0, 1.0, 30.0])
        if chances.random() < 0.8:
            publisher.publish("market_data", {"symbol": "USDJPY", "bid": 148.0, "ask": 148.01}, timestamp=at - 40)
        publisher.publish("market_data", {"symbol": symbol, "bid": price - spread, "ask": price}, timestamp=at - age)
        stop = chances.choice([15, 15, 1.5]) * spread
        data = {"signal_id": f"S{number}", "symbol": symbol, "direction": "BUY", "entry": price}
        data |= {"pattern_type": chances.choice("PPPQ"), "expires_at": at + chances.choice([0.0, 60.0, 60.0])}
        data |= {"confidence": chances.uniform(78, 91), "sl": round(price - stop, 5), "tp": price + 20 * spread}
        publisher.publish("signal_generated", data, timestamp=at)
    assert publisher.flush(30)


def test_the_configured_gate_says_of_a_recorded_day_what_the_running_gate_said(embed):
    limits = "risk_pct = 0.05\nmax_slots = 1000\nmax_total_open_risk_pct = 100.0\nmax_per_currency_risk_pct = 100.0"
    bus = embed(["schema", "store", "slots"], extra=f"[plugins.slots]\nauto_fire = true\n{limits}")
    with bus.publisher() as publisher:
        flawed_day(publisher)
    with bus.tape() as tape:
        verdicts = [event.data for event in islice(tape.follow(after=0, topics=["gate_verdict"], idle_timeout=30), 120)]
    said = Counter(reason for each in verdicts for reason in each.reasons)
    assert len(said) >= 6 and sum(each.fire for each in verdicts) > 10, "flaws of many kinds, and sound ones"
    config = str(bus.data_dir.parent / "tapebus0.toml")
    given = ["whatif", "--data-dir", str(bus.data_dir), "--config", config, "--slots", "999", "--json"]
    found = json.loads(CliRunner().invoke(cli, given, catch_exceptions=False).output)
    assert found["configured"]["fires"] == sum(each.fire for each in verdicts)
    assert found["configured"]["refused"] == dict(said)

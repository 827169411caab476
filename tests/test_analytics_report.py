"""Reports: figures against direct computation, the words they allow themselves, and the command on real tapes."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus_support import wait_until
from tapebus.cli import main
from tapebus_analytics import show
from tapebus_analytics.cli import result
from tapebus_analytics.config import Config
from tapebus_analytics.report import Report
from tapebus_analytics.show import draw
from tapebus_trading.proportions import at_least, wilson

#: A Tuesday, 12:00 UTC: London is open and New York opens in an hour.
NOON = 1_757_419_200.0
#: The six hours of the seeds: pattern, signals, wins.
SIX_HOURS = (
    ("KALMAN_QUICKFIRE", 13, 12),
    ("ORDER_BLOCK_BOUNCE", 4, 4),
    ("BB_SCALP", 9, 6),
    ("FAIR_VALUE_GAP_FILL", 2, 0),
)


def payload(n: int, pattern: str, outcome: str | None, **more: Any) -> dict[str, Any]:
    """A ``signal_outcome``; an hour lies between two of them, so that none repeats another."""
    opened = NOON + 3600.0 * n
    data = {"signal_id": f"S{n}", "symbol": "EURUSD", "direction": "BUY", "pattern_type": pattern, "confidence": 80.0}
    data |= {"outcome": outcome, "opened_at": opened, "closed_at": opened + 60.0, "duration_s": 60.0}
    return data | {"quotes_seen": 5, "fired": False, "risk_reward": 1.0, **more}


def six_hours() -> list[dict[str, Any]]:
    return [
        payload(100 * i + j, pattern, "WIN" if j < wins else "LOSS")
        for i, (pattern, n, wins) in enumerate(SIX_HOURS)
        for j in range(n)
    ]


def event(kind: str, data: dict[str, Any]) -> Any:
    at = data.get("closed_at", data.get("timestamp", NOON))
    full = {"r": None, "pips": None, "risk_reward": None, "origin": None} | data
    return SimpleNamespace(event_type=kind, timestamp=at, bus_seq=1, data=SimpleNamespace(**full))


def reported(payloads: list[dict[str, Any]], by: str = "pattern", **options: Any) -> Any:
    config = options.pop("config", Config())
    report = Report(by, config, options.pop("width", config.cluster_s), **options)
    for data in payloads:
        report.add(event("signal_outcome", data))
    return result(report.finish(), "6h", None, {}, None)


# -- the seeds' six hours ---------------------------------------------------------------------------


def test_the_six_hours_of_the_seeds_come_out_in_their_shape_and_with_their_sums() -> None:
    found = reported(six_hours())
    assert (found["timeframe"], found["total_signals"]) == ("6h", 28)
    shape = {name: (row["signals"], row["wins"], row["wr"]) for name, row in found["patterns"].items()}
    assert shape == {
        "KALMAN_QUICKFIRE": (13, 12, 92.3),
        "BB_SCALP": (9, 6, 66.7),
        "ORDER_BLOCK_BOUNCE": (4, 4, 100.0),
        "FAIR_VALUE_GAP_FILL": (2, 0, 0.0),
    }
    assert found["recommendation"] == "Monitor FAIR_VALUE_GAP_FILL for potential disable"
    overall = found["overall"]
    assert (overall["wins"], overall["n"], overall["wr"]) == (22, 28, 78.6)
    assert (overall["low"], overall["high"]) == (60.5, 89.8)
    assert sum(row["n"] for row in found["patterns"].values()) == 28


def test_at_reward_0_7_five_percent_is_full_kelly_only_from_a_win_rate_of_61_percent() -> None:
    trades = [payload(i, "P", "WIN" if i < 609 else "LOSS", r=0.7 if i < 609 else -1.0) for i in range(1000)]
    assert reported(trades)["patterns"]["P"]["kelly"] == pytest.approx(0.05, abs=0.001)


def test_small_groups_get_an_interval_but_no_word_however_small_their_p() -> None:
    row = reported(six_hours())["patterns"]["KALMAN_QUICKFIRE"]
    assert (row["low"], row["high"]) == (66.7, 98.6)
    assert row["p_value"] == pytest.approx(0.0017, abs=5e-5)
    assert row["p_value_adjusted"] == pytest.approx(4 * 0.00170898, rel=1e-3)
    assert row["verdict"] is None
    thirty = reported([payload(i, "P", "WIN" if i < 24 else "LOSS") for i in range(30)])["patterns"]["P"]
    assert thirty["verdict"] == "above breakeven"
    worse = reported([payload(i, "P", "WIN" if i < 6 else "LOSS") for i in range(30)])["patterns"]["P"]
    assert worse["verdict"] == "below breakeven"


def test_a_word_is_judged_by_the_p_value_adjusted_within_the_report() -> None:
    good = [payload(i, "GOOD", "WIN" if i < 20 else "LOSS") for i in range(30)]
    assert reported(good)["patterns"]["GOOD"]["verdict"] == "above breakeven"  # p = 0.049 alone
    others = [payload(1000 + i, f"P{i % 8}", "WIN" if i % 16 < 8 else "LOSS") for i in range(256)]
    row = reported(good + others)["patterns"]["GOOD"]
    assert row["p_value"] == pytest.approx(at_least(20, 30, 0.5))
    assert row["verdict"] is None


# -- figures against direct computation -------------------------------------------------------------

OUTCOMES = st.sampled_from(["WIN", "LOSS", "LOSS", "BREAKEVEN", "TIMEOUT", "CANCELLED", "UNKNOWN"])
RESULTS = st.lists(
    st.tuples(OUTCOMES, st.one_of(st.none(), st.floats(-5, 5).map(lambda r: round(r, 3)))), min_size=1, max_size=40
)


@settings(max_examples=60)
@given(RESULTS)
def test_the_figures_of_a_group_are_what_their_definitions_say(results: list[tuple[str, float | None]]) -> None:
    found = reported([payload(i, "P", outcome, r=r, risk_reward=None) for i, (outcome, r) in enumerate(results)])
    row = found["patterns"]["P"]
    kinds = [outcome for outcome, _ in results]
    wins, n = kinds.count("WIN"), kinds.count("WIN") + kinds.count("LOSS")
    assert (row["wins"], row["n"], row["signals"]) == (wins, n, len(results))
    assert [row[k] for k in ("breakevens", "timeouts", "cancelled", "unknown", "open")] == [
        *(kinds.count(k) for k in ("BREAKEVEN", "TIMEOUT", "CANCELLED", "UNKNOWN")),
        0,
    ]
    assert row["wr"] == (round(100 * wins / n, 1) if n else None)
    assert (row["low"], row["high"]) == tuple(round(100 * bound, 1) for bound in wilson(wins, n))
    rs = [r for outcome, r in results if outcome in ("WIN", "LOSS", "BREAKEVEN") and r is not None]
    assert row["expectancy_r"] == (pytest.approx(statistics.mean(rs), abs=1e-4) if rs else None)
    loss = -sum(r for r in rs if r < 0)
    gain = sum(r for r in rs if r > 0)
    assert row["profit_factor"] == (pytest.approx(gain / loss, rel=1e-3, abs=1e-4) if loss else None)
    ups, downs = [r for r in rs if r > 0], [-r for r in rs if r < 0]
    if ups and downs:
        w, ratio = len(ups) / len(ups + downs), statistics.mean(ups) / statistics.mean(downs)
        assert row["kelly"] == pytest.approx(w - (1 - w) / ratio, rel=1e-3, abs=1e-3)
    else:
        assert row["kelly"] is None
    peaks = [max(sum(rs[:j]) for j in range(i + 1)) - sum(rs[:i]) for i in range(len(rs) + 1)]
    assert row["max_drawdown_r"] == pytest.approx(max(peaks), abs=1e-3)
    if len(rs) > 1 and statistics.stdev(rs) > 1e-3:
        sqn = math.sqrt(len(rs)) * statistics.mean(rs) / statistics.stdev(rs)
        assert row["sqn"] == pytest.approx(sqn, rel=1e-3, abs=1e-3)


def test_the_whole_report_is_summed_up_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    trades = [
        payload(0, "P", "WIN", pips=20.5, r=1.5, duration_s=600.0, confidence=71.2),
        payload(1, "P", "LOSS", pips=-10.0, r=-1.0, duration_s=1200.0, confidence=92.0),
        payload(2, "P", "TIMEOUT", pips=3.0, r=0.1, duration_s=9000.0),
        payload(3, "P", "CANCELLED"),
    ]
    show.report(reported(trades))
    line = "4 signals, 50 % resolved, +10.5 pips, 15.0 minutes on average, worst drawdown 1.0 R, confidence 71.2-92.0"
    assert line in " ".join(capsys.readouterr().out.split())


def test_without_a_loss_there_is_no_profit_factor_and_no_drawdown() -> None:
    row = reported([payload(i, "P", "WIN", r=1.0) for i in range(5)])["patterns"]["P"]
    assert (row["profit_factor"], row["max_drawdown_r"], row["sqn"]) == (None, 0.0, None)


def test_breakeven_is_the_mean_of_what_each_trade_needs() -> None:
    mixed = [payload(i, "P", "LOSS", risk_reward=1.0 if i % 2 else 3.0) for i in range(10)]
    assert reported(mixed)["patterns"]["P"]["breakeven"] == pytest.approx(37.5)
    assert reported(mixed, config=Config(breakeven=0.6))["patterns"]["P"]["breakeven"] == 60.0
    unknown = reported([payload(i, "P", "WIN", risk_reward=None) for i in range(10)])["patterns"]["P"]
    assert (unknown["breakeven"], unknown["p_value"]) == (None, None)


def test_one_absurd_reward_does_not_prove_the_others_good() -> None:
    fair = [payload(i, "P", "WIN" if i % 5 < 2 else "LOSS", risk_reward=1.5) for i in range(500)]
    absurd = payload(500, "P", "LOSS", risk_reward=5000.0)
    row = reported([*fair, absurd])["patterns"]["P"]
    assert row["breakeven"] == pytest.approx(39.9)
    assert row["verdict"] is None


def test_a_log_without_prices_counts_what_a_target_or_a_stop_pays() -> None:
    trades = [payload(0, "P", "WIN", risk_reward=1.5), payload(1, "P", "LOSS", risk_reward=1.5)]
    row = reported(trades)["patterns"]["P"]
    assert (row["expectancy_r"], row["profit_factor"]) == (0.25, 1.5)


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("pattern", ["A", "B"]),
        ("symbol", ["EURUSD", "USDJPY"]),
        ("pattern-symbol", ["A EURUSD", "A USDJPY", "B EURUSD"]),
        ("hour", ["00:00", "12:00", "22:00"]),
        ("day", ["2025-09-09", "2025-09-10"]),
        ("session", ["london_new_york", "tokyo", "sydney"]),
        ("confidence", ["75-79", "80-84", "95-100"]),
    ],
)
def test_every_kind_of_report_names_its_groups(by: str, groups: list[str]) -> None:
    trades = [
        payload(0, "A", "WIN", opened_at=NOON + 1800, confidence=79.9),
        payload(1, "A", "LOSS", symbol="USDJPY", opened_at=NOON + 10 * 3600, confidence=80.0),
        payload(2, "B", "WIN", opened_at=NOON + 12.5 * 3600, confidence=100.0),
    ]
    found = reported(trades, by=by)
    key = {"pattern-symbol": "patterns_by_symbol", "confidence": "confidences"}.get(by, f"{by}s")
    assert sorted(found[key]) == sorted(groups)
    assert sum(row["n"] for row in found[key].values()) == found["overall"]["n"] == 3


def test_live_and_imported_outcomes_are_the_same_figures_and_can_be_told_apart() -> None:
    trades = six_hours()
    imported = [each | {"origin": f"log:{i}"} for i, each in enumerate(trades)]
    assert reported(imported)["patterns"] == reported(trades)["patterns"]
    assert reported(imported + trades[:5], source="live", width=0)["total_signals"] == 5
    assert reported(imported + trades[:5], source="imported", width=0)["total_signals"] == 28


def test_signals_that_have_not_ended_are_open_and_repeats_are_left_out() -> None:
    report = Report("pattern", Config(), 1800.0)
    levels = {"entry": 1.1, "sl": 1.09, "tp": 1.12, "risk_reward": None}
    for n, at in enumerate((0, 60, 4000)):
        data = payload(n, "P", None) | levels | {"timestamp": NOON + at}
        report.add(SimpleNamespace(event_type="signal_generated", timestamp=NOON + at, data=SimpleNamespace(**data)))
    ended = payload(0, "P", "WIN", opened_at=NOON, risk_reward=None)
    report.add(event("signal_outcome", ended))
    row = result(report.finish(), None, None, {}, None)["patterns"]["P"]
    assert (row["wins"], row["open"], row["repeats"], row["signals"]) == (1, 1, 1, 2)
    assert row["risk_reward"] == pytest.approx(2.0)  # from the levels of the signal


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        ((0, 100, 50), "─────────●─────────"),
        ((40, 60, 50, 30), "     │ ──●──"),
        ((0, 65.8, 0, 50), "●────────│───"),
        ((0, 100, None), ""),
    ],
)
def test_an_interval_is_drawn_to_scale(figures: tuple[Any, ...], line: str) -> None:
    assert draw(*figures) == line


def test_a_name_can_steer_neither_the_terminal_nor_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    show.report(reported([payload(i, "[red]\x1b[2J", "WIN") for i in range(3)]))
    assert "[red]?[2J" in capsys.readouterr().out


# -- the command on real tapes ----------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], data_dir: Path, *args: str) -> str:
    assert main(["analytics", "--data-dir", str(data_dir), *args]) == 0
    return capsys.readouterr().out


def test_the_command_reads_the_tape_while_the_bus_runs_and_after(
    embed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bus = embed(["schema", "store", "analytics"])
    with bus.publisher() as publisher:
        for data in six_hours():
            assert publisher.publish("signal_outcome", data, timestamp=data["closed_at"])
        publisher.publish(
            "user_action", {"action": "pattern_off", "user_id": "7", "details": {"pattern_type": "BB_SCALP"}}
        )
        assert publisher.flush(30)
    wait_until(lambda: bus.runtime.stats()["plugins"]["analytics"]["metrics"]["disabled"] == 1, "the word of the user")
    wait_until(lambda: len(list(bus.tape().read(topics=["pattern_status"]))) == 2, "both statuses on the tape")
    running = command(capsys, bus.data_dir, "--json")
    bus.stop()
    assert command(capsys, bus.data_dir, "--json") == running
    found = json.loads(running)
    assert found["total_signals"] == 28
    assert found["patterns"]["FAIR_VALUE_GAP_FILL"]["status"] == "watch"
    assert found["patterns"]["BB_SCALP"]["status"] == "disabled"
    assert found["disabled"]["BB_SCALP"]["by"] == "user:7"
    assert found["recommendation"] == "Monitor FAIR_VALUE_GAP_FILL for potential disable"
    for by in ("pattern", "symbol", "session", "pattern-symbol", "confidence", "hour", "day", "calibration"):
        text = command(capsys, bus.data_dir, "--by", by)
        assert max(map(len, text.splitlines())) <= 100
        assert "\x1b" not in text
    table = command(capsys, bus.data_dir)
    assert "12 of 13" in table
    assert "92.3" not in table  # thirteen trades are no rate
    assert "BB_SCALP is disabled by user:7" in table
    assert (
        json.loads(command(capsys, bus.data_dir, "--since", "2025-09-11", "--until", "2025-09-12", "--json")) != found
    )


def test_a_wrong_time_and_a_missing_tape_are_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analytics", "--data-dir", str(tmp_path), "--since", "yesterday"]) == 2
    assert "6h" in capsys.readouterr().err
    assert main(["analytics", "--data-dir", str(tmp_path)]) == 74


def test_the_truth_log_imported_into_a_tape_gives_the_recorded_calibration(
    embed: Callable[..., Any], shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bus = embed(["schema", "store", "analytics"], extra='[plugins.analytics]\nlearn_from = "all"')
    log = str(shared_data / "legacy" / "truth_log.jsonl")
    assert main(["import", log, "--data-dir", str(bus.data_dir), "--endpoint", bus.acked]) == 0
    capsys.readouterr()
    args = ("--by", "calibration", "--no-clusters", "--source", "imported", "--json")
    stated = json.loads(command(capsys, bus.data_dir, *args))["calibration"]["stated"]
    # two of the 3,358 have an id that came before
    assert stated["n"] == 3356
    assert stated["brier"] == pytest.approx(0.3827, abs=1e-4)
    assert stated["skill"] == pytest.approx(-0.605, abs=1e-3)
    gate = [each for each in stated["bins"] if each["low"] in (80, 85)]
    assert sum(each["n"] for each in gate) == 1407
    assert round(100 * sum(each["wins"] for each in gate) / 1407, 1) == 41.4
    rows = json.loads(command(capsys, bus.data_dir, "--no-clusters", "--json"))["patterns"]
    shown = {name: (row["n"], row["wr"], row["low"], row["high"]) for name, row in rows.items()}
    assert shown["FAIR_VALUE_GAP_FILL"][1:] == (40.2, 37.9, 42.6)
    assert shown["VCB_BREAKOUT"] == (275, 32.0, 26.8, 37.7)
    assert shown["LIQUIDITY_SWEEP_REVERSAL"] == (25, 28.0, 14.3, 47.6)
    assert [name for name, row in rows.items() if row["verdict"]] == ["VCB_BREAKOUT"]
    wait_until(lambda: bus.runtime.stats()["plugins"]["analytics"]["metrics"]["calibration"] > 20, "the fits")
    clustered = json.loads(command(capsys, bus.data_dir, "--json"))["overall"]
    assert (clustered["repeats"], clustered["n"]) == (1085, 3356 - 1085)


def test_an_imported_end_without_a_time_has_no_part_in_the_mean_duration() -> None:
    untimed = payload(2, "P", "WIN", origin="truth_log.jsonl:1", duration_s=0.0)
    row = reported([payload(1, "P", "WIN"), untimed])["patterns"]["P"]
    assert (row["n"], row["mean_duration_s"]) == (2, 60.0)
    assert reported([untimed])["patterns"]["P"]["mean_duration_s"] is None

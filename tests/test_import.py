"""``tapebus import``: old logs of signals become events, every line is accounted for, and nothing comes twice."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus_support import PATIENCE
from tapebus import Tape
from tapebus.cli import main

FATES = ("mapped", "merged", "duplicate", "conflict", "remark", "refused")
AT = 1_757_000_000


def truth(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A line of the first log: no prices, and a lifespan of 0 throughout."""
    record = {
        "timestamp": "2025-09-04T15:33:20",
        "pair": "EURUSD",
        "pattern": "SWEEP_RETURN",
        "confidence": 83.5,
        "quality_score": 83.5,
        "win": True,
        "risk_reward": 1.5,
        "lifespan": 0,
        "session": "NEWYORK",
        "signal_id": f"ELITE_RAPID_EURUSD_{AT + number}",
        "direction": "BUY",
        "signal_class": "RAPID",
    }
    return {key: value for key, value in (record | changes).items() if value is not ...}


def tracked(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A line of the log with prices: gold, sold at 3640.04, stopped out at 3643.22, pips in its own unit."""
    record = {
        "signal_id": f"ELITE_SNIPER_XAUUSD_{AT + number}",
        "timestamp": AT + 0.5,
        "pair": "XAUUSD",
        "pattern_type": "ORDER_BLOCK_BOUNCE",
        "pattern": "ORDER_BLOCK_BOUNCE",
        "direction": "SELL",
        "confidence": 76.1,
        "entry_price": 3640.04,
        "tp_price": 3637.24,
        "sl_price": 3643.04,
        "tp_pips": 28000.00000000182,
        "sl_pips": 30000.0,
        "session": "LATE_NY",
        "fired": False,
        "would_fire": True,
        "win": False,
        "outcome": "LOSS",
        "lifespan": 26.5,
        "pips_moved": -31799.999999998363,
        "current_price": 3643.22,
        "risk_reward": 0.93,
        "completion_reason": "SL_HIT",
    }
    return {key: value for key, value in (record | changes).items() if value is not ...}


def record_44(**changes: Any) -> dict[str, Any]:
    """The documented tracking record; its time is its signal's, its duration that of an end 189.6 minutes later."""
    record = {
        "signal_id": "ELITE_RAPID_KALMAN_QUICKFIRE_1757993286",
        "symbol": "USDCNH",
        "direction": "BUY",
        "pattern_type": "KALMAN_QUICKFIRE",
        "confidence": 73.4,
        "outcome": "WIN",
        "pips_result": 19.0,
        "timestamp": 1757993290,
        "datetime": "2025-09-16T03:28:10.123456",
        "trade_duration_minutes": 189.6,
    }
    return {key: value for key, value in (record | changes).items() if value is not ...}


def born(number: int = 1, **changes: Any) -> dict[str, Any]:
    record = {
        "signal_id": f"ELITE_GUARD_EURUSD_{AT + number}",
        "symbol": "EURUSD",
        "direction": "SELL",
        "entry_price": 1.1444500000000001,
        "sl": 1.14545,
        "tp": 1.14295,
        "confidence": 54,
        "pattern_type": "BOS_RETEST",
        "generated_at": "2025-09-04T15:33:20",
        "risk_reward": 1.5,
        "status": "pending",
        "completed": False,
    }
    return record | changes


def ended(number: int = 1, **changes: Any) -> dict[str, Any]:
    record = {
        "signal_id": f"ELITE_GUARD_EURUSD_{AT + number}",
        "status": "timeout_closed",
        "outcome": "timeout",
        "completed": True,
        "completed_at": "2025-09-04T17:38:20",
        "runtime_seconds": 7500,
        "exit_type": "timeout",
        "pips_result": 0,
    }
    return record | changes


def log(path: Path, *records: Any) -> str:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return str(path)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """``plan(records…)``: the report and the events of a dry run over one file of these lines."""
    from tapebus_legacy import importing

    made: list[Any] = []
    keep = importing.Import.plan
    monkeypatch.setattr(importing.Import, "plan", lambda self: (keep(self), made.extend(self.made))[0])

    def run(*records: Any, name: str = "old.jsonl") -> tuple[dict[str, Any], list[Any]]:
        made.clear()
        report = dry_run(tmp_path, log(tmp_path / name, *records))
        (found,) = report["files"]
        assert found["lines"] == found["blank"] + sum(found[fate] for fate in FATES), "the sums must add up"
        return found, list(made)

    return run


def dry_run(tmp_path: Path, *files: str, code: int | None = None) -> dict[str, Any]:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        got = main(["import", "--data-dir", str(tmp_path / "none"), "--dry-run", "--json", *files])
    assert code is None or got == code
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


# -- one rule, one case ---------------------------------------------------------------------------

OUT = "signal_outcome"
#: A name; the lines; what the events hold, in their order; the repairs that are counted.
CASES: list[tuple[str, list[Any], list[dict[str, Any]], dict[str, int]]] = [
    (
        "a win without prices earns its reward and risk",
        [truth()],
        [{"type": OUT, "outcome": "WIN", "r": 1.5, "risk_reward": 1.5, "fired": False, "entry": None, "pips": None}],
        {"end_time_unknown": 1, "r_planned": 1},
    ),
    (
        "where a win has lifespan 0 too, a false is a loss",
        [truth(1), truth(2, win=False)],
        [{"outcome": "WIN"}, {"outcome": "LOSS", "r": -1.0}],
        {"end_time_unknown": 2, "r_planned": 2},
    ),
    (
        "where lifespans are kept, a false that never lived is open and a null is too",
        [truth(1, lifespan=60.0), truth(2, win=False), truth(3, win=None), truth(4, win=False, lifespan=90)],
        [
            {"type": "signal_imported", "outcome": None},
            {"type": "signal_imported"},
            {"outcome": "WIN", "duration_s": 60.0},
            {"outcome": "LOSS", "duration_s": 90.0},
        ],
        {"open_not_lost": 1, "r_planned": 2},
    ),
    (
        "a file of births only tells no loss",
        [truth(1, win=False), truth(2, win=False)],
        [{"type": "signal_imported"}, {"type": "signal_imported"}],
        {"open_not_lost": 2},
    ),
    (
        "what was not executed is open",
        [truth(1, win=None, outcome_source="NOT_EXECUTED")],
        [{"type": "signal_imported", "quality_score": 83.5, "signal_class": "RAPID"}],
        {},
    ),
    (
        "gold counts its pips by the registry and its R by prices",
        [tracked()],
        [
            {
                "outcome": "LOSS",
                "r": -1.06,
                "pips": -31.8,
                "exit_price": 3643.22,
                "risk_reward": 0.9333,
                "duration_s": 26.5,
            }
        ],
        {"pips_recomputed": 1},
    ),
    (
        "a target that was overshot is filled at its level",
        [tracked(outcome="WIN", win=True, completion_reason="TP_HIT", current_price=3630.0, pips_moved=...)],
        [{"outcome": "WIN", "exit_price": 3637.24, "r": 0.933333, "pips": 28.0}],
        {"pips_recomputed": 1},
    ),
    (
        "reward and risk that the prices deny are computed again",
        [tracked(risk_reward=1.5)],
        [{"risk_reward": 0.9333}],
        {"pips_recomputed": 1, "risk_reward_recomputed": 1},
    ),
    (
        "an open signal with prices keeps its pips right",
        [tracked(outcome=None, win=None, completion_reason=None, lifespan=0, pips_moved=0)],
        [{"type": "signal_imported", "stop_pips": 30.0, "target_pips": 28.0, "entry": 3640.04}],
        {"pips_recomputed": 1},
    ),
    (
        "a direction that was left out is told by the levels",
        [tracked(direction=...)],
        [{"direction": "SELL"}],
        {"direction_from_levels": 1, "pips_recomputed": 1},
    ),
    (
        "a birth and its end are one event, and noise leaves the price",
        [born(), ended()],
        [{"outcome": "TIMEOUT", "r": None, "pips": None, "entry": 1.14445, "duration_s": 7500.0}],
        {"price_noise": 1},
    ),
    (
        "an end whose stated duration is not the time between is dated by the clock",
        [born(), ended(runtime_seconds=60)],
        [{"duration_s": 7500.0}],
        {"price_noise": 1, "duration_contradiction": 1},
    ),
    (
        "the documented record carries its signal's time, and the contradiction is counted",
        [record_44()],
        [{"outcome": "WIN", "opened_at": 1757993290.0, "closed_at": 1758004666.0, "duration_s": 11376.0, "pips": None}],
        {"duration_contradiction": 1, "pips_dropped": 1},
    ),
    (
        "a documented record whose id has no time contradicts nothing",
        [record_44(signal_id="ELITE_7", pips_result=...)],
        [{"duration_s": 11376.0, "r": None}],
        {},
    ),
    (
        "a confidence that is a fraction becomes percent",
        [truth(confidence=0.95)],
        [{"confidence": 95.0}],
        {"confidence_fraction": 1, "end_time_unknown": 1, "r_planned": 1},
    ),
    (
        "numbers as text and times in milliseconds are read",
        [truth(confidence="83.5", timestamp=1_757_000_000_000)],
        [{"confidence": 83.5, "opened_at": 1_757_000_000.0}],
        {"number_as_text": 1, "milliseconds": 1, "end_time_unknown": 1, "r_planned": 1},
    ),
    (
        "of win and outcome the outcome counts",
        [tracked(win=True)],
        [{"outcome": "LOSS"}],
        {"win_disagrees": 1, "pips_recomputed": 1},
    ),
    (
        "long and short are sides",
        [truth(direction="short")],
        [{"direction": "SELL"}],
        {"end_time_unknown": 1, "r_planned": 1},
    ),
]


@pytest.mark.parametrize(
    ("records", "events", "repairs"), [each[1:] for each in CASES], ids=[each[0] for each in CASES]
)
def test_a_line_becomes_what_it_knows(plan, records, events, repairs):
    report, made = plan(*records)
    assert len(made) == len(events)
    for event, wanted in zip(made, events, strict=True):
        got = {"type": event.event_type, **event.data}
        assert {key: got.get(key) for key in wanted} == wanted
    assert {name: found["count"] for name, found in report["repaired"].items()} == repairs


REFUSALS = [
    ("no direction", [truth(direction=...)]),
    ("unknown direction", [truth(direction="UP")]),
    ("confidence outside 0 to 100", [truth(confidence=140)]),
    ("no confidence", [truth(confidence=...)]),
    ("confidence is no number", [truth(confidence="high")]),
    ("time is no number", [truth(timestamp=10**400)]),
    ("no symbol", [truth(pair="")]),
    ("no usable signal_id", [truth(signal_id="")]),
    ("unreadable time", [truth(timestamp="yesterday")]),
    ("levels on the wrong side", [tracked(sl_price=3600.0)]),
    ("outcome and prices contradict", [tracked(current_price=3639.0)]),
    ("impossible price", [tracked(entry_price=-1)]),
    ("unknown outcome", [tracked(outcome="MAYBE")]),
    ("win is neither true, false nor null", [truth(win="yes")]),
    (
        "ends before it begins",
        [born(), ended(completed_at="2025-09-04T15:00:00", runtime_seconds=None)],
    ),
    ("ends a signal that no line describes", [ended()]),
    ("not a valid event", [truth(pair="A_NAME_FAR_TOO_LONG")]),
    ("not JSON", ['{"signal_id": NaN}', "half a li"]),
    ("not a JSON object", ["[1]"]),
    ("longer than a record can be", ['{"signal_id": "' + "x" * (1 << 20) + '"}']),
    ("unknown shape", [{"signal_id": "S", "colour": "blue"}]),
]


@pytest.mark.parametrize(("reason", "records"), REFUSALS, ids=[each[0] for each in REFUSALS])
def test_what_cannot_be_an_event_is_refused_with_its_reason_and_line(plan, reason, records):
    report, made = plan(truth(77), "", *records)
    assert [each.data["signal_id"] for each in made] == [truth(77)["signal_id"]]
    assert {name: found["count"] for name, found in report["refused_because"].items()} == {reason: len(records)}
    assert report["refused_because"][reason]["lines"] == [3, 4][: len(records)]
    assert (report["blank"], report["mapped"]) == (1, 1)


def test_fields_without_a_place_are_counted(plan):
    report, _ = plan(truth(1, xp_reward=7, rsi=None), truth(2, xp_reward=9))
    assert report["fields_left_out"] == {"xp_reward": 2}


#: Values that old programs, or a half-written line, may have in any field.
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([1]), st.just({"a": 1}),
    st.sampled_from(["BUY", "SELL", "WIN", "LOSS", "timeout", "2025-09-04T15:33:20", "83.5", AT, 1.1, 1.2, 1.0, 50.0]),
)  # fmt: skip
FIELDS = sorted(
    {key for record in (truth(), tracked(), record_44(), born(), ended()) for key in record}
    | {"rr", "quality", "action", "attempted_at", "last_updated", "generated_at", "outcome_source", "fresh_start"}
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no reason to fail
@given(
    st.lists(
        st.tuples(
            st.sampled_from([truth, tracked, record_44, born, ended]),
            st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4),
            st.integers(1, 3),
        ),
        max_size=12,
    )
)
def test_whatever_a_log_holds_every_line_has_one_fate_and_a_signal_one_event(lines):
    from tapebus_legacy import facts, signals
    from tapebus_legacy.account import REFUSED, REMARKED, Account
    from tapebus_trading.symbols import Registry

    account, found = Account("log"), []
    for number, (make, changes, which) in enumerate(lines, 1):
        record = make(**changes) if make is record_44 else make(which, **changes)
        shape = facts.recognise(record)
        if shape in (facts.REMARK, facts.UNKNOWN_SHAPE):
            account.note(shape, REMARKED if shape == facts.REMARK else REFUSED, number, "x")
            continue
        try:
            found.append(facts.fact(record, shape, 0, number))
        except facts.Refused as refused:
            account.note(shape, REFUSED, number, refused.reason)
    account.lines = len(lines)
    signals.settle(found)
    made = signals.plan(found, {}, Registry(), lambda event: None, [account], lambda fact: "log")
    assert account.balanced and account.totals["mapped"] == len(made)
    assert len({each.data["signal_id"] for each in made}) == len(made)
    for each in made:
        if each.event_type == "signal_outcome":
            assert each.data["closed_at"] - each.data["opened_at"] == each.data["duration_s"] >= 0
            if each.data["outcome"] in ("WIN", "LOSS") and each.data.get("r") is not None:
                assert (each.data["r"] > 0) == (each.data["outcome"] == "WIN")


def test_a_heading_and_an_attempt_are_remarks(plan):
    attempt = {"signal_id": "S", "action": "positive_close_attempt", "attempted_at": "2025-08-11T08:03:17", "note": "x"}
    report, _ = plan({"fresh_start": "today", "timestamp": "2025-08-11T02:02:10+00:00"}, attempt, truth())
    assert (report["remark"], report["mapped"]) == (2, 1)


def test_of_two_logs_the_one_with_prices_is_believed_and_the_contradiction_named(tmp_path):
    bare = truth(signal_id=tracked()["signal_id"], pair="XAUUSD", direction="SELL", win=True)
    files = [log(tmp_path / "bare.jsonl", bare, bare), log(tmp_path / "priced.jsonl", tracked())]
    for order in (files, files[::-1]):
        report = {Path(each["file"]).name: each for each in dry_run(tmp_path, *order, code=0)["files"]}
        assert report["priced.jsonl"]["outcomes"] == {"LOSS": 1}
        assert (report["bare.jsonl"]["conflict"], report["bare.jsonl"]["mapped"]) == (2, 0)
        (conflict,) = report["bare.jsonl"]["conflicts"].values()
        assert conflict["lines"] == [1, 2] and "WIN here, LOSS counts" in conflict["example"]


def test_the_mark_some_editors_put_at_the_begin_costs_no_line(tmp_path):
    text = json.dumps(truth(1)) + "\r\n" + json.dumps(truth(2)) + "\r\n"
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8-sig", newline="")
    assert dry_run(tmp_path, str(tmp_path / "a.jsonl"), code=0)["events"] == 2


def test_gzip_zstandard_and_standard_input_are_read_by_what_is_in_them(tmp_path):
    text = "".join(json.dumps(truth(number)) + "\n" for number in range(50)).encode()
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(text))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(text[:2000]) + zstandard.compress(text[2000:]))
    for name in ("a.jsonl", "b.jsonl.zst"):
        assert dry_run(tmp_path, str(tmp_path / name), code=0)["events"] == 50
    command = [
        sys.executable,
        "-m",
        "tapebus",
        "import",
        "--data-dir",
        str(tmp_path / "none"),
        "--dry-run",
        "--json",
        "-",
    ]
    for packed in (text, gzip.compress(text)):
        done = subprocess.run(command, input=packed, capture_output=True, timeout=PATIENCE, check=True)
        assert json.loads(done.stdout)["events"] == 50


def test_a_damaged_archive_is_named_with_the_line_it_breaks_after(tmp_path, capsys):
    text = "".join(json.dumps(truth(number)) + "\n" for number in range(50)).encode()
    (tmp_path / "a.gz").write_bytes(gzip.compress(text)[:-200])
    assert main(["import", "--data-dir", str(tmp_path / "none"), "--dry-run", str(tmp_path / "a.gz")]) == 2
    assert "damaged after line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["absent.jsonl"], 2, "no such file"),
        (["."], 2, "is a directory"),
        (["a.jsonl", "a.jsonl"], 2, "given twice"),
        (["--dry-run", "notes.txt"], 1, "nothing in it could be imported"),
        (["a.jsonl"], 1, "start the bus"),
    ],
)
def test_a_mistake_ends_with_its_code_and_one_line(tmp_path, monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    log(tmp_path / "a.jsonl", truth())
    (tmp_path / "notes.txt").write_text("bread\nmilk\n")
    assert main(["import", "--data-dir", "none", *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


# -- the recorded logs ----------------------------------------------------------------------------


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def win_of(record: dict[str, Any]) -> str | None:
    return None if record.get("win") is None else "WIN" if record["win"] else "LOSS"


def test_every_line_of_the_recorded_logs_is_accounted_for_as_counted_by_hand(shared_data, tmp_path):
    names = ["truth_log", "truth_log_20250811", "optimized_tracking", "comprehensive_tracking"]
    paths = [shared_data / "legacy" / f"{name}.jsonl" for name in names]
    first, august, optimized, comprehensive = (lines_of(path) for path in paths)
    reports = dict(zip(names, dry_run(tmp_path, *map(str, paths), code=0)["files"], strict=True))

    truth_log = reports["truth_log"]
    sided = {each["signal_id"]: win_of(each) for each in first if "direction" in each}
    assert (truth_log["lines"], truth_log["mapped"]) == (3361, len(sided)) == (3361, 3356)
    assert truth_log["outcomes"] == dict(Counter(sided.values())) == {"LOSS": 2040, "WIN": 1316}
    assert truth_log["refused"] == sum("direction" not in each for each in first) == 3
    assert truth_log["duplicate"] == len(first) - 3 - len(sided) == 2

    life = reports["truth_log_20250811"]
    described = {each["signal_id"] for each in august if "symbol" in each}
    ends = [each["signal_id"] for each in august if each.get("outcome") == "timeout"]
    assert life["events"] == {
        "signal_outcome": len(described & set(ends)),
        "signal_imported": len(described - set(ends)),
    }
    assert life["refused"] == sum(each not in described for each in ends) == 9
    assert life["merged"] + life["duplicate"] == sum(each in described for each in ends)
    assert life["remark"] == sum("action" in each or "fresh_start" in each for each in august)
    noisy = [
        each
        for each in august
        if any(len(repr(each.get(key, 0.0)).partition(".")[2]) > 8 for key in ("entry_price", "sl", "tp"))
    ]
    assert life["repaired"]["price_noise"]["count"] == len(noisy) > 0

    both = {each["signal_id"]: each for each in comprehensive}
    told = reports["comprehensive_tracking"]
    assert (told["lines"], told["mapped"]) == (342, len(both))
    assert told["outcomes"] == {
        name: count for name, count in Counter(win_of(each) or "open" for each in comprehensive).items()
    }
    metals = sum(each["pair"] in ("XAUUSD", "XAGUSD") and "sl_pips" in each for each in comprehensive)
    assert told["repaired"]["pips_recomputed"]["count"] == metals == 66
    wrong = sum(
        abs(
            abs(each["tp_price"] - each["entry_price"]) / abs(each["entry_price"] - each["sl_price"])
            - each["risk_reward"]
        )
        > 0.011
        for each in comprehensive
        if "tp_price" in each
    )
    assert told["repaired"]["risk_reward_recomputed"]["count"] == wrong == 3

    rest = reports["optimized_tracking"]
    apart = [each for each in optimized if each["signal_id"] not in both]
    shared = [(win_of(each), win_of(both[each["signal_id"]])) for each in optimized if each["signal_id"] in both]
    assert rest["mapped"] == len(apart)
    assert rest["outcomes"] == dict(Counter(win_of(each) or "open" for each in apart))
    assert rest["merged"] == sum(here is None and there is not None for here, there in shared)
    assert rest["duplicate"] == sum(here == there for here, there in shared)
    assert rest["conflict"] == sum(here is not None and here != there for here, there in shared) == 5


# -- a running bus --------------------------------------------------------------------------------


@pytest.fixture
def running(embed, data_dir, capsys):
    """A bus with all built-in plugins, and ``bring(files…)`` that imports into it and returns the report."""
    bus = embed(["schema", "store", "outcomes", "slots", "telegram"])

    def bring(*files: Any, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        got = main(["import", "--config", str(data_dir / "tapebus0.toml"), "--json", *map(str, files)])
        out, err = capsys.readouterr()
        assert got == code, err
        found: dict[str, Any] = json.loads(out) if out else {}
        return found

    bus.bring = bring
    return bus


def outcomes(bus: Any) -> list[Any]:
    with Tape.open(bus.data_dir) as tape:
        return list(tape.read(topics=["signal_outcome"]))


def test_the_truth_log_on_a_running_bus_gives_the_rates_of_the_record_and_wakes_nobody(running, shared_data):
    path = shared_data / "legacy" / "truth_log.jsonl"
    report = running.bring(path)
    assert report["events"] == report["stored"] == 3356
    (file,) = report["files"]
    assert file["lines"] == 3361 and sum(file[fate] for fate in FATES) == 3361

    events = outcomes(running)
    assert {each.source for each in events} == {"import:truth_log"}
    assert all(each.correlation_id == each.data.signal_id for each in events)
    table: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for each in events:
        table[each.data.pattern_type][0] += each.data.outcome == "WIN"
        table[each.data.pattern_type][1] += 1
    # the published figures count the two lines that stand there twice
    records = lines_of(path)
    for number, at in {record["signal_id"]: n for n, record in enumerate(records)}.items():
        twice = [record for record in records[:at] if record["signal_id"] == number and "win" in record]
        for record in twice:
            table[record["pattern"]][0] += record["win"]
            table[record["pattern"]][1] += 1
    assert sum(n for _, n in table.values()) == 3358
    assert round(100 * sum(k for k, _ in table.values()) / 3358, 1) == 39.2
    assert {name: tuple(table[name]) for name in table if table[name][1] > 20} == {
        "FAIR_VALUE_GAP_FILL": (660, 1641),
        "SWEEP_RETURN": (208, 544),
        "MOMENTUM_BURST": (181, 456),
        "ORDER_BLOCK_BOUNCE": (172, 412),
        "VCB_BREAKOUT": (88, 275),
        "LIQUIDITY_SWEEP_REVERSAL": (7, 25),
    }

    with Tape.open(running.data_dir) as tape:
        assert [*tape.dead_letters()] == []
        derived = [*tape.read(topics=["gate_verdict", "slot_*", "slot_reserved", "fire_command", "signal_generated"])]
    assert derived == []
    metrics = {name: each["metrics"] for name, each in running.runtime.stats()["plugins"].items()}
    assert (metrics["outcomes"]["opened"], metrics["telegram"]["dry_run"]) == (0, 0)


def test_importing_again_or_an_overlapping_log_adds_only_what_is_new(running, tmp_path):
    whole = [truth(number, win=number % 3 == 0) for number in range(300)]
    half, all_of_it = log(tmp_path / "half.jsonl", *whole[:200]), log(tmp_path / "whole.jsonl", *whole)
    assert running.bring(half)["stored"] == 200
    assert running.bring(half)["events"] == 0
    report = running.bring(all_of_it)
    assert report["events"] == report["stored"] == 100
    assert (report["files"][0]["mapped"], report["files"][0]["duplicate"]) == (100, 200)
    ids = [each.data.signal_id for each in outcomes(running)]
    assert len(ids) == len(set(ids)) == 300
    last = running.runtime.stats()["bus"]["last_seq"]
    assert running.bring(half, all_of_it)["events"] == 0
    assert running.runtime.stats()["bus"]["last_seq"] == last, "an import without news leaves no trace"


def test_an_open_signal_gets_its_end_from_a_later_log_and_a_contradiction_stays_out(running, tmp_path):
    name = tracked()["signal_id"]
    opened = log(tmp_path / "open.jsonl", truth(signal_id=name, pair="XAUUSD", direction="SELL", win=None))
    closed = log(tmp_path / "closed.jsonl", tracked())
    other = log(tmp_path / "other.jsonl", truth(signal_id=name, pair="XAUUSD", direction="SELL", win=True))
    assert running.bring(opened)["files"][0]["events"] == {"signal_imported": 1}
    assert running.bring(closed)["files"][0]["events"] == {"signal_outcome": 1}
    assert running.bring(opened)["files"][0]["duplicate"] == 1
    report = running.bring(other)["files"][0]
    assert (report["conflict"], report["mapped"]) == (1, 0)
    assert [each.data.outcome for each in outcomes(running)] == ["LOSS"]


def test_a_signal_the_bus_itself_follows_is_not_ended_by_a_log(running, tmp_path):
    with running.publisher("elite_guard") as publisher:
        data = {key: tracked()[key] for key in ("signal_id", "confidence", "pattern_type", "direction")}
        assert publisher.publish("signal_generated", {**data, "symbol": "XAUUSD"}, timestamp=AT) and publisher.flush(
            PATIENCE
        )
    report = running.bring(log(tmp_path / "a.jsonl", tracked()))["files"][0]
    assert (report["conflict"], report["mapped"]) == (1, 0)
    assert outcomes(running) == []


#: Imports ARGV[2] with the configuration ARGV[1] and dies of SIGKILL in the middle, after ARGV[3] events.
KILLED = """
import os, signal, sys
from tapebus.cli import main
from tapebus_legacy import importing
keep, count = importing.Import._recorded, 0
def recorded(self, made):
    global count
    count += 1
    if count > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return keep(self, made)
importing.Import._recorded = recorded
main(["import", "--config", sys.argv[1], sys.argv[2]])
"""


def killed_import(data_dir: Path, file: str, events: int) -> None:
    command = [sys.executable, "-c", KILLED, str(data_dir / "tapebus0.toml"), file, str(events)]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == -9, done.stderr.decode()


def test_an_import_killed_in_the_middle_is_completed_exactly_by_the_next(running, tmp_path, data_dir):
    file = log(tmp_path / "long.jsonl", *(truth(number) for number in range(2000)))
    killed_import(data_dir, file, 700)
    killed_import(data_dir, file, 300)
    report = running.bring(file)
    assert report["stored"] == report["events"] == 1000
    ids = Counter(each.data.signal_id for each in outcomes(running))
    assert len(ids) == 2000 and set(ids.values()) == {1}
    assert [each.name for each in (running.data_dir / "import").iterdir()] == ["lock"]


def test_a_bus_killed_under_an_import_gets_all_of_it_once_after_its_restart(make_bus, tmp_path):
    bus = make_bus(["schema", "store"]).start()
    file = log(tmp_path / "long.jsonl", *(truth(number) for number in range(20_000)))
    command = [sys.executable, "-m", "tapebus", "import", "--config", str(bus.config_file), "--json", file]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        bus.wait_for(lambda stats: stats["bus"]["last_seq"] > 1000, "to have some of it")
        bus.kill()
        bus.start()
        out, _ = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0 and json.loads(out)["stored"] == 20_000
    ids = Counter(each.data.signal_id for each in outcomes(bus))
    assert len(ids) == 20_000 and set(ids.values()) == {1}


def test_what_a_killed_import_left_through_another_endpoint_is_named(running, tmp_path, data_dir, capsys):
    file = log(tmp_path / "long.jsonl", *(truth(number) for number in range(50)))
    command = KILLED.replace("sys.argv[2]])", 'sys.argv[2], "--endpoint", "tcp://127.0.0.1:1"])').replace(
        "if not pub.flush", "if False"
    )
    patched = "from tapebus.publisher import Publisher\nPublisher.flush = lambda self, timeout=5.0: True\n" + command
    done = subprocess.run(
        [sys.executable, "-c", patched, str(data_dir / "tapebus0.toml"), file, "20"],
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == -9, done.stderr.decode()
    assert main(["import", "--config", str(data_dir / "tapebus0.toml"), file]) == 2
    assert "another endpoint was interrupted" in capsys.readouterr().err


def test_a_bus_that_has_stopped_is_told_of_at_once(running, tmp_path, data_dir, capsys):
    running.stop()
    assert main(["import", "--config", str(data_dir / "tapebus0.toml"), log(tmp_path / "a.jsonl", truth())]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "start one with `tapebus run`" in line


def test_two_imports_do_not_run_at_once(running, tmp_path, data_dir, capsys):
    import fcntl

    running.bring(log(tmp_path / "a.jsonl", truth()))
    with (running.data_dir / "import" / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["import", "--config", str(data_dir / "tapebus0.toml"), str(tmp_path / "a.jsonl")]) == 1
    assert "another import" in capsys.readouterr().err


def test_the_wrong_bus_is_found_out(running, embed, tmp_path, data_dir, capsys):
    other = embed(["schema", "store"])
    file = log(tmp_path / "a.jsonl", truth())
    code = main(["import", "--config", str(data_dir / "tapebus0.toml"), "--endpoint", other.acked, file])
    assert code == 1 and "is it the bus of this data directory" in capsys.readouterr().err


def test_the_report_fits_a_terminal_and_names_every_repair_once(tmp_path, capsys):
    file = log(tmp_path / f"{'long-name-' * 9}.jsonl", truth(), tracked(), tracked(2, sl_price=1.0), "x", "")
    assert main(["import", "--data-dir", str(tmp_path / "none"), "--dry-run", file]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 and "\x1b" not in out
    assert out.count("pips_recomputed") == 1 and "2 events would be imported" in out
    assert "blank" in out and "levels on the wrong side (line 3)" in out

"""``tapebus import``: old logs of signals become events, every line is accounted for, and nothing comes twice."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bus_support import PATIENCE
from legacy_support import AT, FATES, born, dry_run, ended, lines_of, log, record_44, tracked, truth
from tapebus.cli import main


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

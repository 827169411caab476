"""``tapebus explain``: the way of a signal from the tape, with the step that is missing named."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

import tapebus_schema
from bus_support import PATIENCE, wait_until
from tapebus import Tape
from tapebus.cli import main
from tapebus.events import Registry
from tapebus_outcomes.chain import Chain, follow, nearest
from tapebus_outcomes.explain import Story, tell
from tapebus_outcomes.words import RULES as RULE_WORDS
from tapebus_outcomes.words import answer, figure, margin, rule, span

REGISTRY = Registry(tapebus_schema.tapebus_register_event_types({}))
#: A Wednesday noon, Unix seconds.
NOON = 1_757_505_600.0

SIGNAL = (
    "signal_generated",
    {
        "signal_id": "S",
        "symbol": "EURUSD",
        "direction": "BUY",
        "confidence": 85.0,
        "pattern_type": "SWEEP",
        "entry": 1.1,
        "sl": 1.09,
        "tp": 1.12,
    },
)
RULES = [
    {"name": "confidence", "limit": [80.0, 89.0], "actual": 88.1, "passed": True},
    {"name": "quote_age", "limit": 5.0, "actual": 1.0, "passed": True},
    {"name": "slots", "limit": 10, "actual": 10, "passed": False},
    {"name": "sl_distance", "limit": 0.0004, "actual": 0.0002, "passed": False},
]
YES = (
    "gate_verdict",
    {
        "signal_id": "S",
        "user_id": "7",
        "fire": True,
        "reasons": [],
        "rules": RULES[:2],
        "slots_used": 1,
        "lots": 0.5,
        "risk": 50.0,
    },
)
NO = (
    "gate_verdict",
    {
        "signal_id": "S",
        "user_id": "7",
        "fire": False,
        "rules": RULES,
        "slots_used": 10,
        "reasons": ["no_free_slot", "sl_inside_spread"],
    },
)
ORDER = {"fire_id": "F", "signal_id": "S", "user_id": "7", "symbol": "EURUSD", "direction": "BUY", "lot": 0.5}
QUEUED = ("fire_command", ORDER | {"execution_mode": "AUTO", "status": "queued"})
ROUTED = ("fire_command", ORDER | {"execution_mode": "AUTO", "status": "routed"})
MANUAL = ("fire_command", ORDER | {"execution_mode": "MANUAL", "status": "queued", "fire_id": "M"})
SLOT = {"fire_id": "F", "symbol": "EURUSD", "direction": "BUY", "slots_used": 2, "slots_max": 10, "user_id": "7"}
RESERVED = ("slot_reserved", SLOT | {"signal_id": "S"})
FILLED = ("trade_executed", {"fire_id": "F", "ticket": 21173957, "volume": 0.5, "price": 1.1001, "status": "FILLED"})
REFUSED = ("trade_executed", {"fire_id": "F", "status": "REJECTED", "retcode": 10019, "message": "not enough money"})
OPENED = ("slot_opened", SLOT | {"ticket": 21173957})
CLOSED = (
    "position_closed",
    {
        "ticket": 21173957,
        "symbol": "EURUSD",
        "volume": 0.5,
        "close_price": 1.12,
        "profit": 99.5,
        "reason": "TP_HIT",
        "target_uuid": "U",
    },
)
RELEASED = ("slot_released", SLOT | {"method": "position_closed", "evidence": ["bus:9"], "slots_used": 1})
ENDED = (
    "signal_outcome",
    {
        "signal_id": "S",
        "symbol": "EURUSD",
        "direction": "BUY",
        "pattern_type": "SWEEP",
        "confidence": 85.0,
        "outcome": "WIN",
        "r": 2.0,
        "pips": 200.0,
        "exit_price": 1.12,
        "opened_at": NOON,
        "closed_at": NOON + 90,
        "duration_s": 90.0,
        "quotes_seen": 5,
        "fired": True,
    },
)
IMPORTED = (
    "signal_outcome",
    ENDED[1] | {"origin": "truth_log.jsonl:17", "quotes_seen": 0, "opened_at": NOON + 90, "duration_s": 0.0},
)


def told(*given: tuple[str, dict[str, Any]], waited: float = 95.0) -> Story:
    """The story of these events, a second apart, on a tape whose newest event came `waited` seconds later."""
    events = []
    for number, (event_type, data) in enumerate(given):
        wire = {"event_type": event_type, "timestamp": NOON + number, "source": "test", "data": data}
        events.append(msgspec.convert(wire | {"@bus_seq": number + 1}, REGISTRY.classes[event_type]))
    chain = Chain("S")
    chain.fires |= {"F", "M"}
    chain.settle(events)
    assert len(chain.events) == len(given)
    return tell("S", chain.events, NOON + len(given) - 1 + waited)


WAYS = [
    (
        "the whole way lacks nothing",
        [SIGNAL, YES, QUEUED, RESERVED, ROUTED, FILLED, OPENED, CLOSED, RELEASED, ENDED],
        "closed",
        [],
    ),
    ("a refusal of the gate lacks nothing", [SIGNAL, NO, ENDED], "refused by the gate", []),
    (
        "an order refused by the terminal gives its slot back",
        [SIGNAL, YES, QUEUED, RESERVED, REFUSED, RELEASED, ENDED],
        "refused by the terminal",
        [],
    ),
    (
        "a manual order needs no slot",
        [SIGNAL, NO, MANUAL, ("trade_executed", FILLED[1] | {"fire_id": "M"}), CLOSED, ENDED],
        "closed",
        [],
    ),
    ("no verdict", [SIGNAL, ENDED], None, ["no gate verdict for 1 min 36 s"]),
    ("no order", [SIGNAL, YES, ENDED], "let through", ["no fire_command for 1 min 36 s after the verdict"]),
    (
        "no router",
        [SIGNAL, YES, QUEUED, RESERVED, ENDED],
        "queued",
        ["no answer for 1 min 37 s after queued: no router"],
    ),
    (
        "no answer",
        [SIGNAL, YES, QUEUED, RESERVED, ENDED, ROUTED],
        "routed",
        ["no answer from the terminal for 1 min 35 s after routed"],
    ),
    (
        "an answer that says nothing yet",
        [SIGNAL, YES, QUEUED, ("trade_executed", FILLED[1] | {"status": "SENT"}), ENDED],
        "sent",
        ["no answer from the terminal for 1 min 36 s after sent"],
    ),
    (
        "no slot",
        [SIGNAL, YES, QUEUED, RESERVED, FILLED, ENDED],
        "open",
        ["no slot_opened for 1 min 36 s after the fill"],
    ),
    (
        "no close",
        [SIGNAL, YES, QUEUED, RESERVED, FILLED, OPENED, ENDED],
        "open",
        ["no position_closed for 1 min 35 s after the signal's own end"],
    ),
    (
        "no close, but other evidence",
        [SIGNAL, YES, QUEUED, RESERVED, FILLED, OPENED, RELEASED, ENDED],
        "released",
        ["no position_closed: the slot was released by other evidence"],
    ),
    (
        "no release",
        [SIGNAL, YES, QUEUED, RESERVED, FILLED, OPENED, CLOSED, ENDED],
        "closed",
        ["no slot_released for 1 min 36 s after the position was closed"],
    ),
    (
        "no release after a refusal",
        [SIGNAL, YES, QUEUED, RESERVED, REFUSED, ENDED],
        "refused by the terminal",
        ["no slot_released for 1 min 36 s"],
    ),
    (
        "a position that is held lacks its outcome only",
        [SIGNAL, YES, QUEUED, RESERVED, FILLED, OPENED],
        "open for 1 min 36 s",
        ["no outcome for 1 min 40 s"],
    ),
    (
        "an order whose signal is not there",
        [QUEUED, RESERVED, FILLED, OPENED, CLOSED, RELEASED, ENDED],
        "closed",
        ["no signal_generated on this tape"],
    ),
    ("what was imported expects nothing", [IMPORTED], None, []),
]


@pytest.mark.parametrize(("given", "state", "missing"), [each[1:] for each in WAYS], ids=[each[0] for each in WAYS])
def test_a_way_tells_where_it_stands_and_what_is_missing(given, state, missing):
    story = told(*given)
    assert [way.state for way in story.ways][-1:] == ([state] if state else [])
    assert len(story.missing) == len(missing)
    for text, start in zip(story.missing, missing, strict=True):
        assert text.startswith(start)


def test_a_refusal_names_every_failed_rule_with_limit_and_value_and_the_nearest_margin():
    (way,) = told(SIGNAL, NO).ways
    assert way.steps[0].text == "gate refuses it for user 7: 2 of 4 rules failed"
    assert way.steps[0].details == [
        "no free slot: 10 of 10 in use (no_free_slot)",
        "stop 0.0002 away, needs 0.0004 (spread, stops level) (sl_inside_spread)",
        "passed with 10% to spare: confidence 88.1, limit 80 to 89",
    ]


def test_the_steps_of_a_way_carry_the_time_between_them():
    story = told(SIGNAL, YES, QUEUED, FILLED, CLOSED)
    assert [step.after_s for step in story.ways[0].steps] == [1.0, 1.0, 1.0, 1.0]
    assert story.ways[0].ticket == 21173957


def test_each_user_has_a_way_of_their_own():
    other = {"user_id": "8", "fire_id": "F8"}
    eight = YES[0], YES[1] | {"user_id": "8"}
    story = told(SIGNAL, YES, eight, (NO[0], NO[1] | {"user_id": "9"}), QUEUED, (ROUTED[0], ROUTED[1] | other), FILLED)
    assert [(way.user_id, way.fire_id, way.state.split(" for ")[0]) for way in story.ways] == [
        ("7", "F", "open"),
        ("8", "F8", "routed"),
        ("9", None, "refused by the gate"),
    ]
    assert [each for each in story.missing if each.startswith("user 8: no answer from the terminal")]


@pytest.mark.parametrize(
    ("data", "meaning"),
    [
        ({"status": "FILLED"}, "filled"),
        ({"status": "success"}, "filled"),
        ({"ticket": 5}, "filled"),
        ({"retcode": 10009}, "filled"),
        ({"retcode": 10019}, "refused"),
        ({"status": "HEDGE_BLOCKED"}, "refused"),
        ({"status": "CLOSED_TP"}, "closed"),
        ({"status": "SENT"}, "pending"),
        ({}, "pending"),
    ],
)
def test_what_an_answer_means(data, meaning):
    assert answer(data) == meaning


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0042, "0.004 s"),
        (9.9994, "9.999 s"),
        (59.94, "59.9 s"),
        (95, "1 min 35 s"),
        (3600, "1 h"),
        (-2, "-2.000 s"),
        (86_400 * 3 + 7200, "3 d 2 h"),
        (3599.7, "1 h"),
    ],
)
def test_spans_read_like_people_say_them(seconds, words):
    assert span(seconds) == words


def test_a_rule_nobody_knows_is_told_with_limit_and_value():
    assert rule("moon_phase", 3, 4.5, "too_full") == "moon phase 4.5, limit 3 (too_full)"
    assert rule("expiry", NOON, NOON + 1) == "the signal was good until 2025-09-10 12:00:00, it was 2025-09-10 12:00:01"
    assert rule("quote_age", 5.0, None, "quote_missing") == "no quote of the symbol (quote_missing)"
    assert figure([80.0, 89.0]) == "80 to 89" and figure(None) == "unknown" and figure({"sl": 1.5}) == "sl 1.5"
    assert (
        margin([80.0, 89.0], 80.9) == pytest.approx(0.1) and margin("open", "open") is None and margin(5, True) is None
    )


# -- on a real tape -------------------------------------------------------------------------------


@pytest.fixture
def run(embed, capsys):
    """A bus with schema and store; ``run.put(events…)`` publishes, ``run.explain(id)`` gives code, output, errors."""
    bus = embed(["schema", "store"])
    # explain is a command of the plugin outcomes, which the bus itself need not run
    config = bus.data_dir.parent / "explain.toml"
    config.write_text(
        f'[bus]\ndata_dir = {json.dumps(str(bus.data_dir))}\n[plugins]\nenabled = ["schema", "store", "outcomes"]\n'
    )

    def put(*events: tuple[str, dict[str, Any]], by: str | None = "S", at: float = NOON) -> None:
        with bus.publisher() as publisher:
            for number, (event_type, data) in enumerate(events):
                user = data.get("user_id")
                assert publisher.publish(event_type, data, by, timestamp=at + number, user_id=user)
            assert publisher.flush(PATIENCE)

    def explain(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["explain", "--config", str(config), *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    bus.put, bus.explain = put, explain
    return bus


def kinds(chain: Chain) -> list[str]:
    return [event.event_type for event in chain.events]


def test_the_way_is_found_through_fire_id_and_ticket_where_nothing_carries_the_signals_id(run):
    run.put(SIGNAL, YES)
    run.put(QUEUED, RESERVED, FILLED, by="F")  # as the one-line functions correlate them
    run.put(OPENED, CLOSED, RELEASED, by=None)  # as a plain PUSH client does
    run.put(("position_closed", CLOSED[1] | {"ticket": 1}), (FILLED[0], FILLED[1] | {"fire_id": "X"}), by=None)
    whole = [
        "signal_generated",
        "gate_verdict",
        "fire_command",
        "slot_reserved",
        "trade_executed",
        "slot_opened",
        "position_closed",
        "slot_released",
    ]
    with Tape.open(run.data_dir) as tape:
        assert kinds(follow(tape, "S")) == whole
        assert kinds(follow(tape, "F")) == whole, "a fire leads to its signal"
    code, out, _ = run.explain("S")
    assert code == 0 and "position closed: TP_HIT" in out and "ticket 21173957, closed" in out


@pytest.mark.parametrize("first", [[], [YES]], ids=["nothing followed", "a verdict followed"])
def test_a_signal_published_without_a_correlation_id_is_found(run, first):
    run.put((SIGNAL[0], SIGNAL[1] | {"signal_id": "OTHER"}), SIGNAL, by=None)
    with run.publisher() as publisher:
        for event_type, data in first:  # as the gate correlates what it says of such a signal
            assert publisher.publish(event_type, data, "S", causation_id="bus:2", timestamp=NOON + 3, user_id="7")
        assert publisher.flush(PATIENCE)
    with Tape.open(run.data_dir) as tape:
        assert kinds(follow(tape, "S")) == ["signal_generated", *(each[0] for each in first)]
        assert follow(tape, "S").events[0].bus_seq == 2


def test_a_manual_order_a_minute_later_belongs_to_the_way(run):
    run.put(SIGNAL, NO)
    run.put(MANUAL, by="M", at=NOON + 60)
    run.put((FILLED[0], FILLED[1] | {"fire_id": "M"}), by=None, at=NOON + 61)
    _, out, _ = run.explain("S")
    assert "manual order queued" in out and "filled 0.5 lots" in out and "refused by the gate" in out


def test_two_users_of_one_signal_are_told_apart_and_other_signals_stay_out(run):
    run.put(
        SIGNAL,
        YES,
        (YES[0], YES[1] | {"user_id": "8"}),
        QUEUED,
        (QUEUED[0], QUEUED[1] | {"user_id": "8", "fire_id": "F8"}),
    )
    run.put(
        (SIGNAL[0], SIGNAL[1] | {"signal_id": "T"}),
        (QUEUED[0], QUEUED[1] | {"signal_id": "T", "fire_id": "FT"}),
        by="T",
    )
    code, out, _ = run.explain("S", "--json")
    story = json.loads(out)
    assert code == 0 and [(way["user_id"], way["fire_id"]) for way in story["ways"]] == [("7", "F"), ("8", "F8")]
    assert "FT" not in out


def test_an_imported_signal_says_where_it_came_from(run):
    run.put(IMPORTED)
    run.put(("signal_imported", SIGNAL[1] | {"signal_id": "O", "origin": "optimized.jsonl:3"}), by="O")
    _, out, _ = run.explain("S")
    assert "imported from" in out and "truth_log.jsonl:17" in out and "nothing is missing" in out
    _, out, _ = run.explain("O")
    assert "optimized.jsonl:3" in out and "nothing is missing" in out


def test_an_unknown_id_ends_with_1_and_the_nearest_ids(run):
    run.put((SIGNAL[0], SIGNAL[1] | {"signal_id": "ELITE_RAPID_EURUSD_1757505600"}), by="ELITE_RAPID_EURUSD_1757505600")
    code, out, err = run.explain("ELITE_RAPID_EURUSD_1757505601")
    assert (code, out) == (1, "") and "did you mean ELITE_RAPID_EURUSD_1757505600?" in err
    with Tape.open(run.data_dir) as tape:
        assert nearest(tape, "zzz") == []


def test_the_answer_fits_100_columns_and_is_plain_in_a_pipe(run):
    long = "ELITE_" + "X" * 150
    run.put(
        (SIGNAL[0], SIGNAL[1] | {"signal_id": long, "pattern_type": "P" * 90}),
        (
            NO[0],
            NO[1]
            | {"signal_id": long, "rules": [{"name": "n" * 90, "passed": False, "limit": "y" * 300, "actual": 1}]},
        ),
        (
            "trade_executed",
            {"fire_id": long, "status": "REJECTED", "message": "no\x1b[31mmoney " * 30, "signal_id": long},
        ),
        by=long,
    )
    code, out, _ = run.explain(long)
    assert code == 0 and "\x1b" not in out and max(map(len, out.splitlines())) <= 100


def test_the_whole_way_is_told_while_the_bus_runs_and_its_plugins_decide(embed, data_dir, capsys):
    slots = '[plugins.slots]\nauto_fire = true\nuser_id = "7"\n'
    bus = embed(["schema", "store", "outcomes", "slots"], extra=slots)
    account = {"target_uuid": "U", "balance": 10_000.0, "equity": 10_000.0, "open_positions": 0, "positions": []}
    with bus.publisher("desk") as publisher, Tape.open(bus.data_dir) as tape:

        def put(event_type: str, at: float, data: dict[str, Any], **envelope: Any) -> None:
            assert publisher.publish(event_type, data, timestamp=NOON + at, **envelope) and publisher.flush(PATIENCE)

        def seen(event_type: str) -> Any:
            return wait_until(lambda: next(tape.read(topics=[event_type]), None), event_type)

        put("user_action", -3, {"action": "learn", "user_id": "7"})
        put("ea_heartbeat", -2, account, user_id="7")
        put("market_data", -1, {"symbol": "EURUSD", "bid": 1.0999, "ask": 1.1})
        put("signal_generated", 0, SIGNAL[1] | {"signal_id": "LIVE"}, correlation_id="LIVE")
        verdict = seen("gate_verdict")
        assert verdict.data.fire, verdict.data.reasons
        assert {each.name for each in verdict.data.rules} <= RULE_WORDS.keys(), "every rule has words of its own"
        order = seen("fire_command").data
        filled = {"fire_id": order.fire_id, "ticket": 77, "volume": order.lot, "price": 1.1, "status": "FILLED"}
        put("trade_executed", 1, filled | {"symbol": "EURUSD", "direction": "BUY", "target_uuid": "U"}, user_id="7")
        seen("slot_opened")
        put("market_data", 60, {"symbol": "EURUSD", "bid": 1.1201, "ask": 1.1202})
        closed = CLOSED[1] | {"ticket": 77, "volume": order.lot, "fire_id": order.fire_id}
        put("position_closed", 61, closed, user_id="7")
        seen("slot_released")
        seen("signal_outcome")
        assert main(["explain", "--config", str(data_dir / "tapebus0.toml"), "LIVE", "--json"]) == 0
    story = json.loads(capsys.readouterr().out)
    (way,) = story["ways"]
    assert [step["event_type"] for step in way["steps"]] == [
        "gate_verdict",
        "fire_command",
        "slot_reserved",
        "trade_executed",
        "slot_opened",
        "position_closed",
        "slot_released",
    ]
    assert (way["state"], way["fire_id"], way["ticket"], way["user_id"]) == ("closed", order.fire_id, 77, "7")
    assert (story["outcome"], story["missing"]) == ("WIN", [])

"""What a message of each event type says, and that any text in it stays text."""

from __future__ import annotations

import string
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapebus_schema
from tapebus.events import GenericEvent, Registry
from tapebus.testing import PluginBench
from tapebus_schema.examples import EXAMPLES
from tapebus_telegram.markup import MAX_UNITS, ROOM, compose, pages, units
from tapebus_telegram.render import CRITICAL, LINE_UNITS, NORMAL, Renderer
from tapebus_telegram.settings import MESSAGES
from tapebus_trading import symbols

ALLOWED = {"b", "i", "code"}


class Reader(HTMLParser):
    """What a reader sees of Telegram HTML; fails on whatever Telegram would refuse. Knows nothing of the renderer."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text = ""
        self.marked: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.open, f"{self.open} stays open in {html!r}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in ALLOWED and not attrs and not self.open
        self.open.append(tag)
        self.marked.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open:
            self.marked[self.open[-1]][-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")

    handle_decl = handle_pi = unknown_decl = handle_comment


def event(event_type: str, **data: Any) -> Any:
    return GenericEvent(event_type=event_type, timestamp=1e9, source="test", data=data, bus_seq=1)


def shown(event_type: str, mask: bool = True, **data: Any) -> Any:
    message = Renderer(symbols.Registry(), mask).message(event(event_type, **data))
    assert message is not None
    assert Reader(message.html).text == message.plain
    return message


# Whatever may stand in a payload: text of every kind, the characters that mean something in HTML often among it.
TEXT = st.one_of(
    st.text(max_size=80),
    st.text(alphabet="<>&\"'/;#x🔥\u202e\n\t amp lt b", max_size=80),
    st.text(alphabet=string.ascii_letters, min_size=3000, max_size=3001),
    st.builds(lambda char, count: char * count, st.sampled_from("🔥<&é\u0000\ud800"), st.integers(1000, 6000)),
)
SCALAR = st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.just(-(10**400)), st.floats(), st.lists(TEXT))
RULE = st.fixed_dictionaries({"name": TEXT, "passed": st.booleans(), "limit": SCALAR, "actual": SCALAR})
VALUE = st.one_of(
    TEXT,
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(allow_nan=True, allow_infinity=True),
    st.lists(st.one_of(TEXT, st.integers(), RULE), max_size=40),
    st.dictionaries(TEXT, TEXT, max_size=3),
)
FIELDS = sorted(
    {field for example in EXAMPLES.values() for field in example} | {"title", "reasons", "message", "details"}
)


@given(st.sampled_from(sorted(MESSAGES)), st.dictionaries(st.sampled_from(FIELDS), VALUE, max_size=8), st.booleans())
def test_any_payload_becomes_html_that_reads_back_as_its_plain_text_within_the_limit(
    event_type: str, data: dict[str, Any], mask: bool
) -> None:
    message = Renderer(symbols.Registry(), mask).message(event(event_type, **data))
    assert message is not None
    assert Reader(message.html).text == message.plain
    assert 0 < units(message.plain) <= MAX_UNITS - ROOM
    assert message.plain.strip()
    assert units(message.line) <= LINE_UNITS and "\n" not in message.line


@given(st.lists(st.lists(st.tuples(TEXT, st.sampled_from(["", "b", "code", "i"])), max_size=3), max_size=30))
def test_pages_hold_every_character_in_order_and_none_is_too_long(lines: list[list[tuple[str, str]]]) -> None:
    from tapebus_telegram.markup import clean

    found = pages(lines, 500)
    for html, plain in found:
        assert Reader(html).text == plain
        assert 0 < units(plain) <= 500
    wanted = "".join(clean(text) for line in lines for text, _ in line).replace("\n", "")
    assert "".join(plain for _, plain in found).replace("\n", "") == wanted


def test_a_long_list_is_split_between_lines() -> None:
    lines = [[("slot ", ""), (f"{number:04}", "b")] for number in range(1000)]
    found = pages(lines)
    assert len(found) == 3
    assert [line for _, plain in found for line in plain.split("\n")] == [f"slot {number:04}" for number in range(1000)]


def test_a_long_text_is_cut_in_utf16_units_without_splitting_a_character() -> None:
    html, plain = compose([[("🔥" * 5000, "b")]])
    assert units(plain) <= MAX_UNITS - ROOM and plain.rstrip("…") == "🔥" * (len(plain) - 1)
    assert Reader(html).text == plain


@pytest.mark.parametrize("event_type", sorted(MESSAGES))
def test_every_event_type_of_the_schema_has_a_message_from_its_typed_payload(event_type: str) -> None:
    import tapebus_slots
    import tapebus_telegram

    types = tapebus_schema.tapebus_register_event_types({})
    known = {each.name for each in types}
    types += [each for each in tapebus_slots.tapebus_register_event_types() if each.name not in known]
    example = EXAMPLES.get(event_type) or {"user_id": "7", "reasons": ["age"], "slots_used": 4, "slots_max": 10}
    bench = PluginBench(tapebus_telegram, Registry(types), {"dry_run": True})
    typed = bench.event(event_type, 1.0, example)
    message = Renderer(symbols.Registry()).message(typed)
    assert message is not None and Reader(message.html).marked["b"][0] and message.tally and message.line
    tapebus_telegram.tapebus_stop(bench.context)


@pytest.mark.parametrize(
    ("event_type", "data", "lines"),
    [
        (
            "signal_generated",
            {"signal_id": "S1", "symbol": "XAUUSD", "direction": "BUY", "confidence": 82.4, "pattern_type": "FVG_FILL"}
            | {"entry": 3374.7111538461536, "sl": 3370.0, "tp": 3380},
            ["▲ BUY XAUUSD", "entry 3374.71  SL 3370.00  TP 3380.00", "FVG FILL · confidence 82 %", "S1"],
        ),
        (
            "fire_command",
            {"fire_id": "F1", "symbol": "USDJPY", "direction": "SELL", "lot": 0.05, "entry": 0.0, "sl": 148.3}
            | {"execution_mode": "AUTO", "status": "queued", "user_id": "7176191872"},
            ["🔥 SELL USDJPY order", "0.05 lot · AUTO · queued", "SL 148.300", "F1"],
        ),
        (
            "trade_executed",
            {"fire_id": "F1", "symbol": "EURUSD", "direction": "BUY", "status": "FILLED", "volume": 0.1, "price": 1.1}
            | {"ticket": 85051741},
            ["🟢 BUY EURUSD opened", "0.1 lot · at 1.10000", "F1"],
        ),
        (
            "trade_executed",
            {"fire_id": "F1", "symbol": "EURUSD", "status": "INSUFFICIENT_MARGIN", "retcode": 10019}
            | {"message": "account 12345678 is short"},
            ["⛔ EURUSD not opened: INSUFFICIENT MARGIN", "code 10019 · account •••678 is short", "F1"],
        ),
        (
            "trade_executed",
            {"fire_id": "F1", "symbol": "EURUSD", "status": "CLOSED_TP"},
            ["🏁 EURUSD closed", "F1"],
        ),
        (
            "slot_opened",
            {"fire_id": "F1", "symbol": "EURUSD", "direction": "BUY", "slots_used": 4, "slots_max": 10, "ticket": 5},
            ["🔒 BUY EURUSD slot taken", "4/10 slots", "F1"],
        ),
        (
            "slot_released",
            {"fire_id": "F1", "symbol": "EURUSD", "direction": "BUY", "slots_used": 16, "slots_max": 10}
            | {"method": "position_closed"},
            ["🔓 BUY EURUSD slot released", "16/10 slots · position closed", "F1"],
        ),
        (
            "gate_verdict",
            {"signal_id": "S1", "fire": False, "reasons": ["confidence_outside_band"], "slots_used": 4}
            | {"user_id": "7176191872"}
            | {"rules": [{"name": "confidence", "limit": [80, 89], "actual": 91.2, "passed": False}]},
            ["🚫 gate: not fired", "user •••872", "confidence outside band", "confidence: 91.2  limit 80–89", "S1"],
        ),
        (
            "gate_verdict",
            {"signal_id": "S1", "fire": False, "reasons": ["auto_fire_off", "account_unknown"], "symbol": "EURUSD"}
            | {
                "rules": [
                    {"name": "auto_fire", "limit": True, "actual": False, "passed": False},
                    {"name": "total_open_risk", "limit": None, "actual": None, "passed": False},
                    {"name": "sl_distance", "limit": 0.0002, "actual": None, "passed": False},
                    {"name": "geometry", "limit": "sl < entry", "actual": {"entry": 1.1, "sl": 2}, "passed": False},
                    {"name": "slots", "limit": 10, "actual": 4, "passed": True},
                ]
            },
            [
                "🚫 EURUSD gate: not fired",
                "auto fire off · account unknown",
                "auto fire: no  limit yes",
                "sl distance: unknown  limit 0.0002",
                "geometry: entry 1.1, sl 2  limit sl < entry",
                "S1",
            ],
        ),
        (
            "signal_outcome",
            {"signal_id": "S1", "symbol": "EURUSD", "direction": "SELL", "outcome": "LOSS", "r": -1.0, "pips": -15.04}
            | {"exit_price": 1.1},
            ["❌ SELL EURUSD LOSS", "-1.00 R · -15.0 pips · exit 1.10000", "S1"],
        ),
        ("signal_outcome", {"signal_id": "S1", "symbol": "EURUSD", "outcome": None}, ["• EURUSD OPEN", "S1"]),
        (
            "pattern_status",
            {"pattern_type": "VCB_BREAKOUT", "status": "disabled", "reason": "below its breakeven", "n": 275}
            | {"wins": 88, "win_rate": 32.0, "low": 26.8, "high": 37.7},
            ["🧪 VCB BREAKOUT DISABLED", "88 of 275 won · 95 % interval 27–38 %", "below its breakeven"],
        ),
        (
            "pattern_status",
            {"pattern_type": "SWEEP", "status": "disabled", "reason": "by a user", "n": 0, "wins": 0, "low": 0.0}
            | {"high": 100.0},
            ["🧪 SWEEP DISABLED", "by a user"],
        ),
        (
            "alert",
            {"name": "feed_silent", "severity": "critical", "message": "no tick for 30 s", "component": "feed"},
            ["⚠️ CRITICAL feed silent", "no tick for 30 s", "feed"],
        ),
        (
            "alert",
            {"name": "feed_silent", "severity": "critical", "message": "ticks again", "state": "cleared"},
            ["✅ CLEARED feed silent", "ticks again", "test"],
        ),
        (
            "reconcile_requested",
            {"user_id": "7176191872", "reasons": ["age_4h"], "slots_used": 4, "slots_max": 10},
            ["🔎 slots wait for a fresh look at the account", "4/10 slots · age 4h"],
        ),
        (
            "user_action",
            {"user_id": "7176191872", "action": "pattern_off", "details": {"pattern_type": "FVG", "ip": "10.0.0.1"}},
            ["👤 pattern off", "by •••872 · pattern_type FVG"],
        ),
        (
            "calibration",
            {"version": 3, "method": "platt", "n": 300, "knots": [], "brier": 0.3827, "skill": -0.605},
            ["📐 confidence calibration 3", "platt · n 300 · Brier 0.383 · skill -0.605"],
        ),
    ],
)
def test_a_message_says(event_type: str, data: dict[str, Any], lines: list[str]) -> None:
    message = shown(event_type, **data)
    assert message.plain.split("\n") == lines
    for secret in ("7176191872", "85051741", "12345678", "10.0.0.1"):
        assert secret not in message.html


def test_what_the_gate_says_of_one_user_is_not_merged_with_what_it_says_of_another() -> None:
    fired = shown("gate_verdict", signal_id="S1", user_id="7001", fire=True)
    refused = shown("gate_verdict", signal_id="S1", user_id="7002", fire=False, reasons=["no_free_slot"])
    assert fired.group and refused.group and fired.group != refused.group
    assert fired.group == shown("gate_verdict", signal_id="S1", user_id="7001", fire=True).group
    assert "user" not in shown("gate_verdict", signal_id="S1", user_id="default", fire=True).plain


def test_a_number_longer_than_any_float_is_shown_as_unknown() -> None:
    rule = {"name": "x", "passed": False, "limit": 10**400, "actual": 1}
    assert "x: 1  limit unknown" in shown("gate_verdict", rules=[rule]).plain
    assert shown("signal_generated", symbol="EURUSD", confidence=10**400, entry=10**400).plain == "• EURUSD"


def test_a_raised_alert_is_as_urgent_as_its_severity_and_a_cleared_one_never_urgent() -> None:
    assert shown("alert", name="x", severity="critical", message="m").priority == CRITICAL
    assert shown("alert", name="x", severity="critical", message="m", state="cleared").priority == NORMAL


def test_prices_have_the_digits_of_the_symbol_configured_built_in_or_sent_by_the_broker() -> None:
    registry = symbols.Registry({"symbols": {"XAUUSD": {"digits": 3}}})
    renderer = Renderer(registry)

    def entry(symbol: str) -> str:
        message = renderer.message(event("signal_generated", symbol=symbol, direction="BUY", entry=10.123456))
        assert message is not None
        return message.plain.split("\n")[1]

    assert [entry(name) for name in ("XAUUSD", "XAGUSD", "USDJPY", "EURUSD")] == [
        "entry 10.123",
        "entry 10.123",
        "entry 10.123",
        "entry 10.12346",
    ]
    registry.specify({"symbol": "EURUSD", "digits": 4})
    assert entry("EURUSD") == "entry 10.1235"

"""Payloads as producers really write them: every alias, recorded terminal messages, legacy logs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tapebus_schema
from tapebus.events import EventType, Registry
from tapebus_schema.examples import EXAMPLES as GOOD

REGISTRY = Registry(tapebus_schema.event_types())
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def convert(event_type: EventType, data: dict[str, Any], **envelope: Any) -> Any:
    wire = {"event_type": event_type.name, "timestamp": 1.0, "source": "test", "data": data, **envelope}
    return msgspec.convert(wire, REGISTRY.classes[event_type.name])


def decode(name: str, data: dict[str, Any], types: dict[str, EventType] = REGISTRY.types, **envelope: Any) -> Any:
    """The event as the bus decodes it: aliases, typed decoding, a second try after ``prepare``, the check."""
    event_type = types[name]
    data = dict(data)
    for alias, field in event_type.aliases.items():
        if alias in data and field not in data:
            data[field] = data.pop(alias)
    try:
        event = convert(event_type, data, **envelope)
    except msgspec.ValidationError:
        event = convert(event_type, event_type.prepare(data), **envelope)
    reason = event_type.check(event) if event_type.check else None
    if reason is not None:
        raise ValueError(reason)
    return event


def recorded(path: str) -> list[dict[str, Any]]:
    file = DATA / path
    if not file.exists():
        pytest.skip(f"recorded data {path} is not available")
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]


ALIASES = [(each.name, alias, field) for each in REGISTRY.types.values() for alias, field in each.aliases.items()]


def test_every_registered_type_has_a_good_example():
    assert set(GOOD) == set(REGISTRY.types)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_good_payload_decodes_at_the_first_try_and_round_trips(name):
    event = decode(name, GOOD[name])
    assert convert(REGISTRY.types[name], GOOD[name]) == event
    for codec in (msgspec.json, msgspec.msgpack):
        again = codec.decode(codec.encode(event.data), type=type(event.data))
        assert again == event.data
    assert REGISTRY.types[name].prepare(GOOD[name]) == GOOD[name]


@pytest.mark.parametrize(("name", "alias", "field"), ALIASES)
def test_every_alias_reaches_its_canonical_field(name, alias, field):
    assert field in GOOD[name], f"the example of {name} does not exercise {field}"
    data = {alias if key == field else key: value for key, value in GOOD[name].items()}
    assert decode(name, data).data == decode(name, GOOD[name]).data
    assert REGISTRY.types[name].prepare(data) == GOOD[name]


@pytest.mark.parametrize("name", sorted(GOOD))
def test_every_required_field_is_enforced(name):
    for field in msgspec.structs.fields(REGISTRY.types[name].payload):
        if field.required:
            with pytest.raises(msgspec.ValidationError, match=field.name):
                decode(name, {key: value for key, value in GOOD[name].items() if key != field.name})


def test_every_spelling_of_the_bridges_is_registered():
    wanted = {
        "signal_generated": "entry_price open_price price sl_price stop_loss tp_price take_profit type pair pattern ts",
        "fire_command": "lots volume lot_size sl_price stop_loss tp_price take_profit entry_price price uuid user_uuid",
        "trade_executed": "lot lots lot_size open_price entry entry_price uuid user_uuid pair type ts timestamp",
        "balance_update": "login ts",
        "market_data": "pair ts",
        "pattern_detected": "pattern pair type",
        "ea_heartbeat": "uuid user_uuid login ts",
        "position_closed": "uuid user_uuid lot lots lot_size pair ts",
    }
    for name, aliases in wanted.items():
        assert set(aliases.split()) <= set(REGISTRY.types[name].aliases), name


def test_a_canonical_field_wins_over_its_alias_and_aliases_have_a_fixed_order():
    prepare = REGISTRY.types["fire_command"].prepare
    assert prepare({"lot": 1.0, "volume": 2.0})["lot"] == 1.0
    assert prepare({"volume": 2.0, "lots": 3.0, "lot_size": 4.0})["lot"] == 3.0


def test_recorded_terminal_messages_decode_as_their_events():
    lines = recorded("wire/hydrax_ea.jsonl")
    names = {
        "tick": "market_data",
        "fire": "fire_command",
        "confirmation": "trade_confirmed",
        "heartbeat": "ea_heartbeat",
        "heartbeat_metrics": "ea_heartbeat",
        "position_closed": "position_closed",
        None: "signal_generated",
    }
    events = []
    for line in lines:
        kind = line.get("type")
        name = names.get(kind.lower() if kind else None)
        if name is not None:
            events.append(decode(name, line))
    tick, signal, fire, confirmation, beat, metrics, closed = (event.data for event in events)
    assert (tick.symbol, tick.bid, tick.ask, tick.timestamp) == ("EURUSD", 1.1663, 1.16632, 1754613325)
    assert (signal.entry, signal.sl, signal.tp) == (1.1663, 1.1653, 1.1683)
    assert (fire.lot, fire.entry, fire.direction) == (0.5, 0, "SELL")
    assert (confirmation.ticket, confirmation.volume, confirmation.price) == (21173957, 0.5, 148.215)
    assert (confirmation.target_uuid, confirmation.direction) == ("COMMANDER_DEV_001", None)
    assert (confirmation.broker_time, confirmation.execution_time) == ("2025.09.23 00:58:58", None)
    assert (beat.open_positions, len(beat.positions), beat.complete) == (4, 1, False)
    assert beat.timestamp == 1726351234
    assert (metrics.free_margin, metrics.positions[0].ticket, metrics.complete) == (9817.6, 12345678, False)
    assert (closed.target_uuid, closed.profit, closed.reason) == ("COMMANDER_DEV_001", 17.4, "TP_HIT")


@pytest.mark.parametrize(
    "path", ["legacy/truth_log.jsonl", "legacy/optimized_tracking.jsonl", "legacy/comprehensive_tracking.jsonl"]
)
def test_recorded_signals_of_the_old_system_decode(path):
    failures: dict[str, int] = {}
    good = 0
    for line in recorded(path):
        try:
            event = decode("signal_generated", line)
        except (msgspec.ValidationError, ValueError) as error:
            failures[str(error)] = failures.get(str(error), 0) + 1
            continue
        good += 1
        assert event.data.symbol == line.get("pair", line.get("symbol"))
        assert event.data.pattern_type == line.get("pattern", line.get("pattern_type"))
        stamp = line["signal_id"].rsplit("_", 1)[-1]
        if isinstance(line.get("timestamp"), str) and stamp.isdigit():
            # The id carries the second of creation: what shows that times without offset are UTC.
            assert abs(event.data.timestamp - int(stamp)) < 120
    assert good > 300 and sum(failures.values()) <= good * 0.01, failures


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (1754613325, 1754613325),
        ("1754613325", 1754613325),
        (1581611172734, 1581611172.734),
        ("2025-08-21T17:58:37.730103", datetime(2025, 8, 21, 17, 58, 37, 730103, UTC).timestamp()),
        ("2025-08-11T04:02:10+02:00", datetime(2025, 8, 11, 2, 2, 10, tzinfo=UTC).timestamp()),
        ("2025-08-11T02:02:10Z", datetime(2025, 8, 11, 2, 2, 10, tzinfo=UTC).timestamp()),
    ],
)
def test_times_of_every_format_become_unix_seconds(value, seconds):
    data = {"symbol": "EURUSD", "bid": "1.1", "ask": "1.2", "ts": value}
    assert decode("market_data", data).data.timestamp == pytest.approx(seconds, abs=1e-6)


def test_broker_time_is_converted_only_with_a_configured_offset():
    data = {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2, "timestamp": "2025.08.08 05:27:29"}
    plain = decode("market_data", data).data
    assert (plain.timestamp, plain.broker_time) == (None, "2025.08.08 05:27:29")
    types = {each.name: each for each in tapebus_schema.event_types({"broker_utc_offset_hours": 3})}
    moved = decode("market_data", data, types).data
    assert moved.timestamp == datetime(2025, 8, 8, 2, 27, 29, tzinfo=UTC).timestamp()
    assert moved.broker_time == "2025.08.08 05:27:29"


def test_an_expiry_in_broker_time_is_refused_rather_than_lost():
    with pytest.raises(msgspec.ValidationError, match="expires_at"):
        decode("signal_generated", {**GOOD["signal_generated"], "expires_at": "2025.08.08 05:27:29"})


@pytest.mark.parametrize(
    ("value", "direction"),
    [
        ("buy", "BUY"),
        ("Sell", "SELL"),
        ("LONG", "BUY"),
        ("short", "SELL"),
        (0, "BUY"),
        (1, "SELL"),
        ("ORDER_TYPE_BUY", "BUY"),
        ("POSITION_TYPE_SELL", "SELL"),
        ("SignalType.BUY", "BUY"),
    ],
)
def test_directions_of_every_program_are_understood(value, direction):
    data = {**GOOD["pattern_detected"], "sl": None, "tp": None, "type": value}
    del data["direction"]
    assert decode("pattern_detected", data).data.direction == direction


def test_positions_of_other_terminals_are_understood():
    data = {
        "uuid": "U",
        "login": 123,
        "balance": "100.5",
        "equity": "100",
        "open_positions": "1",
        "positions": [
            {
                "ticket": "7",
                "pair": "EURUSD",
                "type": "buy",
                "lots": "0.10",
                "price_open": 1.1,
                "open_time": "2025.05.25 09:44:34",
                "magic": 5,
            }
        ],
    }
    beat = decode("ea_heartbeat", data).data
    position = beat.positions[0]
    assert (beat.account_number, beat.balance, beat.complete) == ("123", 100.5, True)
    assert (position.ticket, position.direction, position.volume, position.open_price) == (7, "BUY", 0.1, 1.1)
    assert (position.open_time, position.broker_time) == (None, "2025.05.25 09:44:34")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lot", "1,5"),
        ("lot", "nan"),
        ("lot", "0x1"),
        ("lot", True),
        ("direction", "UP"),
        ("sl", "none"),
        ("timestamp", "yesterday"),
        ("timestamp", "2025.13.45 00:00:00"),
        ("fire_id", 1.5),
        ("lot", 0.001),
    ],
)
def test_what_cannot_be_interpreted_stays_and_is_the_reason(field, value):
    data = {**GOOD["fire_command"], field: value}
    assert REGISTRY.types["fire_command"].prepare(data)[field] == value
    with pytest.raises(msgspec.ValidationError, match=field):
        decode("fire_command", data)


def test_prepare_leaves_its_argument_alone():
    data = {"symbol": "EURUSD", "bid": "1.1", "ask": "1.2", "ts": "1"}
    before = dict(data)
    REGISTRY.types["market_data"].prepare(data)
    assert data == before

"""Programs that exist today keep working: plain PUSH in, plain SUB out, in the spelling they know."""

from __future__ import annotations

import json

import pytest

from bus_support import PATIENCE, feed_messages, listening, pushing, wait_until

#: What the programs of today send, in their own spelling, and some of what it becomes.
LEGACY = {
    "signal_generated": (
        {
            "signal_id": "S1",
            "symbol": "EURUSD",
            "direction": "BUY",
            "confidence": 85.0,
            "pattern_type": "KALMAN_QUICKFIRE",
            "entry_price": 1.1,
            "sl_price": 1.09,
            "tp_price": 1.12,
        },
        {"entry": 1.1, "sl": 1.09, "tp": 1.12},
    ),
    "fire_command": (
        {"fire_id": "F1", "signal_id": "S1", "symbol": "EURUSD", "direction": "BUY", "lot_size": 0.1},
        {"fire_id": "F1", "lot": 0.1},
    ),
    "trade_executed": (
        {"fire_id": "F1", "ticket": 7, "symbol": "EURUSD", "lot_size": 0.1, "open_price": 1.1, "status": "FILLED"},
        {"volume": 0.1, "price": 1.1},
    ),
    "balance_update": (
        {"user_id": "7", "login": "123", "balance": 1000.0, "equity": 990.0},
        {"account_number": "123"},
    ),
    "system_health": ({"component": "elite_guard", "status": "running"}, {"status": "running"}),
    "user_action": ({"user_id": "7", "action": "login", "details": {"a": 1}}, {"action": "login"}),
    "market_data": ({"symbol": "EURUSD", "bid": 1.1, "ask": 1.1002}, {"bid": 1.1}),
    "pattern_detected": ({"pattern_type": "SWEEP", "symbol": "EURUSD", "confidence": 70.0}, {"confidence": 70.0}),
}


def envelope(event_type: str, data: dict, correlation_id: str | None = None) -> dict:
    return {
        "event_type": event_type,
        "timestamp": 1_755_799_117.25,
        "source": "elite_guard",
        "correlation_id": correlation_id,
        "user_id": None,
        "data": data,
    }


def test_500_of_500_signals_of_a_plain_push_client_reach_a_plain_subscriber_and_the_tape(embed):
    bus = embed(["schema", "store"])
    signal = LEGACY["signal_generated"][0]
    with listening(bus.runtime, bus.feed, b"bitten.") as subscriber, pushing(bus.ingest) as send:
        sent = [envelope("signal_generated", {**signal, "signal_id": f"S{n}"}, f"S{n}") for n in range(500)]
        for each in sent:
            send(json.dumps(each).encode())
        received = feed_messages(subscriber, 500)
    assert [topic for topic, _ in received] == ["bitten.signal_generated"] * 500
    assert [event for _, event in received] == [{**each, "bus_seq": n} for n, each in enumerate(sent, 1)]
    with bus.tape() as tape:
        kept = list(tape.read())
    assert [event.correlation_id for event in kept] == [f"S{n}" for n in range(500)]
    assert {(event.data.entry, event.data.sl, event.data.tp) for event in kept} == {(1.1, 1.09, 1.12)}


@pytest.mark.parametrize("event_type", LEGACY)
def test_each_event_type_is_repeated_as_published_and_kept_under_canonical_names(embed, event_type):
    bus = embed(["schema", "store"])
    data, canonical = LEGACY[event_type]
    with listening(bus.runtime, bus.feed, b"bitten.") as subscriber, pushing(bus.ingest) as send:
        sent = envelope(event_type, data, "S1")
        send(json.dumps(sent).encode())
        [(topic, repeated)] = feed_messages(subscriber, 1)
    assert topic == f"bitten.{event_type}"
    assert repeated == {**sent, "bus_seq": 1}
    with bus.tape() as tape:
        [event] = tape.read()
    assert event.event_type == event_type
    assert (event.source, event.timestamp, event.correlation_id) == ("elite_guard", 1_755_799_117.25, "S1")
    assert {key: getattr(event.data, key) for key in canonical} == canonical


def test_a_batch_frame_of_a_plain_client_counts_as_its_events(embed):
    bus = embed(["schema", "store"])
    with pushing(bus.ingest) as send:
        send(json.dumps([envelope(kind, data) for kind, (data, _) in LEGACY.items()]).encode())
        wait_until(lambda: bus.runtime.stats()["bus"]["stored"] == len(LEGACY), "all events of the frame")
    with bus.tape() as tape:
        assert [event.event_type for event in tape.read()] == list(LEGACY)


def test_recorded_terminal_messages_attach_as_a_source_without_an_envelope(embed, shared_data, free_ports):
    [port] = free_ports(1)
    source = f'[[sources]]\nname = "feed"\ntype = "pull"\nbind = "tcp://127.0.0.1:{port}"\ntopic = "market_data"\n'
    bus = embed(["schema", "store"], extra=source)
    lines = (shared_data / "wire" / "hydrax_ea.jsonl").read_text().splitlines()
    ticks = [json.loads(line) for line in lines if line.startswith("{")]
    ticks = [tick for tick in ticks if str(tick.get("type", "")).lower() == "tick"]
    if not ticks:
        pytest.skip("no ticks in the recorded terminal messages")
    with pushing(f"tcp://127.0.0.1:{port}") as send:
        for tick in ticks:
            send(json.dumps(tick).encode())
        wait_until(lambda: bus.runtime.stats()["bus"]["stored"] == len(ticks), "the ticks", PATIENCE)
    with bus.tape() as tape:
        kept = list(tape.read())
    assert [(event.data.symbol, event.data.bid, event.data.ask) for event in kept] == [
        (tick["symbol"], tick["bid"], tick["ask"]) for tick in ticks
    ]
    assert {event.source for event in kept} == {"feed"}

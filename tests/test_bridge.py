"""The one-liners as existing programs call them, over a real socket to the test bus."""

from __future__ import annotations

import pytest

from tapebus import bridge
from test_publisher import PATIENCE_S, Bus


@pytest.fixture
def bus(monkeypatch):
    bus = Bus()
    monkeypatch.setenv("TAPEBUS_ENDPOINT", bus.endpoint)
    yield bus
    while bridge._publishers:
        bridge._publishers.popitem()[1].close()
    bus.kill()


def arrived(bus: Bus) -> list[dict]:
    for publisher in bridge._publishers.values():
        assert publisher.flush(PATIENCE_S)
    return [event for events in bus.events.values() for _, event in sorted(events.items())]


SIGNAL = {"signal_id": "S1", "symbol": "EURUSD", "direction": "BUY", "confidence": 80.5, "entry": None}
FIRE = {"fire_id": "F1", "signal_id": "S1", "symbol": "EURUSD", "direction": "BUY", "lot": 0.1}


@pytest.mark.parametrize(
    ("call", "event_type", "source", "correlation_id", "user_id", "data"),
    [
        (
            lambda: bridge.signal_generated(SIGNAL),
            "signal_generated",
            "elite_guard",
            "S1",
            None,
            {k: v for k, v in SIGNAL.items() if v is not None},
        ),
        (lambda: bridge.fire_command(FIRE, 7), "fire_command", "webapp", "F1", "7", {**FIRE, "user_id": "7"}),
        (
            lambda: bridge.trade_executed({"fire_id": "F1", "ticket": 9}),
            "trade_executed",
            "mt5_adapter",
            "F1",
            None,
            {"fire_id": "F1", "ticket": 9},
        ),
        (
            lambda: bridge.balance_update({"balance": 10.5}, "u"),
            "balance_update",
            "mt5_adapter",
            None,
            "u",
            {"balance": 10.5, "user_id": "u"},
        ),
        (
            lambda: bridge.system_health("relay", "running", {"uptime": 3}),
            "system_health",
            "relay",
            None,
            None,
            {"component": "relay", "status": "running", "uptime": 3},
        ),
        (
            lambda: bridge.user_action("u", "login"),
            "user_action",
            "webapp",
            None,
            "u",
            {"user_id": "u", "action": "login"},
        ),
        (
            lambda: bridge.market_data("EURUSD", 1.1, 1.2),
            "market_data",
            "mt5_feed",
            None,
            None,
            {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2},
        ),
        (
            lambda: bridge.pattern_detected({"pattern_type": "FLAG", "symbol": "EURUSD"}, "scanner"),
            "pattern_detected",
            "scanner",
            None,
            None,
            {"pattern_type": "FLAG", "symbol": "EURUSD"},
        ),
    ],
)
def test_each_one_liner_publishes_its_event(bus, call, event_type, source, correlation_id, user_id, data):
    assert call() is True
    (event,) = arrived(bus)
    assert event.pop("timestamp") > 0
    expected = {"event_type": event_type, "source": source, "data": data}
    if correlation_id:
        expected["correlation_id"] = correlation_id
    if user_id:
        expected["user_id"] = user_id
    assert event == expected


def test_disable_and_enable_take_effect_at_once(bus):
    bridge.disable()
    try:
        assert bridge.market_data("EURUSD", 1.1, 1.2) is False
    finally:
        bridge.enable()
    assert bridge.market_data("EURUSD", 1.3, 1.4) is True
    assert [event["data"]["bid"] for event in arrived(bus)] == [1.3]


@pytest.mark.parametrize("odd", [None, 3, object(), [], "text", {"signal_id": object()}, {1: 2}])
def test_no_one_liner_ever_raises(bus, odd):
    for kept in (
        bridge.signal_generated(odd),
        bridge.signal_generated({}, odd),
        bridge.fire_command(odd, odd),
        bridge.trade_executed(odd),
        bridge.balance_update(odd, odd),
        bridge.system_health(odd, odd, odd),
        bridge.user_action(odd, odd, odd),
        bridge.market_data(odd, odd, odd, odd),
        bridge.pattern_detected(odd, odd),
    ):
        assert kept in (True, False)


def test_the_callers_map_is_not_changed(bus):
    fire = dict(FIRE)
    bridge.fire_command(fire, "u")
    assert fire == FIRE


def test_made_up_sources_do_not_make_a_thread_each(bus):
    for k in range(bridge._MAX_SOURCES + 20):
        bridge.system_health(f"component-{k}", "running")
    assert len(bridge._publishers) == bridge._MAX_SOURCES

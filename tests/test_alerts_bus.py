"""Alerts on a running bus: real events, real silence, a real crash, and what a person gets to see."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from bus_support import PATIENCE, plugin, wait_until
from tapebus import Consumer, Publisher, Tape
from tapebus.cli import main

RULES = """
[plugins.alerts]
tick_s = 0.05
"""


def rule(kind: str, **keys: Any) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(["[[plugins.alerts.rules]]", f'kind = "{kind}"', *lines, ""])


def alerts(data_dir: Any) -> list[tuple[str, str]]:
    with Tape.open(data_dir) as tape:
        return [(each.data.state, each.data.name) for each in tape.read(topics=["alert"])]


def command(data_dir: Any, *arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    with redirect_stdout(out):
        code = main(["alerts", "--data-dir", str(data_dir), *arguments])
    return code, out.getvalue()


def quote() -> dict[str, Any]:
    return {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2}


@contextmanager
def publisher(bus: Any) -> Iterator[Publisher]:
    with Publisher("test", endpoint=bus.acked) as found:
        yield found


def test_a_silence_reaches_telegram_survives_a_crash_and_ends_with_the_next_quotes(make_bus, capsys):
    silence = rule("silence", name="quiet", topic="market_data", threshold=0.4, clear_for_s=0.2, expected=False)
    bus = make_bus(["schema", "store", "alerts", "telegram"], RULES + silence).start()
    data_dir = bus.config.data_dir
    assert command(data_dir) == (0, "no alert is raised\n")
    with publisher(bus) as quotes:
        quotes.publish("market_data", quote())
        assert quotes.flush(PATIENCE)
    wait_until(lambda: alerts(data_dir) == [("raised", "quiet")], "the alert")
    code, shown = command(data_dir)
    assert code == 1
    assert "without market_data" in shown
    bus.kill()
    assert command(data_dir)[0] == 1, "the tape tells it without the bus"
    bus.start()
    # long enough for a second alert, were there one
    bus.wait_for(lambda stats: stats["bus"]["uptime_s"] > 1.2, "to have watched for a while")
    assert alerts(data_dir) == [("raised", "quiet")]
    with publisher(bus) as quotes:

        def cleared() -> bool:
            quotes.publish("market_data", quote())
            return ("cleared", "quiet") in alerts(data_dir)

        wait_until(cleared, "the end of the alert")
    # should this machine pause now, a second silence begins; the first one is over
    assert alerts(data_dir)[:2] == [("raised", "quiet"), ("cleared", "quiet")]
    bus.wait_for(lambda stats: stats["plugins"]["telegram"]["metrics"]["dry_run"] >= 2, "to relay both")
    assert bus.stop() == 0
    assert main(["telegram", "--data-dir", str(data_dir), "--json"]) == 0
    texts = [each["text"] for each in json.loads(capsys.readouterr().out)]
    assert "WARNING quiet" in texts[0]
    assert "without market_data (limit 0.4 s)" in texts[0]
    assert "CLEARED quiet" in texts[1]


def fail_on_metals(batch: Any) -> None:
    for event in batch:
        if event.data.symbol == "XAUUSD":
            raise ValueError("no metals")


def test_every_kind_of_rule_is_raised_once_and_cleared_once_by_real_events(embed):
    window = {"window_s": 1.0}
    rules = [
        rule(
            "silence", name="quiet", topic="market_data", symbols=["XAUUSD", "EURUSD"], threshold=1.0, clear_for_s=0.1
        ),
        rule("heartbeat", name="beat", session="any", threshold=0.5, for_s=0.1),
        rule("lag", name="lag", measure="events", threshold=10, for_s=0.0, clear_for_s=0.0, consumers=["seen"]),
        rule("error_rate", name="errors", at_least=3, **window),
        rule("dead_letters", name="dead", threshold=2, **window),
        rule("loss", name="loss", of="dropped", **window),
        rule("slots", name="full"),
        rule("drawdown", name="r", measure="r", threshold=1.5, **window),
        rule("drawdown", name="percent", measure="percent", threshold=10.0),
    ]
    faulty = Consumer(name="faulty", topics=["market_data"], handler=fail_on_metals)
    seen = Consumer(name="seen", topics=["user_action"], handler=list)
    bus = embed(
        ["schema", "store", "alerts"], ("faulty", plugin(faulty)), ("seen", plugin(seen)), extra=RULES + "".join(rules)
    )
    names = ["quiet:EURUSD", "beat:T1", "lag:seen", "errors:faulty", "dead", "loss", "full:u1", "r", "percent:T1"]

    def account(equity: float) -> dict[str, Any]:
        return {"target_uuid": "T1", "balance": 1000.0, "equity": equity, "open_positions": 0, "positions": []}

    slot = {"fire_id": "F", "symbol": "EURUSD", "direction": "BUY", "user_id": "u1", "slots_max": 10}
    outcome = {
        "signal_id": "S", "symbol": "EURUSD", "direction": "BUY", "pattern_type": "P", "confidence": 85.0,
        "outcome": "LOSS", "opened_at": 1.0, "closed_at": 2.0, "duration_s": 1.0, "quotes_seen": 1, "fired": True,
        "r": -2.0,
    }  # fmt: skip
    bus.request("pause", consumer="seen")
    state = bus.runtime.wiring.contexts["alerts"].state
    wait_until(lambda: "base:loss:" in state, "the first look, before which nothing counts as lost")
    with bus.publisher() as events, bus.publisher("small", capacity_events=4) as small:
        for _ in range(4):
            events.publish("market_data", quote() | {"symbol": "XAUUSD"})
        for _ in range(12):
            events.publish("user_action", {"user_id": "u1", "action": "look"})
        events.publish("ea_heartbeat", account(800.0))
        events.publish("slot_opened", slot | {"slots_used": 10})
        events.publish("signal_outcome", outcome)
        for _ in range(20_000):
            small.publish("user_action", {"user_id": "u1", "action": "look"})
        assert events.flush(PATIENCE)
        assert small.flush(PATIENCE)
        # what was dropped is reported with the next frame at the latest
        small.publish("user_action", {"user_id": "u1", "action": "look"})
        wait_until(lambda: {("raised", name) for name in names} <= set(alerts(bus.data_dir)), "every alert")
        health = bus.runtime.stats()["plugins"]["alerts"]
        assert health["health"]["status"] == "degraded"
        bus.request("resume", consumer="seen")
        events.publish("slot_released", slot | {"slots_used": 9, "method": "closed", "evidence": []})

        def cleared() -> bool:
            events.publish("ea_heartbeat", account(980.0))
            # the faulty consumer handles these
            events.publish("market_data", quote())
            return {("cleared", name) for name in names} <= set(alerts(bus.data_dir))

        wait_until(cleared, "the end of every alert")
    for name in names:
        states = [state for state, each in alerts(bus.data_dir) if each == name]
        # those of silence may come again, should this machine pause
        assert states == ["raised", "cleared"] * (len(states) // 2) + ["raised"] * (len(states) % 2)
    assert bus.consumer("alerts")["errors"] == bus.consumer("alerts.market_data")["errors"] == 0


def test_the_replay_of_an_old_day_raises_nothing(embed):
    """With the built-in rules: quotes, heartbeats and losses of 2014 that end abruptly."""
    bus = embed(["schema", "store", "alerts"], extra=RULES)
    long_ago = 1_399_550_400.0
    with bus.publisher() as events:
        for n in range(100):
            events.publish("market_data", quote(), timestamp=long_ago + n)
        beat = {"target_uuid": "T1", "balance": 1000.0, "equity": 100.0, "open_positions": 0, "positions": []}
        events.publish("ea_heartbeat", beat, timestamp=long_ago + 100)
        assert events.flush(PATIENCE)
    wait_until(lambda: bus.consumer("alerts.market_data")["handled"] == 100, "the quotes to be handled")
    wait_until(lambda: bus.consumer("alerts")["handled"] == 1, "the heartbeat to be handled")
    state = bus.runtime.wiring.contexts["alerts"].state
    assert not [key for key in state if key.startswith(("seen:", "terminal:", "high:"))]
    assert alerts(bus.data_dir) == []


def test_the_command_tells_what_is_raised_and_what_is_over_from_the_tape(embed):
    bus = embed(["schema", "store", "alerts"], extra="[plugins.alerts]\ndefaults = false")

    def tell(name: str, state: str, at: float, severity: str = "critical", **more: Any) -> None:
        fields = {"name": name, "state": state, "severity": severity, "message": f"{name} is {state}", **more}
        bus.runtime.publish("alert", fields, timestamp=at, source=more.get("component", "tapebus"))

    tell("a", "raised", 100.0, since=90.0, value=3.5, threshold=2.0, unit="s", component="alerts")
    tell("b", "raised", 110.0)
    tell("a", "raised", 160.0, since=90.0, value=63.5, threshold=2.0, unit="s", component="alerts", reminder=True)
    tell("b", "cleared", 170.0, severity="info")
    tell("b", "raised", 180.0, component="slots", severity="warning")
    tell("c", "cleared", 190.0, severity="info")
    wait_until(lambda: len(alerts(bus.data_dir)) == 6, "the alerts")
    code, shown = command(bus.data_dir, "--json")
    rows = json.loads(shown)
    assert code == 1
    assert [(each["name"], each["source"], each["since"], each["value"]) for each in rows] == [
        ("b", "slots", 180.0, None),
        ("a", "alerts", 90.0, 63.5),
    ]
    code, shown = command(bus.data_dir, "--json", "--all")
    over = [each for each in json.loads(shown) if each["state"] == "cleared"]
    assert [(each["name"], each["severity"], each["since"], each["at"]) for each in over] == [
        ("c", "info", 190.0, 190.0),
        ("b", "critical", 110.0, 170.0),
    ]
    code, shown = command(bus.data_dir, "--all")
    assert code == 1
    assert "63.5 s" in shown
    assert max(map(len, shown.splitlines())) <= 100
    code, shown = command(bus.data_dir, "--since", "185", "--all", "--json")
    # what is still raised is never too old to be shown
    assert (code, [(each["name"], each["state"]) for each in json.loads(shown)]) == (
        1,
        [("b", "raised"), ("a", "raised"), ("c", "cleared")],
    )


def test_a_mistake_in_a_rule_stops_the_start_with_the_nearest_name(data_dir, capsys):
    config = data_dir / "wrong.toml"
    config.write_text(rule("silense", topic="market_data"))
    assert main(["check", "--config", str(config), "--data-dir", str(data_dir / "data")]) == 78
    assert "did you mean 'silence'?" in capsys.readouterr().out


def test_a_full_store_is_told_on_the_full_tape_and_cleared_once_there_is_room(make_bus):
    limit = 2 << 20
    extra = f"[plugins.store]\ninitial_bytes = 65536\nmax_bytes = {limit}\n" + RULES + rule("store_full", name="full")
    bus = make_bus(["schema", "store", "alerts"], extra).start()
    data_dir = bus.config.data_dir
    with publisher(bus) as source:
        # noise, so that nothing is gained by compressing it
        noise = {"user_id": "u", "action": "noise", "details": {"noise": os.urandom(30_000).hex()}}
        while bus.stats()["bus"]["state"] == "running":
            for _ in range(10):
                source.publish("user_action", noise)
        wait_until(lambda: ("raised", "full") in alerts(data_dir), "the alert")
        bus.kill()
        bus.config_file.write_text(bus.config_file.read_text().replace(str(limit), str(limit * 4)))
        bus.start()
        wait_until(lambda: ("cleared", "full") in alerts(data_dir), "the end of the alert")
    assert [each for each in alerts(data_dir) if each[1] == "full"] == [("raised", "full"), ("cleared", "full")]

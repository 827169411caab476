"""``tapebus slots`` on a running bus, on recorded messages of a terminal, and after the bus has ended."""

from __future__ import annotations

import json
import time

import pytest
import zmq

from bus_support import wait_until
from tapebus import Publisher, Tape
from tapebus.cli import main

PLUGINS = ["schema", "store", "slots"]
TOPICS = ("fire_command", "trade_executed", "ea_heartbeat", "position_closed")
KINDS = dict(zip(("fire", "confirmation", "heartbeat", "position_closed"), TOPICS, strict=True))


def shown(capsys, bus, *arguments):
    # not by its configuration file: the commands of this process are those of the plugins the first one enables
    assert main(["slots", "--data-dir", str(bus.data_dir), *arguments]) == 0
    return capsys.readouterr().out


def test_recorded_messages_of_a_terminal_hold_their_slots_on_a_running_bus(
    make_bus, free_ports, shared_data, capsys, tmp_path
):
    ports = dict(zip(TOPICS, free_ports(len(TOPICS)), strict=True))
    sources = "".join(
        f'[[sources]]\nname = "{topic}"\ntype = "pull"\nbind = "tcp://127.0.0.1:{port}"\ntopic = "{topic}"\n'
        for topic, port in ports.items()
    )
    bus = make_bus(PLUGINS, f'[plugins.slots]\nuser_id = "u1"\ntrack_manual = true\n{sources}').start()
    lines = [json.loads(line) for line in (shared_data / "wire" / "hydrax_ea.jsonl").read_text().splitlines()[1:]]
    recorded = [(KINDS.get(str(line.get("type")).lower().removesuffix("_metrics")), line) for line in lines]
    recorded = [(topic, line) for topic, line in recorded if topic is not None]
    assert [topic for topic, _ in recorded] == [*TOPICS[:3], "ea_heartbeat", "position_closed"]
    with zmq.Context() as context, Tape.open(bus.data_dir) as tape:
        for sent, (topic, line) in enumerate(recorded * 3, 1):
            with context.socket(zmq.PUSH) as push:
                push.connect(f"tcp://127.0.0.1:{ports[topic]}")
                push.send_json(line)
                # the sockets are read in no order among them
                wait_until(lambda n=sent: len(list(tape.read(topics=TOPICS))) >= n, f"{topic} on the tape")
        # the position that closes at the end is one of those no list has shown
        wait_until(lambda: "user u1: 2/10 slots\n" in shown(capsys, bus), "the last heartbeat to be counted")
        assert [event.data.method for event in tape.read(topics=["slot_released"])] == []
    text = shown(capsys, bus)
    assert "s ago, counts 2, lists 1 (incomplete), balance 10,012.40\n" in text
    assert "OPEN      ELITE_RAPID_USDJPY_1758502680  USDJPY  SELL  0.5 lots" in text
    assert "ticket list  unsure  weak     not in an incomplete list" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    (user,) = json.loads(shown(capsys, bus, "--json"))["users"]
    assert (user["user_id"], user["slots"], user["over_limit"]) == ("u1", "2/10", False)
    (slot,) = user["held"]
    assert slot["ticket"] == 21173957
    assert {name: (each["believes"], each["weight"]) for name, each in slot["witnesses"].items()} == {
        "status": ("held", "strong"),
        "tickets": ("unsure", "weak"),
        "count": ("held", "weak"),
        "balance": ("unsure", "weak"),
        "age": ("held", "weak"),
    }
    assert bus.stats()["plugins"]["slots"]["metrics"]["slots"] == "2/10"


def test_slots_are_shown_with_their_witnesses_with_and_without_a_bus(make_bus, capsys):
    bus = make_bus(PLUGINS, '[plugins.slots.users.u2]\nmax_slots = 1\n[plugins.slots.accounts]\nEA1 = "u1"').start()
    now = time.time() - 70
    rows = [{"ticket": 1, "symbol": "EURUSD", "direction": "BUY", "open_price": 1.1, "volume": 0.1}]
    beat = {"target_uuid": "EA1", "balance": 1e4, "equity": 1e4}
    with Publisher("test", endpoint=bus.acked) as publisher:
        for n in (1, 2):
            fire = {"fire_id": f"f{n}", "symbol": "EURUSD", "direction": "BUY", "lot": 0.1, "execution_mode": "AUTO"}
            publisher.publish("fire_command", fire, timestamp=now, user_id="u1")
            answer = {"fire_id": f"f{n}", "status": "FILLED", "ticket": n, "target_uuid": "EA1"}
            publisher.publish("trade_executed", answer, timestamp=now + 1)
            publisher.publish("fire_command", {**fire, "fire_id": f"g{n}"}, timestamp=now + n, user_id="u2")
        refusal = {"fire_id": "g1", "status": "REJECTED"}
        publisher.publish("trade_executed", {**refusal, "fire_id": "g3"}, timestamp=now + 3, user_id="u2")
        publisher.publish("ea_heartbeat", {**beat, "open_positions": 1, "positions": rows}, timestamp=now + 60)
        publisher.publish("user_action", {"user_id": "u1", "action": "kill_switch_on"}, timestamp=now + 61)
        publisher.publish("trade_executed", refusal, timestamp=now + 62, user_id="u2")
        publisher.publish("fire_command", {**fire, "fire_id": "g3"}, timestamp=now + 63, user_id="u2")
        assert publisher.flush(30)

    def everything():
        return json.loads(shown(capsys, bus, "--json"))

    wait_until(lambda: len(everything()["users"]) == 2 and everything()["users"][1]["over_limit"], "the slots")
    running = everything()
    bus.stop()
    found = everything()
    assert found["kill_switch"] and running["kill_switch"]
    one, two = found["users"]
    assert (one["slots"], two["slots"], two["over_limit"]) == ("2/10", "2/1", True)
    held, leaving = one["held"]
    assert (held["state"], leaving["state"]) == ("OPEN", "RELEASING")
    assert leaving["why"].startswith("absent from 1 complete snapshot")
    assert "fire status says held" in leaving["dispute"] and "ticket list says gone" in leaving["dispute"]
    evidence = leaving["witnesses"]["tickets"]["evidence"]
    with Tape.open(bus.data_dir) as tape:
        assert [event.event_type for event in tape.events_at(evidence).values()] == ["ea_heartbeat"]
        (alert,) = [e.data for e in tape.read(topics=["alert"]) if e.data.name == "slots_disagree:u1"]
    assert alert.state == "raised" and "nothing released: slot f2" in alert.message
    (account,) = one["accounts"]
    assert (account["account"], account["broker_count"], account["complete"], account["stale"]) == (
        "EA1",
        1,
        True,
        False,
    )
    assert [each["method"] for each in two["released"]] == ["rejected"]

    text = shown(capsys, bus, "--released", "--user", "u2")
    assert text.startswith("kill switch is on") and "u1" not in text
    assert "user u2: 2/1 slots OVER THE LIMIT" in text
    assert "RESERVED  g2  EURUSD  BUY  0.1 lots" in text and "\n  g1, " in text and ": rejected\n" in text
    assert "\n    fire status  gone    rejected @" in text
    assert "\x1b" not in text
    assert "user nobody: 0/10 slots\n" in shown(capsys, bus, "--user", "nobody")


def test_where_no_tape_is_the_command_says_so(tmp_path, capsys):
    assert main(["slots", "--data-dir", str(tmp_path / "none")]) == 74
    assert "no tape here yet" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (65, "1m05s"), (3_700, "1h01m"), (200_000, "2d07h")])
def test_a_duration_has_two_units(seconds, text):
    from tapebus_slots.witnesses import span

    assert span(seconds) == text

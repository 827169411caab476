"""What people may ask and command through the bot, what is on the tape of it, and what they are answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tapebus_schema
from botapi_server import BotApi
from bus_support import PATIENCE, wait_until
from tapebus import Publisher, Tape
from tapebus.events import Registry
from tapebus.testing import RecordingContext
from tapebus_telegram.board import Board
from tapebus_telegram.commands import Operators
from tapebus_telegram.listening import Said
from tapebus_telegram.settings import Commands, load

TOKEN = "123456789:CANARY-abcdefghijklmnopqrstuvwxyz0"
OWNER, VIEWER, STRANGER = 11, 12, 13
GROUP = -100500
NOW = 1_800_000_000.0

TYPES = Registry(tapebus_schema.tapebus_register_event_types({}))


class Typed:
    """Events as the schema types them, numbered like on a tape."""

    def __init__(self) -> None:
        self.seq = 0

    def __call__(self, event_type: str, at: float = NOW, source: str = "test", **data: Any) -> Any:
        self.seq += 1
        wire = {"event_type": event_type, "timestamp": at, "source": source, "data": data, "@bus_seq": self.seq}
        return msgspec.convert(wire, TYPES.classes[event_type])


class Talk:
    """People and a bus: ``say`` is heard, run and answered; ``answers`` and ``actions`` are what came of it."""

    def __init__(self, tmp_path: Path, **commands: Any) -> None:
        self.commands = Commands(**{"users": (OWNER,), "viewers": (VIEWER,), **commands})
        self.context = RecordingContext("telegram", {}, tmp_path)
        self.now = NOW
        self.posts: list[tuple[Any, ...]] = []
        self.number = 0
        self.event = Typed()
        self.restart()

    def restart(self) -> None:
        chats = load({"chats": [{"id": GROUP}]}).chats
        self.operators = Operators(
            self.context, self.commands, chats, lambda *post: self.posts.append(post), lambda: [], lambda: self.now
        )

    def say(self, text: str, user: int = OWNER, age: float = 1.0, number: int = 0, thread: int | None = None) -> str:
        """The answer to `text`, "" for none."""
        before = len(self.posts)
        self.number = number or self.number + 1
        self.operators.listener.inbox.put(Said(self.number, user, GROUP, text, self.now - age, thread))
        self.operators.tick()
        return "\n".join(post[4] for post in self.posts[before:])

    @property
    def actions(self) -> list[dict[str, Any]]:
        return [wire.data for wire in self.context.emitted]  # type: ignore[misc]


# -- what a command does --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "user", "action", "result", "answer"),
    [
        ("/pause", OWNER, "kill_switch_on", "run", "Paused"),
        ("/PAUSE@a_bot", OWNER, "kill_switch_on", "run", "Paused"),
        ("/resume", OWNER, "kill_switch_off", "run", "Resumed"),
        ("/pattern SWEEP off", OWNER, "pattern_off", "run", "SWEEP is followed, but not fired"),
        ("/pattern SWEEP auto", OWNER, "pattern_auto", "run", "SWEEP fires as its figures decide"),
        ("/pattern sweep ON", OWNER, "pattern_on", "run", "SWEEP may fire again"),
        ("/pattern", OWNER, "telegram_command", "answered", "SWEEP: active"),
        ("/pattern SWEEP", OWNER, "telegram_command", "wrong", "/pattern NAME on|off|auto"),
        ("/pattern on", OWNER, "telegram_command", "wrong", "/pattern NAME on|off|auto"),
        ("/status", OWNER, "telegram_command", "answered", "kill switch: off"),
        ("/slots", VIEWER, "telegram_command", "answered", "slots"),
        ("/help", VIEWER, "telegram_command", "answered", "/resume"),
        ("/start", VIEWER, "telegram_command", "answered", "/resume"),
        ("/pause", VIEWER, "telegram_command", "not allowed", "not change anything"),
        ("/resume", VIEWER, "telegram_command", "not allowed", "not change anything"),
        ("/pattern SWEEP off", VIEWER, "telegram_command", "not allowed", "not change anything"),
        ("/pattern", VIEWER, "telegram_command", "answered", "SWEEP: active"),
        ("/sell everything", OWNER, "telegram_command", "unknown", "/sell is no command of mine"),
        ("/<b>", OWNER, "telegram_command", "unknown", "/<b> is no command of mine"),
    ],
)
def test_each_command_is_answered_and_on_the_tape_with_who_and_what_came_of_it(
    tmp_path: Path, text: str, user: int, action: str, result: str, answer: str
) -> None:
    talk = Talk(tmp_path)
    talk.operators.see(talk.event("pattern_status", pattern_type="SWEEP", status="active", reason="r", n=1, wins=1))
    assert answer in talk.say(text, user)
    (wire,) = talk.context.emitted
    assert (wire.event_type, wire.user_id, wire.source) == ("user_action", str(user), "telegram")
    assert (talk.actions[0]["action"], talk.actions[0]["user_id"]) == (action, str(user))
    details = talk.actions[0]["details"]
    assert (details["result"], details["command"], details["chat_id"]) == (result, text, GROUP)
    assert ("pattern_type" in details) == action.startswith("pattern_")


def test_an_answer_goes_to_the_chat_and_the_topic_it_was_asked_in_and_overtakes_everything(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.say("/help", thread=9)
    (chat, key, topic, _, _, priority, thread) = talk.posts[0]
    assert (chat, key, topic, priority, thread) == (GROUP, "answer/1/0", "answer", 4, 9)


@pytest.mark.parametrize("text", ["/pause", "/pattern SWEEP off", "/status"])
def test_a_command_from_when_the_bus_was_down_is_answered_but_not_run(tmp_path: Path, text: str) -> None:
    talk = Talk(tmp_path, max_age_s=60.0)
    assert "too old" in talk.say(text, age=61.0) and "not run" in talk.posts[0][4]
    assert [(each["action"], each["details"]["result"]) for each in talk.actions] == [("telegram_command", "too old")]
    assert "too old" not in talk.say(text, age=59.0)


def test_what_telegram_brings_once_more_is_not_run_again_also_after_a_restart(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.say("/pause", number=5)
    assert talk.say("/pause", number=5) == ""
    talk.restart()
    assert talk.say("/pause", number=5) == "" and talk.say("/pause", number=4) == ""
    assert len(talk.actions) == 1 and len(talk.posts) == 1
    assert talk.operators.metrics()["commands.repeated"] == 2


def test_after_a_week_of_silence_telegram_may_count_from_anywhere(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.say("/pause", number=500_000)
    talk.now += 8 * 86_400
    assert "Resumed" in talk.say("/resume", number=77)
    assert talk.say("/resume", number=77) == ""


def test_status_right_after_pause_knows_of_it(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.say("/pause")
    assert "kill switch: ON" in talk.say("/status")
    talk.say("/resume")
    assert "kill switch: off" in talk.say("/status")


def test_an_unknown_pattern_is_taken_as_written_and_said_to_be_unknown(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    assert "is it spelled so?" in talk.say("/pattern Swep off")
    assert talk.actions[0]["details"]["pattern_type"] == "Swep"


def test_a_pattern_is_found_in_any_case_with_spaces_and_once_a_signal_named_it(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    signal = {"signal_id": "S", "symbol": "EURUSD", "direction": "BUY", "confidence": 80}
    talk.operators.see(talk.event("signal_generated", **signal, pattern_type="FAIR_VALUE_Gap"))
    assert "spelled" not in talk.say("/pattern fair value gap off")
    assert talk.actions[0]["details"]["pattern_type"] == "FAIR_VALUE_Gap"


def test_a_command_that_fails_inside_is_answered_audited_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(tmp_path)
    monkeypatch.setattr(Board, "slot_list", lambda *_: 1 / 0)
    assert "failed: ZeroDivisionError" in talk.say("/slots")
    assert talk.actions[0]["details"]["result"] == "failed"
    assert talk.say("/slots", number=1) == ""


def test_only_its_own_commands_that_were_run_are_forgotten_by_telegram(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.say("/pause", number=7)
    settled = talk.operators.commander.settled

    def action(source: str, **details: Any) -> Any:
        return talk.event("user_action", source=source, user_id="1", action="x", details=details)

    assert settled(action("telegram", update_id=7)) == 7
    assert settled(action("webapp", update_id=7)) == 0
    assert settled(action("telegram", update_id=8)) == 0
    assert settled(action("telegram", update_id="7")) == 0
    assert settled(talk.event("user_action", source="telegram", user_id="1", action="x")) == 0


# -- what it knows ----------------------------------------------------------------------------------


def desk(talk: Talk) -> None:
    """A desk at work: 4 of 10 slots, two of them seen, one pattern off, one alert, outcomes."""
    see, event = talk.operators.see, talk.event
    slot = {"symbol": "EURUSD", "direction": "BUY", "slots_max": 10, "user_id": "7176191872"}
    see(event("slot_opened", NOW - 7200, fire_id="F1", slots_used=3, **slot))
    see(
        event(
            "slot_reserved", NOW - 60, fire_id="F2", slots_used=4, **{**slot, "symbol": "XAUUSD", "direction": "SELL"}
        )
    )
    see(event("slot_opened", NOW - 50, fire_id="F3", slots_used=5, **slot))
    released = {"fire_id": "F3", "symbol": "EURUSD", "method": "x", "evidence": [], "slots_used": 4, "slots_max": 10}
    see(event("slot_released", NOW - 40, user_id="7176191872", **released))
    beat = {"target_uuid": "U", "account_number": "87654321", "balance": 1.0, "equity": 1.0}
    see(event("ea_heartbeat", NOW - 12, **beat, open_positions=4, positions=[]))
    see(event("ea_heartbeat", NOW - 5, **{**beat, "target_uuid": "V"}, open_positions=0, positions=[]))
    see(event("pattern_status", pattern_type="SWEEP", status="disabled", reason="r", n=1, wins=1))
    see(event("alert", NOW - 300, name="feed", severity="critical", message="silent since 07:00"))
    see(event("alert", NOW - 300, name="lag", severity="warning", message="behind"))
    see(event("alert", NOW - 200, name="lag", severity="info", message="ok", state="cleared"))
    verdict = {"fire": False, "reasons": ["kill_switch_on"], "rules": [], "slots_used": 4}
    see(event("gate_verdict", NOW - 30, signal_id="S", **verdict))
    for outcome, r in [("WIN", 1.5), ("LOSS", -1.0), ("TIMEOUT", None)]:
        known = {} if r is None else {"r": r}
        times = {"opened_at": 1.0, "closed_at": 2.0, "duration_s": 1.0, "quotes_seen": 1, "fired": False}
        about = {"signal_id": "S", "symbol": "EURUSD", "direction": "BUY", "pattern_type": "SWEEP", "confidence": 80.0}
        see(event("signal_outcome", **about, **times, outcome=outcome, **known))


def test_status_tells_switch_slots_positions_gate_patterns_outcomes_and_alerts_also_after_a_restart(
    tmp_path: Path,
) -> None:
    talk = Talk(tmp_path)
    desk(talk)
    talk.operators.see(talk.event("user_action", NOW - 600, user_id="1", action="kill_switch_on"))
    talk.operators.save()
    talk.restart()
    assert talk.say("/status").split("\n") == [
        "kill switch: ON since 10 min ago: the gate refuses",
        "slots: 4/10",
        "open positions: 4, heartbeat 12 s ago",
        "last signal: never",
        "gate: 0 fired, 1 refused; last 30 s ago: kill switch on",
        "patterns disabled: SWEEP",
        "last outcomes: 1W/1L of n=3, +0.5R",
        "alerts: 1",
        "  critical feed: silent since 07:00 5 min ago",
    ]
    assert "7176191872" not in str(talk.posts) and "87654321" not in str(talk.posts)


def test_slots_lists_what_is_held_and_says_how_many_it_has_not_seen(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    desk(talk)
    assert talk.say("/slots").split("\n") == [
        "🎰 4/10 slots",
        "BUY EURUSD open 2 h ago",
        "SELL XAUUSD reserved 60 s ago",
        "2 more, taken before they were watched here",
    ]


def test_slots_of_many_users_come_in_several_messages_split_between_lines(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    for number in range(400):
        slot = {"symbol": "EURUSD", "direction": "BUY", "slots_used": 1, "slots_max": 1, "user_id": f"U{number}"}
        talk.operators.see(talk.event("slot_opened", fire_id=f"F{number}", **slot))
    text = talk.say("/slots")
    assert "\nuser •••U7: 1/1\nBUY EURUSD open" in text
    assert len(talk.posts) > 1 and len({post[1] for post in talk.posts}) == len(talk.posts)
    assert text.startswith("🎰 400/400 slots") and text.count("\nBUY EURUSD open") == 400


def test_what_it_remembers_is_bounded(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    for number in range(3000):
        see, name = talk.operators.see, f"N{number}"
        see(talk.event("alert", name=name, severity="warning", message="m" * 500))
        see(talk.event("pattern_status", pattern_type=name, status="active", reason="r", n=1, wins=1))
        slot = {"symbol": "EURUSD", "direction": "BUY", "slots_used": 1, "slots_max": 1}
        see(talk.event("slot_reserved", fire_id=name, **slot))
    talk.operators.save()
    assert sum(map(len, talk.context.state.values())) < 150_000
    talk.restart()
    assert "N2999" in talk.say("/pattern")


# -- a running bus ------------------------------------------------------------------------------------


@pytest.fixture
def bot() -> Iterator[Any]:
    pytest.importorskip("telegram", reason="hearing is an extra of the Telegram plugin")
    with BotApi(TOKEN) as server:
        yield server


def configured(server: Any, tmp_path: Path, commands: str = f"users = [{OWNER}]") -> str:
    """The tables of a bus whose relay talks to `server`; nothing but alerts comes unasked."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    return (
        f"[plugins.telegram]\ntoken = {{ file = '{token}' }}\nbase_url = '{server.url}'\n"
        f"chats = [{{ id = {OWNER}, topics = ['alert'] }}]\ncommands = {{ {commands} }}\n"
    )


def answers(server: Any, chat: int = OWNER) -> str:
    return "\n".join(each["visible"] for each in server.accepted if each["chat_id"] == chat)


def on_tape(bus: Any, topic: str) -> list[Any]:
    with Tape.open(bus.data_dir) as tape:
        return list(tape.read(topics=[topic]))


def judged(bus: Any, name: str) -> list[str]:
    """What the gate has against a signal called `name`."""
    signal = {"signal_id": name, "symbol": "EURUSD", "direction": "BUY", "confidence": 85, "pattern_type": "SWEEP"}
    with Publisher("test", endpoint=bus.acked) as publisher:
        assert publisher.publish("signal_generated", {**signal, "entry": 1.1, "sl": 1.09, "tp": 1.12})
        assert publisher.flush(PATIENCE)
    verdicts = wait_until(
        lambda: [each for each in on_tape(bus, "gate_verdict") if each.data.signal_id == name], "the verdict"
    )
    return list(verdicts[0].data.reasons)


def test_on_a_running_bus_pause_and_pattern_off_make_the_gate_refuse_also_after_a_restart(
    embed: Any, bot: Any, tmp_path: Path
) -> None:
    plugins, extra = ["schema", "store", "slots", "analytics", "telegram"], configured(bot, tmp_path)
    bus = embed(plugins, extra=extra)
    assert "kill_switch_on" not in judged(bus, "S1")
    bot.say("/pause", STRANGER)
    bot.say("/pause", OWNER)
    wait_until(lambda: "Paused" in answers(bot), "the answer to /pause")
    wait_until(lambda: "kill switch" in answers(bot), "the alert of the gate")
    assert "kill_switch_on" in judged(bus, "S2")
    bus.stop()
    bus = embed(plugins, extra=extra, again=bus)
    assert "kill_switch_on" in judged(bus, "S3")
    bot.say("/status", OWNER)
    wait_until(lambda: "kill switch: ON" in answers(bot) and "bus: up" in answers(bot), "the status")
    bot.say("/resume", OWNER)
    wait_until(lambda: "Resumed" in answers(bot), "the answer to /resume")
    wait_until(lambda: "kill_switch_on" not in judged(bus, f"S{time.monotonic_ns()}"), "the gate to decide again")
    bot.say("/pattern sweep off", OWNER)
    wait_until(lambda: on_tape(bus, "pattern_status"), "the status of the pattern")
    assert on_tape(bus, "pattern_status")[0].data.status == "disabled"
    assert "pattern_disabled" in judged(bus, "S4")
    bot.say("/pattern", OWNER)
    wait_until(lambda: "SWEEP: disabled" in answers(bot), "the list of patterns")
    assert [(each.data.action, each.data.user_id) for each in on_tape(bus, "user_action")] == [
        (action, str(OWNER))
        for action in ("kill_switch_on", "telegram_command", "kill_switch_off", "pattern_off", "telegram_command")
    ]
    assert answers(bot, STRANGER) == ""
    telegram = bus.runtime.stats()["plugins"]["telegram"]
    assert telegram["health"]["status"] == "ok"


def test_every_command_runs_once_however_often_the_bus_is_killed(make_bus: Any, bot: Any, tmp_path: Path) -> None:
    """Kills at once after Telegram handed a command over, in the second until it is run, and after that."""
    bus = make_bus(["schema", "store", "telegram"], configured(bot, tmp_path, f"users = [{OWNER}], max_age_s = 600"))
    said = 0
    for pause in (0.02, 0.1, 1.2):
        bus.start()
        for _ in range(2):
            said += 1
            bot.say(f"/pattern P{said} off", OWNER)
        wait_until(lambda last=said: bot.handed == last, "the commands to be handed over")
        threading.Event().wait(pause)
        bus.kill()
    bus.start()
    wait_until(lambda: bot.offsets[-1] == said + 1, "everything to be forgotten by Telegram")
    patterns = [each.data.details["pattern_type"] for each in on_tape(bus, "user_action")]
    assert patterns == [f"P{number}" for number in range(1, said + 1)]
    wait_until(lambda: f"P{said} is followed" in answers(bot), "the last answer")
    assert bus.stop() == 0

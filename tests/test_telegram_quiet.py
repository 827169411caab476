"""Which messages come, when, and what a digest says of those that were held."""

from __future__ import annotations

import asyncio
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapebus_schema
import tapebus_telegram
from tapebus.errors import ConfigError
from tapebus.events import GenericEvent
from tapebus.events import Registry as Types
from tapebus.testing import ListBatch, PluginBench, RecordingContext
from tapebus_telegram.markup import MAX_UNITS, units
from tapebus_telegram.outbox import rendered
from tapebus_telegram.quiet import LISTED, Policy, summary
from tapebus_telegram.relay import Relay
from tapebus_telegram.render import Message, Renderer
from tapebus_telegram.settings import MESSAGES, Chat, Settings, load
from tapebus_trading.symbols import Registry

TYPES = Types(tapebus_schema.tapebus_register_event_types({}))
RENDERER = Renderer(Registry())
NIGHT = {"hours": "22:00-07:00", "zone": "Europe/Berlin"}


class Clock:
    def __init__(self, text: str = "2026-03-10 12:00", zone: str = "Europe/Berlin") -> None:
        self.zone = zone
        self.set(text)

    def set(self, text: str) -> None:
        self.now = datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(self.zone)).timestamp()

    def __call__(self) -> float:
        return self.now


def message(event_type: str, **data: Any) -> Message:
    event = GenericEvent(event_type=event_type, timestamp=1e9, source="test", data=data, bus_seq=1)
    found = RENDERER.message(event)
    assert found is not None
    return found


SIGNAL = message("signal_generated", signal_id="S1", symbol="EURUSD", direction="BUY", confidence=85)
ALARM = message("alert", name="feed", severity="critical", message="silent")


class Person:
    """One chat behind a policy, with a relay that sends whatever it may at once; ``got`` is what arrived, and when."""

    def __init__(self, clock: Clock, chat: dict[str, Any] | None = None, **config: Any) -> None:
        self.clock = clock
        self.settings = load({"chats": [{"id": 7, **(chat or {})}], **config})
        self.chat = self.settings.chats[0]
        self.state: dict[str, bytes] = {}
        self.queue: list[tuple[int, str]] = []
        self.got: list[tuple[float, str]] = []
        self.seq = 0
        self.restart()

    def restart(self) -> None:
        self.policy = Policy(self.settings, self.settings.chats, self.state, self.clock)

    def hear(self, topic: str, what: Message) -> str:
        self.seq += 1
        word = self.policy.word(self.chat, topic, what, self.seq, len(self.queue))
        if word in ("send", "silent"):
            self.queue.append((-what.priority, what.plain))
        self._send()
        self.policy.save()
        return word

    def tick(self, seconds: float = 1.0) -> None:
        self.clock.now += seconds
        self._send()
        self.queue += [(-2, digest.plain) for digest in self.policy.due(lambda chat: len(self.queue))]
        self._send()
        self.policy.save()

    def _send(self) -> None:
        while self.queue and not self.policy.wait(7):
            self.queue.sort(key=lambda each: each[0])
            self.got.append((self.clock.now, self.queue.pop(0)[1]))
            self.policy.sent(7)


# -- on, silent, off -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "chat", "topic", "mode"),
    [
        ({}, {}, "signal_generated", "on"),
        ({}, {}, "slot_opened", "silent"),
        ({}, {}, "gate_verdict", "off"),
        ({"messages": {"gate_verdict": "silent"}}, {}, "gate_verdict", "silent"),
        ({"messages": {"alert": "off"}}, {"messages": {"alert": "on"}}, "alert", "on"),
        ({}, {"topics": ["alert"]}, "signal_generated", "off"),
        ({}, {"topics": ["gate_verdict"]}, "gate_verdict", "on"),
        ({}, {"topics": ["slot_opened"]}, "slot_opened", "silent"),
        ({}, {"topics": ["alert"], "messages": {"fire_command": "silent"}}, "fire_command", "silent"),
        ({}, {"topics": ["alert"], "messages": {"alert": "off"}}, "alert", "off"),
        ({}, {}, "never_heard_of", "off"),
    ],
)
def test_the_most_special_word_says_how_a_message_comes(
    config: dict[str, Any], chat: dict[str, Any], topic: str, mode: str
) -> None:
    settings = load({**config, "chats": [{"id": 7, **chat}]})
    assert settings.mode(settings.chats[0], topic) == mode
    person = Person(Clock(), chat, **config)
    assert person.hear(topic, SIGNAL) == {"on": "send", "silent": "silent", "off": "off"}[mode]
    assert (topic in settings.relayed(settings.chats)) == (mode != "off")


def test_each_event_type_goes_to_its_own_topic_of_a_forum() -> None:
    chat = Chat(id=-1, thread_id=3, threads={"alert": 9})
    assert (chat.thread_of("alert"), chat.thread_of("signal_generated")) == (9, 3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"messages": {"alrt": "on"}}, ["messages.alrt", "alert"]),
        ({"messages": {"alert": "loud"}}, ["loud"]),
        ({"message": {}}, ["message", "messages"]),
        ({"topics": ["alert"]}, ["topics", "unknown key"]),
        ({"chats": [{"id": 1, "topics": ["signals"]}]}, ["id 1", "signals"]),
        ({"chats": [{"id": 1, "threads": {"alert": 0}}]}, ["id 1", "positive"]),
        ({"chats": [{"id": "channel"}]}, ["@channel"]),
        ({"chats": [{"id": 1, "quiet": True}]}, ["quiet", "22:00-07:00"]),
        ({"chats": [{"id": 1, "max_per_minute": -1}]}, ["max_per_minute"]),
        ({"quiet": {"hours": "22-7"}}, ["quiet.hours", "22-7", "HH:MM"]),
        ({"quiet": {"hours": "24:00-07:00"}}, ["quiet.hours"]),
        ({"quiet": {"hours": "08:00-08:00"}}, ["quiet.hours"]),
        ({"quiet": {"hours": []}}, ["quiet.hours", "empty"]),
        ({"quiet": {"hours": "22:00-07:00", "zone": "Europe/Berln"}}, ["quiet.zone", "Europe/Berlin"]),
        ({"quiet": {"hours": "22:00-07:00", "zone": "../etc/passwd"}}, ["quiet.zone"]),
        ({"quiet": {"hours": "22:00-07:00", "passes": "all"}}, ["passes", "all"]),
        ({"commands": {}}, ["commands", "users"]),
        ({"commands": {"users": [-100]}}, ["-100", "chats"]),
        ({"commands": {"users": [5], "viewers": [5]}}, ["5", "viewers"]),
        ({"commands": {"users": [5], "poll_s": 500}}, ["poll_s"]),
    ],
)
def test_a_wrong_configuration_is_refused_naming_the_key_and_what_to_write(
    config: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"plugins\.telegram") as refused:
        load(config)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("page", ["docs/telegram.md", "plugins/tapebus_telegram/README.md"])
def test_every_example_of_the_documentation_is_a_valid_configuration(page: str) -> None:
    text = (Path(__file__).parents[1] / page).read_text()
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert examples
    for example in examples:
        load({"chats": [{"id": 1}], **tomllib.loads(example)["plugins"]["telegram"]})


def test_the_page_for_operators_lists_every_event_type_with_how_it_comes() -> None:
    text = (Path(__file__).parents[1] / "docs/telegram.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `") and line.count("|") == 4]
    listed = {name: row[3].strip() for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert listed.items() >= MESSAGES.items()


# -- quiet hours ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "time", "quiet"),
    [
        ("22:00-07:00", "21:59", False),
        ("22:00-07:00", "22:00", True),
        ("22:00-07:00", "00:00", True),
        ("22:00-07:00", "06:59", True),
        ("22:00-07:00", "07:00", False),
        ("12:30-13:00", "12:45", True),
        ("12:30-13:00", "13:00", False),
        ("18:00-24:00", "23:59", True),
        ("18:00-24:00", "00:00", False),
        (["12:00-13:00", "22:00-06:00"], "12:10", True),
        (["12:00-13:00", "22:00-06:00"], "14:00", False),
    ],
)
def test_the_hours_are_quiet_from_the_first_minute_until_before_the_last(hours: Any, time: str, quiet: bool) -> None:
    person = Person(Clock(f"2026-03-10 {time}"), quiet={"hours": hours, "zone": "Europe/Berlin"})
    assert person.hear("signal_generated", SIGNAL) == ("held" if quiet else "send")


@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25", "2026-07-01"])
def test_quiet_hours_end_by_the_clock_on_the_wall_also_in_the_nights_that_change_it(day: str) -> None:
    before = datetime.fromisoformat(day).timestamp() - 4 * 3600
    clock = Clock()
    clock.now = before
    person = Person(clock, quiet=NIGHT)
    clock.set(f"{day} 06:59")
    assert person.hear("signal_generated", SIGNAL) == "held"
    clock.set(f"{day} 07:00")
    person.tick(0)
    assert [text.split(":")[0][2:] for _, text in person.got] == ["held since 06"]


def test_one_digest_at_the_end_of_the_night_says_what_was_held_and_lists_it() -> None:
    clock = Clock("2026-03-10 23:00")
    person = Person(clock, quiet=NIGHT)
    for number in range(12):
        signal = message("signal_generated", signal_id=f"S{number}", symbol="EURUSD", direction="BUY", confidence=80)
        assert person.hear("signal_generated", signal) == "held"
        person.tick(600)
    for outcome, r in [("WIN", 1.5)] * 4 + [("LOSS", -1.0)] * 3 + [("TIMEOUT", -0.9)]:
        person.hear("signal_outcome", message("signal_outcome", signal_id="S", symbol="EURUSD", outcome=outcome, r=r))
    cleared = message("alert", name="lag", severity="info", message="ok", state="cleared")
    for _ in range(3):
        person.hear("alert", cleared)
    person.tick()
    assert person.got == []
    assert person.policy.held == 23
    person.restart()
    clock.set("2026-03-11 07:00")
    person.tick(0)
    ((at, text),) = person.got
    assert at == clock.now
    lines = text.split("\n")
    assert lines[0] == "🌙 held since 23:00: 12 signals, 8 outcomes 4W/3L +2.1R (1 timeout), 3 alerts cleared"
    assert lines[1] == "23:00 ▲ BUY EURUSD · confidence 80 %"
    assert any(line.endswith("(×3)") for line in lines), "what is the same is listed once"
    assert "counted above" not in text
    person.tick(3600)
    assert len(person.got) == 1 and person.policy.held == 0


def test_a_critical_alert_passes_and_the_chat_may_let_others_pass_or_know_no_night() -> None:
    clock = Clock("2026-03-10 23:00")
    assert Person(clock, quiet=NIGHT).hear("alert", ALARM) == "send"
    warning = message("alert", name="lag", severity="warning", message="behind")
    assert Person(clock, quiet=NIGHT).hear("alert", warning) == "held"
    assert Person(clock, quiet={**NIGHT, "passes": "high"}).hear("alert", warning) == "send"
    assert Person(clock, {"quiet": False}, quiet=NIGHT).hear("alert", warning) == "send"
    assert Person(clock, {"quiet": {"hours": "01:00-02:00"}}, quiet=NIGHT).hear("alert", warning) == "send"


def test_what_was_held_is_told_at_once_when_the_hours_are_taken_out_of_the_configuration() -> None:
    clock = Clock("2026-03-10 23:00")
    person = Person(clock, quiet=NIGHT)
    person.hear("signal_generated", SIGNAL)
    person.settings = load({"chats": [{"id": 7}]})
    person.restart()
    person.tick()
    assert len(person.got) == 1


def test_a_night_with_more_than_a_message_can_list_is_counted_in_full() -> None:
    clock = Clock("2026-03-10 23:00")
    person = Person(clock, quiet=NIGHT)
    for number in range(5000):
        person.hear("alert", message("alert", name=f"n{number}", severity="warning", message="x" * 2000))
    assert sum(map(len, person.state.values())) < 100_000
    clock.set("2026-03-11 07:00")
    person.tick(0)
    ((_, text),) = person.got
    lines = text.split("\n")
    assert units(text) <= MAX_UNITS
    assert lines[0].endswith("5000 alerts raised")
    assert lines[-1] == f"… and {5000 - (len(lines) - 2)} more, counted above"
    assert 20 < len(lines) <= LISTED + 2


# -- never more than so many a minute -----------------------------------------------------------------


@given(
    cap=st.integers(1, 6),
    steps=st.lists(
        st.tuples(st.floats(0.0, 40.0), st.sampled_from(["signal", "alarm", "restart", "tick"])), max_size=60
    ),
)
def test_no_minute_has_more_than_its_messages_and_nothing_is_lost(cap: int, steps: list[tuple[float, str]]) -> None:
    clock = Clock()
    person = Person(clock, max_per_minute=cap)
    heard: Counter[str] = Counter()
    for pause, what in steps:
        person.tick(pause)
        if what == "signal":
            heard[what] += 1
            person.hear("signal_generated", SIGNAL)
        elif what == "alarm":
            heard[what] += 1
            assert person.hear("alert", ALARM) == "send"
        elif what == "restart":
            person.restart()
    for _ in range(40 * (heard.total() + 1)):
        person.tick(31.0)
        if not person.queue and not person.policy.held:
            break
    times = [at for at, _ in person.got]
    assert all(later - earlier >= 60.0 for earlier, later in zip(times, times[cap:], strict=False))
    texts = [text.split("\n") for _, text in person.got]
    single = sum(lines[0].startswith("▲") for lines in texts)
    in_digests = sum(int(lines[0].split(": ")[1].split()[0]) for lines in texts if lines[0].startswith("📥"))
    assert single + in_digests == heard["signal"]
    assert sum(lines[0].startswith("⚠️") for lines in texts) == heard["alarm"]


def test_what_a_minute_has_no_room_for_comes_together_a_minute_later() -> None:
    clock = Clock()
    person = Person(clock, max_per_minute=3)
    words = [person.hear("signal_generated", SIGNAL) for _ in range(10)]
    assert words == ["send"] * 3 + ["held"] * 7
    for _ in range(59):
        person.tick()
    assert len(person.got) == 3
    person.tick()
    assert person.got[3][1].split("\n")[0] == "📥 held since 11:00: 7 signals"


def test_a_steady_stream_does_not_keep_a_digest_from_its_place() -> None:
    person = Person(Clock(), max_per_minute=1)
    for number in range(400):
        person.clock.now += 0.5
        person.hear("signal_generated", SIGNAL)
        if number % 2:
            person.tick(0.0)
    firsts = [text.split("\n")[0] for _, text in person.got]
    assert firsts[0].startswith("▲") and len(firsts) == 4
    assert all(first.startswith("📥") for first in firsts[1:])


def test_what_was_held_at_night_stays_a_matter_of_the_night_when_more_is_held_in_the_morning() -> None:
    clock = Clock("2026-03-11 06:59")
    person = Person(clock, quiet=NIGHT, max_per_minute=2)
    clock.now += 55
    person.hear("signal_generated", SIGNAL)
    person.hear("alert", ALARM)
    clock.now += 5
    person.hear("signal_generated", SIGNAL)
    assert person.policy.held == 2
    person.tick(0.0)
    assert person.got[-1][1].startswith("🌙 held since 06:59: 2 signals")


def test_a_clock_that_was_set_back_does_not_silence_a_chat() -> None:
    clock = Clock()
    person = Person(clock, max_per_minute=1)
    person.hear("signal_generated", SIGNAL)
    clock.now -= 86_400
    assert person.hear("signal_generated", SIGNAL) == "send" and len(person.got) == 2


@pytest.mark.parametrize(
    ("tally", "text"),
    [
        ({"signals": 1}, "1 signal"),
        ({"alerts raised": 1, "alerts cleared": 2}, "1 alert raised, 2 alerts cleared"),
        ({"outcomes": 1, "LOSS": 1, "R": -1.04}, "1 outcome 0W/1L -1.0R"),
        ({"outcomes": 2, "TIMEOUT": 1, "BREAKEVEN": 1}, "2 outcomes 0W/0L (1 breakeven, 1 timeout)"),
        ({"refused by the gate": 3, "opened": 1}, "3 refused by the gate, 1 opened"),
    ],
)
def test_a_summary_reads(tally: dict[str, float], text: str) -> None:
    assert summary(tally) == text


def test_the_bus_is_asked_only_for_event_types_that_somebody_gets() -> None:
    assert Settings().relayed([Chat(id=1)]) == tuple(name for name, mode in MESSAGES.items() if mode != "off")


def test_a_dry_run_shows_the_digests_that_would_have_come(tmp_path: Path) -> None:
    clock = Clock()
    context = RecordingContext("telegram", {}, tmp_path)
    relay = Relay(context, load({"max_per_minute": 2}), wall=clock)
    signals = [
        GenericEvent(event_type="signal_generated", timestamp=1e9, source="t", data={"signal_id": f"S{n}"}, bus_seq=n)
        for n in range(1, 10)
    ]
    relay.handle(ListBatch(signals))
    clock.now += 60
    relay.tick()
    relay.save()
    texts = [each["text"].split("\n")[0] for each in rendered(context.state)]
    assert len(texts) == 3 and texts[2] == "📥 held since 11:00: 7 signals"


def test_what_a_broker_says_of_a_symbol_is_known_after_a_restart() -> None:
    bench = PluginBench(tapebus_telegram, TYPES, {"dry_run": True}, name="telegram")
    bench.feed([bench.event("symbol_specification", 1.0, {"symbol": "EURUSD", "digits": 3, "point": 0.001})])
    bench.restart()
    signal = {"signal_id": "S", "symbol": "EURUSD", "direction": "BUY", "confidence": 80, "pattern_type": "X"}
    bench.feed([bench.event("signal_generated", 2.0, {**signal, "entry": 1.12345})])
    tapebus_telegram.tapebus_stop(bench.context)
    assert [each["text"].split("\n")[1] for each in rendered(bench.context.state)] == ["entry 1.123"]


# -- through the relay to a server ----------------------------------------------------------------------


def simulated(scenario: Callable[[], Any]) -> None:
    pytest.importorskip("telegram", reason="sending is an extra of the Telegram plugin")
    from telegram_support import simulate

    simulate(scenario)


def at(world: Any, text: str) -> float:
    """The seconds of the world's clock that are `text` in Berlin."""
    moment = datetime.fromisoformat(text).replace(tzinfo=ZoneInfo("Europe/Berlin")).timestamp()
    return moment - (world.loop.wall() - world.loop.time())


def test_silent_messages_forum_topics_and_types_that_are_off_reach_telegram_as_such(tmp_path: Path) -> None:
    from telegram_support import World, event

    chat = {"id": -5, "thread_id": 3, "threads": {"alert": 9}, "messages": {"signal_generated": "silent"}}

    async def scenario() -> None:
        async with World(tmp_path, chats=[chat]) as world:
            events = [event(1), event(2, "alert", name="x", message="m"), event(3, "gate_verdict", fire=False)]
            await world.handle(ListBatch(events))
            await world.drain()
            assert [
                (call["visible"].split("\n")[0], call.get("message_thread_id"), call.get("disable_notification"))
                for call in world.server.accepted
            ] == [("⚠️ x", 9, None), ("▲ BUY EURUSD", 3, "true")]

    simulated(scenario)


def test_a_night_ends_in_one_digest_also_over_restarts_and_only_the_alarm_came_before(tmp_path: Path) -> None:
    from telegram_support import World, event, signals

    async def scenario() -> None:
        async with World(tmp_path, quiet=NIGHT, queue=50) as world:
            await asyncio.sleep(at(world, "2023-11-15 23:00") - world.now)
            for hour in range(8):
                await world.handle(signals(20, 1 + 20 * hour))
                world.commit()
                await asyncio.sleep(1800)
                await world.restart()
                await asyncio.sleep(1795)
            await world.handle(ListBatch([event(500, "alert", name="x", severity="critical", message="m")]))
            await world.drain()
            (alarm,) = world.server.accepted
            assert alarm["visible"].startswith("⚠️ CRITICAL x")
            world.commit()
            await asyncio.sleep(at(world, "2023-11-16 07:00") - world.now)
            await world.restart()
            await world.until(lambda: len(world.server.accepted) == 2, "the digest")
            for _ in range(100):
                await asyncio.sleep(60)
                world.commit()
            assert len(world.server.accepted) == 2 and not world.server.broken
            assert world.server.accepted[1]["visible"].startswith("🌙 held since 23:00: 160 signals\n23:00 ▲ BUY")

    simulated(scenario)


def test_a_flood_never_breaks_the_bound_of_a_minute_not_even_over_restarts_and_every_event_is_told(
    tmp_path: Path,
) -> None:
    from telegram_support import World, signals

    async def scenario() -> None:
        async with World(tmp_path, chats=[{"id": 7, "max_per_minute": 5}]) as world:
            begun, said = world.now, 0
            while world.now < begun + 300:
                await world.handle(signals(3, 1 + said))
                said += 3
                world.commit()
                await asyncio.sleep(1)
                world.commit()
                if said % 150 == 0:
                    await world.restart()
            for _ in range(140):
                await asyncio.sleep(1)
                world.commit()
            times = [call["at"] for call in world.server.accepted]
            assert all(later - earlier >= 60 for earlier, later in zip(times, times[5:], strict=False))
            texts = [call["visible"] for call in world.server.accepted]
            digests = [text for text in texts if text.startswith("📥")]
            told = sum(int(text.split(": ")[1].split()[0]) for text in digests) + len(texts) - len(digests)
            assert told == said and len(digests) >= 5

    simulated(scenario)

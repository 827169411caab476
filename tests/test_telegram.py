"""The Telegram relay against a strict local Bot API server, on a clock the tests move."""

from __future__ import annotations

import importlib.util
import logging
import random
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapebus_telegram
from tapebus.errors import ConfigError
from tapebus.events import GenericEvent
from tapebus.testing import ListBatch, RecordingContext
from tapebus_telegram.markup import MAX_UNITS, compose, units
from tapebus_telegram.outbox import rendered
from tapebus_telegram.relay import Relay
from tapebus_telegram.render import Renderer
from tapebus_telegram.secret import Secret, guard_logs, read_token, release_logs
from tapebus_telegram.settings import load
from tapebus_telegram.transport import Answer, HttpTransport
from tapebus_trading.symbols import Registry

_spec = importlib.util.spec_from_file_location("botapi_server", Path(__file__).with_name("botapi_server.py"))
assert _spec is not None and _spec.loader is not None
api = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(api)

TOKEN = "123456789:CANARY-abcdefghijklmnopqrstuvwxyz0"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def event(seq: int, event_type: str = "signal_generated", **data: Any) -> Any:
    if event_type == "signal_generated":
        data = {"signal_id": f"S-{seq}", "symbol": "EURUSD", "direction": "BUY", "confidence": 80, **data}
    return GenericEvent(event_type=event_type, timestamp=1e9 + seq, source="test", data=data, bus_seq=seq)


def signals(count: int, first: int = 1) -> Any:
    return ListBatch(event(first + number) for number in range(count))


class Recorder:
    """A transport that answers from a script and notes when each call came."""

    def __init__(self, clock: Clock, answers: Any = ()) -> None:
        self.clock, self.answers = clock, list(answers)
        self.calls: list[tuple[float, str, dict[str, Any]]] = []
        self.accepted: list[dict[str, Any]] = []

    def call(self, method: str, payload: dict[str, Any]) -> Answer:
        self.calls.append((self.clock.now, method, payload))
        answer = self.answers.pop(0) if self.answers else Answer(200, message_id=len(self.calls))
        if answer.ok:
            self.accepted.append(payload)
        return answer

    def close(self) -> None:
        """Nothing to release."""


def make(tmp_path: Path, clock: Clock, transport: Any, context: RecordingContext | None = None, **config: Any) -> Relay:
    context = context or RecordingContext("telegram", {}, tmp_path)
    return Relay(context, load({"chats": [{"id": 7}], **config}), transport, clock)


def drain(relay: Relay, clock: Clock, step: float = 0.25, limit: int = 8000) -> None:
    for _ in range(limit):
        relay.pump()
        if not relay.outbox.waiting:
            return
        clock.now += step
    raise AssertionError(f"still waiting: {relay.health()}")


def test_every_message_arrives_exactly_once_under_429_5xx_and_dropped_connections(tmp_path: Path) -> None:
    clock = Clock()
    with api.BotApi(TOKEN) as server:
        chance = random.Random(7)
        faults = [None, None, api.TOO_MANY, api.RESTART, api.DROP, b"<html>bad gateway</html>"]
        server.faults.extend(chance.choice(faults) for _ in range(80))
        relay = make(tmp_path, clock, HttpTransport(server.url, Secret(TOKEN)), chats=[{"id": 7}, {"id": 8}])
        relay.handle(signals(25))
        drain(relay, clock)
        relay.close()
        for chat in (7, 8):
            got = [call["visible"].split("\n")[-1] for call in server.accepted if call["chat_id"] == chat]
            assert got == [f"S-{number}" for number in range(1, 26)]


def test_no_window_is_ever_exceeded(tmp_path: Path) -> None:
    clock = Clock()
    transport = Recorder(clock)
    chats = [{"id": number} for number in [*range(1, 41), -5, -6]]
    relay = make(tmp_path, clock, transport, chats=chats, queue=5000)
    relay.handle(signals(45))
    drain(relay, clock, step=0.2)

    def at_most(times: list[float], limit: int, seconds: float) -> bool:
        return all(later - earlier >= seconds - 1e-6 for earlier, later in zip(times, times[limit:], strict=False))

    assert len(transport.calls) == 45 * 42
    assert at_most([at for at, _, _ in transport.calls], 25, 1.0)
    for chat in {payload["chat_id"] for _, _, payload in transport.calls}:
        times = [at for at, _, payload in transport.calls if payload["chat_id"] == chat]
        assert at_most(times, 1, 1.0)
        assert chat > 0 or at_most(times, 20, 60.0)


def test_retry_after_holds_back_every_chat(tmp_path: Path) -> None:
    clock = Clock()
    transport = Recorder(clock, [Answer(429, "Too Many Requests", retry_after=5)])
    relay = make(tmp_path, clock, transport, chats=[{"id": 1}, {"id": 2}])
    relay.handle(signals(1))
    drain(relay, clock, step=0.05)
    assert [at for at, _, _ in transport.calls][1] >= 1005.1
    assert len(transport.accepted) == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_crash_at_any_call_repeats_at_most_the_message_in_flight(tmp_path: Path, seed: int) -> None:
    """The crash hits before or after the server took the message; state is as of the last saved unit of work."""
    chance = random.Random(seed)
    clock = Clock()
    accepted: list[str] = []
    crashes = 0

    class Crash(BaseException):
        pass

    class Crashing(Recorder):
        def call(self, method: str, payload: dict[str, Any]) -> Answer:
            nonlocal crashes
            accepted.append(payload["text"])
            if chance.random() < 0.3:
                crashes += 1
                raise Crash
            return Answer(200, message_id=len(accepted))

    committed: tuple[int, dict[str, bytes]] = (0, {})
    while True:
        context = RecordingContext("telegram", {}, tmp_path)
        cursor, context.state = committed[0], dict(committed[1])
        relay = make(tmp_path, clock, Crashing(clock), context)
        try:
            while cursor < 40 or relay.outbox.waiting:
                if cursor < 40:
                    cursor += 1
                    relay.handle(signals(1, cursor))
                relay.pump()
                clock.now += 1.0
                if chance.random() < 0.4:
                    relay.outbox.save()
                    committed = (cursor, dict(context.state))
            break
        except Crash:
            relay.close()
    assert crashes > 3
    assert len(set(accepted)) == 40, "nothing is lost"
    assert len(accepted) - 40 <= crashes


def test_the_token_appears_nowhere_after_hundreds_of_failures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    caplog.set_level(logging.DEBUG)
    secret = Secret(TOKEN)
    context = RecordingContext("telegram", {}, tmp_path)
    redactor = guard_logs(secret, context.log)
    seen: list[str] = []
    try:
        with api.BotApi(TOKEN) as server:
            echo = api.failure(500, f"failed at /bot{TOKEN}/sendMessage")
            faults = [echo, api.DROP, api.RESTART, api.TOO_MANY, api.failure(400, TOKEN), api.BAD_ENTITIES]
            server.faults.extend(faults[number % len(faults)] for number in range(300))
            transport = HttpTransport(server.url, secret)
            relay = make(tmp_path, clock, transport, context, queue=400)
            relay.handle(signals(300))
            for _ in range(3000):
                relay.pump()
                clock.now += 20.0
                seen.append(f"{relay.health()}{relay.metrics()}{relay.last_error}")
                if server.calls >= 300:
                    break
            assert server.calls >= 300
        context.log.error("address %s", f"{server.url}/bot{TOKEN}/getMe")
        try:
            raise RuntimeError(f"at /bot{TOKEN}/x")
        except RuntimeError:
            context.log.exception("caught")
        try:
            transport._client.post("http://127.0.0.1:1/bot" + TOKEN)
        except Exception as error:
            logging.getLogger("httpx").warning("%s %s", error, TOKEN)
        relay.outbox.save()
        relay.close()
    finally:
        release_logs(redactor, context.log)
    captured = capfd.readouterr()
    formatted = [
        f"{r.getMessage()}{r.exc_text}{traceback.format_exception(*r.exc_info) if r.exc_info else ''}"
        for r in caplog.records
    ]
    files = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    state = [blob.decode("latin-1") for blob in context.state.values()]
    texts = [*seen, *formatted, *files, *state, repr(transport), repr(secret), repr(vars(relay)), captured.out]
    assert len(formatted) > 100
    for text in [*texts, captured.err, caplog.text]:
        assert TOKEN not in text and TOKEN.partition(":")[2] not in text


@given(st.text(max_size=6000), st.text(max_size=300))
def test_any_text_becomes_html_that_parses_back_to_the_plain_text(message: str, name: str) -> None:
    found = Renderer(Registry(), mask_numbers=False).message(event(1, "alert", message=message, name=name))
    assert found is not None
    assert api.visible(found.html) == found.plain
    assert 0 < units(found.plain) <= MAX_UNITS - 32
    assert found.html.count("<") == 2 * (found.html.count("<b>") + found.html.count("<code>"))


def test_a_long_text_is_cut_in_utf16_units_without_splitting_a_character() -> None:
    html, plain = compose([[("🔥" * 5000, "b")]])
    assert units(plain) <= MAX_UNITS - 32 and plain.rstrip("…") == "🔥" * (len(plain) - 1)
    assert api.visible(html) == plain


def test_a_dry_run_shows_its_messages_and_opens_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    context = RecordingContext("telegram", {}, tmp_path)
    (consumer,) = tapebus_telegram.tapebus_register_consumers(context)
    consumer.handler(
        ListBatch([event(1, entry=1.08512), event(2, "alert", severity="warning", message="acct 12345678")])
    )
    assert consumer.save is not None and consumer.on_tick is not None
    consumer.on_tick(0.0)
    consumer.save()
    first, second = rendered(context.state)
    assert (first["status"], first["text"].split("\n")[1]) == ("dry_run", "entry 1.08512")
    assert "12345678" not in second["text"] and "•••678" in second["text"]
    assert tapebus_telegram.tapebus_health(context)["status"] == "ok"
    assert tapebus_telegram.tapebus_metrics(context)["dry_run"] == 2
    assert not list(tmp_path.iterdir())
    tapebus_telegram.tapebus_stop(context)


def test_entities_that_do_not_parse_are_sent_once_more_as_plain_text(tmp_path: Path) -> None:
    clock = Clock()
    transport = Recorder(clock, [Answer(400, "Bad Request: can't parse entities: x")])
    relay = make(tmp_path, clock, transport)
    relay.handle(signals(1))
    drain(relay, clock)
    assert [payload.get("parse_mode") for _, _, payload in transport.calls] == ["HTML", None]


@pytest.mark.parametrize(
    "answer", [Answer(403, "Forbidden: bot was blocked by the user"), Answer(400, "Bad Request: chat not found")]
)
def test_a_chat_that_refuses_three_times_is_disabled_and_the_others_go_on(tmp_path: Path, answer: Answer) -> None:
    clock = Clock()

    class Refusing(Recorder):
        def call(self, method: str, payload: dict[str, Any]) -> Answer:
            super().call(method, payload)
            return answer if payload["chat_id"] == 1 else Answer(200, message_id=1)

    transport = Refusing(clock)
    relay = make(tmp_path, clock, transport, chats=[{"id": 1}, {"id": 2}])
    relay.handle(signals(5))
    drain(relay, clock)
    chats = [payload["chat_id"] for _, _, payload in transport.calls]
    assert (chats.count(1), chats.count(2)) == (3, 5)
    assert relay.health()["status"] == "degraded" and relay.metrics()["dropped.chat_disabled"] == 5


@pytest.mark.parametrize("code", [401, 404])
def test_a_wrong_token_stops_the_relay_and_says_so(tmp_path: Path, code: int) -> None:
    clock = Clock()
    transport = Recorder(clock, [Answer(code, "Unauthorized")])
    relay = make(tmp_path, clock, transport)
    relay.handle(signals(3))
    clock.now += 1000
    relay.pump()
    assert len(transport.calls) == 1 and relay.health()["status"] == "error" and relay.outbox.waiting == 3


def test_a_migrated_group_gets_its_messages_under_the_new_id(tmp_path: Path) -> None:
    clock = Clock()
    transport = Recorder(clock, [Answer(400, "group chat was upgraded to a supergroup chat", migrate_to=-1009)])
    relay = make(tmp_path, clock, transport, chats=[{"id": -5}])
    relay.handle(signals(2))
    drain(relay, clock)
    assert [payload["chat_id"] for payload in transport.accepted] == [-1009, -1009]


def test_repeats_become_one_message_with_a_count_and_then_an_edit(tmp_path: Path) -> None:
    clock = Clock()
    with api.BotApi(TOKEN) as server:
        relay = make(tmp_path, clock, HttpTransport(server.url, Secret(TOKEN)))
        for first in (1, 20):
            relay.handle(ListBatch(event(first + n, "alert", name="lag", message="behind") for n in range(3)))
            drain(relay, clock)
        relay.close()
        assert [call["method"] for call in server.accepted] == ["sendMessage", "editMessageText"]
        assert server.accepted[-1]["visible"].endswith("(×6)")


def test_a_full_outbox_drops_the_oldest_of_the_lowest_priority_and_counts_it(tmp_path: Path) -> None:
    clock = Clock()
    relay = make(tmp_path, clock, Recorder(clock), queue=3)
    relay._halt(100, "test")
    relay.handle(ListBatch([event(1, "slot_released", reason="x"), event(2), event(3), event(4, "alert", message="m")]))
    relay.handle(signals(1, 5))
    assert [entry.bus_seq for entry in relay.outbox.entries()] == [3, 4, 5]
    assert relay.metrics()["dropped.outbox_full"] == 2


def test_a_token_readable_by_others_or_written_in_the_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token({"file": str(path)})
    path.chmod(0o600)
    assert read_token({"file": str(path)}).reveal() == TOKEN
    with pytest.raises(ConfigError) as refused:
        read_token(TOKEN)
    assert TOKEN not in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        {"token": {"env": "T"}},
        {"chat": []},
        {"dry_run": False},
        {"topics": ["x"]},
        {"base_url": "http://example.org"},
        {"chats": [{"id": 1}, {"id": 1}]},
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_its_key(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"plugins\.telegram"):
        load(config)

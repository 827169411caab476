"""The calls themselves: what the library makes of each answer, and the servers that answer them."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("telegram", reason="sending is an extra of the Telegram plugin")

import httpx
import msgspec

import botapi_server as api
import virtual_time
from bus_support import wait_until
from tapebus.errors import ConfigError
from tapebus.testing import RecordingContext
from tapebus_telegram import transport as transport_module
from tapebus_telegram.listening import Listener
from tapebus_telegram.relay import Relay
from tapebus_telegram.secret import Secret
from tapebus_telegram.settings import Commands, load
from tapebus_telegram.transport import Answer, BotTransport, require_library
from telegram_support import TOKEN, ids, signals

HELLO = {"chat_id": 7, "text": "<b>hello</b>", "parse_mode": "HTML", "link_preview_options": {"is_disabled": True}}


def ask(server: api.BotApi, method: str, payload: dict[str, Any], times: int = 1) -> Answer:
    """The last of several equal calls to `server`, on a loop with virtual time."""

    async def main() -> Answer:
        async with server:
            transport = BotTransport(server.url, Secret(TOKEN))
            for _ in range(times):
                answer = await transport.call(method, payload)
            await transport.close()
            return answer

    return virtual_time.run(main())


ANSWERS: dict[str, tuple[Any, Answer]] = {
    "429": (api.TOO_MANY, Answer(429, "Flood control exceeded. Retry in 3 seconds", retry_after=3.0)),
    "429 with no time": (api.failure(429, "Too Many Requests"), Answer(429, "Too Many Requests")),
    "migrated": (
        api.failure(400, "Bad Request: group chat was upgraded", migrate_to_chat_id=-1009),
        Answer(400, "Group migrated to supergroup. New chat id: -1009", migrate_to=-1009),
    ),
    "400": (api.NO_CHAT, Answer(400, "Chat not found")),
    "401": (api.UNAUTHORIZED, Answer(401, "Unauthorized")),
    "403": (api.BLOCKED, Answer(403, "Forbidden: bot was blocked by the user")),
    "404": (api.NOT_FOUND, Answer(404, "Not Found")),
    "409": (api.CONFLICT, Answer(409, api.CONFLICT["description"])),
    "500": (api.RESTART, Answer(500, "Internal Server Error: restart")),
    "502 of a proxy": (api.BAD_GATEWAY, Answer(502, "not a Bot API answer (HTTP 502)")),
    "closed": (api.DROP, Answer(0, "no answer (RemoteProtocolError)")),
    "reset": (api.RESET, Answer(0, "no answer (ReadError)")),
    "half": (api.HALF, Answer(0, "no answer (RemoteProtocolError)")),
    "never": (api.HANG, Answer(0, "no answer (ReadTimeout)")),
}


@pytest.mark.parametrize(("fault", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_every_error_of_the_library_becomes_an_answer_with_its_code(fault: Any, expected: Answer) -> None:
    server = api.BotApi(TOKEN)
    server.faults.append(fault)
    answer = ask(server, "sendMessage", HELLO)
    # some releases add the code to the words
    assert answer.description.startswith(expected.description)
    assert msgspec.structs.replace(answer, description=expected.description) == expected


def test_nobody_listening_is_no_answer(free_ports: Any) -> None:
    (port,) = free_ports(1)
    answer = asyncio.run(BotTransport(f"http://127.0.0.1:{port}", Secret(TOKEN)).call("sendMessage", HELLO))
    assert answer == Answer(0, "no answer (ConnectError)")


def test_a_message_that_was_taken_counts_as_sent_even_where_the_library_cannot_read_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # milliseconds instead of seconds: a year that no calendar has
    message = {"message_id": 41, "date": 1_700_000_000_000, "chat": {"id": 7, "type": "private"}}
    server = api.BotApi(TOKEN)
    monkeypatch.setattr(server, "answer", lambda path, body: {"ok": True, "result": message})
    answer = ask(server, "sendMessage", HELLO)
    assert answer.ok and answer.message_id == 41


@pytest.mark.parametrize(
    "body", [{"ok": True}, {"ok": True, "result": True}, {"ok": True, "result": {"message_id": "x"}}]
)
def test_an_accepted_message_without_a_number_has_the_number_0(monkeypatch: pytest.MonkeyPatch, body: Any) -> None:
    server = api.BotApi(TOKEN)
    monkeypatch.setattr(server, "answer", lambda path, _: body)
    answer = ask(server, "sendMessage", HELLO)
    assert answer.ok and answer.message_id == 0


def test_a_bot_knows_itself() -> None:
    assert ask(api.BotApi(TOKEN), "getMe", {}).result["username"] == "a_bot"


def test_a_call_leaves_with_all_it_was_given() -> None:
    server = api.BotApi(TOKEN)
    server.chats = {-5: {9}}
    answer = ask(server, "sendMessage", {**HELLO, "chat_id": -5, "message_thread_id": 9, "disable_notification": True})
    (call,) = server.accepted
    assert answer.message_id == 1 and call["visible"] == "hello" and call["message_thread_id"] == 9
    assert json.loads(call["link_preview_options"]) == {"is_disabled": True} and call["disable_notification"] == "true"


@pytest.mark.parametrize(
    ("found", "words"), [(None, "needs python-telegram-bot 22 or later; run: pip"), ("21.9", "22 or later, not 21.9")]
)
def test_without_the_library_a_token_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, found: str | None, words: str
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(transport_module, "version", version)
    with pytest.raises(ConfigError, match=r"pip install 'tapebus.telegram.'") as refused:
        require_library()
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_dry_run_imports_no_library() -> None:
    code = (
        "import sys, tapebus_telegram\nfrom tapebus.testing import RecordingContext\n"
        "context = RecordingContext('telegram', {})\n"
        "tapebus_telegram.tapebus_register_consumers(context); tapebus_telegram.tapebus_start(context)\n"
        "tapebus_telegram.tapebus_stop(context)\n"
        "print({'telegram', 'httpx', 'asyncio', 'ssl'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "set()\n"


def test_all_calls_are_made_on_one_thread_of_the_relay_and_the_handler_makes_none(tmp_path: Path) -> None:
    threads: set[str] = set()

    class Watched(BotTransport):
        async def call(self, method: str, payload: dict[str, Any]) -> Answer:
            threads.add(threading.current_thread().name)
            return await super().call(method, payload)

    with api.BotApi(TOKEN) as server:
        settings = load({"chats": [{"id": chat} for chat in (1, 2, 3)]})
        relay = Relay(RecordingContext("telegram", {}, tmp_path), settings, Watched(server.url, Secret(TOKEN)))
        relay.start()
        relay.handle(signals(1))
        wait_until(lambda: len(server.accepted) == 3, "the messages")
        relay.close()
    assert threads == {"tapebus-telegram-api"}
    assert "tapebus-telegram-api" not in {thread.name for thread in threading.enumerate()}


def test_the_handler_is_through_while_the_server_keeps_every_call_waiting(tmp_path: Path) -> None:
    release = threading.Event()

    class Stuck:
        calls = 0

        async def call(self, method: str, payload: dict[str, Any]) -> Answer:
            self.calls += 1
            await asyncio.to_thread(release.wait)
            return Answer(200, result={"message_id": 1})

        async def close(self) -> None:
            """Nothing to release."""

    stuck = Stuck()
    context = RecordingContext("telegram", {}, tmp_path)
    relay = Relay(context, load({"chats": [{"id": 1}], "queue": 5000}), stuck)
    relay.start()
    try:
        relay.handle(signals(1000))
        wait_until(lambda: stuck.calls, "the first call")
        relay.handle(signals(1000, 1001))
        relay.tick()
        relay.save()
        # two thousand are queued and kept although not one call was ever answered
        assert relay.outbox.waiting == 2000 and stuck.calls == 1
        assert sum(name.startswith("queue/") for name in context.state) == 2000
    finally:
        release.set()
        relay.close()


def test_a_call_under_way_at_the_end_is_waited_for_so_that_it_is_not_made_again(tmp_path: Path) -> None:
    with api.BotApi(TOKEN) as server:
        server.lag = lambda: 0.2
        settings = load({"chats": [{"id": 1}]})
        for calls in (1, 0):
            transport = BotTransport(server.url, Secret(TOKEN))
            relay = Relay(RecordingContext("telegram", {}, tmp_path), settings, transport)
            relay.start()
            relay.handle(signals(1))
            assert relay.outbox.waiting == calls
            wait_until(lambda calls=calls: server.connected >= calls, "the call to leave")
            relay.close()
    assert ids(server.accepted) == ["S-1"]


# -- the strict server, which judges the rest ----------------------------------------------------


def test_the_server_says_409_to_a_poll_that_another_one_replaces() -> None:
    server = api.BotApi(TOKEN)

    async def main() -> tuple[Answer, Answer]:
        async with server:
            transport = BotTransport(server.url, Secret(TOKEN))
            first = asyncio.create_task(transport.call("getUpdates", {"timeout": 30}))
            await asyncio.sleep(1.0)
            second = asyncio.create_task(transport.call("getUpdates", {"timeout": 30}))
            await asyncio.sleep(1.0)
            server.say("/status", user=5)
            answers = (await first, await second)
            await transport.close()
            return answers

    first, second = virtual_time.run(main())
    assert first.code == 409 and [each["message"]["text"] for each in second.result] == ["/status"]


def test_the_server_repeats_an_update_until_the_offset_is_behind_it() -> None:
    server = api.BotApi(TOKEN)

    async def main() -> list[list[int]]:
        async with server:
            transport = BotTransport(server.url, Secret(TOKEN))
            for text in ("a", "b"):
                server.say(text, user=5)
            found = [await transport.call("getUpdates", {"offset": offset, "timeout": 5}) for offset in (0, 0, 2, 3)]
            await transport.close()
            return [[each["update_id"] for each in answer.result] for answer in found]

    assert virtual_time.run(main()) == [[1, 2], [1, 2], [2], []]


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<b>a</b> &lt;x&gt; &amp; &#34;", 'a <x> & "'),
        ('<a href="https://x">l</a><tg-spoiler>s</tg-spoiler>', "ls"),
        ("<b>a", None),
        ("a</b>", None),
        ("<b><i>a</b></i>", None),
        ("1 < 2", None),
        ("<blink>a</blink>", None),
        ("&nbsp;", "&nbsp;"),
    ],
)
def test_the_server_reads_html_as_telegram_does(html: str, text: str | None) -> None:
    if text is None:
        with pytest.raises(ValueError, match=r"tag"):
            api.visible(html)
    else:
        assert api.visible(html) == text


@pytest.mark.parametrize(
    ("payload", "code", "words"),
    [
        ({"text": "x"}, 400, "chat_id is empty"),
        ({"chat_id": 7, "text": " "}, 400, "message text is empty"),
        ({"chat_id": 7, "text": "x" * 4097}, 400, "message is too long"),
        ({"chat_id": 7, "text": "🔥" * 2049}, 400, "message is too long"),
        ({"chat_id": 7, "text": "<b>" + "x" * 4096 + "</b>", "parse_mode": "HTML"}, 200, ""),
        ({"chat_id": 7, "text": "<b>", "parse_mode": "HTML"}, 400, "can't parse entities"),
        ({"chat_id": 8, "text": "x"}, 400, "chat not found"),
        ({"chat_id": 7, "text": "x", "message_thread_id": 3}, 400, "message thread not found"),
    ],
)
def test_the_server_refuses_what_telegram_refuses(payload: dict[str, Any], code: int, words: str) -> None:
    server = api.BotApi(TOKEN)
    server.chats = {7: set()}
    answer = server.answer(f"/bot{TOKEN}/sendMessage", json.dumps(payload).encode())
    assert answer.get("error_code", 200) == code and words in answer.get("description", "")


def test_the_server_counts_every_limit_by_itself() -> None:
    now = 0.0
    server = api.BotApi(TOKEN, clock=lambda: now)

    def send(chat: int, at: float) -> int:
        nonlocal now
        now = at
        body = json.dumps({"chat_id": chat, "text": "x"}).encode()
        return int(server.answer(f"/bot{TOKEN}/sendMessage", body).get("error_code", 200))

    assert [send(1, at) for at in (0.0, 0.9, 1.9, 2.0)] == [200, 429, 200, 429]
    assert [send(-1, 10.0 + 2 * n) for n in range(21)] == [200] * 20 + [429]
    assert [send(chat, 100.0) for chat in range(1, 28)] == [200] * 25 + [429] * 2
    assert len(server.broken) == 5


@pytest.mark.parametrize(("token", "code"), [(TOKEN, 200), (TOKEN[:-1] + "x", 401), ("1:short", 404)])
def test_the_server_tells_a_wrong_token_from_a_malformed_one(token: str, code: int) -> None:
    assert api.BotApi(TOKEN).answer(f"/bot{token}/getMe", b"").get("error_code", 200) == code


# -- another one's server ------------------------------------------------------------------------

SECOND = """
const T = require('telegram-test-api');
const server = new (T.default || T)({ port: Number(process.argv[2]), host: '127.0.0.1' });
server.start().then(() => console.log('ready'));
"""


@pytest.fixture(scope="module")
def second_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of npm's telegram-test-api."""
    if shutil.which("npm") is None:
        pytest.skip("npm is absent, so there is no second server")
    home = tmp_path_factory.mktemp("npm")
    command = ["npm", "install", "telegram-test-api@4", "--no-audit", "--no-fund", "--silent", "--prefix", str(home)]
    if subprocess.run(command, capture_output=True, timeout=110).returncode != 0:
        pytest.skip("npm cannot install telegram-test-api here")
    (home / "server.js").write_text(SECOND)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    process = subprocess.Popen(["node", "server.js", str(port)], cwd=home, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_a_second_implementation_of_the_bot_api_takes_messages_and_edits(second_server: str, tmp_path: Path) -> None:
    settings = load({"chats": [{"id": 7}, {"id": 8}]})
    relay = Relay(RecordingContext("telegram", {}, tmp_path), settings, BotTransport(second_server, Secret(TOKEN)))
    relay.start()
    try:
        relay.handle(signals(2))
        wait_until(lambda: not relay.outbox.waiting, "the messages to be taken")
        relay.handle(signals(1, 2))
        assert relay.metrics()["sent"] == 4 and relay.health()["status"] == "ok"
    finally:
        relay.close()
    history = httpx.post(f"{second_server}/getUpdatesHistory", json={"token": TOKEN}, timeout=30).json()["result"]
    taken = [(int(each["message"]["chat_id"]), each["message"]["text"].split("\n")[-1]) for each in history]
    assert sorted(taken) == [(chat, f"<code>S-{n}</code>") for chat in (7, 8) for n in (1, 2)]
    assert {each["message"]["parse_mode"] for each in history} == {"HTML"}


@pytest.mark.slow
def test_a_second_implementation_of_the_bot_api_hands_commands_over_until_they_are_settled(second_server: str) -> None:
    person = {"id": 11, "first_name": "P", "username": "p", "is_bot": False}
    chat = {"id": 11, "first_name": "P", "type": "private"}
    for text in ("/pause", "hello", "/help"):
        said = {"botToken": TOKEN, "from": person, "chat": chat, "date": int(time.time()), "text": text}
        assert httpx.post(f"{second_server}/sendMessage", json=said, timeout=30).json()["ok"]
    listener = Listener(Commands(users=(11,)), {"/pause", "/help"}, [], 0, 0.0, logging.getLogger("tapebus.telegram"))

    async def hear() -> list[Any]:
        api = BotTransport(second_server, Secret(TOKEN))
        task = asyncio.create_task(listener.listen(api))
        found: list[Any] = []
        while len(found) < 2:
            found.append(await asyncio.to_thread(listener.inbox.get, timeout=30))
        listener.settle(found[-1].update_id)
        await asyncio.sleep(1.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await api.close()
        return found

    said = asyncio.run(hear())
    assert [each.text for each in said] == ["/pause", "/help"] and listener.inbox.empty()
    assert listener.ignored == {"no_command": 1} and not listener.trouble

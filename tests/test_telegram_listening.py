"""What people write to the bot: who is heard, and how the long poll gets through what a server may answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from botapi_server import BAD_GATEWAY, CONFLICT, DROP, RESET, RESTART, UNAUTHORIZED, BotApi, too_many
from tapebus_telegram.listening import Listener
from tapebus_telegram.secret import Secret
from tapebus_telegram.settings import Commands
from tapebus_telegram.transport import BotTransport
from virtual_time import VirtualLoop

TOKEN = "123456789:CANARY-abcdefghijklmnopqrstuvwxyz0"
OWNER, VIEWER, STRANGER = 11, 12, 13
GROUP = -100500


def listening(
    commands: Commands, script: Callable[[Any, Listener], Coroutine[Any, Any, None]], **more: Any
) -> Listener:
    """Run `script(server, listener)` while the listener hears a strict server; time passes as soon as all wait."""
    pytest.importorskip("telegram", reason="hearing is an extra of the Telegram plugin")

    async def run(clock: Callable[[], float]) -> Listener:
        async with BotApi(TOKEN, clock) as server:
            log = logging.getLogger("tapebus.telegram")
            names = {"/group", "/pause", "/help"}
            chats = [GROUP, "@news"]
            listener = Listener(commands, names, chats, more.get("done", 0), more.get("at", 0.0), log, clock)
            api = BotTransport(server.url, Secret(TOKEN))
            task = asyncio.create_task(listener.listen(api))
            try:
                await script(server, listener)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await api.close()
            return listener

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        return runner.run(run(loop.time))


async def until(condition: Callable[[], Any], what: str) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.5)
    pytest.fail(f"waited in vain for {what}")


def heard(listener: Listener) -> list[str]:
    found = []
    while not listener.inbox.empty():
        found.append(listener.inbox.get_nowait().text)
    return found


PEOPLE = Commands(users=(OWNER,), viewers=(VIEWER,))


def test_only_allowed_people_in_allowed_chats_are_heard_and_the_rest_is_counted_in_silence() -> None:
    said: list[str] = []

    async def script(server: Any, listener: Listener) -> None:
        server.say("/own", OWNER)
        server.say("/group", VIEWER, GROUP)
        server.say("/stranger", STRANGER)
        server.say("/stranger_in_group", STRANGER, GROUP)
        server.say("/elsewhere", OWNER, -999)
        server.say("/others_chat", OWNER, VIEWER)
        server.say("hello", OWNER)
        server.say("/other_bot@b_bot", OWNER, GROUP)
        server.say("/perhaps_other_bot", OWNER, GROUP)
        server.say("/mine@A_Bot now", OWNER, GROUP)
        server.say("/bot", OWNER, GROUP, **{"from": {"id": OWNER, "is_bot": True, "first_name": "x"}})
        server.say("/channel", OWNER, GROUP, **{"from": None, "sender_chat": {"id": GROUP}})
        server.say("/last", OWNER)
        await until(lambda: listener.inbox.qsize() == 4, "the commands of the allowed")
        said.extend(heard(listener))
        await asyncio.sleep(1)
        assert not server.accepted, "nobody is answered by the listener"

    listener = listening(PEOPLE, script)
    assert said == ["/own", "/group", "/mine@A_Bot now", "/last"]
    assert dict(listener.ignored) == {"strangers": 4, "no_command": 3, "no_person": 2}


def test_what_is_asked_in_a_topic_of_a_forum_is_known_to_be_from_there() -> None:
    async def script(server: Any, listener: Listener) -> None:
        server.say("/help", OWNER, GROUP, message_thread_id=9, is_topic_message=True)
        server.say("/help", OWNER, GROUP, message_thread_id=1001)  # an answer to a message, in no topic
        await until(lambda: listener.inbox.qsize() == 2, "both questions")
        assert [listener.inbox.get_nowait().thread_id for _ in range(2)] == [9, None]

    listening(PEOPLE, script)


def test_a_list_of_chats_replaces_the_configured_ones() -> None:
    only = Commands(users=(OWNER,), chats=(-7,))
    assert only.hears(OWNER, -7, [GROUP]) and not only.hears(OWNER, GROUP, [GROUP])
    assert not only.hears(OWNER, OWNER, [GROUP]) and not only.hears(VIEWER, -7, [GROUP])


def test_telegram_is_told_to_forget_only_what_is_settled() -> None:
    async def script(server: Any, listener: Listener) -> None:
        server.say("/pause", OWNER)
        await until(lambda: server.offsets.count(0) >= 3, "the same question, asked again every few seconds")
        assert set(heard(listener)) == {"/pause"} and set(server.offsets) == {0}
        listener.settle(1)
        await until(lambda: 2 in server.offsets, "the next question")
        assert not heard(listener)

    listening(PEOPLE, script)


def test_what_nobody_wants_is_forgotten_at_once_and_a_restart_goes_on_where_it_was() -> None:
    async def script(server: Any, listener: Listener) -> None:
        for number in range(3):
            server.say(f"/n{number}", STRANGER)
        await until(lambda: server.offsets[-1:] == [4], "the strangers to be passed over")
        assert server.offsets[0] == 3

    listening(PEOPLE, script, done=2, at=1000.0)


def test_a_conflict_broken_connections_and_429_are_waited_out_ever_longer() -> None:
    times: list[float] = []

    async def script(server: Any, listener: Listener) -> None:
        clock = asyncio.get_running_loop().time
        server.polls.extend([CONFLICT, CONFLICT, RESET, RESTART, BAD_GATEWAY, DROP, too_many(90)])
        begun = clock()
        await until(lambda: listener.trouble.startswith("409"), "the conflict to be known")
        server.say("/pause", OWNER)
        await until(lambda: heard(listener), "the command behind all the trouble")
        times.append(clock() - begun)
        assert not listener.trouble

    listening(PEOPLE, script)
    assert 30 + 30 + 4 + 8 + 16 + 32 + 90 <= times[0] < 300


def test_a_server_that_does_not_wait_is_not_asked_in_a_frenzy() -> None:
    async def script(server: Any, listener: Listener) -> None:
        clock = asyncio.get_running_loop().time
        server.polls.extend([{"ok": True, "result": []}] * 50)
        begun = clock()
        await until(lambda: not server.polls, "all empty answers")
        assert 49 <= clock() - begun < 60

    listening(PEOPLE, script)


def test_a_refused_token_ends_the_listening_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def script(server: Any, listener: Listener) -> None:
        server.polls.append(UNAUTHORIZED)
        await until(lambda: listener.trouble.startswith("401"), "the token to be refused")
        calls = server.calls
        await asyncio.sleep(3600)
        assert server.calls == calls

    listening(PEOPLE, script)
    assert "put a valid token in place" in caplog.text and TOKEN not in caplog.text


@pytest.mark.parametrize(
    "odd",
    [
        None,
        5,
        {},
        {"update_id": "7"},
        {"update_id": 7},
        {"update_id": 7, "message": 5},
        {"update_id": 7, "message": {"chat": {}, "date": 1, "text": "/pause"}},
        {"update_id": 7, "message": {"chat": {"id": OWNER}, "date": 1, "text": "/pause"}},
        {"update_id": 7, "message": {"chat": {"id": OWNER}, "from": {"id": OWNER}, "date": [], "text": "/pause"}},
        {"update_id": 7, "message": {"chat": {"id": OWNER}, "from": {"id": OWNER}, "date": 1, "text": {}}},
        {"update_id": 7, "message": {"chat": {"id": OWNER}, "from": {"id": [OWNER]}, "date": 1, "text": "/pause"}},
        {"update_id": 7, "edited_message": {"chat": {"id": OWNER}, "from": {"id": OWNER}, "date": 1, "text": "/pause"}},
    ],
)
def test_an_update_that_is_none_is_passed_over_and_the_next_is_heard(odd: Any) -> None:
    async def script(server: Any, listener: Listener) -> None:
        good = {"chat": {"id": OWNER}, "from": {"id": OWNER}, "date": 1, "text": "/help"}
        server.polls.append({"ok": True, "result": [odd, {"update_id": 8, "message": good}]})
        await until(lambda: listener.inbox.qsize(), "the command behind it")
        assert heard(listener) == ["/help"]

    listening(PEOPLE, script)

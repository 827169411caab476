"""Many messages, faults and restarts at once: none lost, none twice but for a stated reason, no limit broken."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

pytest.importorskip("telegram", reason="sending is an extra of the Telegram plugin")

from telegram.error import NetworkError, TimedOut
from telegram.request import BaseRequest

import botapi_server as api
from bus_support import PATIENCE, wait_until
from tapebus import Publisher
from tapebus_telegram.secret import Secret
from tapebus_telegram.transport import READ_S, BotTransport, _answered
from telegram_support import TOKEN, World, ids, signals, simulate

PEOPLE, GROUPS = range(1, 31), range(-4, 0)
FAULTS = (
    *(api.too_many(seconds) for seconds in (1, 3, 30)),
    *(api.RESTART, api.BAD_GATEWAY, api.CONFLICT),
    *(api.DROP, api.RESET, api.HALF, api.HANG, api.LOSE),
)


def breaches(times: list[float], most: int, seconds: float) -> list[float]:
    """The times at which there had been `most` calls already within the `seconds` before."""
    return [late for early, late in zip(times, times[most:], strict=False) if late - early < seconds - 1e-6]


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in memory where there is one: nobody cuts the power here, and a journal syncs every message."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield path
    shutil.rmtree(path)


class Direct(BaseRequest):
    """The library's calls without a network: the server is asked at once, in this process."""

    def __init__(self, server: api.BotApi) -> None:
        self._server = server

    @property
    def read_timeout(self) -> float:
        return READ_S

    async def initialize(self) -> None:
        """Nothing to open."""

    async def shutdown(self) -> None:
        """Nothing to close."""

    async def do_request(self, url: str, method: str, request_data: Any = None, **_: Any) -> tuple[int, bytes]:
        await asyncio.sleep(self._server.lag())
        body = urlencode(request_data.json_parameters).encode()
        answer = self._server.answer(url.partition("//")[2], body)
        await asyncio.sleep(self._server.lag())
        if answer == api.HANG:
            await asyncio.sleep(READ_S)
            raise TimedOut
        if isinstance(answer, str):
            raise NetworkError("the connection broke")
        page = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        answered = (502 if isinstance(answer, bytes) else answer.get("error_code", 200), page)
        _answered.set(answered)
        return answered


class DirectTransport(BotTransport):
    def __init__(self, server: api.BotApi) -> None:
        super().__init__("http://localhost", Secret(TOKEN))
        self._base = "direct://"
        self._server = server

    def _request(self) -> BaseRequest:
        return Direct(self._server)


def test_10000_messages_under_faults_and_two_restarts_none_is_lost_and_no_limit_broken(shm: Path) -> None:
    flood(shm, 295, over_sockets=False)


def test_as_many_messages_over_sockets(shm: Path, request: pytest.FixtureRequest) -> None:
    quick = request.config.getoption("--faults") == "quick"
    flood(shm, 30 if quick else 295, over_sockets=True)


def flood(tmp_path: Path, count: int, over_sockets: bool) -> None:
    """`count` signals to every chat."""
    chance = random.Random(20)
    chats = [*PEOPLE, *GROUPS]
    total = count * len(chats)

    async def scenario() -> None:
        async with World(tmp_path, chats=[{"id": chat} for chat in chats], queue=20_000) as world:
            server, world.tick_s = world.server, 4.0
            if not over_sockets:
                await world.kill()
                world.transport = DirectTransport(server)
                world.begin()
            server.faults.extend(chance.choice(FAULTS) if chance.random() < 0.02 else None for _ in range(20_000))
            await world.handle(signals(count))
            world.commit()
            assert world.relay.outbox.waiting == total
            for part in (0.3, 0.8):
                await world.until(lambda part=part: len(server.accepted) > part * total, "a part of the messages")
                # some have been sent since what is committed, and one is on its way
                server.lag = lambda: 0.02
                await asyncio.sleep(3.0 + chance.random())
                await world.restart()
                server.lag = lambda: 0.0
            await world.drain()
            assert server.broken == []
            found = Counter((call["chat_id"], ids([call])[0]) for call in server.accepted)
            assert len(found) == total and {chat for chat, _ in found} == set(chats), "nothing is lost"
            # a message whose answer never arrived has to be sent again; beyond those at most one a restart
            assert len(server.accepted) - total <= server.lost + 2
            for chat in chats:
                mine = [call for call in server.accepted if call["chat_id"] == chat]
                assert list(dict.fromkeys(ids(mine))) == [f"S-{n}" for n in range(1, count + 1)]
                times = [call["at"] for call in mine]
                assert not breaches(times, 1, 1.0) and (chat > 0 or not breaches(times, 20, 60.0))
            assert not breaches([call["at"] for call in server.accepted], 25, 1.0)
            refusals = Counter(code for _, code, _ in server.refused)
            assert server.lost and all(refusals[code] > 1 for code in (429, 500, 409)), "there were such faults"

    simulate(scenario)


def test_a_bus_takes_all_events_while_telegram_answers_none_and_then_sends_them(make_bus: Any, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    chats = [*range(1, 12), -1]
    with api.BotApi(TOKEN) as server:
        held = True
        server.lag = lambda: 1.0 if held else 0.0
        receivers = ", ".join(f'{{ id = {chat}, topics = ["signal_generated"] }}' for chat in chats)
        bus = make_bus(
            ["schema", "store", "telegram"],
            f'[plugins.telegram]\ntoken = {{ file = "{token}" }}\nbase_url = "{server.url}"\nchats = [{receivers}]\n',
        ).start()
        server.faults.extend([api.DROP, api.RESTART, api.TOO_MANY])
        with Publisher("test", endpoint=bus.acked) as publisher:
            for n in range(1, 5):
                data = {"signal_id": f"S-{n}", "symbol": "EURUSD", "direction": "BUY", "confidence": 80}
                assert publisher.publish("signal_generated", {**data, "pattern_type": "X"})
            assert publisher.flush(PATIENCE)
        # the consumer is through with all of them before the first one has been taken
        wait_until(lambda: bus.consumer("telegram")["handled"] == 4, "the relay to have queued all")
        assert not server.accepted
        held = False
        wait_until(lambda: len(server.accepted) == 4 * len(chats), "all messages")
        assert bus.stop() == 0
    assert server.broken == [] and server.faults == api.deque()
    for chat in chats:
        assert ids(server.accepted, chat) == ["S-1", "S-2", "S-3", "S-4"]

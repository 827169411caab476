"""kill -9 around the calls of the Telegram relay: no message is lost, at most the one in flight comes twice."""

from __future__ import annotations

import collections
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from botapi_server import BotApi
from bus_support import PATIENCE
from tapebus import Publisher

pytest.importorskip("telegram", reason="sending is an extra of the Telegram plugin")

TOKEN = "123456789:CANARY-abcdefghijklmnopqrstuvwxyz0"
#: A chat takes one message a second, so many chats make many calls.
CHATS = range(1, 16)


class Killer(BotApi):
    """A Bot API server that kills the bus around the call it was told to: before, during or after it is accepted."""

    def __init__(self, token: str) -> None:
        super().__init__(token)
        self.pid = 0
        self.calls_left = -1
        self.moment = ""
        self.killed = threading.Event()

    def answer(self, path: str, body: bytes) -> Any:
        self.calls_left -= 1
        mine = self.calls_left == 0
        if mine and self.moment == "before":
            self._kill()
            return "drop"
        found = super().answer(path, body)
        if mine and self.moment == "during":
            self._kill()
        elif mine:
            # while the answer is on its way, or has just been read
            threading.Timer(0.002, self._kill).start()
        return found

    def _kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.killed.set()


def test_no_message_is_lost_and_at_most_one_a_kill_comes_twice(make_bus, tmp_path, size, chance, figures):
    kills = size(5, 50, 200)
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    with Killer(TOKEN) as server:
        chats = ", ".join(f'{{ id = {number}, topics = ["signal_generated"] }}' for number in CHATS)
        extra = (
            f'[plugins.telegram]\ntoken = {{ file = "{token}" }}\nchats = [{chats}]\nbase_url = "{server.url}"\n'
            "queue = 100000\n"
        )
        bus = make_bus(["schema", "store", "telegram"], extra)
        published = 0
        moments: collections.Counter[str] = collections.Counter()
        for _ in range(kills):
            bus.start()
            assert bus.process is not None
            server.pid = bus.process.pid
            server.moment = chance.choice(("before", "during", "after"))
            server.killed.clear()
            server.calls_left = chance.randrange(1, len(CHATS))
            moments[server.moment] += 1
            if len({*heard(server)}) + len(CHATS) >= published * len(CHATS):
                published += publish(bus, published)
            assert server.killed.wait(PATIENCE), bus.output()
            bus.process.wait(PATIENCE)
            bus.process = None
        server.calls_left = -1
        bus.start()
        published += publish(bus, published)
        expected = {(chat, f"S-{n}") for chat in CHATS for n in range(1, published + 1)}
        bus.wait_for(lambda stats: {*heard(server)} >= expected, "to send what is left")
        assert bus.stop() == 0
        found = collections.Counter(heard(server))
    twice = sum(found.values()) - len(found)
    figures.update(kills=kills, messages=len(found), twice=twice, lost=len(expected - {*found}), **moments)
    assert {*found} == expected, "nothing is lost, nothing is invented"
    # what the server had not accepted when the bus was killed cannot come a second time
    assert twice <= kills - moments["before"], [each for each, count in found.items() if count > 1]
    assert TOKEN not in Path(bus.log).read_text()


def publish(bus: Any, before: int) -> int:
    with Publisher("test", endpoint=bus.acked) as publisher:
        data = {"signal_id": f"S-{before + 1}", "symbol": "EURUSD", "direction": "BUY", "confidence": 80}
        data["pattern_type"] = "BB_SCALP"
        assert publisher.publish("signal_generated", data)
        assert publisher.flush(PATIENCE)
    return 1


def heard(server: BotApi) -> list[tuple[int, str]]:
    return [(call["chat_id"], call["visible"].split("\n")[-1]) for call in list(server.accepted)]

"""A Telegram relay and the strict Bot API server on one loop with one clock, with restarts."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botapi_server as api
import virtual_time
from tapebus.events import GenericEvent
from tapebus.testing import ListBatch, RecordingContext
from tapebus_telegram.relay import Relay
from tapebus_telegram.secret import Secret
from tapebus_telegram.settings import load
from tapebus_telegram.transport import Answer, BotTransport

# The HTTP client looks for these with every call, on the whole path, and goes on without them.
for name in ("sniffio", "trio"):
    if importlib.util.find_spec(name) is None:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]

TOKEN = "123456789:CANARY-abcdefghijklmnopqrstuvwxyz0"


def event(seq: int, event_type: str = "signal_generated", **data: Any) -> Any:
    if event_type == "signal_generated":
        data = {"signal_id": f"S-{seq}", "symbol": "EURUSD", "direction": "BUY", "confidence": 80, **data}
    return GenericEvent(event_type=event_type, timestamp=1e9 + seq, source="test", data=data, bus_seq=seq)


def signals(count: int, first: int = 1) -> Any:
    return ListBatch(event(first + number) for number in range(count))


def alerts(*seqs: int, name: str = "lag", **data: Any) -> Any:
    return ListBatch(event(seq, "alert", name=name, message="behind", **data) for seq in seqs)


def ids(calls: list[dict[str, Any]], chat: Any = None) -> list[str]:
    """The signal ids of a transcript, as they came."""
    return [call["visible"].split("\n")[-1] for call in calls if chat is None or call["chat_id"] == chat]


class Script:
    """A transport that answers from a list; a coroutine function in it is awaited for the answer."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[float, str, dict[str, Any]]] = []

    async def call(self, method: str, payload: dict[str, Any]) -> Answer:
        self.calls.append((asyncio.get_running_loop().time(), method, payload))
        answer = self.answers.pop(0) if self.answers else Answer(200, result={"message_id": len(self.calls)})
        return answer if isinstance(answer, Answer) else await answer()

    async def close(self) -> None:
        """Nothing to release."""


class World:
    """``relay`` is the one that lives, ``server`` outlives it. `commit` is what the bus does after a unit of work."""

    def __init__(self, tmp_path: Path, transport: Any = None, **config: Any) -> None:
        self.loop = asyncio.get_running_loop()
        assert isinstance(self.loop, virtual_time.VirtualLoop)
        self.server = api.BotApi(TOKEN, clock=self.loop.time)
        self.config = {"chats": [{"id": 7}], **config}
        self.tmp_path = tmp_path
        self.committed: dict[str, bytes] = {}
        self.emitted: list[Any] = []
        self.tick_s = 0.5
        self.transport = transport
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> World:
        await self.server.__aenter__()
        self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
        await self.server.__aexit__()

    @property
    def now(self) -> float:
        return self.loop.time()

    def begin(self) -> None:
        """Start a relay from what was committed and from its journal, as a new process would."""
        context = RecordingContext("telegram", {}, self.tmp_path)
        context.state, context.emitted = dict(self.committed), self.emitted
        transport = self.transport or BotTransport(self.server.url, Secret(TOKEN))
        self.relay = Relay(context, load(self.config), transport, self.loop.time, self.loop.wall)
        assert self.relay.sender is not None
        self.sender = self.relay.sender
        self._task = asyncio.create_task(self.sender.run())

    async def handle(self, batch: Any) -> None:
        """Hand `batch` to the relay; what is on the other thread in a bus is woken."""
        self.relay.handle(batch)
        self.sender.wake()
        await asyncio.sleep(0)

    def commit(self) -> None:
        self.relay.tick()
        self.sender.wake()
        self.committed = dict(self.relay.context.state)

    async def kill(self) -> None:
        """End the relay wherever it is; nothing but its committed state and its journal remains."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        await self.sender.transport.close()
        self.relay.close()

    async def restart(self) -> None:
        await self.kill()
        self.begin()

    async def until(self, condition: Callable[[], Any], what: str, limit: float = 20_000.0) -> None:
        end = self.now + limit
        while not condition():
            assert self.now < end, f"waited in vain for {what}: {self.relay.health()}"
            await asyncio.sleep(self.tick_s)
            self.commit()

    async def drain(self, limit: float = 20_000.0) -> None:
        await self.until(lambda: not self.relay.outbox.waiting, "an empty outbox", limit)


def simulate(scenario: Callable[[], Any]) -> None:
    """Run the coroutine function `scenario` with virtual time."""
    virtual_time.run(scenario())

"""Hears what people write to the bot by a long poll, never on the consumer's thread.

What an allowed person says goes into a queue that the consumer empties. Telegram is told to forget it only after the
consumer says that it is durable, so a crash in between brings it once more, and the consumer knows it by its number.
Whatever anybody else says is counted and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from queue import SimpleQueue
from typing import Any

import msgspec

from tapebus_telegram.settings import Commands
from tapebus_telegram.transport import Answer, Transport

BACKOFF_S, BACKOFF_MAX_S = 1.0, 60.0
#: Least time between two questions that bring nothing: not every server waits as long as it is asked to.
LEAST_S = 1.0
#: Another program that reads this bot's updates does not go away by asking again at once.
CONFLICT_S = 30.0
#: Seconds to wait for what was heard to become durable before Telegram is asked for it again.
SETTLE_S = 10.0
#: Telegram starts with new numbers when a bot has heard nothing for a week.
FORGET_S = 6 * 86_400.0


class Said(msgspec.Struct, frozen=True):
    """What an allowed person wrote; ``at`` is Unix seconds by Telegram's clock."""

    update_id: int
    user: int
    chat: int
    text: str
    at: float
    thread_id: int | None = None


class _Person(msgspec.Struct):
    id: int
    is_bot: bool = False
    username: str = ""


class _Chat(msgspec.Struct):
    id: int


class _Message(msgspec.Struct, rename={"sender": "from"}):
    chat: _Chat
    date: float
    sender: _Person | None = None
    text: str = ""
    message_thread_id: int | None = None
    is_topic_message: bool = False


class _Update(msgspec.Struct):
    update_id: int
    message: _Message | None = None


class Listener:
    """`listen` runs as a coroutine on the loop that also sends; `settle` is called by the consumer's thread, and the
    figures may be read by all.

    `names` are the commands there are, `receivers` the configured chats.
    `confirmed` is the last update known to be done with and `confirmed_at` when that was (Unix seconds).
    """

    def __init__(
        self,
        commands: Commands,
        names: Collection[str],
        receivers: Iterable[int | str],
        confirmed: int,
        confirmed_at: float,
        log: logging.Logger,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.inbox: SimpleQueue[Said] = SimpleQueue()
        #: What was not taken, by reason.
        self.ignored: Counter[str] = Counter()
        #: Why nothing is heard at the moment.
        self.trouble = ""
        #: The bot's own name, as soon as Telegram has told it.
        self.username = ""
        self._commands = commands
        self._names = names
        self._receivers = tuple(receivers)
        self._confirmed, self._confirmed_at = confirmed, confirmed_at
        self._log = log
        self._clock = clock
        self._failures = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bell = asyncio.Event()

    def settle(self, update_id: int) -> None:
        """All that was said up to `update_id` is dealt with, durably."""
        loop = self._loop
        if loop is not None:
            # the loop may be closing at this moment
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._settle, update_id)

    def _settle(self, update_id: int) -> None:
        if update_id > self._confirmed:
            self._confirmed, self._confirmed_at = update_id, self._clock()
        self._bell.set()

    async def listen(self, api: Transport) -> None:
        """Hear until cancelled, or until the token is refused."""
        self._loop = asyncio.get_running_loop()
        while True:
            begun = self._loop.time()
            try:
                answer = await self._ask(api)
                if answer.ok:
                    self._failures, self.trouble = 0, ""
                    await self._take(answer.result)
                    if not answer.result:
                        await asyncio.sleep(max(0.0, LEAST_S - (self._loop.time() - begun)))
                    continue
            except Exception as error:
                # only the class: an error of the HTTP client may hold the address, and the address the token
                answer = Answer(0, f"unexpected {type(error).__name__}")
            if not await self._wait_after(answer):
                return

    async def _ask(self, api: Transport) -> Answer:
        if not self.username:
            answer = await api.call("getMe", {})
            if not answer.ok:
                return answer
            self.username = str((answer.result or {}).get("username") or "").lower() or "?"
        payload: dict[str, Any] = {"timeout": self._commands.poll_s, "allowed_updates": ["message"]}
        if self._confirmed and not self._is_forgotten():
            payload["offset"] = self._confirmed + 1
        return await api.call("getUpdates", payload)

    def _is_forgotten(self) -> bool:
        return self._clock() - self._confirmed_at > FORGET_S

    async def _wait_after(self, answer: Answer) -> bool:
        """Wait as the failed `answer` deserves; False where asking again is in vain."""
        told = bool(self.trouble)
        self.trouble = f"{answer.code or ''} {answer.description}".strip()
        if answer.code in (401, 404):
            self._log.error("commands are not heard: %s; put a valid token in place and restart", self.trouble)
            return False
        if not told:
            self._log.warning("commands are not heard for now: %s", self.trouble)
        delay = min(BACKOFF_S * 2.0 ** min(self._failures, 10), BACKOFF_MAX_S)
        self._failures += 1
        if answer.code == 429:
            delay = max(answer.retry_after, 1.0)
        elif answer.code == 409:
            delay = max(delay, CONFLICT_S)
        await asyncio.sleep(delay)
        return True

    async def _take(self, updates: Any) -> None:
        """Hand over what allowed people said; returns when that is durable, or after `SETTLE_S`."""
        if self._is_forgotten():
            self._confirmed = 0
        last = heard = 0
        for each in updates if isinstance(updates, list) else ():
            number = each.get("update_id") if isinstance(each, dict) else None
            if not isinstance(number, int):
                continue
            last = number
            said = self._said(each)
            if said is not None:
                heard = number
                self.inbox.put(said)
        if not heard:
            if last:
                self._confirmed, self._confirmed_at = last, self._clock()
            return
        try:
            async with asyncio.timeout(SETTLE_S):
                while self._confirmed < heard:
                    self._bell.clear()
                    await self._bell.wait()
        except TimeoutError:
            return
        self._confirmed = max(self._confirmed, last)  # behind what was heard there may be more that nobody wants

    def _said(self, update: Any) -> Said | None:
        try:
            message = msgspec.convert(update, _Update, strict=False).message
        except msgspec.ValidationError:
            self.ignored["unreadable"] += 1
            return None
        if message is None or message.sender is None or message.sender.is_bot:
            self.ignored["no_person"] += 1
            return None
        if not self._commands.hears(message.sender.id, message.chat.id, self._receivers):
            self.ignored["strangers"] += 1
            return None
        if not message.text.startswith("/") or not self._is_for_us(message):
            self.ignored["no_command"] += 1
            return None
        thread = message.message_thread_id if message.is_topic_message else None
        return Said(update["update_id"], message.sender.id, message.chat.id, message.text, message.date, thread)

    def _is_for_us(self, message: _Message) -> bool:
        """In a group a command may be another bot's: named after it, ``/status@other_bot``, or one we do not know."""
        name, at, bot = message.text.split(maxsplit=1)[0].partition("@")
        if at:
            return bot.lower() == self.username
        alone = message.sender is not None and message.chat.id == message.sender.id
        return alone or name.lower() in self._names

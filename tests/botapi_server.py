"""A strict Bot API server of our own, with its limits enforced, fault injection and a transcript.

It runs on the loop of whoever enters it with ``async with``, or on a thread of its own with ``with``. The wording of
its errors is Telegram's. Nothing here is taken from the code under test: the limits, the lengths and the HTML rules
are written down a second time.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from html import unescape
from typing import Any
from urllib.parse import parse_qsl

_TAGS = {"b", "strong", "i", "em", "u", "ins", "s", "strike", "del", "code", "pre", "a", "blockquote", "tg-spoiler"}
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9-]*)((?:\s+[a-z-]+(?:=\"[^\"<>]*\")?)*)\s*>")
_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|#\d+|#x[0-9a-fA-F]+);")


def visible(html: str) -> str:
    """Text of Telegram HTML as a reader sees it; ValueError where Telegram answers "can't parse entities"."""
    text, open_tags, at = "", [], 0

    def plain(part: str) -> str:
        return _ENTITY.sub(lambda found: unescape(found[0]), part)

    while (begin := html.find("<", at)) >= 0:
        text += plain(html[at:begin])
        found = _TAG.match(html, begin)
        offset = len(html[:begin].encode())
        if found is None:
            raise ValueError(f"Unclosed start tag at byte offset {offset}")
        closing, tag = found[1], found[2].lower()
        if closing:
            if not open_tags or open_tags.pop() != tag:
                raise ValueError(f"Unexpected end tag at byte offset {offset}")
        elif tag not in _TAGS:
            raise ValueError(f'Unsupported start tag "{tag}" at byte offset {offset}')
        else:
            open_tags.append(tag)
        at = found.end()
    if open_tags:
        raise ValueError(f'Can\'t find end tag corresponding to start tag "{open_tags[-1]}"')
    return text + plain(html[at:])


def failure(code: int, description: str, **parameters: int) -> dict[str, Any]:
    body: dict[str, Any] = {"ok": False, "error_code": code, "description": description}
    return {**body, "parameters": parameters} if parameters else body


def too_many(seconds: int) -> dict[str, Any]:
    return failure(429, f"Too Many Requests: retry after {seconds}", retry_after=seconds)


TOO_MANY = too_many(3)
RESTART = failure(500, "Internal Server Error: restart")
BLOCKED = failure(403, "Forbidden: bot was blocked by the user")
NO_CHAT = failure(400, "Bad Request: chat not found")
NO_THREAD = failure(400, "Bad Request: message thread not found")
BAD_ENTITIES = failure(400, "Bad Request: can't parse entities: Unsupported start tag")
TOO_LONG = failure(400, "Bad Request: message is too long")
NO_EDIT = failure(400, "Bad Request: message to edit not found")
NOT_MODIFIED = failure(
    400,
    "Bad Request: message is not modified: specified new message content and reply markup are exactly the same as a "
    "current content and reply markup of the message",
)
UNAUTHORIZED = failure(401, "Unauthorized")
NOT_FOUND = failure(404, "Not Found")
CONFLICT = failure(
    409,
    "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running",
)
BAD_GATEWAY = b"<html>502 Bad Gateway</html>"
# What can happen to a connection instead of an answer. LOSE takes the message first.
DROP, RESET, HALF, HANG, LOSE = "drop", "reset", "half", "hang", "lose"


class Rule:
    """Telegram's limit of `most` messages in any `seconds`, checked against all times so far."""

    def __init__(self, name: str, most: int, seconds: float) -> None:
        self.name, self.most, self.seconds = name, most, seconds
        self.times: dict[Any, deque[float]] = defaultdict(deque)

    def count(self, key: Any, now: float) -> float:
        """Note one more message; seconds until it would have been allowed, 0 when it is."""
        times = self.times[key]
        # What is a whole window away no longer counts; the tolerance is that of adding floats.
        while times and times[0] <= now - self.seconds + 1e-6:
            times.popleft()
        times.append(now)
        return times[0] + self.seconds - now if len(times) > self.most else 0.0


class BotApi:
    """``faults`` are answered first, one per message (None lets one through); ``accepted`` is the transcript.

    ``chats`` are the known ones (None: all are) with the topics that exist in them, ``migrated`` leads from a group to
    its supergroup, ``blocked`` are the people who do not want the bot. ``broken`` lists every breach of a limit.
    """

    def __init__(self, token: str, clock: Callable[[], float] = time.monotonic, overall: int = 25) -> None:
        self.token = token
        self.faults: deque[Any] = deque()
        self.accepted: list[dict[str, Any]] = []
        self.refused: list[tuple[float, int, Any]] = []
        self.lost = 0
        self.calls = 0
        self.chats: dict[int | str, set[int]] | None = None
        self.migrated: dict[int, int] = {}
        self.blocked: set[int | str] = set()
        self.broken: list[str] = []
        #: What was said and not yet confirmed by an `offset` above it, and the last number given and handed over.
        self.updates: list[dict[str, Any]] = []
        self.said = self.handed = 0
        #: Answers to the next questions for updates, and the offsets of all of them so far (0: none given).
        self.polls: deque[Any] = deque()
        self.offsets: list[int] = []
        self.texts: dict[tuple[Any, int], str] = {}
        self.url = ""
        #: Seconds on the way to the server, and as many again on the way back.
        self.lag: Callable[[], float] = lambda: 0.0
        self._clock = clock
        self._rules = (Rule("chat", 1, 1.0), Rule("group", 20, 60.0), Rule("overall", overall, 1.0))
        self._poll: asyncio.Future[None] | None = None
        self._news: asyncio.Event | None = None
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def connected(self) -> int:
        """Connections that are open."""
        return len(self._writers)

    # -- running --------------------------------------------------------------------------------

    async def __aenter__(self) -> BotApi:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    def __enter__(self) -> BotApi:
        ready, self._end = threading.Event(), threading.Event()

        async def run() -> None:
            async with self:
                ready.set()
                await asyncio.to_thread(self._end.wait)

        self._thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._one(head, reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _one(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection goes on."""
        line, *headers = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in headers)}
        body = await reader.readexactly(int(fields.get("content-length", "0")))
        path = line.split(" ")[1]
        await asyncio.sleep(self.lag())
        answer = await self._updates(body) if path == f"/bot{self.token}/getUpdates" else self.answer(path, body)
        if answer == HANG:
            await asyncio.sleep(3600)
        if answer == RESET:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        if isinstance(answer, str) and answer != HALF:
            return False
        status = 502 if isinstance(answer, bytes) else 200 if answer == HALF else answer.get("error_code", 200)
        data = answer if isinstance(answer, bytes) else json.dumps({"ok": True} if answer == HALF else answer).encode()
        length = len(data) + (100 if answer == HALF else 0)
        await asyncio.sleep(self.lag())
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, length) + data)
        await writer.drain()
        return answer != HALF

    # -- methods --------------------------------------------------------------------------------

    def answer(self, path: str, body: bytes) -> Any:
        """The answer to a call, or what happens to its connection."""
        self.calls += 1
        head, _, method = path[1:].partition("/")
        if head != f"bot{self.token}":
            return UNAUTHORIZED if re.fullmatch(r"bot\d+:[\w-]{30,}", head) else NOT_FOUND
        if method == "getMe":
            return {"ok": True, "result": {"id": 1, "is_bot": True, "first_name": "bot", "username": "a_bot"}}
        if method not in ("sendMessage", "editMessageText"):
            return NOT_FOUND
        call = _parameters(body)
        now = self._clock()
        broken = self._judge(call.get("chat_id"), now)
        fault = self.faults.popleft() if self.faults else None
        if fault is not None and fault != LOSE:
            if isinstance(fault, dict):
                self.refused.append((now, fault["error_code"], call.get("chat_id")))
            return fault
        answer = too_many(math.ceil(broken)) if broken else self._message(method, call, now)
        if fault == LOSE:
            self.lost += answer["ok"]
            return DROP
        if not answer["ok"]:
            self.refused.append((now, answer["error_code"], call.get("chat_id")))
        return answer

    def _judge(self, chat: Any, now: float) -> float:
        """Count one call against every limit; seconds it comes too early."""
        group = isinstance(chat, str) or (isinstance(chat, int) and chat < 0)
        keys = {"chat": chat, "group": chat if group else None, "overall": "all"}
        early = 0.0
        for rule in self._rules:
            if keys[rule.name] is not None and (wait := rule.count(keys[rule.name], now)):
                self.broken.append(f"{rule.name} {keys[rule.name]} at {now:.3f}: {wait:.3f} s too early")
                early = max(early, wait)
        return early

    def _message(self, method: str, call: dict[str, Any], now: float) -> dict[str, Any]:
        chat = call.get("chat_id")
        refusal = self._place(chat, call.get("message_thread_id"))
        if refusal is not None:
            return refusal
        text = call.get("text", "")
        if call.get("parse_mode") == "HTML":
            try:
                text = visible(text)
            except ValueError as error:
                return failure(400, f"Bad Request: can't parse entities: {error}")
        elif "parse_mode" in call:
            return failure(400, "Bad Request: unsupported parse_mode")
        text = text.strip()
        if not text:
            return failure(400, "Bad Request: message text is empty")
        if len(text.encode("utf-16-le", "surrogatepass")) // 2 > 4096:
            return TOO_LONG
        number = len(self.accepted) + 1
        if method == "editMessageText":
            number = call.get("message_id", 0)
            if (chat, number) not in self.texts:
                return NO_EDIT
            if self.texts[chat, number] == text:
                return NOT_MODIFIED
        self.texts[chat, number] = text
        self.accepted.append({**call, "method": method, "visible": text, "at": now, "number": number})
        about = {"id": chat, "type": "private" if isinstance(chat, int) and chat > 0 else "supergroup"}
        return {"ok": True, "result": {"message_id": number, "date": int(now), "chat": about, "text": text}}

    def _place(self, chat: Any, thread: Any) -> dict[str, Any] | None:
        """Why nothing can be sent there."""
        if chat is None or chat == "":
            return failure(400, "Bad Request: chat_id is empty")
        if chat in self.migrated:
            new = self.migrated[chat]
            text = "Bad Request: group chat was upgraded to a supergroup chat"
            return failure(400, text, migrate_to_chat_id=new)
        if self.chats is not None and chat not in self.chats:
            return NO_CHAT
        if chat in self.blocked:
            return BLOCKED
        if thread is not None and self.chats is not None and thread not in self.chats[chat]:
            return NO_THREAD
        return None

    # -- updates --------------------------------------------------------------------------------

    def say(self, text: str, user: int, chat: int | None = None, **more: Any) -> None:
        """Someone writes to the bot; from any thread."""
        assert self._loop is not None and self._news is not None
        chat = user if chat is None else chat
        person = {"id": user, "is_bot": False, "first_name": "P"}
        about = {"id": chat, "type": "private" if chat > 0 else "supergroup"}
        self.said += 1
        message = {"message_id": 1000 + self.said, "date": int(time.time()), "chat": about, "from": person}
        self.updates.append({"update_id": self.said, "message": {**message, "text": text, **more}})
        self._loop.call_soon_threadsafe(self._news.set)

    async def _updates(self, body: bytes) -> Any:
        """A long poll: what is new, or nothing after `timeout`; a second one ends the first with a conflict."""
        assert self._news is not None
        self.calls += 1
        call = _parameters(body)
        self.offsets.append(call.get("offset", 0))
        self.updates = [each for each in self.updates if each["update_id"] >= self.offsets[-1]]
        if self.polls:
            return self.polls.popleft()
        if self._poll is not None and not self._poll.done():
            self._poll.set_result(None)
        mine = self._poll = asyncio.get_running_loop().create_future()
        end = asyncio.get_running_loop().time() + float(call.get("timeout", 0))
        while True:
            found = list(self.updates)
            left = end - asyncio.get_running_loop().time()
            if mine.done():
                return CONFLICT
            if found or left <= 0:
                mine.set_result(None)
                found = found[: int(call.get("limit", 100))]
                self.handed = max([self.handed, *(each["update_id"] for each in found)])
                return {"ok": True, "result": found}
            self._news.clear()
            news = asyncio.ensure_future(self._news.wait())
            await asyncio.wait({news, mine}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            news.cancel()


def _parameters(body: bytes) -> dict[str, Any]:
    """What a call was given, in a form or as JSON; numbers as numbers."""
    if body.startswith(b"{"):
        return dict(json.loads(body))
    given: dict[str, Any] = dict(parse_qsl(body.decode(), keep_blank_values=True))
    for name in ("chat_id", "message_id", "message_thread_id", "offset", "limit", "timeout"):
        if re.fullmatch(r"-?\d+", given.get(name, "")):
            given[name] = int(given[name])
    return given

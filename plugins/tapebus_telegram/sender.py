"""The way out: one coroutine that sends what the limits allow, one call at a time, and reads each answer.

One call at a time is what bounds the repeats after a crash to one; the limits, not the round trips, set the pace.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from tapebus_telegram.journal import Journal, Sent
from tapebus_telegram.limits import Limits
from tapebus_telegram.markup import cut, units
from tapebus_telegram.outbox import Entry, Outbox, place_of, settle
from tapebus_telegram.quiet import Policy
from tapebus_telegram.transport import Answer, Transport

#: A chat or topic is given up after this many refusals in a row.
CHAT_FAILURES = 3
#: A message that gets nothing but 5xx for this long is given up, provided the server works otherwise.
GIVE_UP_S = 3600.0
BACKOFF_S, BACKOFF_MAX_S = 1.0, 60.0
#: Asked for on top of ``retry_after``, because Telegram rounds down.
MARGIN_S = 0.1
#: Telegram holds back the answer to repeated conflicts for as long.
CONFLICT_S = 3.0
#: A call that the end of a process cut off may still reach Telegram this much later.
LATE_S = 2.0
#: Stands for all chats in ``refused``.
EVERYWHERE = "*"
_CHAT_REFUSED = (
    "chat not found",
    "chat_id is empty",
    "not enough rights",
    "have no rights",
    "need administrator rights",
    "group chat was deactivated",
    "chat was deleted",
    "chat_write_forbidden",
    "thread not found",
    "topic_closed",
    "peer_id_invalid",
)


class Notice:
    """Something a person should know; becomes an ``alert`` on the consumer's thread."""

    __slots__ = ("message", "name", "severity", "state")

    def __init__(self, name: str, severity: str, message: str, state: str = "raised") -> None:
        self.name, self.severity, self.message, self.state = name, severity, message, state


class Sender:
    """Runs as a coroutine on one loop; `wake` and `finish` are called on that loop, figures may be read anywhere.

    It shares `outbox` and `policy` with the consumer's thread under the outbox's lock, never held across a call or
    the disk.
    `clock` is monotonic seconds, `wall` wall-clock seconds for what must outlive the process. ``moved`` and
    ``refused`` are kept by the owner across restarts; what it has yet to write down waits in ``unsaved``.
    """

    def __init__(
        self,
        outbox: Outbox,
        policy: Policy,
        journal: Journal,
        transport: Transport,
        log: logging.Logger,
        moved: dict[str, int],
        refused: set[str],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.outbox = outbox
        self.policy = policy
        self.journal = journal
        self.transport = transport
        self.log = log
        self.moved = moved
        self.refused = refused
        self.stopped = ""
        self.disabled: dict[str, str] = {}
        self.last_error = ""
        self.failures = 0
        self.notices: deque[Notice] = deque()
        self.unsaved: deque[tuple[str, bytes | None]] = deque()
        self._clock = clock
        self._wall = wall
        self._limits = Limits()
        self._halted_until = float("-inf")
        self._refusals: dict[str, int] = {}
        self._failing: dict[str, float] = {}
        self._bell = asyncio.Event()
        self._closing = False
        self._resume()

    def _resume(self) -> None:
        """Take over what the process before this one had used up of the limits."""
        now, wall = self._clock(), self._wall()
        if (cut_off := self.journal.in_flight) is not None:
            with contextlib.suppress(OSError):
                self.journal.over(cut_off.chat, wall + LATE_S)
        for call in self.journal.calls:
            # a clock set back must not put a call far into the future
            self._limits.take(call.chat, now - max(-LATE_S, wall - call.at))
        left = self.journal.halted_until - wall
        if left > 0.0:
            self._halted_until = now + min(left, BACKOFF_MAX_S * 60)

    # -- the loop -------------------------------------------------------------------------------

    def wake(self) -> None:
        """Look at the outbox again."""
        self._bell.set()

    def finish(self) -> None:
        """End `run` after the call that is under way."""
        self._closing = True
        self._bell.set()

    async def run(self) -> None:
        """Send until `finish`; raises nothing but cancellation."""
        while not self._closing:
            self._bell.clear()
            try:
                entry, at = self._next()
                if entry is not None:
                    await self._send(entry)
                    continue
            except OSError as error:
                self._backoff(f"journal {self.journal.path}: {error.strerror}")
                at = self._halted_until
            except Exception as error:
                self._backoff(f"unexpected {type(error).__name__}")
                at = self._halted_until
            await self._wait(at)

    async def run_with(self, jobs: Iterable[Callable[[Transport], Coroutine[Any, Any, None]]]) -> None:
        """`run`, with `jobs` on the same loop that end with it; then close the transport."""
        tasks = [asyncio.create_task(job(self.transport)) for job in jobs]
        try:
            await self.run()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.transport.close()

    async def _wait(self, at: float) -> None:
        wait = None if at == float("inf") else max(0.0, at - self._clock())
        # not wait_for: before Python 3.12 it can swallow a cancellation
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._bell.wait()

    def _next(self) -> tuple[Entry | None, float]:
        """The entry to send now, or None and when to look again."""
        now = self._clock()
        if self.stopped:
            return None, float("inf")
        if now < self._halted_until:
            return None, self._halted_until
        with self.outbox.lock:
            entry, at = self.outbox.next(self._ready_at, now)
            self.outbox.flying = entry.key if entry is not None else ""
        return entry, at

    def _ready_at(self, entry: Entry) -> float:
        ready_at = self._limits.ready_at(self.target(entry.chat))
        wait = self.policy.wait(entry.chat) if entry.disturbs else 0.0
        return max(ready_at, self._clock() + wait) if wait > 0.0 else ready_at

    def target(self, chat: int | str) -> int | str:
        """The id to use for `chat`: a group that became a supergroup has a new one."""
        return self.moved.get(str(chat), chat)

    # -- one call -------------------------------------------------------------------------------

    async def _send(self, entry: Entry) -> None:
        chat = self.target(entry.chat)
        with self.outbox.lock:
            method, payload = self._request(entry, chat)
            group = f"{entry.place}|{entry.group}" if entry.group else ""
            sent = Sent(entry.key, group, entry.last_seq, 0, entry.repeats)
        try:
            self.journal.begun(entry.key, chat, self._wall())
            try:
                answer = await self.transport.call(method, payload)
            finally:
                self._limits.take(chat, self._clock())
            if answer.ok or (answer.code == 400 and "message is not modified" in answer.description.lower()):
                sent.message_id = answer.message_id or entry.edits
                self._accepted(entry, sent)
                self.journal.over(chat, self._wall(), sent)
            else:
                halt = self._refused(entry, answer)
                self.journal.over(chat, self._wall(), halt=halt)
                if self._is_hopeless(entry) and (await self.transport.call("getMe", {})).ok:
                    self._give_up(entry)
        finally:
            with self.outbox.lock:
                self.outbox.flying = ""

    def _request(self, entry: Entry, chat: int | str) -> tuple[str, dict[str, Any]]:
        payload: dict[str, Any] = {
            "chat_id": chat,
            "text": entry.text(),
            "link_preview_options": {"is_disabled": True},
        }
        if not entry.as_plain:
            payload["parse_mode"] = "HTML"
        if entry.edits:
            return "editMessageText", {**payload, "message_id": entry.edits}
        if entry.silent:
            payload["disable_notification"] = True
        if entry.thread_id is not None:
            payload["message_thread_id"] = entry.thread_id
        return "sendMessage", payload

    def _accepted(self, entry: Entry, sent: Sent) -> None:
        self.failures = 0
        self._refusals.pop(entry.place, None)
        self._failing.pop(entry.key, None)
        for place in self.refused & {entry.place, EVERYWHERE}:
            self.refused.discard(place)
            self.unsaved.append((f"refused/{place}", None))
            self._notice(place, "info", "messages are taken again", "cleared")
        with self.outbox.lock:
            if entry.disturbs:
                self.policy.sent(entry.chat)
            settle(self.outbox, entry, sent)

    # -- what an answer means -------------------------------------------------------------------

    def _refused(self, entry: Entry, answer: Answer) -> float:
        """React to anything but success; until when (wall clock) Telegram asked to wait, else 0."""
        text = answer.description.lower()
        self.outbox.counts[f"errors.{answer.code or 'network'}"] += 1
        if answer.code == 429:
            self.failures = 0
            seconds = max(answer.retry_after, 1.0) + MARGIN_S
            self._halt(seconds, f"Telegram asks to wait {answer.retry_after:g} s")
            return self._wall() + seconds
        if answer.code in (401, 404):
            self._stop(f"{answer.code} {answer.description}: the token is wrong or revoked")
        elif answer.code == 409:
            self._halt(CONFLICT_S, f"{answer.code} {answer.description}")
        elif answer.migrate_to:
            self._migrated(entry.chat, answer.migrate_to)
        elif answer.code == 403 or (answer.code == 400 and any(each in text for each in _CHAT_REFUSED)):
            self._place_refused(entry, answer)
        elif 400 <= answer.code < 500:
            self._bad_request(entry, answer, text)
        else:
            return self._unavailable(entry, answer)
        return 0.0

    def _bad_request(self, entry: Entry, answer: Answer, text: str) -> None:
        """Mend the message where the answer says how; drop it otherwise."""
        with self.outbox.lock:
            if "can't parse entities" in text and not entry.as_plain:
                entry.as_plain = True
            elif "too long" in text and units(entry.plain) > 64:
                entry.as_plain, entry.plain = True, cut(entry.plain, units(entry.plain) // 2)
            elif entry.edits and "message" in text:
                entry.edits = 0  # the earlier message is gone or too old to edit: say it anew
            else:
                self.outbox.finish(entry, "dropped", "refused")
                self.last_error = f"{answer.code} {answer.description}"
                self.log.warning("telegram refused a message of %s: %s", entry.topic, self.last_error)
            self.outbox.touch(entry)

    def _stop(self, reason: str) -> None:
        self.stopped = self.last_error = reason
        self.log.error("telegram stopped: %s; put a valid token in place and restart", reason)
        self._refuse(EVERYWHERE, reason)
        self._notice(EVERYWHERE, "critical", f"nothing is sent: {reason}")

    def _migrated(self, chat: int | str, target: int) -> None:
        self.moved[str(chat)] = target
        self.unsaved.append((f"moved/{chat}", str(target).encode()))
        self.log.warning("chat %s moved to %s: update the configuration", chat, target)

    def _place_refused(self, entry: Entry, answer: Answer) -> None:
        place = entry.place
        count = self._refusals[place] = self._refusals.get(place, 0) + 1
        self.last_error = f"chat {place}: {answer.code} {answer.description}"
        if count < CHAT_FAILURES:
            return
        reason = self.disabled[place] = f"{answer.code} {answer.description}"
        self._refuse(place, reason)
        self.log.error("chat %s is disabled until restart: %s", place, reason)
        self._notice(place, "error", f"chat {place} is disabled: {reason}")
        with self.outbox.lock:
            for each in self.outbox.entries():
                if place_of(each.chat, each.thread_id) == place:
                    self.outbox.finish(each, "dropped", "chat disabled")

    def _refuse(self, place: str, reason: str) -> None:
        """Remember over a restart that `place` has an alert to clear."""
        self.refused.add(place)
        self.unsaved.append((f"refused/{place}", reason.encode()))

    def _notice(self, place: str, severity: str, message: str, state: str = "raised") -> None:
        name = "telegram" if place == EVERYWHERE else f"telegram chat {place}"
        self.notices.append(Notice(name, severity, message, state))

    def _unavailable(self, entry: Entry, answer: Answer) -> float:
        if answer.code:
            self._failing.setdefault(entry.key, self._clock())
        self._backoff(answer.description or f"server error {answer.code}")
        return 0.0

    def _is_hopeless(self, entry: Entry) -> bool:
        return self._clock() - self._failing.get(entry.key, float("inf")) >= GIVE_UP_S

    def _give_up(self, entry: Entry) -> None:
        del self._failing[entry.key]
        with self.outbox.lock:
            self.outbox.finish(entry, "dropped", "server errors")

    def _backoff(self, reason: str) -> None:
        delay = min(BACKOFF_S * 2.0 ** min(self.failures, 10), BACKOFF_MAX_S)
        self.failures += 1
        self._halt(delay, reason)

    def _halt(self, seconds: float, reason: str) -> None:
        self._halted_until = self._clock() + seconds
        self.last_error = reason
        self.log.warning("telegram waits %.1f s: %s", seconds, reason)

    @property
    def halted_s(self) -> float:
        return max(0.0, self._halted_until - self._clock())

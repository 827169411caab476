"""From events to messages: what is queued, when it is sent, and what each answer of Telegram means."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from tapebus.consumer import Context
from tapebus_telegram.journal import Journal, Sent
from tapebus_telegram.limits import Limits
from tapebus_telegram.outbox import Entry, Outbox
from tapebus_telegram.quiet import Policy
from tapebus_telegram.render import HIGH, LOW, Message, Renderer
from tapebus_telegram.settings import Chat, Settings
from tapebus_telegram.transport import Answer, Transport
from tapebus_trading.symbols import Registry

#: A chat is given up after this many refusals in a row.
CHAT_FAILURES = 3
#: A message the server keeps failing on (5xx) is given up after this many tries; a dead network never counts.
MAX_ATTEMPTS = 10
BACKOFF_S, BACKOFF_MAX_S = 1.0, 60.0
#: Seconds in which one `pump` may start calls.
PUMP_S = 1.0
#: Asked for on top of ``retry_after``, because Telegram rounds down.
MARGIN_S = 0.1
_DRY_CHAT = Chat(id="dry-run")
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


class Relay:
    """The state machine behind the consumer; runs on the consumer's thread, reads of its figures are safe anywhere.

    Without `transport` nothing is sent: every message goes to the outbox as ``dry_run``. `clock` is monotonic
    seconds. `handle` may raise for a broken event (the fence's business); `pump` never raises.
    """

    def __init__(
        self,
        context: Context,
        settings: Settings,
        transport: Transport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.context = context
        self.settings = settings
        self.chats = settings.chats or (_DRY_CHAT,)
        self.outbox = Outbox(context.state, settings.queue, settings.keep)
        self.stopped = ""
        self.disabled: dict[int | str, str] = {}
        self.last_error = ""
        self._transport = transport
        self._clock = clock
        self.policy = Policy(settings, self.chats, context.state)
        symbols = Registry(context.shared, settings.symbols, "plugins.telegram.symbols")
        self._renderer = Renderer(symbols, settings.mask_numbers)
        self._limits = Limits()
        self._halted_until = float("-inf")
        self._failures = 0
        self._refusals: dict[int | str, int] = {}
        self._journal = Journal(context.data_dir / "telegram.journal") if transport is not None else None
        if self._journal is not None:
            self._reconcile(self._journal)

    @property
    def dry(self) -> bool:
        return self._transport is None

    def _reconcile(self, journal: Journal) -> None:
        """Take out of the queue what had been sent before its state was saved."""
        for entry in self.outbox.entries():
            if (sent := journal.find(entry.key)) is not None:
                entry.message_id = sent.message_id
                self.outbox.finish(entry, "sent")

    # -- from the bus ---------------------------------------------------------------------------

    def handle(self, batch: Iterable[Any]) -> None:
        for event in batch:
            message = self._renderer.message(event)
            if message is None:
                continue
            for chat in self.chats:
                if self.policy.wants(chat, event.event_type):
                    self._accept(event, chat, message)
        self.pump(0.0)

    def _accept(self, event: Any, chat: Chat, message: Message) -> None:
        key = f"{event.bus_seq:016d}/{chat.id}"
        if key in self.outbox or self._already_sent(key, chat, message, event.bus_seq):
            self.outbox.counts["already_sent"] += 1
            return
        earlier = self.outbox.latest(chat.id, message.group)
        if earlier is not None and not self._recent(earlier, event):
            earlier = None
        if earlier is not None and earlier.status in ("queued", "dry_run"):
            self.outbox.merge(earlier, message, event.bus_seq)
            return
        entry = Entry(
            key=key,
            chat=chat.id,
            topic=event.event_type,
            html=message.html,
            plain=message.plain,
            priority=message.priority,
            bus_seq=event.bus_seq,
            last_seq=event.bus_seq,
            at=event.timestamp,
            group=message.group,
            thread_id=chat.thread_of(event.event_type),
        )
        if earlier is not None and earlier.message_id:
            entry.edits, entry.repeats, entry.priority = earlier.message_id, earlier.repeats + 1, LOW
            self.outbox.counts["merged"] += 1
        else:
            waiting = self.outbox.waiting_for(chat.id)
            word = self.policy.word(chat, event.event_type, message, event.bus_seq, waiting)
            if word in ("held", "off"):
                self.outbox.counts[word] += 1
                return
            entry.silent = word == "silent"
        self._queue(entry)

    def tell_digests(self) -> None:
        """Queue the digests whose time has come."""
        for digest in self.policy.due(self.outbox.waiting_for):
            chat = digest.chat
            self.post(chat.id, digest.key, "digest", digest.html, digest.plain, HIGH, chat.thread_id, digest.last_seq)

    def post(
        self,
        chat: int | str,
        key: str,
        topic: str,
        html: str,
        plain: str,
        priority: int,
        thread_id: int | None = None,
        bus_seq: int = 0,
    ) -> None:
        """Queue a message that is no event; what was sent under the same `key` before is not sent again."""
        if key in self.outbox or (self._journal is not None and self._journal.find(key) is not None):
            self.outbox.counts["already_sent"] += 1
            return
        entry = Entry(key, chat, topic, html, plain, priority, bus_seq, bus_seq, time.time(), thread_id=thread_id)
        self._queue(entry)

    def _queue(self, entry: Entry) -> None:
        if self.dry:
            self.outbox.finish(entry, "dry_run")
        elif entry.chat in self.disabled:
            self.outbox.finish(entry, "dropped", "chat disabled")
        else:
            self.outbox.add(entry)

    def _already_sent(self, key: str, chat: Chat, message: Message, bus_seq: int) -> bool:
        if self._journal is None:
            return False
        if self._journal.find(key) is not None:
            return True
        group = self._journal.group(f"{chat.id}|{message.group}" if message.group else "")
        return group is not None and bus_seq <= group.last_seq

    def _recent(self, earlier: Entry, event: Any) -> bool:
        return bool(abs(event.timestamp - earlier.at) <= self.settings.coalesce_s)

    # -- to Telegram ----------------------------------------------------------------------------

    def pump(self, budget: float = PUMP_S) -> None:
        """Send what the limits allow now, starting no call once `budget` seconds are over (but always trying one)."""
        if self._transport is None or self._journal is None:
            return
        end = self._clock() + budget
        try:
            while not self.stopped and self._clock() >= self._halted_until:
                entry = self._next(self._clock())
                if entry is None:
                    return
                self._send(entry, self._transport, self._journal)
                if self._clock() >= end:
                    return
        except OSError as error:
            self._backoff(f"journal {self.context.data_dir / 'telegram.journal'}: {error.strerror}")
        except Exception as error:
            self._backoff(f"unexpected {type(error).__name__}")

    def _next(self, now: float) -> Entry | None:
        return next((e for e in self.outbox.ordered() if self._may_leave(e, now)), None)

    def _may_leave(self, entry: Entry, now: float) -> bool:
        if not entry.edits and self.policy.wait(entry.chat):
            return False
        return self._limits.ready_at(self._target(entry.chat)) <= now

    def _target(self, chat: int | str) -> int | str:
        """The id to use for `chat`: a group that became a supergroup has a new one."""
        moved = self.context.state.get(f"moved/{chat}")
        return chat if moved is None else int(moved)

    def _send(self, entry: Entry, transport: Transport, journal: Journal) -> None:
        method, payload = self._request(entry)
        journal.sending(entry.key)
        self._limits.take(payload["chat_id"], self._clock())
        answer = transport.call(method, payload)
        if answer.ok or (answer.code == 400 and "message is not modified" in answer.description):
            entry.message_id = answer.message_id or entry.edits
            self._failures = 0
            self._refusals.pop(entry.chat, None)
            if not entry.edits:
                self.policy.sent(entry.chat)
            self.outbox.finish(entry, "sent")
            group = f"{entry.chat}|{entry.group}" if entry.group else ""
            journal.sent(Sent(entry.key, group, entry.last_seq, entry.message_id))
        else:
            self._refused(entry, answer)

    def _request(self, entry: Entry) -> tuple[str, dict[str, Any]]:
        payload: dict[str, Any] = {
            "chat_id": self._target(entry.chat),
            "text": entry.text(),
            "link_preview_options": {"is_disabled": True},
        }
        if not entry.as_plain:
            payload["parse_mode"] = "HTML"
        if entry.edits:
            return "editMessageText", {**payload, "message_id": entry.edits}
        if entry.thread_id is not None:
            payload["message_thread_id"] = entry.thread_id
        if entry.silent:
            payload["disable_notification"] = True
        return "sendMessage", payload

    def _refused(self, entry: Entry, answer: Answer) -> None:
        text = answer.description.lower()
        self.outbox.counts[f"errors.{answer.code or 'network'}"] += 1
        if answer.code == 429:
            self._failures = 0
            self._halt(max(answer.retry_after, 1.0) + MARGIN_S, f"Telegram asks to wait {answer.retry_after:g} s")
        elif answer.code in (401, 404):
            self.stopped = f"{answer.code} {answer.description}: the token is wrong or revoked"
            self.last_error = self.stopped
            self.context.log.error("telegram stopped: %s; put a valid token in place and restart", self.stopped)
        elif answer.migrate_to:
            self.context.state[f"moved/{entry.chat}"] = str(answer.migrate_to).encode()
            self.context.log.warning("chat %s moved to %s: update the configuration", entry.chat, answer.migrate_to)
        elif answer.code == 403 or (answer.code == 400 and any(each in text for each in _CHAT_REFUSED)):
            self._chat_refused(entry.chat, answer)
        elif answer.code == 400 and "can't parse entities" in text and not entry.as_plain:
            entry.as_plain = True
            self.outbox.touch(entry)
        elif answer.code == 400 and entry.edits and "message" in text:
            entry.edits = 0  # the earlier message is gone or too old to edit: say it anew
            self.outbox.touch(entry)
        elif 400 <= answer.code < 500:
            self.last_error = f"{answer.code} {answer.description}"
            self.outbox.finish(entry, "dropped", "refused")
        else:
            self._unavailable(entry, answer)

    def _unavailable(self, entry: Entry, answer: Answer) -> None:
        if answer.code:
            entry.attempts += 1
            self.outbox.touch(entry)
            if entry.attempts >= MAX_ATTEMPTS:
                self.outbox.finish(entry, "dropped", "server errors")
        self._backoff(answer.description or f"server error {answer.code}")

    def _backoff(self, reason: str) -> None:
        delay = min(BACKOFF_S * 2.0 ** min(self._failures, 10), BACKOFF_MAX_S)
        self._failures += 1
        self._halt(delay, reason)

    def _halt(self, seconds: float, reason: str) -> None:
        self._halted_until = self._clock() + seconds
        self.last_error = reason
        self.context.log.warning("telegram waits %.1f s: %s", seconds, reason)

    def _chat_refused(self, chat: int | str, answer: Answer) -> None:
        count = self._refusals[chat] = self._refusals.get(chat, 0) + 1
        self.last_error = f"chat {chat}: {answer.code} {answer.description}"
        if count < CHAT_FAILURES:
            return
        self.disabled[chat] = f"{answer.code} {answer.description}"
        self.context.log.error("chat %s is disabled until restart: %s", chat, self.disabled[chat])
        for entry in self.outbox.entries():
            if entry.chat == chat:
                self.outbox.finish(entry, "dropped", "chat disabled")

    def tick(self) -> None:
        """What is due by the clock. A digest leaves with the next turn, when it is durable that it is told."""
        self.pump()
        self.tell_digests()

    def save(self) -> None:
        """Write what changed into the plugin's state."""
        self.outbox.save()
        self.policy.save()

    # -- figures --------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        counts = self.outbox.counts
        if self.stopped:
            return {"status": "error", "message": f"stopped: {self.stopped}"}
        if self.disabled:
            names = ", ".join(f"{chat} ({reason})" for chat, reason in list(self.disabled.items()))
            status = "error" if len(self.disabled) == len(self.chats) else "degraded"
            return {"status": status, "message": f"chats disabled until restart: {names}"}
        if self._failures:
            return {"status": "degraded", "message": f"retrying, {self.outbox.waiting} waiting: {self.last_error}"}
        if self.dry:
            return {"status": "ok", "message": f"dry run: {counts['dry_run']} messages shown, none sent"}
        return {"status": "ok", "message": f"{counts['sent']} sent, {self.outbox.waiting} waiting"}

    def metrics(self) -> dict[str, int | float | str]:
        named = {name: self.outbox.counts[name] for name in ("sent", "dry_run", "dropped", "merged")}
        rest = {name: count for name, count in list(self.outbox.counts.items()) if name not in named}
        wait = max(0.0, self._halted_until - self._clock())
        queue = {"waiting": self.outbox.waiting, "waiting_for_digest": self.policy.held}
        return {**named, **rest, **queue, "disabled_chats": len(self.disabled), "halted_s": wait}

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        if self._journal is not None:
            self._journal.close()

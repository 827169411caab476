"""From events to queued messages, on the consumer's thread; a thread of its own sends them.

The bus never waits for Telegram: the handler only queues, and whatever the network does happens elsewhere.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from tapebus.consumer import Context
from tapebus_telegram.journal import Journal
from tapebus_telegram.outbox import Entry, Outbox, place_of, settle
from tapebus_telegram.quiet import Policy
from tapebus_telegram.render import HIGH, LOW, Message, Renderer
from tapebus_telegram.settings import Chat, Settings
from tapebus_telegram.transport import Transport
from tapebus_trading.symbols import Registry

if TYPE_CHECKING:
    import asyncio

    from tapebus_telegram.sender import Sender

#: Seconds that a call under way at the end gets to be answered.
CLOSE_S = 2.0
_DRY_CHAT = Chat(id="dry-run")


class Relay:
    """Used on the consumer's thread; reads of its figures are safe anywhere.

    Without `transport` nothing is sent: every message goes to the outbox as ``dry_run``. `clock` is monotonic
    seconds, `wall` wall-clock seconds. `handle` may raise for a broken event (the fence's business).
    """

    def __init__(
        self,
        context: Context,
        settings: Settings,
        transport: Transport | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.context = context
        self.settings = settings
        self.chats = settings.chats or (_DRY_CHAT,)
        self.outbox = Outbox(context.state, settings.queue, settings.keep)
        self.sender: Sender | None = None
        #: Shared with the sender's thread: only under the outbox's lock.
        self.policy = Policy(settings, self.chats, context.state, wall)
        self._receivers = {
            topic: [chat for chat in self.chats if self.policy.wants(chat, topic)]
            for topic in settings.relayed(self.chats)
        }
        #: Sees every event the consumer gets, before it is rendered.
        self.observe: Callable[[Any], None] = lambda event: None
        self.symbols = Registry(context.shared, settings.symbols, "plugins.telegram.symbols")
        self._renderer = Renderer(self.symbols, settings.mask_numbers)
        self._wall = wall
        self._journal: Journal | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        if transport is not None:
            # with asyncio and all that comes along, which a dry run does without
            from tapebus_telegram.sender import Sender

            self._journal = Journal(context.data_dir / "telegram.journal")
            self._reconcile(self._journal)
            moved = {name.removeprefix("moved/"): int(to) for name, to in self._stored("moved/")}
            refused = {name.removeprefix("refused/") for name, _ in self._stored("refused/")}
            self.sender = Sender(
                self.outbox, self.policy, self._journal, transport, context.log, moved, refused, clock, wall
            )

    def _stored(self, prefix: str) -> list[tuple[str, bytes]]:
        return [(name, blob) for name, blob in self.context.state.items() if name.startswith(prefix)]

    @property
    def dry(self) -> bool:
        return self.sender is None

    def _reconcile(self, journal: Journal) -> None:
        """Take out of the queue what had been sent before its state was saved."""
        with self.outbox.lock:
            for entry in self.outbox.entries():
                if (sent := journal.find(entry.key)) is not None:
                    settle(self.outbox, entry, sent)

    # -- from the bus ---------------------------------------------------------------------------

    def handle(self, batch: Iterable[Any]) -> None:
        try:
            for event in batch:
                self.observe(event)
                receivers = self._receivers.get(event.event_type)
                message = self._renderer.message(event) if receivers else None
                if message is not None:
                    for chat in receivers or ():
                        self._accept(event, chat, message)
        finally:
            self._wake()

    def _accept(self, event: Any, chat: Chat, message: Message) -> None:
        thread_id = chat.thread_of(event.event_type)
        place = place_of(chat.id, thread_id)
        key = f"{event.bus_seq:016d}/{place}"
        with self.outbox.lock:
            if self._known(key, place, message.group, event.bus_seq):
                self.outbox.counts["already_sent"] += 1
                return
            earlier = self.outbox.latest(place, message.group)
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
                thread_id=thread_id,
            )
            self.outbox.keep_order(entry)
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
        parked: bool = False,
    ) -> None:
        """Queue a message that is no event; what was sent under the same `key` before is not sent again.

        A `parked` one leaves after the next `tick` only, when this unit of work is durable.
        """
        with self.outbox.lock:
            if key in self.outbox or (self._journal is not None and self._journal.find(key) is not None):
                self.outbox.counts["already_sent"] += 1
                return
            entry = Entry(key, chat, topic, html, plain, priority, bus_seq, bus_seq, self._wall(), thread_id=thread_id)
            self._queue(entry, parked)
        self._wake()

    def _queue(self, entry: Entry, parked: bool = False) -> None:
        if self.sender is None:
            if entry.disturbs:
                self.policy.sent(entry.chat)
            self.outbox.finish(entry, "dry_run")
        elif entry.place in self.sender.disabled:
            self.outbox.finish(entry, "dropped", "chat disabled")
        else:
            self.outbox.add(entry, parked)

    def _known(self, key: str, place: str, group: str, bus_seq: int) -> bool:
        """Whether the event `bus_seq` is in the queue or was sent before this process began."""
        if key in self.outbox:
            return True
        if self._journal is None:
            return False
        if self._journal.find(key) is not None:
            return True
        sent = self._journal.group(f"{place}|{group}" if group else "")
        return sent is not None and bus_seq <= sent.last_seq

    def _recent(self, earlier: Entry, event: Any) -> bool:
        return bool(abs(event.timestamp - earlier.at) <= self.settings.coalesce_s)

    def tick(self) -> None:
        """Tell what happened on the way out since the last time and what is due by the clock, and keep it."""
        with self.outbox.lock:
            self.outbox.release()
            digests = list(self.policy.due(self.outbox.waiting_for))
        for digest in digests:
            # Made again after a crash a digest may hold more, so it leaves only when it is durable that it is told.
            chat = digest.chat
            text = (digest.html, digest.plain)
            self.post(chat.id, digest.key, "digest", *text, HIGH, chat.thread_id, digest.last_seq, parked=True)
        self._wake()
        if self.sender is not None:
            while self.sender.notices:
                notice = self.sender.notices.popleft()
                data = {"name": notice.name, "severity": notice.severity, "message": notice.message}
                self.context.emit("alert", {**data, "state": notice.state, "component": self.context.name})
        self.save()

    def save(self) -> None:
        """Write what changed into the plugin's state."""
        self.outbox.save()
        with self.outbox.lock:
            self.policy.save()
        if self.sender is not None:
            while self.sender.unsaved:
                name, blob = self.sender.unsaved.popleft()
                if blob is None:
                    self.context.state.pop(name, None)
                else:
                    self.context.state[name] = blob

    # -- the thread that sends ------------------------------------------------------------------

    def start(self, *jobs: Callable[[Transport], Coroutine[Any, Any, None]]) -> None:
        """Begin to send, and run `jobs` on the same loop; a dry run begins nothing."""
        if self.sender is None:
            return
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self.sender, jobs, started), name="tapebus-telegram-api", daemon=True
        )
        self._thread.start()
        started.wait()

    def _run(self, sender: Sender, jobs: Iterable[Callable[..., Coroutine[Any, Any, None]]], started: Any) -> None:
        import asyncio

        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            started.set()
            runner.run(sender.run_with(jobs))
        # what is woken from now on has nobody to wake
        self._loop = None

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None and self.sender is not None:
            # the loop may be closing at this moment
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.sender.wake)

    def close(self) -> None:
        """End the thread; a call under way gets `CLOSE_S` to be answered, so that it is not made again."""
        loop, thread = self._loop, self._thread
        if loop is not None and self.sender is not None and thread is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.sender.finish)
            thread.join(CLOSE_S)
        if self._journal is not None and (thread is None or not thread.is_alive()):
            self._journal.close()

    # -- figures --------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        counts, sender = self.outbox.counts, self.sender
        if sender is None:
            return {"status": "ok", "message": f"dry run: {counts['dry_run']} messages shown, none sent"}
        if sender.stopped:
            return {"status": "error", "message": f"stopped: {sender.stopped}"}
        if sender.disabled:
            names = ", ".join(f"{place} ({reason})" for place, reason in list(sender.disabled.items()))
            status = "error" if len(sender.disabled) == len(self.chats) else "degraded"
            return {"status": status, "message": f"chats disabled until restart: {names}"}
        if sender.failures:
            return {"status": "degraded", "message": f"retrying, {self.outbox.waiting} waiting: {sender.last_error}"}
        return {"status": "ok", "message": f"{counts['sent']} sent, {self.outbox.waiting} waiting"}

    def metrics(self) -> dict[str, int | float | str]:
        named = {name: self.outbox.counts[name] for name in ("sent", "dry_run", "dropped", "merged")}
        rest = {name: count for name, count in list(self.outbox.counts.items()) if name not in named}
        disabled = len(self.sender.disabled) if self.sender is not None else 0
        halted = self.sender.halted_s if self.sender is not None else 0.0
        queue = {"waiting": self.outbox.waiting, "waiting_for_digest": self.policy.held}
        return {**named, **rest, **queue, "disabled_chats": disabled, "halted_s": halted}

"""The messages waiting and the last ones finished, kept in the plugin's durable state."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import msgspec

from tapebus_telegram.render import Message

_QUEUE, _DONE, _COUNTS = "queue/", "done/", "counts"


class Entry(msgspec.Struct, omit_defaults=True):
    """One message for one chat.

    ``status``: queued, dry_run, sent, or dropped with the reason in ``note``. ``bus_seq`` is the first event
    in it and ``last_seq`` the last one merged into it; ``message_id`` is Telegram's, once sent; with ``edits``
    set, the entry changes that earlier message instead of sending a new one. ``at`` is event time.
    """

    key: str
    chat: int | str
    topic: str
    html: str
    plain: str
    priority: int
    bus_seq: int
    last_seq: int
    at: float
    group: str = ""
    thread_id: int | None = None
    repeats: int = 1
    status: str = "queued"
    note: str = ""
    message_id: int = 0
    edits: int = 0
    attempts: int = 0
    as_plain: bool = False
    silent: bool = False

    def shown(self, text: str) -> str:
        return text if self.repeats == 1 else f"{text}\n(×{self.repeats})"

    def text(self) -> str:
        return self.shown(self.plain if self.as_plain else self.html)


class Outbox:
    """A bounded queue ordered by priority, then age, and a ring of the last `keep` finished messages.

    Changes stay in memory until `save`. Used on the consumer's thread only; ``counts`` and `waiting` may be
    read by others.
    """

    def __init__(self, state: MutableMapping[str, bytes], queue: int, keep: int) -> None:
        self._state = state
        self._limit = queue
        self._keep = keep
        self._dirty: dict[str, Entry | None] = {}
        self._queue: dict[str, Entry] = {}
        self._done: OrderedDict[int, Entry] = OrderedDict()
        self._groups: dict[tuple[int | str, str], Entry] = {}
        self.counts: Counter[str] = Counter()
        self._finished = 0
        self._load()

    def _load(self) -> None:
        for name, blob in list(self._state.items()):
            if name.startswith(_QUEUE):
                entry = msgspec.msgpack.decode(blob, type=Entry)
                self._queue[entry.key] = entry
            elif name == _COUNTS:
                self.counts.update(msgspec.msgpack.decode(blob, type=dict[str, int]))
        self._queue = dict(sorted(self._queue.items(), key=lambda item: item[1].bus_seq))
        for number, entry in _finished(self._state):
            self._done[number] = entry
            self._finished = number + 1
            self._remember(entry)
        while len(self._done) > self._keep:
            self._forget_oldest()
        for entry in self._queue.values():
            self._remember(entry)

    def __contains__(self, key: str) -> bool:
        return key in self._queue

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def waiting_for(self, chat: int | str) -> int:
        """How many new messages wait for `chat`; edits of earlier ones disturb nobody."""
        return sum(entry.chat == chat and not entry.edits for entry in self._queue.values())

    def entries(self) -> list[Entry]:
        return list(self._queue.values())

    def add(self, entry: Entry) -> None:
        """Queue `entry`; when that is one too many, the oldest of the lowest priority is dropped and counted."""
        self._queue[entry.key] = entry
        self._dirty[_QUEUE + entry.key] = entry
        self._remember(entry)
        if len(self._queue) > self._limit:
            victim = min(self._queue.values(), key=lambda each: each.priority)
            self.finish(victim, "dropped", "outbox full")

    def merge(self, earlier: Entry, message: Message, bus_seq: int) -> None:
        """Count one more repeat in a waiting (or dry-run) entry, which shows the newest text."""
        earlier.repeats += 1
        earlier.last_seq = max(earlier.last_seq, bus_seq)
        earlier.html, earlier.plain = message.html, message.plain
        self.counts["merged"] += 1
        self.touch(earlier)

    def touch(self, entry: Entry) -> None:
        """Note that `entry` changed."""
        if entry.key in self._queue:
            self._dirty[_QUEUE + entry.key] = entry
        elif (number := self._number(entry)) is not None:
            self._dirty[f"{_DONE}{number % self._keep}"] = entry

    def _number(self, entry: Entry) -> int | None:
        return next((number for number in reversed(self._done) if self._done[number] is entry), None)

    def latest(self, chat: int | str, group: str) -> Entry | None:
        """The entry a repeat of `group` would be merged into."""
        return self._groups.get((chat, group)) if group else None

    def ordered(self) -> Iterator[Entry]:
        """Waiting entries, most urgent first; within a priority in bus order."""
        return iter(sorted(self._queue.values(), key=lambda entry: -entry.priority))

    def finish(self, entry: Entry, status: str, note: str = "") -> None:
        """Move `entry` from the queue to the ring of finished ones."""
        if self._queue.pop(entry.key, None) is not None:
            self._dirty[_QUEUE + entry.key] = None
        entry.status, entry.note = status, note
        self.counts[status] += 1
        if note:
            self.counts[f"{status}.{note.replace(' ', '_')}"] += 1
        self._done[self._finished] = entry
        self._dirty[f"{_DONE}{self._finished % self._keep}"] = entry
        self._finished += 1
        self._remember(entry)
        if len(self._done) > self._keep:
            self._forget_oldest()

    def _remember(self, entry: Entry) -> None:
        if entry.group and entry.status != "dropped":
            self._groups[entry.chat, entry.group] = entry

    def _forget_oldest(self) -> None:
        _, gone = self._done.popitem(last=False)
        if self._groups.get((gone.chat, gone.group)) is gone:
            del self._groups[gone.chat, gone.group]

    def save(self) -> None:
        """Write what changed into the state."""
        if not self._dirty:
            return
        numbers = {id(entry): number for number, entry in self._done.items()}
        for name, entry in self._dirty.items():
            if entry is None:
                self._state.pop(name, None)
            elif name.startswith(_DONE):
                if id(entry) in numbers:
                    self._state[name] = msgspec.msgpack.encode((numbers[id(entry)], entry))
            else:
                self._state[name] = msgspec.msgpack.encode(entry)
        self._state[_COUNTS] = msgspec.msgpack.encode(dict(self.counts))
        self._dirty.clear()


def _finished(state: Mapping[str, bytes]) -> list[tuple[int, Entry]]:
    blobs = [blob for name, blob in state.items() if name.startswith(_DONE)]
    found = [msgspec.msgpack.decode(blob, type=tuple[int, Entry]) for blob in blobs]
    return sorted(found, key=lambda pair: pair[0])


def rendered(state: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """What was (or, dry, would have been) sent and what still waits, oldest first, from saved plugin state.

    Each item has ``chat, topic, status, note, text, html, repeats, bus_seq, at``.
    """
    waiting = [msgspec.msgpack.decode(blob, type=Entry) for name, blob in state.items() if name.startswith(_QUEUE)]
    entries = [entry for _, entry in _finished(state)] + sorted(waiting, key=lambda entry: entry.bus_seq)
    return [_public(entry) for entry in entries]


def _public(entry: Entry) -> dict[str, Any]:
    names = ("chat", "topic", "status", "note", "repeats", "bus_seq", "at")
    shown = {name: getattr(entry, name) for name in names}
    return {**shown, "text": entry.shown(entry.plain), "html": entry.shown(entry.html)}

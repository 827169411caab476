"""The messages waiting and the last ones finished, kept in the plugin's durable state."""

from __future__ import annotations

import heapq
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import msgspec

from tapebus_telegram.journal import Sent
from tapebus_telegram.render import ANSWER, LOW, Message

_QUEUE, _DONE, _COUNTS = "queue/", "done/", "counts"


class Entry(msgspec.Struct, omit_defaults=True):
    """One message for one place: a chat, or a topic (thread) of it.

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
    as_plain: bool = False
    silent: bool = False

    @property
    def place(self) -> str:
        return place_of(self.chat, self.thread_id)

    @property
    def disturbs(self) -> bool:
        """Whether it counts for the bound per minute: an edit makes no sound, and who asked wants the answer."""
        return not self.edits and self.topic != ANSWER

    def shown(self, text: str) -> str:
        return text if self.repeats == 1 else f"{text}\n(×{self.repeats})"

    def text(self) -> str:
        return self.shown(self.plain if self.as_plain else self.html)


def place_of(chat: int | str, thread_id: int | None) -> str:
    """The name of a chat, or of a topic in it."""
    return str(chat) if thread_id is None else f"{chat}/{thread_id}"


def subject_of(group: str) -> str:
    """What messages of `group` are about, whatever they say of it."""
    return group.partition("\n")[2] or group


class Outbox:
    """A bounded queue ordered by priority, then age, and a ring of the last `keep` finished messages.

    Two threads share it: hold ``lock`` around every call but `save`, which takes it itself, and the constructor.
    Changes stay in memory until `save`, which alone touches the state. ``counts`` and `waiting` may be read freely.
    """

    def __init__(self, state: MutableMapping[str, bytes], queue: int, keep: int) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        #: Key of the message on its way, which may be neither dropped nor sent by anybody else.
        self.flying = ""
        self._state = state
        self._limit = queue
        self._keep = keep
        self._dirty: dict[str, Entry | None] = {}
        self._queue: dict[str, Entry] = {}
        self._arrival: dict[str, int] = {}
        self._arrivals = 0
        #: (−priority, arrival, key) by chat and (priority, arrival, key) of all; what has left the queue is skipped.
        self._heads: dict[int | str, list[tuple[int, int, str]]] = {}
        #: Keys of the new messages (edits disturb nobody) by chat, and the entries that may not leave yet.
        self._new: dict[int | str, set[str]] = {}
        self._parked: list[Entry] = []
        self._lowest: list[tuple[int, int, str]] = []
        self._done: OrderedDict[int, Entry] = OrderedDict()
        self._numbers: dict[str, int] = {}
        self._groups: dict[tuple[str, str], Entry] = {}
        self._finished = 0
        self._load()

    def _load(self) -> None:
        waiting = []
        for name, blob in list(self._state.items()):
            if name.startswith(_QUEUE):
                waiting.append(msgspec.msgpack.decode(blob, type=Entry))
            elif name == _COUNTS:
                self.counts.update(msgspec.msgpack.decode(blob, type=dict[str, int]))
        for number, entry in _finished(self._state):
            self._note_finished(number, entry)
        self._rearrange()
        for entry in sorted(waiting, key=lambda each: each.bus_seq):
            self._enter(entry)

    def _rearrange(self) -> None:
        """Where `keep` was another number before, put what is kept into the places it has now."""
        kept = {f"{_DONE}{number % self._keep}": entry for number, entry in self._done.items()}
        stored = {name: blob for name, blob in self._state.items() if name.startswith(_DONE)}
        numbers = {name: msgspec.msgpack.decode(blob, type=tuple[int, Entry])[0] for name, blob in stored.items()}
        if any(name != f"{_DONE}{number % self._keep}" for name, number in numbers.items()):
            self._dirty.update(dict.fromkeys(stored))
            self._dirty.update(kept)

    def __contains__(self, key: str) -> bool:
        return key in self._queue

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def entries(self) -> list[Entry]:
        return list(self._queue.values())

    def waiting_for(self, chat: int | str) -> int:
        """How many new messages wait for `chat`; edits of earlier ones disturb nobody."""
        return len(self._new.get(chat, ()))

    def add(self, entry: Entry, parked: bool = False) -> None:
        """Queue `entry`; when that is one too many, the oldest of the lowest priority is dropped and counted.

        A `parked` one may not leave before `release`.
        """
        self._enter(entry, parked)
        self._dirty[_QUEUE + entry.key] = entry
        if len(self._queue) > self._limit:
            self._drop_lowest()

    def _enter(self, entry: Entry, parked: bool = False) -> None:
        self._arrivals += 1
        self._queue[entry.key] = entry
        self._arrival[entry.key] = self._arrivals
        heapq.heappush(self._lowest, (entry.priority, self._arrivals, entry.key))
        if not entry.edits:
            self._new.setdefault(entry.chat, set()).add(entry.key)
        if parked:
            self._parked.append(entry)
        else:
            self._line_up(entry)
        self._remember(entry)

    def _line_up(self, entry: Entry) -> None:
        item = (-entry.priority, self._arrival[entry.key], entry.key)
        heapq.heappush(self._heads.setdefault(entry.chat, []), item)

    def release(self) -> None:
        """Let go what was parked."""
        for entry in self._parked:
            if entry.key in self._queue:
                self._line_up(entry)
        self._parked.clear()

    def _drop_lowest(self) -> None:
        flying = None
        while self._lowest:
            item = heapq.heappop(self._lowest)
            if not self._waits(item):
                continue
            if item[2] == self.flying:
                flying = item
                continue
            self.finish(self._queue[item[2]], "dropped", "outbox full")
            break
        if flying is not None:
            heapq.heappush(self._lowest, flying)

    def _waits(self, item: tuple[int, int, str]) -> bool:
        return self._arrival.get(item[2]) == item[1]

    def next(self, ready_at: Callable[[Entry], float], now: float) -> tuple[Entry | None, float]:
        """The most urgent entry that is ready, oldest first, or None and when one will be ready.

        Within a chat nothing overtakes a message of its own or a higher priority.
        """
        found: tuple[int, int, str] | None = None
        earliest = float("inf")
        for chat, heap in list(self._heads.items()):
            while heap and not self._waits(heap[0]):
                heapq.heappop(heap)
            if not heap:
                del self._heads[chat]
                continue
            at = ready_at(self._queue[heap[0][2]])
            if at > now:
                earliest = min(earliest, at)
            elif found is None or heap[0] < found:
                found = heap[0]
        return (self._queue[found[2]], now) if found is not None else (None, earliest)

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
        elif (number := self._numbers.get(entry.key)) is not None:
            self._dirty[f"{_DONE}{number % self._keep}"] = entry

    def latest(self, place: str, group: str) -> Entry | None:
        """The entry a repeat of `group` would be merged into.

        None where the last one said that the same subject stands otherwise: an alert that is raised again after it was
        cleared must not become a silent edit above the message that says it is over.
        """
        found = self._groups.get((place, subject_of(group))) if group else None
        return found if found is not None and found.group == group else None

    def keep_order(self, entry: Entry) -> None:
        """Let what waits about the same subject as `entry` leave before it, however urgent `entry` is.

        Else "cleared" would arrive after the alert that was raised again.
        """
        before = self._groups.get((entry.place, subject_of(entry.group))) if entry.group else None
        if before is None or before.key not in self._queue or before.edits or before.priority >= entry.priority:
            return
        before.priority = entry.priority
        self._line_up(before)
        self.touch(before)

    def finish(self, entry: Entry, status: str, note: str = "") -> None:
        """Move `entry` from the queue to the ring of finished ones."""
        if self._queue.pop(entry.key, None) is not None:
            del self._arrival[entry.key]
            self._new.get(entry.chat, set()).discard(entry.key)
            self._dirty[_QUEUE + entry.key] = None
        entry.status, entry.note = status, note
        self.counts[status] += 1
        if note:
            self.counts[f"{status}.{note.replace(' ', '_')}"] += 1
        self._dirty[f"{_DONE}{self._finished % self._keep}"] = entry
        self._note_finished(self._finished, entry)
        self._sweep(self._lowest)
        self._sweep(self._heads.get(entry.chat, []))

    def _sweep(self, heap: list[tuple[int, int, str]]) -> None:
        """Forget what has left the queue, before it is more than what is in it."""
        if len(heap) > 2 * len(self._queue) + 100:
            heap[:] = [item for item in heap if self._waits(item)]
            heapq.heapify(heap)

    def _note_finished(self, number: int, entry: Entry) -> None:
        self._done[number] = entry
        self._numbers[entry.key] = number
        self._finished = number + 1
        self._remember(entry)
        while len(self._done) > self._keep:
            oldest, gone = self._done.popitem(last=False)
            if self._numbers.get(gone.key) == oldest:
                del self._numbers[gone.key]
            if self._groups.get((gone.place, subject_of(gone.group))) is gone:
                del self._groups[gone.place, subject_of(gone.group)]

    def _remember(self, entry: Entry) -> None:
        if not entry.group or entry.status == "dropped":
            return
        place = (entry.place, subject_of(entry.group))
        before = self._groups.get(place)
        if before is None or before.last_seq <= entry.last_seq:
            self._groups[place] = entry

    def save(self) -> None:
        """Write what changed into the state; on the thread that owns the state."""
        with self.lock:
            if not self._dirty:
                return
            changes = {name: self._blob(name, entry) for name, entry in self._dirty.items()}
            changes[_COUNTS] = msgspec.msgpack.encode(dict(self.counts))
            self._dirty.clear()
        for name, blob in changes.items():
            if blob is None:
                self._state.pop(name, None)
            else:
                self._state[name] = blob

    def _blob(self, name: str, entry: Entry | None) -> bytes | None:
        if entry is None:
            return None
        if name.startswith(_QUEUE):
            return msgspec.msgpack.encode(entry)
        return msgspec.msgpack.encode((self._numbers[entry.key], entry))


def settle(outbox: Outbox, entry: Entry, sent: Sent) -> None:
    """Finish `entry` as `sent`; what was merged into it in the meantime becomes an edit. Hold the outbox's lock."""
    entry.message_id = sent.message_id
    outbox.finish(entry, "sent")
    if entry.repeats <= sent.repeats:
        return
    outbox.add(
        Entry(
            key=f"{entry.last_seq:016d}/{entry.place}/edit",
            chat=entry.chat,
            topic=entry.topic,
            html=entry.html,
            plain=entry.plain,
            priority=LOW if sent.message_id else entry.priority,
            bus_seq=entry.last_seq,
            last_seq=entry.last_seq,
            at=entry.at,
            group=entry.group,
            thread_id=entry.thread_id,
            repeats=entry.repeats,
            edits=sent.message_id,
            silent=entry.silent,
        )
    )


def _finished(state: Mapping[str, bytes]) -> list[tuple[int, Entry]]:
    blobs = [blob for name, blob in state.items() if name.startswith(_DONE)]
    found = [msgspec.msgpack.decode(blob, type=tuple[int, Entry]) for blob in blobs]
    return sorted(found, key=lambda pair: pair[0])


def rendered(state: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """What was (or, dry, would have been) sent and what still waits, oldest first, from saved plugin state.

    Each item has ``chat, thread_id, topic, status, note, text, html, repeats, bus_seq, at``.
    """
    waiting = [msgspec.msgpack.decode(blob, type=Entry) for name, blob in state.items() if name.startswith(_QUEUE)]
    entries = [entry for _, entry in _finished(state)] + sorted(waiting, key=lambda entry: entry.bus_seq)
    return [_public(entry) for entry in entries]


def _public(entry: Entry) -> dict[str, Any]:
    names = ("chat", "thread_id", "topic", "status", "note", "repeats", "bus_seq", "at")
    shown = {name: getattr(entry, name) for name in names}
    return {**shown, "text": entry.shown(entry.plain), "html": entry.shown(entry.html)}

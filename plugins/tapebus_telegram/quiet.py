"""What happens to a message for a chat: sent, sent without a sound, held for a digest, or left out.

A chat is quiet in its quiet hours and when it has had its messages of this minute. What is held then is counted in full
and listed as far as there is room, survives a restart, and comes as one digest later. Critical messages are never held;
the bound per minute counts for them as well, so they wait for its end at the head of the queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, MutableMapping
from datetime import UTC, datetime, tzinfo
from typing import Literal
from zoneinfo import ZoneInfo

import msgspec

from tapebus_telegram.markup import MAX_UNITS, ROOM, Line, compose, units
from tapebus_telegram.render import CRITICAL, Message
from tapebus_telegram.settings import Chat, Quiet, Settings

Word = Literal["send", "silent", "held", "off"]
#: Held messages that are kept to be named one by one; the rest is only counted.
LISTED = 100
MINUTE_S = 60.0
_STATE = "quiet/"
#: How a signal can end, as words of a tally.
_ENDS = ("WIN", "LOSS", "BREAKEVEN", "TIMEOUT", "CANCELLED", "UNKNOWN", "OPEN")


class HeldLine(msgspec.Struct, array_like=True):
    """One message that is held: when it came (Unix seconds), its line, what it repeats, and how often it came."""

    at: float
    text: str
    group: str = ""
    repeats: int = 1


class Held(msgspec.Struct, omit_defaults=True):
    """What one chat has not been told yet, and when it was sent its last messages (Unix seconds).

    ``number`` counts the digests of this chat, ``quiet`` tells that something was held because of the hour.
    """

    number: int = 0
    since: float = 0.0
    quiet: bool = False
    last_seq: int = 0
    count: int = 0
    tally: dict[str, float] = {}
    lines: list[HeldLine] = []
    sent: list[float] = []

    def add(self, message: Message, bus_seq: int, now: float, quiet: bool) -> None:
        if not self.count:
            self.since = now
        self.count += 1
        self.quiet = self.quiet or quiet
        self.last_seq = max(self.last_seq, bus_seq)
        for word, amount in message.tally.items():
            self.tally[word] = self.tally.get(word, 0) + amount
        same = next((each for each in self.lines if message.group and each.group == message.group), None)
        if same is not None:
            same.text, same.repeats = message.line, same.repeats + 1
        elif len(self.lines) < LISTED:
            self.lines.append(HeldLine(now, message.line, message.group))

    def clear(self) -> None:
        self.number += 1
        self.since, self.count, self.quiet = 0.0, 0, False
        self.tally, self.lines = {}, []


class Digest(msgspec.Struct, frozen=True):
    """What was held for a chat; `key` is the same again when it is made again after a crash."""

    chat: Chat
    key: str
    html: str
    plain: str
    last_seq: int


class Policy:
    """Decides for all chats. Two threads use it, one at a time: hold the outbox's lock around every call; `held` may
    be read freely. `clock` is Unix seconds.

    The hours are those of the wall clock, not of the events: it is a person who sleeps.
    """

    def __init__(
        self,
        settings: Settings,
        chats: Iterable[Chat],
        state: MutableMapping[str, bytes],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._known = {chat.id: chat for chat in chats}
        self._state = state
        self._clock = clock
        self._held: dict[int | str, Held] = {}
        self._zones: dict[str, tzinfo] = {}
        self._dirty: set[int | str] = set()
        for chat in self._known:
            blob = state.get(f"{_STATE}{chat}")
            self._held[chat] = msgspec.msgpack.decode(blob, type=Held) if blob is not None else Held()

    @property
    def held(self) -> int:
        """Messages that wait for a digest."""
        return sum(each.count for each in list(self._held.values()))

    def wants(self, chat: Chat, topic: str) -> bool:
        """Whether messages about `topic` come to `chat` at all."""
        return self._settings.mode(chat, topic) != "off"

    def word(self, chat: Chat, topic: str, message: Message, bus_seq: int, waiting: int) -> Word:
        """What to do with a new `message`; ``held`` means that it is taken into the next digest.

        `waiting` is how many messages for `chat` are in the queue.
        """
        mode = self._settings.mode(chat, topic)
        if mode == "off":
            return "off"
        now = self._clock()
        held = self._held[chat.id]
        quiet = self._settings.quiet_of(chat)
        asleep = quiet is not None and message.priority < quiet.least and self._is_quiet(quiet, now)
        full = message.priority < CRITICAL and not self._room(chat, held, now, waiting + (held.count > 0))
        if asleep or full:
            held.add(message, bus_seq, now, asleep)
            self._dirty.add(chat.id)
            return "held"
        return "silent" if mode == "silent" else "send"

    def wait(self, chat: int | str) -> float:
        """Seconds until one more message may leave for `chat`."""
        known = self._known.get(chat)
        now = self._clock()
        if known is None or self._room(known, self._held[chat], now, 0):
            return 0.0
        return max(0.0, min(at for at in self._held[chat].sent if 0 <= now - at < MINUTE_S) + MINUTE_S - now)

    def sent(self, chat: int | str) -> None:
        """Note that a message left for `chat`."""
        known = self._known.get(chat)
        if known is not None and (cap := self._settings.cap_of(known)):
            held = self._held[chat]
            held.sent = [*held.sent, self._clock()][-cap:]
            self._dirty.add(chat)

    def due(self, waiting: Callable[[int | str], int]) -> Iterable[Digest]:
        """The digests whose time has come; what they tell is no longer held."""
        now = self._clock()
        for chat in self._known.values():
            held = self._held[chat.id]
            if not held.count or not self._is_due(chat, held, now, waiting(chat.id)):
                continue
            quiet = self._settings.quiet_of(chat)
            zone = self._zone(quiet.zone) if quiet is not None else UTC
            html, plain = compose(_digest(held, zone))
            yield Digest(chat, f"digest/{chat.id}/{held.number}", html, plain, held.last_seq)
            held.clear()
            self._dirty.add(chat.id)

    def save(self) -> None:
        """Write what changed into the state."""
        for chat in self._dirty:
            self._state[f"{_STATE}{chat}"] = msgspec.msgpack.encode(self._held[chat])
        self._dirty.clear()

    # -- when -----------------------------------------------------------------------------------

    def _is_due(self, chat: Chat, held: Held, now: float, waiting: int) -> bool:
        quiet = self._settings.quiet_of(chat)
        if quiet is not None and self._is_quiet(quiet, now):
            return False
        # what one minute had no room for is told together, not one by one as room comes
        return (held.quiet or not 0 <= now - held.since < MINUTE_S) and self._room(chat, held, now, waiting)

    def _room(self, chat: Chat, held: Held, now: float, waiting: int) -> bool:
        cap = self._settings.cap_of(chat)
        # a clock that was set back must not silence a chat
        recent = sum(0 <= now - at < MINUTE_S for at in held.sent)
        return not cap or recent + waiting < cap

    def _is_quiet(self, quiet: Quiet, now: float) -> bool:
        local = datetime.fromtimestamp(now, self._zone(quiet.zone))
        minute = local.hour * 60 + local.minute
        return any(
            begin <= minute < end if begin < end else minute >= begin or minute < end for begin, end in quiet.spans
        )

    def _zone(self, name: str) -> tzinfo:
        if name not in self._zones:
            self._zones[name] = ZoneInfo(name)
        return self._zones[name]


def _digest(held: Held, zone: tzinfo) -> list[Line]:
    """What was held: the summary, then as many of the messages as one message has room for."""
    begin = datetime.fromtimestamp(held.since, zone)
    head = f"held since {begin:%H:%M}: {summary(held.tally)}"
    lines: list[Line] = [[("🌙 " if held.quiet else "📥 ", ""), (head, "b")]]
    room = MAX_UNITS - ROOM - units(head) - 60
    shown = 0
    for each in held.lines:
        text = each.text if each.repeats == 1 else f"{each.text} (×{each.repeats})"
        room -= units(text) + 7
        if room < 0:
            break
        lines.append([(f"{datetime.fromtimestamp(each.at, zone):%H:%M} ", "code"), (text, "")])
        shown += each.repeats
    if held.count > shown:
        lines.append([(f"… and {held.count - shown} more, counted above", "i")])
    return lines


def summary(tally: dict[str, float]) -> str:
    """Like ``12 signals, 7 outcomes 4W/3L +2.1R, 3 alerts cleared``."""
    parts = []
    for word, amount in tally.items():
        if word == "R" or word in _ENDS:
            continue
        noun, _, rest = word.partition(" ")
        part = f"{amount:.0f} {noun.removesuffix('s') if amount == 1 else noun} {rest}".rstrip()
        if word == "outcomes":
            others = [f"{tally[end]:.0f} {end.lower()}" for end in _ENDS[2:] if tally.get(end)]
            r = f" {tally['R']:+.1f}R" if "R" in tally else ""
            part += f" {tally.get('WIN', 0):.0f}W/{tally.get('LOSS', 0):.0f}L{r}"
            part += f" ({', '.join(others)})" if others else ""
        parts.append(part)
    return ", ".join(parts)

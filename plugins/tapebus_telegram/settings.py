"""The configuration ``[plugins.telegram]``."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

import msgspec
from msgspec import Meta

from tapebus.errors import ConfigError
from tapebus_telegram.secret import Secret, read_token

Mode = Literal["on", "silent", "off"]
#: Every event type that has a message, and how it comes unless the configuration says otherwise.
MESSAGES: dict[str, Mode] = {
    "signal_generated": "on",
    "gate_verdict": "off",
    "fire_command": "on",
    "trade_executed": "on",
    "slot_opened": "silent",
    "slot_released": "silent",
    "signal_outcome": "on",
    "pattern_status": "on",
    "alert": "on",
    "reconcile_requested": "silent",
    "user_action": "off",
    "calibration": "off",
}
PRIORITIES = ("low", "normal", "high", "critical")
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)|([01]\d|2[0-3]):([0-5]\d)-(24):(00)")
_PLACE = "plugins.telegram"


class Quiet(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """When a chat is left in peace: ``hours`` like ``22:00-07:00`` (one or several), by the clock of ``zone``.

    What comes then with a lower priority than ``passes`` is held and told in one digest at the end.
    """

    hours: str | tuple[str, ...]
    zone: str = "UTC"
    passes: Literal["normal", "high", "critical"] = "critical"

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The hours as minutes of the day, from (included) and until (excluded); they may run over midnight."""
        return tuple(_span(each) for each in self.parts)

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.hours,) if isinstance(self.hours, str) else self.hours

    @property
    def least(self) -> int:
        return PRIORITIES.index(self.passes)


class Chat(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One receiver: a numeric id or ``@channelname``.

    ``topics`` names the only event types it gets, ``messages`` says on, silent or off for single ones; ``thread_id``
    is the forum topic its messages go to, ``threads`` that of single event types. ``quiet = false`` exempts it from
    the quiet hours of all.
    """

    id: int | str
    topics: tuple[str, ...] = ()
    thread_id: int | None = None
    messages: dict[str, Mode] = {}
    threads: dict[str, int] = {}
    quiet: Quiet | bool | None = None
    max_per_minute: Annotated[int, Meta(ge=0, le=60)] | None = None

    def thread_of(self, topic: str) -> int | None:
        return self.threads.get(topic, self.thread_id)


class Commands(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Who may ask and command: ``users`` everything, ``viewers`` only what changes nothing; ids of people.

    Both are heard in ``chats`` only: by default the configured chats and each one's own chat with the bot. A command
    older than ``max_age_s`` seconds is answered but not run. ``poll_s`` is how long one question to Telegram waits.
    """

    users: tuple[int, ...] = ()
    viewers: tuple[int, ...] = ()
    chats: tuple[int, ...] = ()
    max_age_s: Annotated[float, Meta(gt=0, le=86_400)] = 60.0
    poll_s: Annotated[int, Meta(ge=1, le=50)] = 30

    def hears(self, user: int, chat: int, receivers: Iterable[int | str]) -> bool:
        """Whether `user` may say something in `chat`, where `receivers` are the configured chats."""
        if user not in self.users and user not in self.viewers:
            return False
        return chat in self.chats if self.chats else chat == user or chat in receivers


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``queue`` bounds the messages waiting, ``keep`` the finished ones that can be read back.

    ``messages`` says on, silent or off per event type, ``quiet`` when only urgent ones come, ``max_per_minute`` how
    many reach a chat (0: as many as Telegram allows); each chat may say otherwise. ``symbols`` holds facts of symbols
    that differ from the shared ones; ``coalesce_s`` is how long (event time, seconds) a repeat still edits the earlier
    message instead of sending another one; ``mask_numbers`` hides runs of six and more digits (account numbers) in
    free text. ``commands`` lets people ask and command; without it nobody is heard.
    """

    token: Any = None
    chats: tuple[Chat, ...] = ()
    base_url: str = "https://api.telegram.org"
    dry_run: bool | None = None
    messages: dict[str, Mode] = {}
    quiet: Quiet | None = None
    max_per_minute: Annotated[int, Meta(ge=0, le=60)] = 0
    commands: Commands | None = None
    queue: int = 500
    keep: int = 200
    coalesce_s: float = 300.0
    mask_numbers: bool = True
    symbols: dict[str, dict[str, Any]] = {}

    @property
    def live(self) -> bool:
        return self.token is not None and not self.dry_run

    def mode(self, chat: Chat, topic: str) -> Mode:
        """How a message about `topic` comes to `chat`; the most special word counts."""
        own = chat.messages.get(topic)
        if own is not None:
            return own
        general = self.messages.get(topic, MESSAGES.get(topic, "off"))
        if chat.topics:
            return "off" if topic not in chat.topics else "on" if general == "off" else general
        return general

    def relayed(self, chats: Iterable[Chat]) -> tuple[str, ...]:
        """The event types that at least one of `chats` gets."""
        chats = tuple(chats)
        return tuple(topic for topic in MESSAGES if any(self.mode(chat, topic) != "off" for chat in chats))

    def quiet_of(self, chat: Chat) -> Quiet | None:
        if isinstance(chat.quiet, Quiet):
            return chat.quiet
        return None if chat.quiet is False else self.quiet

    def cap_of(self, chat: Chat) -> int:
        """The most messages a minute for `chat`; 0 for no bound but Telegram's."""
        return self.max_per_minute if chat.max_per_minute is None else chat.max_per_minute


def load(config: Mapping[str, Any]) -> Settings:
    """Check `config`; raises `ConfigError` naming the key and what to write instead."""
    for key in config:
        _known(key, Settings.__struct_fields__, f"{_PLACE}.{key}", "key")
    # The token is taken out first, so that no message about a wrong type can repeat it.
    rest = {key: value for key, value in config.items() if key != "token"}
    try:
        settings = msgspec.convert(rest, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{_PLACE}: {error}") from None
    settings = msgspec.structs.replace(settings, token=config.get("token"))
    _check(settings)
    return settings


def token_of(settings: Settings) -> Secret | None:
    """The token, or None in a dry run (the default without a token)."""
    return read_token(settings.token) if settings.live else None


def _check(settings: Settings) -> None:
    if settings.queue < 1 or settings.keep < 1:
        raise ConfigError(f"{_PLACE}: queue and keep must be at least 1")
    if settings.dry_run is False and settings.token is None:
        raise ConfigError(f'{_PLACE}.dry_run is false but there is no token; add token = {{ file = "PATH" }}')
    if settings.live and not settings.chats:
        raise ConfigError(f"{_PLACE}.chats is empty: add chats = [{{ id = -1001234567890 }}] or dry_run = true")
    _check_topics(settings.messages, f"{_PLACE}.messages")
    _check_quiet(settings.quiet, f"{_PLACE}.quiet")
    for chat in settings.chats:
        _check_chat(chat, f"{_PLACE}.chats (id {chat.id})")
    ids = [chat.id for chat in settings.chats]
    if len(set(ids)) != len(ids):
        raise ConfigError(f"{_PLACE}.chats: the same id stands twice; merge their topics")
    if settings.commands is not None:
        _check_commands(settings.commands, f"{_PLACE}.commands")
    _check_url(settings.base_url)


def _check_chat(chat: Chat, place: str) -> None:
    for part in ("topics", "messages", "threads"):
        _check_topics(getattr(chat, part), f"{place}.{part}")
    if isinstance(chat.id, str) and not re.fullmatch(r"@[A-Za-z]\w{3,31}", chat.id):
        raise ConfigError(f"{place}: an id is a number or a name like @channel")
    if any(number < 1 for number in (*chat.threads.values(), chat.thread_id or 1)):
        raise ConfigError(f"{place}: the number of a forum topic is positive")
    if chat.quiet is True:
        raise ConfigError(f'{place}.quiet: write false, or hours like {{ hours = "22:00-07:00", zone = "UTC" }}')
    _check_quiet(chat.quiet or None, f"{place}.quiet")


def _check_commands(commands: Commands, place: str) -> None:
    if not commands.users and not commands.viewers:
        raise ConfigError(f"{place}: nobody is named; add users = [YOUR_USER_ID]")
    for user in (*commands.users, *commands.viewers):
        if user <= 0:
            raise ConfigError(f"{place}: {user} is no user id; groups belong into chats")
    if both := set(commands.users) & set(commands.viewers):
        raise ConfigError(f"{place}: {min(both)} stands in users and in viewers; users may look as well")


def _check_topics(topics: Iterable[str], place: str) -> None:
    for topic in topics:
        _known(topic, MESSAGES, f"{place}.{topic}", "event type with a message")


def _check_quiet(quiet: Quiet | None, place: str) -> None:
    if quiet is None:
        return
    if not quiet.spans:
        raise ConfigError(f'{place}.hours is empty; write hours = "22:00-07:00"')
    for hours in quiet.parts:
        begin, end = _span(hours)
        if begin == end:
            raise ConfigError(f"{place}.hours: {hours!r} is no part of a day; write HH:MM-HH:MM, like 22:00-07:00")
    try:
        ZoneInfo(quiet.zone)
    except (KeyError, ValueError, OSError):
        near = difflib.get_close_matches(quiet.zone, available_timezones(), 1)
        hint = f"did you mean {near[0]!r}?" if near else "write a name like Europe/Berlin"
        raise ConfigError(f"{place}.zone: {quiet.zone!r} is not known; {hint}") from None


def _span(hours: str) -> tuple[int, int]:
    """Minutes of the day; two equal ones for what cannot be read, which the check refuses."""
    found = _HOURS.fullmatch(hours.replace(" ", ""))
    if found is None:
        return 0, 0
    numbers = [int(each) for each in found.groups() if each is not None]
    return numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]


def _known(word: str, words: Iterable[str], place: str, kind: str) -> None:
    words = tuple(words)
    if word not in words:
        near = difflib.get_close_matches(word, words, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(words)}"
        raise ConfigError(f"{place}: unknown {kind}; {hint}")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ConfigError(f"{_PLACE}.base_url must look like https://host[:port]")
    if parts.scheme == "http" and not is_loopback(url):
        raise ConfigError(f"{_PLACE}.base_url: http would send the token readable; use https or a local server")


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""The configuration ``[plugins.telegram]``."""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from tapebus.errors import ConfigError
from tapebus_telegram.secret import Secret, read_token

TOPICS = ("signal_generated", "fire_command", "signal_outcome", "alert", "slot_released")


class Chat(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One receiver: a numeric id or ``@channelname``, the topics it gets (all when empty), and a forum thread."""

    id: int | str
    topics: tuple[str, ...] = ()
    thread_id: int | None = None

    def wants(self, topic: str) -> bool:
        return not self.topics or topic in self.topics


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``queue`` bounds the messages waiting, ``keep`` the finished ones that can be read back.

    ``digits`` overrides the decimals of a price per symbol; ``coalesce_s`` is how long (event time, seconds) a
    repeat still edits the earlier message instead of sending another one; ``mask_numbers`` hides runs of six
    and more digits (account numbers) in free text.
    """

    token: Any = None
    chats: tuple[Chat, ...] = ()
    base_url: str = "https://api.telegram.org"
    dry_run: bool | None = None
    topics: tuple[str, ...] = TOPICS
    queue: int = 500
    keep: int = 200
    coalesce_s: float = 300.0
    mask_numbers: bool = True
    digits: dict[str, int] = {}

    @property
    def live(self) -> bool:
        return self.token is not None and not self.dry_run


def load(config: Mapping[str, Any]) -> Settings:
    """Check `config`; raises `ConfigError` naming the key and what to write instead."""
    fields = Settings.__struct_fields__
    for key in config:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"plugins.telegram.{key}: unknown key; {hint}")
    # The token is taken out first, so that no message about a wrong type can repeat it.
    rest = {key: value for key, value in config.items() if key != "token"}
    try:
        settings = msgspec.convert(rest, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"plugins.telegram: {error}") from None
    settings = msgspec.structs.replace(settings, token=config.get("token"))
    _check(settings)
    return settings


def token_of(settings: Settings) -> Secret | None:
    """The token, or None in a dry run (the default without a token)."""
    return read_token(settings.token) if settings.live else None


def _check(settings: Settings) -> None:
    if settings.queue < 1 or settings.keep < 1:
        raise ConfigError("plugins.telegram: queue and keep must be at least 1")
    if settings.dry_run is False and settings.token is None:
        raise ConfigError('plugins.telegram.dry_run is false but there is no token; add token = { file = "PATH" }')
    if settings.live and not settings.chats:
        raise ConfigError("plugins.telegram.chats is empty: add chats = [{ id = -1001234567890 }] or dry_run = true")
    for name in (topic for chat in settings.chats for topic in chat.topics):
        if name not in settings.topics:
            raise ConfigError(f"plugins.telegram.chats: topic {name!r} is not among {', '.join(settings.topics)}")
    for name in settings.topics:
        if name not in TOPICS:
            raise ConfigError(f"plugins.telegram.topics: {name!r} is not one of {', '.join(TOPICS)}")
    ids = [chat.id for chat in settings.chats]
    if len(set(ids)) != len(ids):
        raise ConfigError("plugins.telegram.chats: the same id stands twice; merge their topics")
    _check_url(settings.base_url)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ConfigError("plugins.telegram.base_url must look like https://host[:port]")
    if parts.scheme == "http" and not is_loopback(url):
        raise ConfigError("plugins.telegram.base_url: http would send the token readable; use https or a local server")


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

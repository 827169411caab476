"""The bot token: where it may come from, and everything that keeps it out of logs and errors.

The token is part of every Bot API address, so an exception or an access log of an HTTP client would print it.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapebus.errors import ConfigError
from tapebus.redaction import register

_SHAPE = re.compile(r"[0-9]{1,20}:[A-Za-z0-9_-]{8,200}")
#: Anything that looks like a bot token, so that a token this process does not know is masked as well.
_LOOKS_LIKE = re.compile(r"[0-9]{6,20}(?::|%3[Aa])[A-Za-z0-9_-]{30,200}")
MASK = "<telegram token>"
_HTTP_LOGGERS = (
    "telegram",
    "telegram.Bot",
    "telegram.request.BaseRequest",
    "telegram.request.HTTPXRequest",
    "asyncio",
    "httpx",
    "httpcore",
    "httpcore.connection",
    "httpcore.http11",
    "httpcore.http2",
    "httpcore.proxy",
    "httpcore.socks",
)


class Secret:
    """A string that shows itself only through `reveal`; it can be neither printed, pickled nor copied by accident."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def redact(self, text: str) -> str:
        """`text` without this secret, in plain or percent-encoded spelling, and without anything like a token."""
        for spelling in (self._value, self._value.replace(":", "%3A"), self._value.replace(":", "%3a")):
            text = text.replace(spelling, MASK)
        _, _, key = self._value.partition(":")
        if key:
            text = text.replace(key, MASK)
        return _LOOKS_LIKE.sub(MASK, text)

    def __repr__(self) -> str:
        return MASK

    __str__ = __repr__

    def __reduce__(self) -> str:
        raise TypeError("a secret cannot be pickled")


class Redactor(logging.Filter):
    """Masks the token in the message, the arguments and the traceback of every record that passes.

    Attach it to loggers or, to cover everything a process writes, to the handlers.
    """

    def __init__(self, secret: Secret) -> None:
        super().__init__()
        self._secret = secret

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception:
            message = f"{record.msg} (arguments left out: they do not fit the message)"
        clean = self._secret.redact(message)
        if clean != message or record.args:
            record.msg, record.args = clean, ()
        if record.exc_info:
            text = record.exc_text or logging.Formatter().formatException(record.exc_info)
            if (redacted := self._secret.redact(text)) != text:
                record.exc_info = None
                record.exc_text = redacted
        if record.stack_info:
            record.stack_info = self._secret.redact(record.stack_info)
        return True


def guard_logs(secret: Secret, log: logging.Logger) -> Redactor:
    """Put a `Redactor` on `log` and on the loggers of the libraries that send, and silence the latter below WARNING.

    The HTTP client writes each address at INFO. A filter does not reach child loggers, hence the whole list.
    """
    redactor = Redactor(secret)
    log.addFilter(redactor)
    for name in _HTTP_LOGGERS:
        logger = logging.getLogger(name)
        logger.addFilter(redactor)
        logger.setLevel(max(logger.level, logging.WARNING))
    return redactor


def quiet_library() -> None:
    """Keep python-telegram-bot from logging every answer it cannot read, in full: its callers are told anyway."""
    logging.getLogger("telegram").setLevel(logging.CRITICAL)


def release_logs(redactor: Redactor, log: logging.Logger) -> None:
    """Take the filters of `guard_logs` away; the levels stay where they are."""
    log.removeFilter(redactor)
    for name in _HTTP_LOGGERS:
        logging.getLogger(name).removeFilter(redactor)


def read_token(where: Any) -> Secret:
    """The token from ``{ file = "…" }`` (mode 0600 or stricter) or ``{ env = "NAME" }``.

    Raises `ConfigError`, which never repeats the value.
    """
    key = "plugins.telegram.token"
    if not isinstance(where, Mapping) or set(where) not in ({"file"}, {"env"}):
        raise ConfigError(f'{key}: write {{ file = "PATH" }} or {{ env = "NAME" }}; never the token itself')
    if not all(isinstance(value, str) and value for value in where.values()):
        raise ConfigError(f"{key}: the name of the file or of the variable must be a non-empty string")
    if "env" in where:
        place = f"environment variable {where['env']}"
        value = os.environ.get(where["env"], "")
        if not value:
            raise ConfigError(f"{key}: {place} is not set; export it or use {{ file = … }}")
    else:
        place = f"file {where['file']}"
        value = _read_private(Path(where["file"]).expanduser(), key)
    value = value.strip()
    if not _SHAPE.fullmatch(value):
        raise ConfigError(f"{key}: {place} holds no bot token (expected digits, a colon, letters); copy it again")
    register(value)
    return Secret(value)


def _read_private(path: Path, key: str) -> str:
    try:
        # O_NONBLOCK: a named pipe put there by mistake must not hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"{key}: {path} is not a regular file")
        if info.st_mode & 0o077:
            mode = stat.S_IMODE(info.st_mode)
            raise ConfigError(f"{key}: others can read {path} (mode {mode:04o}); run: chmod 600 {path}")
        return file.read(1024).decode("ascii", "replace")

"""Keeps secrets out of what a process writes: known values, and whatever looks like one.

Formatting is the last step before a line is written, so the masking happens there: it sees messages, arguments,
tracebacks and stack dumps alike, whichever library they come from.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import traceback
from types import TracebackType
from typing import Any
from urllib.parse import quote

MASK = "<secret>"
#: A shorter value would mask ordinary words; such a secret is no secret.
MIN_SIZE = 6

_known: frozenset[str] = frozenset()
_LOOKS_SECRET = (
    # a bot token of Telegram, also as part of an address
    (re.compile(r"\d{6,}(?::|%3[Aa])[A-Za-z0-9_-]{30,}"), MASK),
    (re.compile(r'(secret-key\s*=\s*"?)[!-~]{30,}?(?="|\s|$)'), rf"\1{MASK}"),
    (re.compile(r"(?i)(authorization[\"']?\s*[:=]\s*[\"']?(?:bearer |basic |token )?)[^\s\"',;)}\]\\]+"), rf"\1{MASK}"),
    (re.compile(r"(?i)\b((?:token|password|passwd|secret|api_?key)=)(?![{\s])[^\s\"'&,;)}\]\\]+"), rf"\1{MASK}"),
    (re.compile(r"(?i)([\"'](?:token|password|passwd|secret|api_?key)[\"']\s*:\s*[\"'])[^\"'\\]+"), rf"\1{MASK}"),
    (re.compile(r"(?<=://)([^/\s:@]+):[^/\s:@\"'\\]+(?=@)"), rf"\1:{MASK}"),
)


def register(secret: str) -> None:
    """Mask `secret` from now on wherever this process logs or prints an error; from any thread."""
    global _known
    if len(secret) >= MIN_SIZE:
        # with what percent-encoding, a repr and JSON make of it
        _known = _known | {secret, quote(secret, safe=""), repr(secret)[1:-1], json.dumps(secret)[1:-1]}


def redact(text: str) -> str:
    """`text` without known secrets and without what looks like one."""
    for secret in sorted(_known, key=len, reverse=True):
        if secret in text:
            text = text.replace(secret, MASK)
    for pattern, replacement in _LOOKS_SECRET:
        text = pattern.sub(replacement, text)
    return text


class RedactingFormatter(logging.Formatter):
    """Formats as `inner` does, and masks the result."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        try:
            return redact(self.inner.format(record))
        except Exception:
            # a mistake in a log call must not make logging print the arguments by itself
            return redact(f"{record.levelname} {record.name}: {record.msg} (arguments left out: they do not fit)")


def protect() -> None:
    """Mask secrets in every handler of the root logger and in tracebacks of uncaught exceptions; once a process."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, RedactingFormatter):
            handler.setFormatter(RedactingFormatter(handler.formatter or logging.Formatter()))
    # what logging cannot write it prints with all arguments
    logging.raiseExceptions = False
    sys.excepthook = _on_uncaught
    threading.excepthook = _on_thread
    sys.unraisablehook = _on_unraisable


def _on_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _write("".join(traceback.format_exception(kind, error, trace)))


def _on_thread(arguments: Any) -> None:
    if arguments.exc_type is not SystemExit:
        name = arguments.thread.name if arguments.thread is not None else "unknown"
        text = "".join(traceback.format_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback))
        _write(f"Exception in thread {name}:\n{text}")


def _on_unraisable(arguments: Any) -> None:
    text = "".join(traceback.format_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback))
    _write(f"{arguments.err_msg or 'Exception ignored'}:\n{text}")


def _write(text: str) -> None:
    try:
        sys.stderr.write(redact(text))
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # nobody reads what we would say

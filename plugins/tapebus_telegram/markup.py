"""Text that Telegram takes: HTML whose tags always close, the same as plain text, within the length it counts."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: UTF-16 units after entity parsing; Telegram does not say which unit it counts, this is the stricter one.
MAX_UNITS = 4096
#: Kept free for the repeat mark.
ROOM = 32
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

#: A line is a list of parts, each a text and the HTML tag around it ("" for none).
Line = list[tuple[str, str]]


def units(text: str) -> int:
    """Length in UTF-16 code units."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2


def escape(text: str) -> str:
    """`text` for the inside of Telegram HTML, tags and attributes alike."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def clean(text: str) -> str:
    """`text` without control and direction characters and lone surrogates, which hide or break what follows."""
    if text.isascii() and text.isprintable():
        return text
    return _CONTROL.sub("", text.encode("utf-8", "replace").decode("utf-8"))


def cut(text: str, limit: int) -> str:
    """`text` in at most `limit` UTF-16 units, never splitting a character."""
    if units(text) <= limit:
        return text
    return text[: _fitting(text, limit - 1)] + "…" if limit > 0 else ""


def _fitting(text: str, limit: int) -> int:
    """How many characters of `text` fit into `limit` UTF-16 units."""
    used = 0
    for count, char in enumerate(text):
        used += 2 if ord(char) > 0xFFFF else 1
        if used > limit:
            return count
    return len(text)


def one_line(text: str, limit: int) -> str:
    """`text` on one line of at most `limit` UTF-16 units."""
    return cut(" ".join(clean(text).split()), limit)


def compose(lines: Iterable[Line], limit: int = MAX_UNITS - ROOM) -> tuple[str, str]:
    """HTML and plain text of `lines`, both cut to `limit` UTF-16 units of visible text, never inside a tag."""
    html: list[str] = []
    plain: list[str] = []
    left = limit
    for line in lines:
        html_line, plain_line = "", ""
        for text, tag in line:
            if not text:
                continue
            if len(text) <= left and text.isascii() and text.isprintable():
                shown, left = text, left - len(text)
            else:
                shown = cut(clean(text), left)
                left -= units(shown)
            html_line += tagged(shown, tag)
            plain_line += shown
        if plain_line:
            html.append(html_line)
            plain.append(plain_line)
            left -= 1
        if left <= 0:
            break
    return "\n".join(html), "\n".join(plain)


def tagged(text: str, tag: str) -> str:
    return f"<{tag}>{escape(text)}</{tag}>" if tag and text else escape(text)


def pages(lines: Iterable[Line], limit: int = MAX_UNITS - ROOM) -> list[tuple[str, str]]:
    """`lines` as HTML and plain text of as many messages as they need, split between lines.

    A line that alone is too long for a message is split within.
    """
    found: list[tuple[str, str]] = []
    page: list[Line] = []
    used = 0
    for line in _short(lines, limit):
        length = sum(units(text) for text, _ in line) + 1
        if page and used + length > limit + 1:
            found.append(compose(page, limit))
            page, used = [], 0
        page.append(line)
        used += length
    if page:
        found.append(compose(page, limit))
    return found


def _short(lines: Iterable[Line], limit: int) -> Iterable[Line]:
    """`lines` without empty ones, those longer than `limit` in pieces."""
    for line in lines:
        piece: Line = []
        left = limit
        for text, tag in line:
            rest = clean(text)
            while units(rest) > left:
                end = _fitting(rest, left)
                piece.append((rest[:end], tag))
                yield piece
                piece, left, rest = [], limit, rest[end:]
            if rest:
                piece.append((rest, tag))
                left -= units(rest)
        if piece:
            yield piece

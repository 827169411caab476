"""From an event to a message: Telegram HTML, the same as plain text, and what it may be merged with.

Only chosen fields are shown; user ids, account numbers and terminal ids never are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

#: UTF-16 units after entity parsing; Telegram does not say which unit it counts, this is the stricter one.
MAX_UNITS = 4096
#: Kept free for the repeat mark.
_ROOM = 32
_LONG_NUMBER = re.compile(r"(?<![\d.,])\d{6,}(?![\d.,]*\d)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_INDEX = re.compile(r"[A-Z]{2,5}\d{2,4}")

LOW, NORMAL, HIGH, CRITICAL = range(4)
#: A line is a list of parts, each a text and the HTML tag around it ("" for none).
Line = list[tuple[str, str]]


class Message(msgspec.Struct, frozen=True):
    """``group`` names what is the same message to a reader; repeats within it are merged. Empty: never merged."""

    html: str
    plain: str
    priority: int
    group: str


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
    used, end = 1, 0
    for end, char in enumerate(text):  # noqa: B007 - the position is what is wanted
        used += 2 if ord(char) > 0xFFFF else 1
        if used > limit:
            break
    return text[:end] + "…" if limit > 0 else ""


def digits_of(symbol: str, overrides: Mapping[str, int]) -> int:
    """Decimals of a price of `symbol`."""
    if symbol in overrides:
        return overrides[symbol]
    if symbol.startswith(("XAG",)):
        return 3
    if symbol.startswith(("XAU", "BTC", "ETH")):
        return 2
    if _INDEX.fullmatch(symbol):
        return 1
    return 3 if symbol[3:6] == "JPY" else 5


def compose(lines: list[Line], limit: int = MAX_UNITS - _ROOM) -> tuple[str, str]:
    """HTML and plain text of `lines`, both cut to `limit` UTF-16 units of visible text, never inside a tag."""
    html: list[str] = []
    plain: list[str] = []
    left = limit
    for line in lines:
        html_line, plain_line = "", ""
        for text, tag in line:
            shown = cut(clean(text), left)
            left -= units(shown)
            if shown:
                html_line += f"<{tag}>{escape(shown)}</{tag}>" if tag else escape(shown)
            plain_line += shown
        if plain_line:
            html.append(html_line)
            plain.append(plain_line)
            left -= 1
        if left <= 0:
            break
    return "\n".join(html), "\n".join(plain)


class Renderer:
    """Turns events into messages; `digits` overrides the decimals per symbol. Stateless otherwise."""

    def __init__(self, digits: Mapping[str, int], mask_numbers: bool = True) -> None:
        self._digits = digits
        self._mask = mask_numbers

    def message(self, event: Any) -> Message | None:
        """The message for `event`, or None for a type that has none."""
        build = _BUILDERS.get(event.event_type)
        if build is None:
            return None
        view = _View(event, self._digits, self._mask)
        lines, priority, group = build(view)
        html, plain = compose(lines)
        return Message(html, plain, priority, f"{event.event_type}:{group}"[:300] if group else "")


class _View:
    """Reads payload fields by canonical name from a struct or from the ``dict`` of an unregistered type."""

    def __init__(self, event: Any, digits: Mapping[str, int], mask: bool) -> None:
        self.event = event
        self._data = event.data
        self._plain = isinstance(event.data, Mapping)
        self._digits = digits
        self._mask = mask

    def get(self, *names: str) -> Any:
        for name in names:
            value = self._data.get(name) if self._plain else getattr(self._data, name, None)
            if value is not None and value is not msgspec.UNSET:
                return value
        return None

    def text(self, *names: str) -> str:
        value = self.get(*names)
        if value is None:
            return ""
        value = getattr(value, "value", value)
        return value if isinstance(value, str) else str(value)

    def free(self, *names: str) -> str:
        """Text written by people or programs: long digit runs are masked down to their last three."""
        text = self.text(*names)
        return _LONG_NUMBER.sub(lambda found: "•••" + found[0][-3:], text) if self._mask else text

    @property
    def symbol(self) -> str:
        return self.text("symbol").upper()

    def price(self, *names: str) -> str:
        value = _number(self.get(*names))
        # terminals write 0 for "at the market" and for "no level"
        return "" if not value else f"{value:.{digits_of(self.symbol, self._digits)}f}"

    def figure(self, pattern: str, *names: str) -> str:
        value = _number(self.get(*names))
        return "" if value is None else pattern.format(value)

    def prices(self) -> Line:
        shown = [(label, self.price(*names)) for label, names in _PRICES]
        parts: Line = []
        for label, value in shown:
            if value:
                parts += [("  " if parts else "", ""), (f"{label} ", ""), (value, "code")]
        return parts


_PRICES = (
    ("entry", ("entry", "entry_price")),
    ("SL", ("sl", "stop_loss", "sl_price")),
    ("TP", ("tp", "take_profit", "tp_price")),
)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _details(*parts: str) -> Line:
    return [(" · ".join(part for part in parts if part), "")]


def _head(mark: str, view: _View, *parts: str) -> Line:
    """The bold first line. A direction is always a word too: colour and arrows alone do not reach everybody."""
    title = " ".join(part for part in (view.text("direction").upper(), view.symbol) if part)
    return [(f"{mark} ", ""), (" ".join(part for part in (title, *parts) if part) or "unnamed", "b")]


def _arrow(view: _View) -> str:
    return {"BUY": "▲", "SELL": "▼"}.get(view.text("direction").upper(), "•")


def _signal(view: _View) -> tuple[list[Line], int, str]:
    confidence = view.figure("{:.0f} %", "confidence")
    identity = view.text("signal_id") or (view.event.correlation_id or "")
    lines = [
        _head(_arrow(view), view),
        view.prices(),
        _details(view.text("pattern_type").replace("_", " "), f"confidence {confidence}" if confidence else ""),
        [(identity, "code")],
    ]
    return lines, NORMAL, identity


def _fire(view: _View) -> tuple[list[Line], int, str]:
    lot = view.figure("{:g} lot", "lot", "lot_size", "volume")
    identity = view.text("fire_id") or (view.event.correlation_id or "")
    lines = [
        _head("🔥", view, "order"),
        _details(lot, view.text("execution_mode"), view.text("status")),
        view.prices(),
        [(identity, "code")],
    ]
    return lines, HIGH, identity


_OUTCOME_MARKS = {"WIN": "✅", "LOSS": "❌", "BREAKEVEN": "➖", "TIMEOUT": "⌛", "CANCELLED": "🚫"}


def _outcome(view: _View) -> tuple[list[Line], int, str]:
    # An open signal has no outcome yet (None); it is called open, never lost.
    outcome = view.text("outcome", "status", "result").upper() or "OPEN"
    identity = view.text("signal_id") or (view.event.correlation_id or "")
    pips = view.figure("{:+.1f} pips", "pips", "pnl_pips", "result_pips")
    result = view.figure("{:+.2f} R", "r", "r_multiple", "result_r", "realized_r")
    exit_price = view.price("exit_price", "exit", "close_price")
    lines: list[Line] = [
        _head(_OUTCOME_MARKS.get(outcome, "•"), view, outcome),
        _details(result, pips, f"exit {exit_price}" if exit_price else "", view.free("reason", "exit_reason")),
        [(identity, "code")],
    ]
    return lines, NORMAL, identity


def _alert(view: _View) -> tuple[list[Line], int, str]:
    severity = view.text("severity", "level", "priority").lower()
    name = view.text("name", "code", "kind", "alert", "rule")
    component = view.text("component") or view.event.source
    title = view.free("title") or name.replace("_", " ") or "alert"
    cleared = view.text("state") == "cleared"
    words = ("CLEARED" if cleared else severity.upper(), title)
    lines: list[Line] = [
        [("✅ " if cleared else "⚠️ ", ""), (" ".join(part for part in words if part), "b")],
        [(view.free("message", "text", "detail", "reason"), "")],
        [(component, "code")],
    ]
    priority = {"critical": CRITICAL, "error": CRITICAL, "info": NORMAL, "low": LOW}.get(severity, HIGH)
    return lines, priority, "|".join((component, *words[:1], name or title, view.symbol))


def _released(view: _View) -> tuple[list[Line], int, str]:
    used, most = view.figure("{:.0f}", "slots_used"), view.figure("{:.0f}", "slots_max")
    lines: list[Line] = [
        _head("🔓", view, "slot released"),
        _details(view.text("method").replace("_", " "), f"{used} of {most} slots used" if used and most else ""),
        [(view.text("fire_id", "signal_id"), "code")],
    ]
    return lines, LOW, ""


_BUILDERS: dict[str, Callable[[_View], tuple[list[Line], int, str]]] = {
    "signal_generated": _signal,
    "fire_command": _fire,
    "signal_outcome": _outcome,
    "alert": _alert,
    "slot_released": _released,
}

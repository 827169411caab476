"""From an event to a message: Telegram HTML, the same as plain text, and what it may be merged with.

Only chosen fields are shown; user ids, account numbers and terminal ids never are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from tapebus_telegram.markup import Line, compose, cut, one_line
from tapebus_trading.symbols import Registry

_LONG_NUMBER = re.compile(r"(?<![\d.,])\d{6,}(?![\d.,]*\d)")
#: UTF-16 units of a message in a list of messages.
LINE_UNITS = 120

#: Above all events is what somebody has asked for and waits for.
LOW, NORMAL, HIGH, CRITICAL, ASKED = range(5)
#: What a message is about that answers somebody's command, in place of an event type.
ANSWER = "answer"


class Message(msgspec.Struct, frozen=True):
    """``group`` names what is the same message to a reader; repeats within it are merged. Empty: never merged.

    ``tally`` is what it adds to a summary of several.
    """

    html: str
    plain: str
    priority: int
    group: str
    tally: Mapping[str, float] = {}

    @property
    def line(self) -> str:
        """The message in a list of several."""
        return one_line(" · ".join(self.plain.split("\n", 2)[:2]), LINE_UNITS)


class Built(msgspec.Struct, frozen=True):
    """What a builder makes of an event, before it is cut to length."""

    lines: list[Line]
    priority: int
    group: str = ""
    tally: Mapping[str, float] = {}


class Renderer:
    """Turns events into messages, with prices by the digits `symbols` knows. Stateless otherwise."""

    def __init__(self, symbols: Registry, mask_numbers: bool = True) -> None:
        self._symbols = symbols
        self._mask = mask_numbers

    def message(self, event: Any) -> Message | None:
        """The message for `event`, or None for a type that has none and for what was imported: it is long over."""
        build = _BUILDERS.get(event.event_type)
        view = _View(event, self._symbols, self._mask)
        if build is None or (event.event_type == "signal_outcome" and view.get("origin")):
            return None
        built = build(view)
        html, plain = compose(built.lines)
        group = f"{event.event_type}:{built.group}"[:300] if built.group else ""
        return Message(html, plain, built.priority, group, built.tally)


class _View:
    """Reads payload fields by canonical name from a struct or from the ``dict`` of an unregistered type."""

    def __init__(self, event: Any, symbols: Registry, mask: bool) -> None:
        self.event = event
        self._data = event.data
        self._plain = isinstance(event.data, Mapping)
        self._symbols = symbols
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

    def words(self, *names: str) -> str:
        """A code like ``SWEEP_RETURN`` as words."""
        return self.text(*names).replace("_", " ")

    def free(self, *names: str) -> str:
        """Text written by people or programs, with account numbers masked."""
        return self.masked(self.text(*names))

    def masked(self, text: str) -> str:
        """`text` with long digit runs masked down to their last three."""
        return _LONG_NUMBER.sub(lambda found: "•••" + found[0][-3:], text) if self._mask else text

    @property
    def symbol(self) -> str:
        return self.text("symbol").upper()

    def identity(self, *names: str) -> str:
        return self.text(*names) or (self.event.correlation_id or "")

    def price(self, *names: str) -> str:
        value = _number(self.get(*names))
        # terminals write 0 for "at the market" and for "no level"
        return "" if not value else f"{value:.{self._symbols[self.symbol].digits}f}"

    def figure(self, pattern: str, *names: str) -> str:
        value = _number(self.get(*names))
        return "" if value is None else pattern.format(value)

    def slots(self) -> str:
        """How many slots are held of how many, like ``4/10 slots``."""
        used, most = self.figure("{:.0f}", "slots_used"), self.figure("{:.0f}", "slots_max")
        return f"{used}/{most} slots" if used and most else ""

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
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer longer than any float
        return None
    return number if math.isfinite(number) else None


def _details(*parts: str) -> Line:
    return [(" · ".join(part for part in parts if part), "")]


def _head(mark: str, view: _View, *parts: str) -> Line:
    """The bold first line. A direction is always a word too: colour and arrows alone do not reach everybody."""
    title = " ".join(part for part in (view.text("direction").upper(), view.symbol) if part)
    return [(f"{mark} ", ""), (" ".join(part for part in (title, *parts) if part) or "unnamed", "b")]


def _arrow(view: _View) -> str:
    return {"BUY": "▲", "SELL": "▼"}.get(view.text("direction").upper(), "•")


def _signal(view: _View) -> Built:
    confidence = view.figure("{:.0f} %", "confidence")
    identity = view.identity("signal_id")
    lines = [
        _head(_arrow(view), view),
        view.prices(),
        _details(view.words("pattern_type"), f"confidence {confidence}" if confidence else ""),
        [(identity, "code")],
    ]
    return Built(lines, NORMAL, identity, {"signals": 1})


def _gate(view: _View) -> Built:
    """Why a signal is not fired: each rule that stopped it, with its limit and what it found; for each user apart."""
    fires = view.get("fire") is True
    who = view.text("user_id") or view.event.user_id or ""
    identity = view.identity("signal_id")
    stopped = [each for each in _items(view.get("rules")) if _of(each, "passed") is False]
    rules = [(str(_of(each, "name")).replace("_", " "), _of(each, "actual"), _of(each, "limit")) for each in stopped]
    lines = [
        _head("🟢" if fires else "🚫", view, "gate:", "fires" if fires else "not fired"),
        _details(f"user •••{who[-3:]}" if who not in ("", "default") else ""),
        _details(*(str(each).replace("_", " ") for each in _items(view.get("reasons"))[:20])),
        *(
            [(f"{name}: ", ""), (_value(actual), "code"), (f"  limit {_value(limit)}", "")]
            for name, actual, limit in rules[:20]
            if (actual, limit) != (None, None)
        ),
        [(identity, "code")],
    ]
    lines = [[(view.masked(cut(text, 300)), tag) for text, tag in line] for line in lines]
    group = f"{identity}|{who}" if identity else ""
    return Built(lines, LOW, group, {"fired by the gate" if fires else "refused by the gate": 1})


def _value(value: Any, depth: int = 2) -> str:
    """A limit, or what a rule found, as people write it."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        number = _number(value)
        return "unknown" if number is None else f"{number:.10g}"
    if isinstance(value, str):
        return value
    if not depth:
        return "…"
    if isinstance(value, list | tuple):
        return "–".join(_value(each, depth - 1) for each in value[:10]) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(each, depth - 1)}" for name, each in list(value.items())[:10])
    return type(value).__name__


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _of(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)


def _fire(view: _View) -> Built:
    lot = view.figure("{:g} lot", "lot", "lot_size", "volume")
    identity = view.identity("fire_id")
    lines = [
        _head("🔥", view, "order"),
        _details(lot, view.text("execution_mode"), view.text("status")),
        view.prices(),
        [(identity, "code")],
    ]
    return Built(lines, HIGH, identity, {"orders": 1})


_OPENED = frozenset(("success", "filled", "ok", "done", "executed", "open", "opened", "partially_filled"))


def _executed(view: _View) -> Built:
    """A terminal's answer to an order; FILLED is an open position, not a finished one."""
    status = view.text("status")
    word = status.lower()
    if word in _OPENED:
        mark, what, priority = "🟢", "opened", HIGH
    elif word.startswith("closed"):
        mark, what, priority = "🏁", "closed", HIGH
    elif word:
        mark, what, priority = "⛔", f"not opened: {status.replace('_', ' ')}", HIGH
    else:
        mark, what, priority = "•", "answered", NORMAL
    identity = view.identity("fire_id")
    price, retcode = view.price("price", "open_price"), view.figure("{:.0f}", "retcode")
    lines: list[Line] = [
        _head(mark, view, what),
        _details(
            view.figure("{:g} lot", "volume", "lot"),
            f"at {price}" if price else "",
            f"code {retcode}" if retcode and mark == "⛔" else "",
            view.free("message"),
        ),
        [(identity, "code")],
    ]
    tally = {"🟢": "opened", "🏁": "closed", "⛔": "not opened"}.get(mark, "answers")
    return Built(lines, priority, f"{what}|{identity}", {tally: 1})


def _slot(mark: str, what: str, tally: str) -> Callable[[_View], Built]:
    def build(view: _View) -> Built:
        lines: list[Line] = [
            _head(mark, view, what),
            _details(view.slots(), view.words("method")),
            [(view.text("fire_id", "signal_id"), "code")],
        ]
        return Built(lines, LOW, tally={tally: 1})

    return build


_OUTCOME_MARKS = {"WIN": "✅", "LOSS": "❌", "BREAKEVEN": "➖", "TIMEOUT": "⌛", "CANCELLED": "🚫"}


def _outcome(view: _View) -> Built:
    # An open signal has no outcome yet (None); it is called open, never lost.
    outcome = view.text("outcome", "status", "result").upper() or "OPEN"
    identity = view.identity("signal_id")
    pips = view.figure("{:+.1f} pips", "pips", "pnl_pips", "result_pips")
    result = view.figure("{:+.2f} R", "r", "r_multiple", "result_r", "realized_r")
    exit_price = view.price("exit_price", "exit", "close_price")
    lines: list[Line] = [
        _head(_OUTCOME_MARKS.get(outcome, "•"), view, outcome),
        _details(result, pips, f"exit {exit_price}" if exit_price else "", view.free("reason", "exit_reason")),
        [(identity, "code")],
    ]
    tally = {"outcomes": 1.0, outcome: 1.0}
    if (r := _number(view.get("r", "r_multiple", "result_r", "realized_r"))) is not None:
        tally["R"] = r
    return Built(lines, NORMAL, identity, tally)


def _pattern(view: _View) -> Built:
    """Where a pattern stands: how many of how many were won, with the interval, and nobody's adjective."""
    status, name = view.text("status").upper(), view.words("pattern_type")
    n, wins = view.figure("{:.0f}", "n"), view.figure("{:.0f}", "wins")
    low, high = _number(view.get("low")), _number(view.get("high"))
    scale = 100 if high is not None and high <= 1 else 1
    known = n not in ("", "0")
    interval = f"{low * scale:.0f}–{high * scale:.0f} %" if known and low is not None and high is not None else ""
    lines: list[Line] = [
        [("🧪 ", ""), (f"{name} {status}".strip() or "pattern", "b")],
        _details(f"{wins} of {n} won" if known and wins else "", f"95 % interval {interval}" if interval else ""),
        [(view.free("reason"), "")],
    ]
    return Built(lines, HIGH if status == "DISABLED" else NORMAL, name, {"patterns changed": 1})


def _alert(view: _View) -> Built:
    severity = view.text("severity", "level", "priority").lower()
    name = view.text("name", "code", "kind", "alert", "rule")
    component = view.text("component") or view.event.source
    what, colon, which = name.partition(":")  # which: a terminal, user or symbol, spelled as it is
    title = view.free("title") or view.masked(what.replace("_", " ") + colon + which) or "alert"
    cleared = view.text("state") == "cleared"
    words = ("CLEARED" if cleared else severity.upper(), title)
    lines: list[Line] = [
        [("✅ " if cleared else "⚠️ ", ""), (" ".join(part for part in words if part), "b")],
        [(view.free("message", "text", "detail", "reason"), "")],
        [(component, "code")],
    ]
    priority = {"critical": CRITICAL, "error": CRITICAL, "info": NORMAL, "low": LOW}.get(severity, HIGH)
    if cleared:
        priority = min(priority, NORMAL)
    # before the line break how it stands, after it what it is about: see `Outbox.latest`
    group = f"{words[0]}\n" + "|".join((component, name or title, view.symbol))
    return Built(lines, priority, group, {"alerts cleared" if cleared else "alerts raised": 1})


def _reconcile(view: _View) -> Built:
    lines: list[Line] = [
        [("🔎 ", ""), ("slots wait for a fresh look at the account", "b")],
        _details(view.slots(), *(str(each).replace("_", " ") for each in _items(view.get("reasons"))[:10])),
    ]
    lines = [[(view.masked(text), tag) for text, tag in line] for line in lines]
    return Built(lines, NORMAL, "reconcile", {"slot checks": 1})


def _action(view: _View) -> Built:
    """What a person did; of who it was only the last three characters are shown."""
    who = view.text("user_id") or view.event.user_id or ""
    details = view.get("details")
    shown = details if isinstance(details, Mapping) else {}
    named = {key: value for key, value in shown.items() if key in _ACTION_DETAILS and isinstance(value, str | int)}
    lines: list[Line] = [
        [("👤 ", ""), (view.words("action") or "action", "b")],
        _details(f"by •••{who[-3:]}" if who else "", *(view.masked(f"{key} {value}") for key, value in named.items())),
    ]
    return Built(lines, NORMAL, tally={"actions": 1})


#: Of what an action says about itself, the rest may be about persons and accounts.
_ACTION_DETAILS = ("pattern_type", "command", "result", "via", "reason")


def _calibration(view: _View) -> Built:
    lines: list[Line] = [
        [("📐 ", ""), (f"confidence calibration {view.figure('{:.0f}', 'version')}".strip(), "b")],
        _details(
            view.text("method"),
            view.figure("n {:.0f}", "n"),
            view.figure("Brier {:.3f}", "brier"),
            view.figure("skill {:+.3f}", "skill"),
            view.figure("ECE {:.3f}", "ece"),
        ),
    ]
    return Built(lines, LOW, "calibration", {"calibrations": 1})


_BUILDERS: dict[str, Callable[[_View], Built]] = {
    "signal_generated": _signal,
    "gate_verdict": _gate,
    "fire_command": _fire,
    "trade_executed": _executed,
    "slot_opened": _slot("🔒", "slot taken", "slots taken"),
    "slot_released": _slot("🔓", "slot released", "slots released"),
    "signal_outcome": _outcome,
    "pattern_status": _pattern,
    "alert": _alert,
    "reconcile_requested": _reconcile,
    "user_action": _action,
    "calibration": _calibration,
}

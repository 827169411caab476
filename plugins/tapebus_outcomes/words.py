"""The steps of a signal's way, the rules of a gate and spans of time, in words for people."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tapebus_outcomes.chain import field

FILLED = frozenset(("FILLED", "SUCCESS", "DONE", "DONE_PARTIAL", "OPEN", "OPENED", "OK", "PLACED"))
REFUSED = frozenset(
    ("FAILED", "REJECTED", "REJECT", "ERROR", "INSUFFICIENT_MARGIN", "INVALID_STOPS", "HEDGE_BLOCKED", "MAX_POSITIONS")
)
#: Answers of MetaTrader 5 that mean the order was taken.
_ACCEPTED = frozenset((10008, 10009, 10010, 10025))


def answer(data: Any) -> str:
    """What a terminal's answer means: ``filled``, ``refused``, ``closed`` or ``pending``."""
    status = str(field(data, "status") or "").upper()
    if status.startswith("CLOSED"):
        return "closed"
    if status in REFUSED:
        return "refused"
    retcode = field(data, "retcode")
    if status in FILLED or retcode in _ACCEPTED or (not status and field(data, "ticket")):
        return "filled"
    return "refused" if retcode and retcode >= 10000 and not status else "pending"


def figure(value: Any) -> str:
    """A figure without noise; a list as a range."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, float):
        return f"{round(value, 6):,.12g}" if abs(value) < 1e6 else f"{value:,.2f}"
    if isinstance(value, list) and len(value) == 2 and all(isinstance(each, int | float) for each in value):
        return f"{figure(value[0])} to {figure(value[1])}"
    if isinstance(value, list):
        return ", ".join(map(figure, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {figure(each)}" for key, each in value.items())
    return str(value)


def span(seconds: float) -> str:
    """A length of time in at most two units."""
    sign, left = ("-", -seconds) if seconds < 0 else ("", seconds)
    if left < 60:
        return f"{sign}{left:.3f} s" if left < 10 else f"{sign}{left:.1f} s"
    whole = round(left)
    for name, size, below, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{sign}{whole // size} {name}" + (f" {rest} {below}" if rest else "")
    return f"{sign}{whole} s"


def _moment(value: Any) -> str:
    """A time of day in UTC, from Unix seconds."""
    return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S}" if isinstance(value, float) else figure(value)


def _limit(what: str, unit: str = "") -> Callable[[str, str], str]:
    return lambda limit, actual: f"{what} {actual}{unit}, limit {limit}{unit}"


#: A rule that failed, by its name, from limit and actual value.
RULES: dict[str, Callable[[str, str], str]] = {
    "auto_fire": lambda limit, actual: "auto-fire is off for this user",
    "kill_switch": lambda limit, actual: "the kill switch is on",
    "tier": lambda limit, actual: f"tier {actual} is not one of {limit}",
    "not_fired_before": lambda limit, actual: "this signal was fired before",
    "expiry": lambda limit, actual: f"the signal was good until {limit}, it was {actual}",
    "lateness": lambda limit, actual: f"decided on {actual} s after it was made, limit {limit} s",
    "pattern": lambda limit, actual: f"pattern {actual} is disabled",
    "confidence": lambda limit, actual: f"confidence {actual} is outside {limit}",
    "market": lambda limit, actual: f"the market of {actual} is closed",
    "trade_mode": lambda limit, actual: f"the broker takes no {limit} on the symbol: trade mode {actual}",
    "specification": lambda limit, actual: f"not said by the broker itself: {actual}",
    "geometry": lambda limit, actual: f"levels on the wrong side: {actual}; needs {limit}",
    "price_on_tick": lambda limit, actual: f"prices that are no multiple of {limit}: {actual}",
    "sl_distance": lambda limit, actual: f"stop {actual} away, needs {limit} (spread, stops level)",
    "tp_distance": lambda limit, actual: f"target {actual} away, needs {limit} (spread, stops level)",
    "quote_age": lambda limit, actual: (
        "no quote of the symbol" if actual == "unknown" else f"quote {actual} s old, limit {limit} s"
    ),
    "slots": lambda limit, actual: f"no free slot: {actual} of {limit} in use",
    "opposite_position": lambda limit, actual: f"opposite position on the symbol: {actual} is held",
    "heartbeat_age": lambda limit, actual: f"last heartbeat of the terminal {actual} s ago, limit {limit} s",
    "account": lambda limit, actual: "the balance of the account is unknown",
    "total_open_risk": _limit("risk of all open positions with this one"),
    "currency_risk": _limit("risk in one currency with this one"),
    "margin": _limit("margin needed"),
    "sizing": lambda limit, actual: f"size {actual} lots, the least is {limit}",
}


def rule(name: str, limit: Any, actual: Any, reason: str = "") -> str:
    """Why a rule failed; `reason` is its code."""
    as_word = _moment if name == "expiry" else figure
    told = RULES.get(name, _limit(name.replace("_", " ")))(as_word(limit), as_word(actual))
    return f"{told} ({reason})" if reason else told


def margin(limit: Any, actual: Any) -> float | None:
    """How near a rule that passed was to failing, as a part of its limit; None where that means nothing."""
    if isinstance(actual, bool) or not isinstance(actual, int | float):
        return None
    if isinstance(limit, list) and len(limit) == 2 and all(isinstance(each, int | float) for each in limit):
        width = limit[1] - limit[0]
        return min(actual - limit[0], limit[1] - actual) / width if width > 0 else 0.0
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit:
        return None
    return abs(limit - actual) / abs(limit)


def step(event: Any) -> str:
    """One event of the way in one line."""
    found = _STEPS.get(event.event_type)
    return found(event.data, event) if found is not None else event.event_type.replace("_", " ")


def _fill(data: Any, name: str, words: str) -> str:
    value = field(data, name)
    return words.format(figure(value)) if value is not None else ""


def _lots(data: Any, name: str, before: str = " ") -> str:
    value = field(data, name)
    return "" if value is None else f"{before}{figure(value)} lot{'s' * (value != 1)}"


def _verdict(data: Any, event: Any) -> str:
    rules = field(data, "rules") or []
    failed = sum(not field(each, "passed") for each in rules)
    who = _user(data, event)
    if field(data, "fire"):
        risk = field(data, "risk")
        money = f", risk {risk:,.2f}" if isinstance(risk, int | float) else ""
        return f"gate lets it through{who}:{_lots(data, 'lots')}{money}"
    return f"gate refuses it{who}: {failed} of {len(rules)} rules failed"


def _user(data: Any, event: Any) -> str:
    user = field(data, "user_id") or event.user_id
    return f" for user {user}" if user else ""


def _order(data: Any, event: Any) -> str:
    mode = str(field(data, "execution_mode") or "").lower()
    status = str(field(data, "status") or "queued").lower()
    return f"{mode} order {status}:".lstrip() + _lots(data, "lot") + _fill(data, "direction", " {}")


def _answered(data: Any, event: Any) -> str:
    kind = "executed" if event.event_type == "trade_executed" else "confirmed"
    price = _fill(data, "price", " at {}")
    ticket = f", ticket {field(data, 'ticket')}" if field(data, "ticket") is not None else ""
    meaning = answer(data)
    if meaning == "filled":
        return f"trade {kind}: filled{_lots(data, 'volume')}{price}{ticket}"
    code = f" (code {field(data, 'retcode')})" if field(data, "retcode") is not None else ""
    if meaning == "refused":
        why = field(data, "message") or field(data, "status") or "no reason given"
        return f"the terminal refused the order: {why}{code}"
    return f"trade {kind}: {field(data, 'status') or 'answer without a status'}{code}{ticket}"


def _closed(data: Any, event: Any) -> str:
    profit = field(data, "profit")
    result = f", result {profit:+,.2f}" if isinstance(profit, int | float) else ""
    words = f"{_lots(data, 'volume', ', ')}{_fill(data, 'close_price', ' at {}')}{result}"
    return f"position closed: {field(data, 'reason') or 'no reason given'}{words}"


def _slot(what: str) -> Callable[[Any, Any], str]:
    def told(data: Any, event: Any) -> str:
        used = f", {field(data, 'slots_used') or 0}/{field(data, 'slots_max') or '?'} in use"
        method = f" by {str(field(data, 'method')).replace('_', ' ')}" if field(data, "method") else ""
        return f"slot {what}{method}{used}"

    return told


def _outcome(data: Any, event: Any) -> str:
    r = field(data, "r")
    parts = [
        f"{r:+.2f} R" if r is not None else "",
        "" if field(data, "pips") is None else f"{field(data, 'pips'):+,.1f} pips",
        _fill(data, "exit_price", "out at {}"),
        f"after {span(field(data, 'duration_s') or 0.0)}" if field(data, "duration_s") else "",
    ]
    origin = field(data, "origin")
    where = f" (imported from {origin})" if origin else ""
    return f"outcome {field(data, 'outcome')}: {', '.join(filter(None, parts)) or 'no price known'}{where}"


_STEPS: dict[str, Callable[[Any, Any], str]] = {
    "signal_generated": lambda data, event: f"signal generated by {event.source}",
    "signal_imported": lambda data, event: (
        f"signal imported from {field(data, 'origin') or event.source}; its end is not recorded there"
    ),
    "signal_expired": lambda data, event: f"signal expired: {field(data, 'reason') or 'no reason given'}",
    "gate_verdict": _verdict,
    "slot_reserved": _slot("reserved"),
    "fire_command": _order,
    "trade_executed": _answered,
    "trade_confirmed": _answered,
    "slot_opened": _slot("opened"),
    "position_closed": _closed,
    "slot_released": _slot("released"),
    "signal_outcome": _outcome,
}

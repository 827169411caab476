"""What one line of an old log says about one signal, under one set of names, with what had to be repaired.

Several programs wrote these logs, each in its own spelling. `recognise` tells the shape of a record, `fact` reads it.
Nothing is believed that the line itself contradicts, and nothing is made up: what is unknown stays None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct

TRUTH_LOG, OPTIMIZED, COMPREHENSIVE = "truth_log", "optimized_tracking", "comprehensive_tracking"
LIFE_CYCLE, TRACKING_RECORD, REMARK = "life_cycle", "tracking_record", "remark"
UNKNOWN_SHAPE = "unknown"

#: What was repaired, by the name that is counted.
REPAIRS = {
    "pips_recomputed": "pip figures that are not the symbol's: recomputed from prices",
    "pips_dropped": "pip figures without prices behind them: left out",
    "price_noise": "prices with floating-point noise: rounded to 8 decimals",
    "open_not_lost": "win is false although it was never followed: open, not lost",
    "end_time_unknown": "the end has no time: taken as the signal's own, duration 0",
    "r_planned": "no exit price: R is reward:risk for a win, -1 for a loss",
    "risk_reward_recomputed": "reward:risk disagrees with the prices: recomputed",
    "duration_contradiction": "duration and times disagree: the times count",
    "confidence_fraction": "confidence as a fraction of 1: made percent",
    "direction_from_levels": "no direction: told by stop, entry and target",
    "number_as_text": "numbers written as text: read",
    "milliseconds": "times in milliseconds: made seconds",
    "win_disagrees": "win disagrees with the outcome beside it: the outcome counts",
}
#: How programs spell the same thing, the best spelling first.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "symbol": ("symbol", "pair"),
    "pattern": ("pattern_type", "pattern"),
    "confidence": ("confidence", "confidence_score"),
    "entry": ("entry_price", "entry", "open_price"),
    "sl": ("sl_price", "stop_loss", "sl"),
    "tp": ("tp_price", "take_profit", "tp"),
    "risk_reward": ("risk_reward", "rr"),
    "quality": ("quality_score", "quality"),
    "at": ("timestamp", "generated_at", "time_utc", "datetime"),
    "ended_at": ("completed_at", "closed_at"),
    "exit_price": ("exit_price", "close_price", "current_price"),
}
_OUTCOMES = {
    "WIN": "WIN",
    "TP_HIT": "WIN",
    "LOSS": "LOSS",
    "SL_HIT": "LOSS",
    "BREAKEVEN": "BREAKEVEN",
    "TIMEOUT": "TIMEOUT",
    "TIMEOUT_CLOSED": "TIMEOUT",
    "EXPIRED": "TIMEOUT",
    "CANCELLED": "CANCELLED",
    "CANCELED": "CANCELLED",
    "UNKNOWN": "UNKNOWN",
}
_OPEN = frozenset(("", "OPEN", "PENDING", "ACTIVE"))
_SIDES = {"BUY": "BUY", "LONG": "BUY", "SELL": "SELL", "SHORT": "SELL"}
#: Seconds by which two statements about one moment may differ.
CLOCK_TOLERANCE_S = 60.0
#: Fields that are read, or that say in other words what another one says.
READ = frozenset(each for spelt in SPELLINGS.values() for each in spelt) | frozenset(
    [
        "signal_id",
        "direction",
        "session",
        "signal_class",
        "fired",
        "win",
        "outcome",
        "completion_reason",
        "outcome_source",
        "lifespan",
        "runtime_seconds",
        "runtime_hours",
        "trade_duration_minutes",
        "last_updated",
        "sl_pips",
        "tp_pips",
        "pips_moved",
        "pips_result",
        "status",
        "completed",
        "exit_type",
        "timeout_reason",
    ]
)
_PIPS = {"sl_pips": "stop", "tp_pips": "target", "pips_moved": "result", "pips_result": "result"}


class Refused(ValueError):
    """A line, or all lines of a signal, cannot become an event; ``reason`` is what is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


class Fact(Struct):
    """One line. ``describes`` tells a signal from a mere end of one; ``win`` is as recorded, ``outcome`` as stated.

    ``at``, ``ended_at`` in Unix seconds, ``lived_s`` the stated duration (0: not followed), ``pips`` what the file
    says, by ``stop``, ``target`` and ``result``, to be compared and never used.
    """

    file: int
    line: int
    shape: str
    signal_id: str
    describes: bool = True
    symbol: str = ""
    direction: str = ""
    pattern: str = ""
    confidence: float | None = None
    at: float | None = None
    entry: float | None = None
    sl: float | None = None
    tp: float | None = None
    risk_reward: float | None = None
    quality: float | None = None
    session: str | None = None
    signal_class: str | None = None
    fired: bool = False
    win: bool | None = None
    outcome: str | None = None
    exit_price: float | None = None
    ended_at: float | None = None
    lived_s: float | None = None
    pips: dict[str, float] = {}
    repairs: set[str] = set()


def recognise(record: Mapping[str, Any]) -> str:
    """The shape of a record, by the fields only its writer has."""
    keys = record.keys()
    if "fresh_start" in keys or ("action" in keys and "attempted_at" in keys):
        return REMARK
    if "signal_id" not in keys:
        return UNKNOWN_SHAPE
    if "trade_duration_minutes" in keys:
        return TRACKING_RECORD
    if "would_fire" in keys or "completion_reason" in keys:
        return COMPREHENSIVE
    if "generated_at" in keys or "completed_at" in keys:
        return LIFE_CYCLE
    if "outcome_source" in keys:
        return OPTIMIZED
    if ("pair" in keys or "symbol" in keys) and ("pattern" in keys or "pattern_type" in keys) and "timestamp" in keys:
        return TRUTH_LOG
    return UNKNOWN_SHAPE


def fact(record: Mapping[str, Any], shape: str, file: int, line: int) -> Fact:
    """What the line says. Raises `Refused`."""
    reader = _Reader(record)
    signal_id = record.get("signal_id")
    if not isinstance(signal_id, str) or not 0 < len(signal_id) <= 200:
        raise Refused("no usable signal_id", f"signal_id {signal_id!r}")
    outcome = reader.outcome()
    found = Fact(
        file=file,
        line=line,
        shape=shape,
        signal_id=signal_id,
        describes=reader.has("symbol"),
        symbol=reader.word("symbol").upper(),
        direction=reader.direction(),
        pattern=reader.word("pattern"),
        confidence=reader.confidence(),
        at=reader.time("at"),
        entry=reader.price("entry"),
        sl=reader.price("sl"),
        tp=reader.price("tp"),
        risk_reward=reader.number("risk_reward"),
        quality=reader.number("quality"),
        session=reader.word("session") or None,
        signal_class=reader.word("signal_class") or None,
        fired=record.get("fired") is True,
        win=reader.win(),
        outcome=outcome,
        exit_price=reader.price("exit_price") if outcome else None,
        ended_at=reader.time("ended_at"),
        lived_s=reader.lived(),
        pips=reader.pips(),
    )
    if found.outcome in ("WIN", "LOSS") and found.win is not None and found.win is not (found.outcome == "WIN"):
        reader.repairs.add("win_disagrees")
    _date_the_end(found, record, reader)
    if found.describes and not found.direction:
        found.direction = _direction_of(found)
        reader.repairs.add("direction_from_levels")
    found.repairs = reader.repairs
    return found


def _date_the_end(found: Fact, record: Mapping[str, Any], reader: _Reader) -> None:
    """Find the end's time. Two clock times outweigh a stated duration that disagrees with them."""
    started = found.at
    if started is None:
        return
    if found.shape == TRACKING_RECORD and found.lived_s:
        # The one time of such a record is its signal's (its id carries the same one), although it was
        # written at the end: so the end is known by the duration only.
        born = re.search(r"_(\d{10})$", found.signal_id)
        if born and abs(started - int(born[1])) <= CLOCK_TOLERANCE_S < found.lived_s:
            reader.repairs.add("duration_contradiction")
    updated = reader.seconds(record.get("last_updated"))
    ended = found.ended_at if found.ended_at is not None else updated if found.outcome and found.lived_s else None
    if ended is not None and found.lived_s is not None and abs(ended - started - found.lived_s) > CLOCK_TOLERANCE_S:
        reader.repairs.add("duration_contradiction")
        found.lived_s = None
    if found.ended_at is None and found.lived_s:
        found.ended_at = started + found.lived_s
    elif found.ended_at is None and found.outcome:
        found.ended_at = ended


def _direction_of(found: Fact) -> str:
    low, high = (found.sl, found.tp) if found.sl and found.tp else (None, None)
    if low is None or high is None or low == high or not found.entry:
        raise Refused("no direction", f"{found.signal_id} has neither a direction nor all of entry, stop and target")
    return "BUY" if low < high else "SELL"


class _Reader:
    """Reads the fields of one record and notes in ``repairs`` what had to be put right."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.repairs: set[str] = set()

    def has(self, name: str) -> bool:
        return self._value(name) is not None

    def _value(self, name: str) -> Any:
        for key in SPELLINGS.get(name, (name,)):
            if (value := self.record.get(key)) is not None:
                return value
        return None

    def word(self, name: str) -> str:
        value = self._value(name)
        if value is not None and not isinstance(value, str):
            raise Refused(f"{name} is no text", f"{name} {value!r}")
        return (value or "").strip()

    def number(self, name: str) -> float | None:
        return self._number(name, self._value(name))

    def _number(self, name: str, value: Any) -> float | None:
        if isinstance(value, str) and value.strip():
            try:
                value = float(value)
            except ValueError:
                raise Refused(f"{name} is no number", f"{name} {value!r}") from None
            self.repairs.add("number_as_text")
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(f"{name} is no number", f"{name} {value!r}")
        try:
            found = float(value)
        except OverflowError:  # an integer of hundreds of digits
            found = math.inf
        if not math.isfinite(found):
            raise Refused(f"{name} is no number", f"{name} is too large or not a number")
        return found

    def price(self, name: str) -> float | None:
        """A price without noise; 0 is how terminals write that there is none."""
        value = self.number(name)
        if value is None or value == 0:
            return None
        if value < 0 or value > 1e12:
            raise Refused("impossible price", f"{name} {value!r}")
        clean = round(value, 8)
        if clean != value:
            self.repairs.add("price_noise")
        return clean

    def confidence(self) -> float | None:
        value = self.number("confidence")
        if value is None:
            return None
        if 0 < value < 1:
            self.repairs.add("confidence_fraction")
            value = round(value * 100, 8)
        if not 0 <= value <= 100:
            raise Refused("confidence outside 0 to 100", f"confidence {value!r}")
        return value

    def direction(self) -> str:
        word = self.word("direction").upper()
        if word and word not in _SIDES:
            raise Refused("unknown direction", f"direction {word!r}")
        return _SIDES.get(word, "")

    def win(self) -> bool | None:
        value = self.record.get("win")
        if value is not None and not isinstance(value, bool):
            raise Refused("win is neither true, false nor null", f"win {value!r}")
        return value

    def outcome(self) -> str | None:
        for key in ("outcome", "completion_reason"):
            word = self.word(key).upper()
            if word in _OUTCOMES:
                return _OUTCOMES[word]
            if word not in _OPEN:
                raise Refused("unknown outcome", f"{key} {word!r}")
        return None

    def lived(self) -> float | None:
        """The stated duration in seconds; 0 is how these programs write that nobody has followed it."""
        for key, unit in (("lifespan", 1.0), ("runtime_seconds", 1.0), ("trade_duration_minutes", 60.0)):
            value = self._number(key, self.record.get(key))
            if value is not None:
                if value < 0:
                    raise Refused("negative duration", f"{key} {value!r}")
                return value * unit
        return None

    def pips(self) -> dict[str, float]:
        stated = {_PIPS[key]: self._number(key, self.record.get(key)) for key in _PIPS if key in self.record}
        return {name: value for name, value in stated.items() if value}

    def time(self, name: str) -> float | None:
        return self.seconds(self._value(name))

    def seconds(self, value: Any) -> float | None:
        """Unix seconds; a time without a zone is UTC, which is what the ids of these logs prove."""
        if isinstance(value, str):
            try:
                moment = datetime.fromisoformat(value)
            except ValueError:
                raise Refused("unreadable time", f"time {value!r}") from None
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        found = self._number("time", value)
        if found is not None and found > 1e11:
            self.repairs.add("milliseconds")
            found /= 1000
        if found is not None and not 0 < found < 1e11:
            raise Refused("unreadable time", f"time {value!r}")
        return found

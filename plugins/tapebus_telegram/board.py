"""What the relay knows of the desk from the events it sees: slots, switch, patterns, alerts, last outcomes.

It answers ``/status`` and ``/slots``, and survives a restart. It shows no user id and no account number.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import msgspec

from tapebus_telegram.markup import Line, one_line

#: The event types it learns from.
TOPICS = (
    "signal_generated",
    "gate_verdict",
    "slot_reserved",
    "slot_opened",
    "slot_released",
    "signal_outcome",
    "pattern_status",
    "alert",
    "ea_heartbeat",
    "user_action",
)
#: How many of each are kept.
OUTCOMES, SLOTS, NAMES = 20, 500, 200
_STATE = "board/"


class Held(msgspec.Struct):
    """One slot that is held: for whom, by what, since when (event time), whether its order is a position already."""

    user: str
    symbol: str
    direction: str
    at: float
    is_open: bool


class Slots(msgspec.Struct):
    """By user: slots used and allowed. By fire id: what holds them, as far as it was seen."""

    counts: dict[str, tuple[int, int]] = {}
    held: dict[str, Held] = {}


class Desk(msgspec.Struct):
    """The rest; ``patterns`` by name with the last known status ("" as long as none was said)."""

    switch: bool = False
    switch_at: float = 0.0
    patterns: dict[str, str] = {}
    alerts: dict[str, tuple[str, str, float]] = {}
    outcomes: list[tuple[str, float | None]] = []


class Gate(msgspec.Struct):
    """What comes often: signals, verdicts, and by terminal its open positions with the time of the heartbeat."""

    signal_at: float = 0.0
    fired: int = 0
    refused: int = 0
    reasons: list[str] = []
    verdict_at: float = 0.0
    beats: dict[str, tuple[int | None, float]] = {}


class Board:
    """Used on the consumer's thread. `see` takes every event of `TOPICS`; `save` writes the parts that changed."""

    def __init__(self, state: MutableMapping[str, bytes]) -> None:
        self._state = state
        self.slots = self._load("slots", Slots)
        self.desk = self._load("desk", Desk)
        self.gate = self._load("gate", Gate)
        self._dirty: set[str] = set()
        self._seers: dict[str, tuple[str, Callable[[Any, Any], None]]] = {
            "signal_generated": ("gate", self._signal),
            "gate_verdict": ("gate", self._verdict),
            "ea_heartbeat": ("gate", self._beat),
            "slot_reserved": ("slots", self._slot),
            "slot_opened": ("slots", self._slot),
            "slot_released": ("slots", self._slot),
            "signal_outcome": ("desk", self._outcome),
            "pattern_status": ("desk", self._pattern),
            "alert": ("desk", self._alert),
            "user_action": ("desk", self._action),
        }

    def _load(self, name: str, kind: type[Any]) -> Any:
        blob = self._state.get(_STATE + name)
        return msgspec.msgpack.decode(blob, type=kind) if blob is not None else kind()

    def see(self, event: Any) -> None:
        found = self._seers.get(event.event_type)
        if found is not None:
            part, take = found
            take(event, event.data)
            self._dirty.add(part)

    def save(self) -> None:
        for part in self._dirty:
            self._state[_STATE + part] = msgspec.msgpack.encode(getattr(self, part))
        self._dirty.clear()

    # -- events ---------------------------------------------------------------------------------

    def _signal(self, event: Any, data: Any) -> None:
        self.gate.signal_at = event.timestamp
        name = field(data, "pattern_type")
        if name and name not in self.desk.patterns and len(self.desk.patterns) < NAMES:
            self.desk.patterns[name] = ""
            self._dirty.add("desk")

    def _verdict(self, event: Any, data: Any) -> None:
        fires = field(data, "fire") is True
        self.gate.fired += fires
        self.gate.refused += not fires
        self.gate.reasons = [str(each)[:60] for each in (field(data, "reasons") or ())[:3]]
        self.gate.verdict_at = event.timestamp

    def _beat(self, event: Any, data: Any) -> None:
        terminal = str(field(data, "target_uuid") or field(data, "account_number") or "")
        self.gate.beats[terminal] = (field(data, "open_positions"), event.timestamp)
        _bound(self.gate.beats, NAMES)

    def _slot(self, event: Any, data: Any) -> None:
        user = str(field(data, "user_id") or event.user_id or "")
        used, most = field(data, "slots_used"), field(data, "slots_max")
        if isinstance(used, int) and isinstance(most, int):
            self.slots.counts[user] = (used, most)
            _bound(self.slots.counts, SLOTS)
        fire = field(data, "fire_id") or ""
        if event.event_type == "slot_released":
            self.slots.held.pop(fire, None)
            return
        is_open = event.event_type == "slot_opened"
        self.slots.held[fire] = Held(
            user, field(data, "symbol") or "", _code(data, "direction"), event.timestamp, is_open
        )
        _bound(self.slots.held, SLOTS)

    def _outcome(self, event: Any, data: Any) -> None:
        outcome = _code(data, "outcome")
        if outcome:
            self.desk.outcomes = [*self.desk.outcomes, (outcome, field(data, "r"))][-OUTCOMES:]

    def _pattern(self, event: Any, data: Any) -> None:
        name = field(data, "pattern_type")
        if name:
            self.desk.patterns[name] = _code(data, "status").lower()
            _bound(self.desk.patterns, NAMES)

    def _alert(self, event: Any, data: Any) -> None:
        name = _code(data, "name")
        if _code(data, "state") == "cleared":
            self.desk.alerts.pop(name, None)
        else:
            self.desk.alerts.pop(name, None)
            self.desk.alerts[name] = (_code(data, "severity"), str(field(data, "message") or "")[:200], event.timestamp)
            _bound(self.desk.alerts, NAMES)

    def _action(self, event: Any, data: Any) -> None:
        self.acted(_code(data, "action"), event.timestamp)

    def acted(self, action: str, at: float) -> None:
        """Somebody turned the switch, or did something else."""
        on = action == "kill_switch_on"
        if on != self.desk.switch and action in ("kill_switch_on", "kill_switch_off"):
            self.desk.switch, self.desk.switch_at = on, at
            self._dirty.add("desk")

    # -- answers --------------------------------------------------------------------------------

    def occupancy(self) -> str:
        """Slots used of slots allowed over all users, like ``4/10``."""
        if not self.slots.counts:
            return "none seen"
        used = sum(used for used, _ in self.slots.counts.values())
        return f"{used}/{sum(most for _, most in self.slots.counts.values())}"

    def known(self, name: str) -> str | None:
        """The pattern called `name`, in whatever case and with spaces or underscores."""
        wanted = _plain(name)
        return next((each for each in self.desk.patterns if _plain(each) == wanted), None)

    def status(self, now: float) -> list[Line]:
        desk, gate = self.desk, self.gate
        disabled = [name for name, status in desk.patterns.items() if status == "disabled"]
        switch = f"ON since {ago(now, desk.switch_at)}: the gate refuses" if desk.switch else "off"
        lines: list[Line] = [
            _line("kill switch", switch),
            _line("slots", self.occupancy()),
            _line("open positions", self._positions(now)),
            _line("last signal", ago(now, gate.signal_at)),
            _line("gate", self._gate(now)),
            _line("patterns disabled", ", ".join(disabled) or "none"),
            _line("last outcomes", outcomes(desk.outcomes)),
            _line("alerts", str(len(desk.alerts)) if desk.alerts else "none"),
        ]
        newest = sorted(desk.alerts.items(), key=lambda item: -item[1][2])[:10]
        lines += [
            [(f"  {one_line(f'{severity} {name}: {message}', 200)}", ""), (f" {ago(now, at)}", "i")]
            for name, (severity, message, at) in newest
        ]
        return lines

    def _positions(self, now: float) -> str:
        beats = self.gate.beats.values()
        if not beats:
            return "no heartbeat seen"
        counts = [count for count, _ in beats if isinstance(count, int)]
        return f"{sum(counts) if counts else '?'}, heartbeat {ago(now, min(at for _, at in beats))}"

    def _gate(self, now: float) -> str:
        gate = self.gate
        if not gate.verdict_at:
            return "no verdict seen"
        last = ", ".join(each.replace("_", " ") for each in gate.reasons) or "fires"
        return f"{gate.fired} fired, {gate.refused} refused; last {ago(now, gate.verdict_at)}: {last}"

    def slot_list(self, now: float) -> list[Line]:
        """One line for each slot that is held, the oldest first; by user where there are several."""
        lines: list[Line] = [[("🎰 ", ""), (f"{self.occupancy()} slots", "b")]]
        for user, (used, most) in self.slots.counts.items():
            if len(self.slots.counts) > 1:
                lines.append([(f"user •••{user[-3:]}: {used}/{most}", "b")])
            mine = sorted((each for each in self.slots.held.values() if each.user == user), key=lambda each: each.at)
            for held in mine:
                what = "open" if held.is_open else "reserved"
                name = f"{held.direction or '?'} {held.symbol or '?'}"
                lines.append([(name, "b"), (f" {what} {ago(now, held.at)}", "")])
            if (unseen := used - len(mine)) > 0:
                lines.append([(f"{unseen} more, taken before they were watched here", "i")])
        return lines

    def pattern_list(self) -> list[Line]:
        lines: list[Line] = [[("🧪 ", ""), ("patterns", "b")]]
        lines += [_line(name, status or "no status yet") for name, status in sorted(self.desk.patterns.items())]
        return lines if len(lines) > 1 else [*lines, [("none seen yet", "")]]


def outcomes(last: list[tuple[str, float | None]]) -> str:
    """Like ``12W/7L of 20, +2.1R``: wins and losses of all that ended, and R where it is known."""
    if not last:
        return "none seen"
    wins, losses = (sum(outcome == word for outcome, _ in last) for word in ("WIN", "LOSS"))
    known = [r for _, r in last if r is not None]
    return f"{wins}W/{losses}L of n={len(last)}" + (f", {sum(known):+.1f}R" if known else "")


def ago(now: float, at: float) -> str:
    """How long ago `at` was; ``never`` for 0."""
    return f"{span(max(0.0, now - at))} ago" if at else "never"


def span(seconds: float) -> str:
    """So many seconds in the largest unit that says something."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def field(data: Any, name: str) -> Any:
    """A field of a payload, which is a struct or, for an unregistered type, a dict; None where it is absent."""
    value = data.get(name) if isinstance(data, dict) else getattr(data, name, None)
    return None if value is msgspec.UNSET else value


def _code(data: Any, name: str) -> str:
    value = field(data, name)
    return "" if value is None else str(getattr(value, "value", value))


def _plain(name: str) -> str:
    return "_".join(name.upper().replace("_", " ").split())


def _line(name: str, value: str) -> Line:
    return [(f"{name}: ", ""), (value, "b")]


def _bound(table: dict[str, Any], most: int) -> None:
    while len(table) > most:
        del table[next(iter(table))]

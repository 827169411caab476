"""A signal's way from its events: steps with the time between them, and which step is missing. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from tapebus_outcomes import words
from tapebus_outcomes.chain import SIGNALS, field

#: Nearest margins told of a verdict.
_NEAREST = 2
#: A margin of more than this part of its limit is told only when there is none nearer.
_FAR = 0.5
_PER_FIRE = frozenset(
    ("fire_command", "slot_reserved", "slot_opened", "slot_released", "trade_executed", "trade_confirmed")
) | {"position_closed"}


class Step(Struct):
    """One event. ``at`` is event time, ``received_at`` when the bus got it (0: unknown), both Unix seconds;
    ``after_s`` is event time since the step before on the same way."""

    bus_seq: int
    event_type: str
    at: float
    received_at: float
    text: str
    after_s: float | None = None
    details: list[str] = []


class Way(Struct):
    """The way for one user and one fire; ``missing`` names the step that did not come, ``state`` where it stands."""

    user_id: str | None = None
    fire_id: str | None = None
    ticket: int | None = None
    state: str = ""
    missing: str | None = None
    steps: list[Step] = []


class Story(Struct):
    """Everything about one signal. ``birth`` and ``end`` are the steps all users share."""

    signal_id: str
    symbol: str | None = None
    direction: str | None = None
    pattern_type: str | None = None
    confidence: float | None = None
    entry: float | None = None
    sl: float | None = None
    tp: float | None = None
    outcome: str | None = None
    imported: bool = False
    birth: list[Step] = []
    ways: list[Way] = []
    end: list[Step] = []
    missing: list[str] = []


def tell(signal_id: str, events: Sequence[Any], now: float) -> Story:
    """The story of `events`, which are those of one signal in bus order; `now` is when the newest event of the tape was
    received: waiting is counted up to there."""
    story = Story(signal_id)
    birth = [each for each in events if each.event_type in (*SIGNALS, "signal_expired")]
    ends = [each for each in events if each.event_type == "signal_outcome"]
    born = next((each for each in birth if each.event_type in SIGNALS), None)
    for each in (*birth, *ends, *events):
        _describe(story, each.data)
    story.imported = any(each.event_type == "signal_imported" or field(each.data, "origin") for each in (*birth, *ends))
    story.outcome = field(ends[-1].data, "outcome") if ends else None
    story.birth = _steps(birth, None)
    story.ways = [_way(mine, born, ends, now) for mine in _by_way(events)]
    story.end = _steps(ends, born)
    story.missing = _missing(story, born, ends, now)
    return story


def _describe(story: Story, data: Any) -> None:
    for name in ("symbol", "direction", "pattern_type", "confidence", "entry", "sl", "tp"):
        if getattr(story, name) is None and (value := field(data, name)) not in (None, 0):
            setattr(story, name, value)


def _missing(story: Story, born: Any, ends: Sequence[Any], now: float) -> list[str]:
    found: list[str] = []
    if born is None and not story.imported:
        found.append("no signal_generated on this tape: older than what is kept, or never published here")
    if (
        born is not None
        and born.event_type == "signal_generated"
        and not any(step.event_type == "gate_verdict" for way in story.ways for step in way.steps)
    ):
        found.append(f"no gate verdict for {words.span(_waited(born, now))}: is the plugin slots enabled?")
    for way in story.ways:
        if way.missing:
            found.append(f"user {way.user_id}: {way.missing}" if way.user_id and len(story.ways) > 1 else way.missing)
    if not ends and not story.imported and born is not None:
        found.append(f"no outcome for {words.span(_waited(born, now))}: neither stop, target nor expiry was seen")
    return found


def _waited(event: Any, now: float) -> float:
    return max(0.0, now - float(event.received_at or event.timestamp))


def _by_way(events: Sequence[Any]) -> list[list[Any]]:
    """Events by fire, each with the verdict of its user; verdicts that led to no fire by user."""
    fires: dict[str, list[Any]] = {}
    owners: dict[str, str | None] = {}
    tickets: dict[int, str] = {}
    for each in events:
        if each.event_type not in _PER_FIRE:
            continue
        fire = field(each.data, "fire_id") or tickets.get(field(each.data, "ticket") or -1)
        fire = fire or tickets.get(field(each.data, "position_id") or -1) or each.correlation_id or ""
        fires.setdefault(fire, []).append(each)
        for name in ("ticket", "position_id"):
            if ticket := field(each.data, name):
                tickets.setdefault(ticket, fire)
        owners[fire] = owners.get(fire) or _user_of(each)
    found = {fire: list(mine) for fire, mine in fires.items()}
    alone: dict[str | None, list[Any]] = {}
    for each in events:
        if each.event_type == "gate_verdict":
            user = _user_of(each)
            theirs = [fire for fire in fires if owners[fire] == user and _is_auto(fires[fire])]
            (found[theirs[0]] if theirs else alone.setdefault(user, [])).append(each)
    ways = [*found.values(), *alone.values()]
    for mine in ways:
        mine.sort(key=lambda each: each.bus_seq)
    return sorted(ways, key=lambda mine: mine[0].bus_seq)


def _is_auto(events: Sequence[Any]) -> bool:
    orders = [each for each in events if each.event_type == "fire_command"]
    return not orders or field(orders[0].data, "execution_mode") in ("AUTO", None)


def _user_of(event: Any) -> str | None:
    user = field(event.data, "user_id") or event.user_id
    return str(user) if user else None


def _way(events: list[Any], born: Any, ends: Sequence[Any], now: float) -> Way:
    def first(name: str) -> Any:
        return next((field(each.data, name) for each in events if field(each.data, name) is not None), None)

    way = Way(next(filter(None, map(_user_of, events)), None), first("fire_id"), first("ticket"))
    way.steps = _steps(events, born)
    way.state, way.missing = _state(events, ends, now)
    return way


def _state(events: list[Any], ends: Sequence[Any], now: float) -> tuple[str, str | None]:
    """Where a way stands, and the step that should have come next."""
    last = {each.event_type: each for each in events}
    orders = [each for each in events if each.event_type == "fire_command"]
    answers = [each for each in events if each.event_type in ("trade_executed", "trade_confirmed")]
    meanings = {words.answer(each.data) for each in answers}
    verdict, closed, released = (last.get(each) for each in ("gate_verdict", "position_closed", "slot_released"))
    if not orders and not answers:
        if verdict is not None and field(verdict.data, "fire"):
            return "let through", f"no fire_command for {words.span(_waited(verdict, now))} after the verdict"
        return "refused by the gate", None
    if closed is None and "closed" not in meanings and not meanings & {"filled", "refused"}:
        return _unanswered(orders, answers, now)
    holds = ("slot_reserved" in last or "slot_opened" in last) and released is None
    if closed is None and "closed" not in meanings and "refused" not in meanings:
        filled = next(each for each in answers if words.answer(each.data) == "filled")
        if "slot_reserved" in last and "slot_opened" not in last:
            return "open", f"no slot_opened for {words.span(_waited(filled, now))} after the fill"
        if released is not None:
            return "released", "no position_closed: the slot was released by other evidence"
        if ends:
            return "open", f"no position_closed for {words.span(_waited(ends[-1], now))} after the signal's own end"
        return f"open for {words.span(_waited(filled, now))}", None
    state = "closed" if closed is not None or "closed" in meanings else "refused by the terminal"
    if holds:
        ended = closed or answers[-1]
        return (
            state,
            f"no slot_released for {words.span(_waited(ended, now))} after the position was {state.split()[0]}",
        )
    return state, None


def _unanswered(orders: Sequence[Any], answers: Sequence[Any], now: float) -> tuple[str, str]:
    asked = (answers or orders)[-1]
    status = str(field(asked.data, "status") or "queued").lower()
    waited = words.span(_waited(asked, now))
    if not answers and status == "queued":
        return "queued", f"no answer for {waited} after queued: no router has said that it took the order"
    return status, f"no answer from the terminal for {waited} after {status}"


def _steps(events: Sequence[Any], born: Any) -> list[Step]:
    steps: list[Step] = []
    before = born.timestamp if born is not None else None
    for each in events:
        after = None if before is None else each.timestamp - before
        details = _rules(each.data) if each.event_type == "gate_verdict" else []
        text = words.step(each)
        steps.append(Step(each.bus_seq, each.event_type, each.timestamp, each.received_at, text, after, details))
        before = each.timestamp
    return steps


def _rules(data: Any) -> list[str]:
    """Every rule that failed, in words, then those that passed most narrowly."""
    rules = field(data, "rules") or []
    failed = [each for each in rules if not field(each, "passed")]
    reasons = list(field(data, "reasons") or [])
    codes = reasons if len(reasons) == len(failed) else [""] * len(failed)
    found = [
        words.rule(str(field(each, "name")), field(each, "limit"), field(each, "actual"), code)
        for each, code in zip(failed, codes, strict=True)
    ]
    near = []
    for each in rules:
        left = words.margin(field(each, "limit"), field(each, "actual"))
        if field(each, "passed") and left is not None:
            near.append((left, each))
    near.sort(key=lambda each: each[0])
    for left, each in [*near[:1], *(other for other in near[1:_NEAREST] if other[0] < _FAR)]:
        name = str(field(each, "name")).replace("_", " ")
        limit, actual = words.figure(field(each, "limit")), words.figure(field(each, "actual"))
        found.append(f"passed with {left:.0%} to spare: {name} {actual}, limit {limit}")
    return found

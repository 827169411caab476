"""What a rule looks at: the base of all watches, and those of the bus's own figures."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import msgspec

from tapebus_alerts.settings import DeadLetters, ErrorRate, Lag, Loss, Rule, StoreFull
from tapebus_trading.sessions import Hours, Market

#: An event whose own time is so far from that of its arrival is a recording, of which no rule takes notice.
RECORDING_S = 86_400.0
#: Terminals, accounts or users one rule watches at most.
SUBJECTS = 1000
_SUBJECT_LENGTH = 100

R = TypeVar("R", bound=Rule)


class Reading(NamedTuple):
    """What a watch found about one `subject` ("" where there is but one); without `value` nobody can tell now."""

    subject: str
    value: float | None = None
    text: str = ""


class Moment:
    """One look at everything. ``awake`` is since when this program has been watching without a pause."""

    def __init__(self, at: float, awake: float, figures: Mapping[str, Any], hours: Hours) -> None:
        self.at = at
        self.awake = awake
        self.figures = figures
        self._hours = hours
        self._opened: dict[str, float | None] = {}

    def opened(self, session: str) -> float | None:
        """When `session` opened last, None while it is closed; ``any`` is always open."""
        if session == "any":
            return 0.0
        if session not in self._opened:
            market: Market = session  # type: ignore[assignment]
            self._opened[session] = self._hours.opened_at(market, self.at)
        return self._opened[session]

    def market_of(self, symbol: str) -> str:
        return self._hours.market_of(symbol)


class Watch(Generic[R]):
    """Looks after one rule; everything is called on one thread. What it keeps in `state` may be written again with
    the same events after a crash, so it is kept by what the events are, not by how many there were.
    """

    #: Event types of which every event is handed to `see`.
    topics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, rule: R, state: MutableMapping[str, bytes]) -> None:
        self.rule = rule
        self.state = state

    @property
    def sighted(self) -> str:
        """The topic of which only the last event of each batch matters, and that by its arrival; "" for none."""
        return ""

    def see(self, event: Any, at: float) -> None:
        """Take notice of an event that arrived `at`."""

    def sight(self, batch: Any, at: float) -> None:
        """Take notice of a batch of the sighted topic whose last event arrived `at`."""

    def check(self, moment: Moment) -> Iterator[Reading]:
        """Everything this rule can tell now; what is left out is no longer watched."""
        raise NotImplementedError

    def keep(self, kind: str, subject: str, value: Any) -> None:
        self.state[f"{kind}:{self.rule.name}:{subject}"] = msgspec.json.encode(value)

    def forget(self, kind: str, subject: str) -> None:
        self.state.pop(f"{kind}:{self.rule.name}:{subject}", None)

    def kept(self, kind: str) -> dict[str, Any]:
        """What was kept, by subject."""
        prefix = f"{kind}:{self.rule.name}:"
        found = [(key, value) for key, value in self.state.items() if key.startswith(prefix)]
        return {key.removeprefix(prefix): msgspec.json.decode(value) for key, value in found}


def arrival(event: Any, now: float) -> float | None:
    """When `event` arrived (`now` where nobody noted it); None for a recording."""
    at = event.received_at or now or event.timestamp
    return None if abs(at - event.timestamp) > RECORDING_S else at


def subject_of(*names: Any) -> str:
    """The first of `names` that is one, no longer than a name of an alert may be."""
    name = next((str(each) for each in names if each not in (None, "")), "")
    if len(name) <= _SUBJECT_LENGTH:
        return name
    return f"{name[:80]}…{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def field(data: Any, name: str) -> Any:
    return data.get(name) if isinstance(data, dict) else getattr(data, name, None)


def span(seconds: float) -> str:
    """`seconds` for people."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size or (seconds >= size and seconds % size == 0):
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


class Rise:
    """By how much counters have grown within the last `window_s` seconds, to a sixtieth of that."""

    def __init__(self, window_s: float) -> None:
        self._window = window_s
        self._samples: deque[tuple[float, Mapping[str, int]]] = deque()

    def add(self, at: float, counters: Mapping[str, int]) -> dict[str, int]:
        """Note `counters` and tell what has grown since the window began, or since the first note."""
        samples = self._samples
        if samples and (
            at < samples[-1][0] or any(counters.get(name, 0) < count for name, count in samples[-1][1].items())
        ):
            samples.clear()  # the clock was set back, or it is counted anew or elsewhere
        if not samples or at - samples[-1][0] >= self._window / 60:
            samples.append((at, dict(counters)))
        # the newest of the old ones is where the window begins
        while len(samples) > 1 and samples[1][0] <= at - self._window:
            samples.popleft()
        before = samples[0][1]
        return {name: count - before.get(name, 0) for name, count in counters.items() if count > before.get(name, 0)}

    def seed(self, at: float, counters: Mapping[str, int]) -> None:
        self._samples.append((at, counters))


class FiguresWatch(Watch[R]):
    """A watch of the bus's own figures."""

    def consumers(self, moment: Moment, chosen: list[str]) -> Iterator[Mapping[str, Any]]:
        for row in moment.figures["consumers"]:
            if not chosen or row["name"] in chosen:
                yield row

    def within_window(self, grown: Mapping[str, int], moment: Moment) -> float | None:
        """The sum of `grown`; None where it is no longer bad only because the window has just been begun anew."""
        total = float(sum(grown.values()))
        whole = moment.at - moment.awake >= self.rule.window_s  # type: ignore[attr-defined]
        return total if whole or self.rule.bad(total, False) else None


class LagWatch(FiguresWatch[Lag]):
    def check(self, moment: Moment) -> Iterator[Reading]:
        events = self.rule.measure == "events"
        for row in self.consumers(moment, self.rule.consumers):
            value = row["lag_events"] if events else row["lag_ms"]
            behind = f"{value:,.0f} events" if events else f"{value / 1e3:,.1f} s"
            yield Reading(row["name"], float(value), f"consumer {row['name']} ({row['state']}) is {behind} behind")


class ErrorRateWatch(FiguresWatch[ErrorRate]):
    def __init__(self, rule: ErrorRate, state: MutableMapping[str, bytes]) -> None:
        super().__init__(rule, state)
        self._rises: dict[str, Rise] = {}

    def check(self, moment: Moment) -> Iterator[Reading]:
        window = self.rule.window_s
        for row in self.consumers(moment, self.rule.consumers):
            name = row["name"]
            rise = self._rises.get(name)
            if rise is None:
                rise = self._rises[name] = Rise(window)
                rise.seed(moment.awake, {})  # a bus that starts counts from 0
            grown = rise.add(moment.at, {"handled": row["handled"], "errors": row["errors"]})
            errors = grown.get("errors", 0)
            total = errors + grown.get("handled", 0)
            share = 100.0 * errors / total if total else 0.0
            few = total < self.rule.at_least
            value = None if few and (errors or moment.at - moment.awake < window) else share
            yield Reading(
                name, value, f"consumer {name} failed on {errors:,} of {total:,} events within {span(window)}"
            )


class LossWatch(FiguresWatch[Loss]):
    """Counts that only grow are compared with those of a while ago; what grew while the bus was down shows as well."""

    def __init__(self, rule: Loss, state: MutableMapping[str, bytes]) -> None:
        super().__init__(rule, state)
        self._rise = Rise(rule.window_s)
        self._before: dict[str, int] | None = self.kept("base").get("")
        self._seeded = False

    def check(self, moment: Moment) -> Iterator[Reading]:
        of, bus = self.rule.of, moment.figures["bus"]
        if of == "unexplained":
            yield Reading("", float(bus[of]), f"{bus[of]:,} events are unexplained in the books")
            return
        found = bus[of] if of == "dropped" else {"": moment.figures["feed"]["lost"] if of == "feed" else bus[of]}
        if not self._seeded:
            self._seeded = True
            if self._before is not None and of != "feed":
                self._rise.seed(moment.awake, self._before)
        if found != self._before:
            self._before = dict(found)
            if of != "feed":
                self.keep("base", "", found)
        grown = self._rise.add(moment.at, found)
        where = ", ".join(f"{place} {count:,}" for place, count in sorted(grown.items()) if place)
        words = {"dropped": "dropped", "lost": "lost to damage", "feed": "not sent to slow subscribers of the feed"}[of]
        text = f"{sum(grown.values()):,} events {words} within {span(self.rule.window_s)}"
        yield Reading("", self.within_window(grown, moment), f"{text} ({where})" if where else text)


class DeadLettersWatch(FiguresWatch[DeadLetters]):
    def __init__(self, rule: DeadLetters, state: MutableMapping[str, bytes]) -> None:
        super().__init__(rule, state)
        self._rise = Rise(rule.window_s)
        self._seeded = False

    def check(self, moment: Moment) -> Iterator[Reading]:
        found = dict(moment.figures["bus"]["dead_letters"])
        if not self._seeded:
            self._seeded = True
            self._rise.seed(moment.awake, dict(found))  # kept on the tape, while consumers count from 0
        found |= {f"{row['name']} failed": row["errors"] for row in moment.figures["consumers"]}
        grown = self._rise.add(moment.at, found)
        where = ", ".join(f"{reason} {count:,}" for reason, count in sorted(grown.items(), key=lambda e: -e[1])[:3])
        text = f"{sum(grown.values()):,} new dead letters within {span(self.rule.window_s)}"
        yield Reading("", self.within_window(grown, moment), f"{text} ({where})" if where else text)


class StoreFullWatch(FiguresWatch[StoreFull]):
    def check(self, moment: Moment) -> Iterator[Reading]:
        full = moment.figures["bus"]["state"] != "running"
        yield Reading("", float(full), "the store is full" if full else "the store has room")

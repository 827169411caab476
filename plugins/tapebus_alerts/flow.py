"""Watches of what should keep coming: topics, terminals, and the usual number of signals."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, MutableMapping
from typing import Any

from tapebus_alerts.settings import Fewer, Heartbeat, Silence
from tapebus_alerts.usual import Usual
from tapebus_alerts.watch import SUBJECTS, Moment, Reading, Watch, field, span, subject_of
from tapebus_trading.sessions import week_hour

#: How often, in parts of the threshold, a busy topic is searched for the symbols or sources that are watched.
LOOKS = 10
_HOUR = 3600.0
#: Between the arrival of an event and a look at the clock no more than this can be wrong.
_AHEAD_S = 5.0


def silent_for(last: float, moment: Moment, session: str, grace_s: float, limit: float) -> float | None:
    """Seconds of silence since `last`, counted while the market is open and this program watches.

    None where nobody can tell: the market is closed, or too little time has passed since it opened or since the
    program began to watch.
    """
    opened = moment.opened(session)
    if opened is None:
        return None
    begin = max(moment.awake, opened + grace_s if opened else 0.0)
    # what seems to come from the future came before the clock was set back
    seen = begin <= last <= moment.at + _AHEAD_S
    silence = moment.at - (last if seen else begin)
    return silence if seen or silence > limit else None


class SilenceWatch(Watch[Silence]):
    def __init__(self, rule: Silence, state: MutableMapping[str, bytes]) -> None:
        super().__init__(rule, state)
        self._by = "symbol" if rule.symbols else "source"
        self._wanted = frozenset(rule.symbols or rule.sources)
        self._missing = set(self._wanted)
        self._look_at = 0.0
        self._last: dict[str, float] = {}
        self._known = rule.expected or bool(self.kept("seen"))

    @property
    def sighted(self) -> str:
        return self.rule.topic

    def sight(self, batch: Any, at: float) -> None:
        if not self._wanted:
            self._last[""] = at
            if not self._known:
                self._known = True
                self.keep("seen", "", True)
        elif self._missing or at >= self._look_at:
            self._search(batch, at)

    def _search(self, batch: Any, at: float) -> None:
        """Look through the batch, and through the next ones until each of the wanted has been seen."""
        self._missing = self._missing or set(self._wanted)
        if self._by == "symbol":
            found = self._wanted & {field(event.data, "symbol") for event in batch}
        else:
            found = self._wanted & {event.source for event in batch}
        for each in found:
            self._last[each] = at
        self._missing -= found
        self._look_at = at + self.rule.threshold / LOOKS

    def check(self, moment: Moment) -> Iterator[Reading]:
        rule = self.rule
        if not self._known:
            return
        for subject in sorted(self._wanted) or [""]:
            session = moment.market_of(subject) if rule.session == "symbol" else rule.session
            last = self._last.get(subject, 0.0)
            value = silent_for(last, moment, session, rule.grace_s, rule.threshold)
            of = f" of {subject}" if self._by == "symbol" else f" from {subject}"
            text = f"{span(value or 0.0)} without {rule.topic}{of if subject else ''}"
            yield Reading(subject_of(subject), value, text)


class HeartbeatWatch(Watch[Heartbeat]):
    topics = ("ea_heartbeat",)

    def __init__(self, rule: Heartbeat, state: MutableMapping[str, bytes]) -> None:
        super().__init__(rule, state)
        self._last: dict[str, float] = {}
        #: To within an hour, and durable: which terminals there are.
        self._known: dict[str, float] = self.kept("terminal")

    def see(self, event: Any, at: float) -> None:
        terminal = subject_of(field(event.data, "target_uuid"), field(event.data, "account_number"))
        if terminal not in self._known and len(self._known) >= SUBJECTS:
            return
        self._last[terminal] = at
        if at - self._known.get(terminal, 0.0) >= _HOUR:
            self._known[terminal] = at
            self.keep("terminal", terminal, at)

    def check(self, moment: Moment) -> Iterator[Reading]:
        rule = self.rule
        for terminal, known in list(self._known.items()):
            last = self._last.get(terminal, 0.0)
            if moment.at - max(last, known) > rule.forget_s:
                del self._known[terminal]
                self._last.pop(terminal, None)
                self.forget("terminal", terminal)
                continue
            value = silent_for(last, moment, rule.session, rule.grace_s, rule.threshold)
            yield Reading(terminal, value, f"{span(value or 0.0)} without a heartbeat of {terminal}")


class FewerWatch(Watch[Fewer]):
    """Counts the hours of the week as they pass, and compares the last while with them."""

    def __init__(self, rule: Fewer, state: MutableMapping[str, bytes]) -> None:
        super().__init__(rule, state)
        self._usual = Usual({int(slot): (seen, total) for slot, (seen, total) in self.kept("hour").items()})
        self._arrived: deque[float] = deque()
        #: Beginnings of whole hours with their counts, to be learned from once no window reaches into them.
        self._past: deque[tuple[float, int]] = deque()
        self._hour = 0
        self._count = 0

    @property
    def topics(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.rule.topic,)

    def see(self, event: Any, at: float) -> None:
        self._arrived.append(at)
        if int(at // _HOUR) == self._hour:
            self._count += 1

    def check(self, moment: Moment) -> Iterator[Reading]:
        rule, at = self.rule, moment.at
        self._turn(moment)
        begin = at - rule.window_s
        while self._arrived and self._arrived[0] <= begin:
            self._arrived.popleft()
        opened = moment.opened(rule.session)
        if opened is None or max(opened, moment.awake) > begin:
            yield Reading("")
            return
        usual = self._usual.expect(_parts(begin, at), rule.weeks)
        if usual is None or usual.mean < rule.at_least:
            yield Reading("")
            return
        count = len(self._arrived)
        value: float | None = 100.0 * count / usual.mean
        if rule.bad(value or 0.0, False) and usual.at_most(count) > rule.chance:
            value = None  # so few may well be chance
        text = f"{count} {rule.topic} within {span(rule.window_s)}, {usual.mean:.1f} are usual ({usual.weeks} weeks)"
        yield Reading("", value, text)

    def _turn(self, moment: Moment) -> None:
        """At the end of an hour, count it where it was watched and traded in whole."""
        hour = int(moment.at // _HOUR)
        if hour == self._hour:
            return
        begin = self._hour * _HOUR
        opened = moment.opened(self.rule.session)
        whole = opened is not None and max(moment.awake, opened) <= begin and hour == self._hour + 1
        if self._hour and whole:
            self._past.append((begin, self._count))
        while self._past and self._past[0][0] + _HOUR + self.rule.window_s <= moment.at:
            begin, count = self._past.popleft()
            slot = week_hour(begin)
            self.keep("hour", str(slot), self._usual.learn(slot, count))
        self._hour = hour
        self._count = sum(1 for at in self._arrived if at >= hour * _HOUR)


def _parts(begin: float, end: float) -> list[tuple[int, float]]:
    """The hours of the week between two moments, each with how much of it lies between them."""
    out = []
    hour = begin // _HOUR * _HOUR
    while hour < end:
        share = (min(end, hour + _HOUR) - max(begin, hour)) / _HOUR
        out.append((week_hour(hour), share))
        hour += _HOUR
    return out

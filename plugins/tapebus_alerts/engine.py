"""Raises each alert once and clears it once: hold times, hysteresis, and what survives a restart."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import msgspec
from msgspec import Struct

from tapebus.consumer import Consumer, Context, covers
from tapebus_alerts import settings
from tapebus_alerts.account import DrawdownPercentWatch, DrawdownRWatch, SlotsWatch
from tapebus_alerts.flow import FewerWatch, HeartbeatWatch, SilenceWatch
from tapebus_alerts.settings import AnyRule, Rule
from tapebus_alerts.watch import (
    DeadLettersWatch,
    ErrorRateWatch,
    FiguresWatch,
    LagWatch,
    LossWatch,
    Moment,
    Reading,
    StoreFullWatch,
    Watch,
    arrival,
    span,
)
from tapebus_trading.sessions import hours

NAME = "alerts"
#: A longer pause between two looks (a machine that slept, a bus that stood still) is as good as a restart.
PAUSE_S = 30.0
#: So late, this plugin has not seen all there is, and nothing can be said about what did not come.
LATE_MS = 1000.0
_RAISED = "raised:"

_WATCHES: dict[type[Rule], Any] = {
    settings.Silence: SilenceWatch,
    settings.Heartbeat: HeartbeatWatch,
    settings.Lag: LagWatch,
    settings.ErrorRate: ErrorRateWatch,
    settings.Loss: LossWatch,
    settings.DeadLetters: DeadLettersWatch,
    settings.StoreFull: StoreFullWatch,
    settings.Slots: SlotsWatch,
    settings.Fewer: FewerWatch,
}


class Raised(Struct):
    """An alert that is raised, as it is kept: since when the value has been bad, and when that was told last."""

    since: float
    told: float
    value: float


class Standing:
    """Where one alert stands: good or bad since when, and whether that was told."""

    __slots__ = ("good_since", "raised", "since", "told")

    def __init__(self, since: float, raised: bool = False, told: float = 0.0) -> None:
        self.since = since
        self.raised = raised
        self.told = told
        self.good_since: float | None = None


class Engine:
    """All rules of one bus. Everything runs on the thread of its consumers."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.settings = settings.load(context.config)
        self._hours = hours(context.shared)
        self.watches: list[Watch[Any]] = [_watch(rule, context.state) for rule in self.settings.rules]
        self.standing: dict[str, Standing] = {}
        for key, value in context.state.items():
            if key.startswith(_RAISED):
                kept = msgspec.json.decode(value, type=Raised)
                self.standing[key.removeprefix(_RAISED)] = Standing(kept.since, True, kept.told)
        self._now = 0.0
        self._awake = 0.0
        self._by_type: dict[str, list[Watch[Any]]] = {}

    @property
    def raised(self) -> list[str]:
        """The names of all alerts that are raised."""
        return sorted(name for name, each in self.standing.items() if each.raised)

    def consumers(self) -> list[Consumer]:
        """One consumer for what is rare, and one that looks at last events only for each topic that may be busy."""
        rare = sorted({topic for watch in self.watches for topic in watch.topics})
        main = Consumer(name=NAME, topics=rare, handler=self.handle, tick=self.settings.tick_s, on_tick=self.on_tick)
        sighted = sorted({watch.sighted for watch in self.watches if watch.sighted})
        return [
            main,
            *(Consumer(name=f"{NAME}.{each}", topics=[each], handler=self._sighting(each)) for each in sighted),
        ]

    # -- events ---------------------------------------------------------------------------------

    def handle(self, batch: Any) -> None:
        for event in batch:
            kind = event.event_type
            watches = self._by_type.get(kind)
            if watches is None:
                watches = self._by_type[kind] = [each for each in self.watches if covers(each.topics, kind)]
            at = arrival(event, self._now)
            if at is not None:
                for watch in watches:
                    watch.see(event, at)

    def _sighting(self, topic: str) -> Any:
        watches = [watch for watch in self.watches if watch.sighted == topic]

        def handle(batch: Any) -> None:
            # the last one tells of them all: no work an event, however many there are
            at = arrival(batch[-1], self._now)
            if at is not None:
                for watch in watches:
                    watch.sight(batch, at)

        return handle

    # -- looking --------------------------------------------------------------------------------

    def on_tick(self, now: float) -> None:
        """Look at everything, and tell what has changed."""
        if not self._awake or not 0 <= now - self._now <= PAUSE_S + self.settings.tick_s:
            self._wake(now)
        self._now = now
        figures = self.context.figures()
        moment = Moment(now, self._awake, figures, self._hours)
        late = any(
            row["plugin"] == self.context.name and row["lag_ms"] > LATE_MS for row in figures.get("consumers", ())
        )
        told: set[str] = set()
        for watch in self.watches:
            if isinstance(watch, FiguresWatch):
                readings = list(watch.check(moment)) if figures else None
            else:
                # what waits to be seen may say otherwise
                readings = None if late else list(watch.check(moment))
            if readings is None:
                told |= {name for name in self.standing if _rule_of(name) == watch.rule.name}
                continue
            for reading in readings:
                told.add(self._judge(watch.rule, reading, now))
        for name in self.standing.keys() - told:
            self._no_longer(name, now)

    def _wake(self, now: float) -> None:
        """Begin to watch anew after a start, a pause, or a clock that was set; so does what must last for a while."""
        self._awake = now
        for name, standing in list(self.standing.items()):
            standing.good_since = None
            standing.told = min(standing.told, now)
            if not standing.raised:
                del self.standing[name]

    def _judge(self, rule: Rule, reading: Reading, now: float) -> str:
        """Compare one reading with its rule; the name of its alert."""
        name = f"{rule.name}:{reading.subject}" if reading.subject else rule.name
        standing = self.standing.get(name)
        if reading.value is None:
            if standing is not None and not standing.raised:
                del self.standing[name]
            return name
        if rule.bad(reading.value, standing is not None and standing.raised):
            if standing is None:
                standing = self.standing[name] = Standing(now)
            standing.good_since = None
            due = (
                now - standing.since >= rule.for_s if not standing.raised else 0 < rule.repeat_s <= now - standing.told
            )
            if due:
                self._raise(name, rule, reading, standing, now)
        elif standing is not None and not standing.raised:
            del self.standing[name]
        elif standing is not None:
            standing.good_since = now if standing.good_since is None else standing.good_since
            if now - standing.good_since >= rule.clear_for_s:
                self._clear(name, rule, reading, standing, now)
        return name

    def _raise(self, name: str, rule: Rule, reading: Reading, standing: Standing, now: float) -> None:
        reminder, standing.raised, standing.told = standing.raised, True, now
        kept = Raised(standing.since, now, reading.value or 0.0)
        self.context.state[_RAISED + name] = msgspec.json.encode(kept)
        text = f"{reading.text} (limit {rule.threshold:g} {rule.measured})"
        if reminder:
            text = f"still, after {span(now - standing.since)}: {text}"
        self._tell(name, rule, text, "raised", rule.severity, reading.value, standing, now, reminder)

    def _clear(self, name: str, rule: Rule, reading: Reading, standing: Standing, now: float) -> None:
        self._drop(name)
        text = f"over after {span(now - standing.since)}: {reading.text}"
        self._tell(name, rule, text, "cleared", "info", reading.value, standing, now)

    def _no_longer(self, name: str, now: float) -> None:
        """Nothing watches this any more: its rule, its consumer or its terminal is gone."""
        standing = self.standing[name]
        self._drop(name)
        if standing.raised:
            text = f"no longer watched, after {span(now - standing.since)}"
            self._tell(name, None, text, "cleared", "info", None, standing, now)

    def _drop(self, name: str) -> None:
        del self.standing[name]
        self.context.state.pop(_RAISED + name, None)

    def _tell(
        self,
        name: str,
        rule: Rule | None,
        message: str,
        state: str,
        severity: str,
        value: float | None,
        standing: Standing,
        now: float,
        reminder: bool = False,
    ) -> None:
        data: dict[str, Any] = {
            "name": name,
            "severity": severity,
            "message": message[:2000],
            "state": state,
            "component": NAME,
            "since": standing.since,
        }
        if rule is not None and value is not None:
            data |= {"value": round(value, 6), "threshold": rule.threshold, "unit": rule.measured}
        if reminder:
            data["reminder"] = True
        urgent = "critical" if severity == "critical" else "high"
        self.context.emit("alert", data, timestamp=now, priority=urgent)


def _watch(rule: AnyRule, state: MutableMapping[str, bytes]) -> Watch[Any]:
    if isinstance(rule, settings.Drawdown):
        return DrawdownRWatch(rule, state) if rule.measure == "r" else DrawdownPercentWatch(rule, state)
    found: Watch[Any] = _WATCHES[type(rule)](rule, state)
    return found


def _rule_of(name: str) -> str:
    return name.partition(":")[0]

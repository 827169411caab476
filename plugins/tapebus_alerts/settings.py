"""The table ``[plugins.alerts]``: rules by kind, what each compares, and the rules that hold when none are given."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from tapebus.consumer import is_pattern
from tapebus.errors import ConfigError

Seconds = Annotated[float, Meta(gt=0)]
Patience = Annotated[float, Meta(ge=0)]
Severity = Literal["info", "warning", "error", "critical"]


class Rule(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """What every rule has; ``kind`` chooses which it is. Times are seconds.

    A value is bad when it is above ``threshold`` (below it, for kinds that say so). Bad for ``for_s`` raises the
    alert. Once raised it is compared with ``clear_at`` instead, where given, and good for ``clear_for_s`` clears it.
    ``repeat_s`` above 0 reminds of an alert that stays raised.
    """

    name: Annotated[str, Meta(max_length=100)] = ""
    severity: Severity = "warning"
    threshold: float
    clear_at: float | None = None
    for_s: Patience = 0.0
    clear_for_s: Patience = 0.0
    repeat_s: Patience = 0.0

    #: What the value counts, and whether little of it is what is bad.
    unit: ClassVar[str] = ""
    below: ClassVar[bool] = False

    @property
    def measured(self) -> str:
        """The unit of the value and of ``threshold``."""
        return self.unit

    def bad(self, value: float, raised: bool) -> bool:
        """Whether `value` is one to raise the alert for, or to keep it raised."""
        limit = self.clear_at if raised and self.clear_at is not None else self.threshold
        return value < limit if self.below else value > limit


class Silence(Rule, frozen=True, kw_only=True, tag="silence"):
    """Seconds since the last event of ``topic`` while ``session`` is open (``any``: always).

    With ``symbols`` or ``sources`` each of them is watched by itself. ``grace_s`` is the time a market is given after
    it opens. Without ``expected`` a topic is watched only once it has come at all.
    """

    threshold: Seconds = 30.0
    topic: str
    symbols: list[str] = []
    sources: list[str] = []
    session: Literal["any", "fx", "metals", "crypto", "symbol"] = "any"
    grace_s: Patience = 300.0
    expected: bool = True
    clear_for_s: Patience = 5.0
    unit = "s"


class Heartbeat(Rule, frozen=True, kw_only=True, tag="heartbeat"):
    """Seconds since the last ``ea_heartbeat`` of each terminal; forgotten after ``forget_s`` without one."""

    threshold: Seconds = 40.0
    session: Literal["any", "fx", "metals", "crypto"] = "fx"
    grace_s: Patience = 300.0
    forget_s: Seconds = 7 * 86400.0
    for_s: Patience = 20.0
    severity: Severity = "error"
    unit = "s"


class Lag(Rule, frozen=True, kw_only=True, tag="lag"):
    """How far a consumer is behind the tape: the age of what it has not seen (``ms``), or how many ``events``."""

    threshold: Patience = 10_000.0
    measure: Literal["ms", "events"] = "ms"
    consumers: list[str] = []
    for_s: Patience = 10.0
    clear_for_s: Patience = 5.0

    @property
    def measured(self) -> str:
        return self.measure


class ErrorRate(Rule, frozen=True, kw_only=True, tag="error_rate"):
    """Percent of a consumer's events within ``window_s`` that failed, once ``at_least`` so many came."""

    threshold: Annotated[float, Meta(ge=0, le=100)] = 5.0
    consumers: list[str] = []
    window_s: Seconds = 300.0
    at_least: Annotated[int, Meta(ge=1)] = 20
    severity: Severity = "error"
    unit = "%"


class Loss(Rule, frozen=True, kw_only=True, tag="loss"):
    """Events lost: ``dropped`` by producers or shed, ``lost`` from the tape by damage, or by the ``feed`` for slow
    subscribers, each within ``window_s``; ``unexplained`` in the books right now.
    """

    of: Literal["dropped", "lost", "unexplained", "feed"]
    threshold: Patience = 0.0
    window_s: Seconds = 300.0
    unit = "events"


class DeadLetters(Rule, frozen=True, kw_only=True, tag="dead_letters"):
    """New dead letters within ``window_s``, of the event types' rules and of consumers."""

    threshold: Patience = 10.0
    window_s: Seconds = 300.0
    unit = "letters"


class StoreFull(Rule, frozen=True, kw_only=True, tag="store_full"):
    """1 while the store has no room and producers are asked to wait."""

    threshold: Patience = 0.0
    severity: Severity = "critical"
    unit = "full"


class Slots(Rule, frozen=True, kw_only=True, tag="slots"):
    """Free slots of each user: full is below 1, over the limit below 0."""

    threshold: float = 1.0
    unit = "free"
    below = True


class Drawdown(Rule, frozen=True, kw_only=True, tag="drawdown"):
    """How far below its highest point within ``window_s``: the sum of R over outcomes (``measure = "r"``, of fired
    signals only with ``fired_only``), or an account's equity in ``percent`` of its highest balance.
    """

    measure: Literal["r", "percent"]
    threshold: Seconds = 5.0
    window_s: Seconds = 86400.0
    fired_only: bool = True
    severity: Severity = "error"

    @property
    def measured(self) -> str:
        return "R" if self.measure == "r" else "%"


class Fewer(Rule, frozen=True, kw_only=True, tag="fewer"):
    """Events of ``topic`` within ``window_s`` in percent of what is usual at this hour of the week.

    Speaks where each hour concerned was seen ``weeks`` times, ``at_least`` so many events are usual, and so few would
    come by chance less often than ``chance``. Learns only from whole hours in which ``session`` was open.
    """

    topic: str = "signal_generated"
    threshold: Annotated[float, Meta(gt=0, le=100)] = 25.0
    window_s: Annotated[float, Meta(ge=600, le=86400)] = 3600.0
    session: Literal["any", "fx", "metals", "crypto"] = "fx"
    weeks: Annotated[int, Meta(ge=2, le=12)] = 4
    at_least: Annotated[float, Meta(gt=0)] = 5.0
    chance: Annotated[float, Meta(gt=0, lt=0.5)] = 0.001
    for_s: Patience = 60.0
    unit = "%"
    below = True


AnyRule = Silence | Heartbeat | Lag | ErrorRate | Loss | DeadLetters | StoreFull | Slots | Drawdown | Fewer
_KINDS: dict[str, type[Rule]] = {str(each.__struct_config__.tag): each for each in AnyRule.__args__}


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``tick_s`` seconds pass between two looks. ``defaults`` adds the built-in rules to those given, except those of
    the same name; without any rules they hold unless it is false.
    """

    tick_s: Annotated[float, Meta(ge=0.05, le=60)] = 1.0
    defaults: bool | None = None
    rules: list[AnyRule] = []


#: What is watched when nobody says what. A full store is told by the bus itself, slots over the limit by `slots`.
DEFAULTS: tuple[AnyRule, ...] = (
    Silence(name="no_quotes", topic="market_data", session="fx", expected=False, severity="critical"),
    Heartbeat(name="heartbeat_stale"),
    Lag(name="lag", clear_at=1000.0),
    ErrorRate(name="error_rate"),
    Loss(name="events_dropped", of="dropped"),
    Loss(name="events_lost", of="lost", severity="critical"),
    Loss(name="events_unexplained", of="unexplained", severity="critical", for_s=5.0),
    Loss(name="feed_lost", of="feed", severity="info"),
    DeadLetters(name="dead_letters"),
    Slots(name="slots_full"),
    Drawdown(name="drawdown_r", measure="r"),
    Drawdown(name="drawdown_percent", measure="percent", threshold=10.0, clear_at=8.0, severity="critical"),
    Fewer(name="fewer_signals", clear_at=50.0),
)


def load(table: Mapping[str, Any]) -> Settings:
    """The settings in `table` with all rules that hold, each named; `ConfigError` names what is wrong and near."""
    _known(table, Settings, "plugins.alerts")
    given = table.get("rules", [])
    if not isinstance(given, list):
        raise ConfigError("plugins.alerts.rules: must be an array of tables, written [[plugins.alerts.rules]]")
    rules = [_rule(each, f"plugins.alerts.rules[{index}]") for index, each in enumerate(given)]
    settings: Settings = _convert({**table, "rules": []}, Settings, "plugins.alerts")
    names = [each.name for each in rules]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"plugins.alerts.rules: two are called {name!r}; give them names of their own")
    if settings.defaults or (settings.defaults is None and not rules):
        rules = [*rules, *(each for each in DEFAULTS if each.name not in names)]
    return msgspec.structs.replace(settings, rules=rules)


def _rule(given: Any, place: str) -> AnyRule:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{place}: must be a table, written [[plugins.alerts.rules]]")
    kind = given.get("kind")
    if kind not in _KINDS:
        raise ConfigError(f"{place}.kind = {kind!r}: no such kind of rule; {_near(str(kind), _KINDS)}")
    _known(given, _KINDS[kind], place, ("kind",))
    rule: Any = _convert(given, _KINDS[kind], place)
    if isinstance(rule, Silence | Fewer) and not is_pattern(rule.topic):
        raise ConfigError(f"{place}.topic = {rule.topic!r}: matches nothing; write an event type, prefix.* or *")
    if isinstance(rule, Silence):
        _check_silence(rule, place)
    if rule.clear_at is not None and (rule.clear_at < rule.threshold if rule.below else rule.clear_at > rule.threshold):
        raise ConfigError(
            f"{place}.clear_at = {rule.clear_at:g}: lies on the bad side of threshold = {rule.threshold:g}"
        )
    if not rule.name:
        topic = getattr(rule, "topic", "") or getattr(rule, "of", "") or getattr(rule, "measure", "")
        rule = msgspec.structs.replace(rule, name=f"{kind}_{topic}" if topic else kind)
    if ":" in rule.name:
        raise ConfigError(f"{place}.name = {rule.name!r}: the colon is kept for what an alert is about")
    return rule  # type: ignore[no-any-return]


def _check_silence(rule: Silence, place: str) -> None:
    if rule.symbols and rule.sources:
        raise ConfigError(f"{place}: give symbols or sources, and another rule for the other")
    if rule.session == "symbol" and not rule.symbols:
        raise ConfigError(f'{place}.session = "symbol": needs symbols; write fx, metals, crypto or any')


def _known(table: Mapping[str, Any], kind: type[Struct], place: str, more: tuple[str, ...] = ()) -> None:
    keys = (*kind.__struct_fields__, *more)
    for key in table:
        if key not in keys:
            raise ConfigError(f"{place}.{key}: unknown key; {_near(key, keys)}")


def _near(word: str, words: Any) -> str:
    near = difflib.get_close_matches(word, words, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(words)}"


def _convert(values: Mapping[str, Any], kind: type[Any], place: str) -> Any:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at `$")
        raise ConfigError(f"{place}{where.rstrip('`')}: {problem[:1].lower()}{problem[1:]}") from None

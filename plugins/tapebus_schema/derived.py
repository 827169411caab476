"""Payloads of the events that plugins of the bus derive from other events."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from tapebus_schema.fields import (
    Code,
    Count,
    Direction,
    Id,
    Level,
    Lots,
    Name,
    Number,
    Percent,
    Positive,
    Ratio,
    Severity,
    Symbol,
    Text,
    Time,
)

Outcome = Literal["WIN", "LOSS", "BREAKEVEN", "TIMEOUT", "CANCELLED", "UNKNOWN"]
#: Empty where the terminal's answer named neither: the position still holds a slot.
SlotSymbol = Annotated[str, Meta(max_length=16)]
SlotDirection = Literal["BUY", "SELL", ""]
Texts = Annotated[list[Text], Meta(max_length=1000)]


class SignalOutcome(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """How a signal ended, all times in event time.

    ``r`` is the result in multiples of the stop distance; ``mfe`` and ``mae`` are the greatest moves
    for and against the signal, as price differences from its entry. ``risk_reward`` is planned gain over risk,
    ``slippage`` exit price less level, ``gap_ms`` how long no price was known before the exit, ``mode`` whether quotes
    or bars decided, and ``bars_seen`` how many bars the signal has lived through.
    ``origin`` names file and line of an outcome that was imported; such a one may know neither quotes nor prices.
    """

    signal_id: Id
    symbol: Symbol
    direction: Direction
    pattern_type: Name
    confidence: Percent
    outcome: Outcome
    opened_at: Time
    closed_at: Time
    duration_s: Positive
    quotes_seen: Count
    fired: bool
    exit_price: Level | None = None
    r: Number | None = None
    pips: Number | None = None
    mfe: Number | None = None
    mae: Number | None = None
    ambiguous: bool = False
    gap_before_exit: bool = False
    entry: Level | None = None
    sl: Level | None = None
    tp: Level | None = None
    risk_reward: Positive | None = None
    risk: Positive | None = None
    slippage: Number | None = None
    mfe_r: Number | None = None
    mae_r: Number | None = None
    mfe_pips: Number | None = None
    mae_pips: Number | None = None
    gap_ms: Positive | None = None
    mode: Literal["tick", "bar"] | None = None
    bars_seen: Count | None = None
    session: Code | None = None
    origin: Text | None = None


class Rule(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """One rule of a gate with the limit it compared and what it found."""

    name: Name
    passed: bool
    limit: Any = None
    actual: Any = None


class GateVerdict(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """Whether a signal may be fired, with every rule that was asked. ``risk`` and ``margin`` in account currency.

    ``confidence`` is what the signal states, ``calibrated`` the win rate in percent that such signals had.
    """

    signal_id: Id
    fire: bool
    reasons: Texts
    rules: Annotated[list[Rule], Meta(max_length=1000)]
    slots_used: Count
    user_id: Id | None = None
    lots: Lots | None = None
    risk: Positive | None = None
    confidence: Percent | None = None
    calibrated: Percent | None = None
    margin: Positive | None = None


class SlotReserved(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A slot is held for an order; ``slots_used`` may exceed ``slots_max``, that is a state, not an error."""

    fire_id: Id
    symbol: SlotSymbol
    direction: SlotDirection
    slots_used: Count
    slots_max: Count
    signal_id: Id | None = None
    user_id: Id | None = None


class SlotOpened(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """The order of a slot became a position."""

    fire_id: Id
    symbol: SlotSymbol
    direction: SlotDirection
    slots_used: Count
    slots_max: Count
    signal_id: Id | None = None
    user_id: Id | None = None
    ticket: Count | None = None
    position_id: Count | None = None


class SlotReleased(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A slot is free again; ``evidence`` names the events that proved it."""

    fire_id: Id
    symbol: SlotSymbol
    method: Code
    evidence: Texts
    slots_used: Count
    slots_max: Count
    ticket: Count | None = None
    direction: SlotDirection | None = None
    signal_id: Id | None = None
    user_id: Id | None = None


class PatternStatus(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """Where a pattern stands: ``active``, ``watch`` (a recommendation) or ``disabled`` (followed, not fired).

    ``win_rate``, ``low`` and ``high`` (its interval) share one unit. ``breakeven`` is the win rate, as a fraction, at
    which the pattern's own reward and risk earn nothing; ``by`` says who decided, a user or the rule.
    """

    pattern_type: Name
    status: Code
    reason: Text
    n: Count
    wins: Count
    win_rate: Percent | None = None
    low: Percent | None = None
    high: Percent | None = None
    breakeven: Ratio | None = None
    e_value: Positive | None = None
    p_value: Ratio | None = None
    by: Name | None = None
    since: Time | None = None


class Calibration(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A fit of stated confidence to observed win rate; the newest ``version`` holds.

    ``knots`` are pairs of stated confidence and calibrated win rate, both percent, ascending; between two of them the
    line counts, beyond the ends the end. ``brier``, ``skill`` and ``ece`` judge the stated confidence that was fitted.
    """

    version: Count
    method: Literal["shrinkage", "platt", "isotonic"]
    n: Count
    knots: Annotated[list[tuple[Percent, Percent]], Meta(min_length=1, max_length=1000)]
    base_rate: Ratio | None = None
    brier: Ratio | None = None
    skill: Number | None = None
    ece: Ratio | None = None
    fitted_to: Time | None = None


class Alert(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """Something a person should know; ``cleared`` ends what ``raised`` began under the same name.

    ``value`` was compared with ``threshold``, both in ``unit``; ``since`` is when it began. A ``reminder`` repeats
    what is raised already.
    """

    name: Annotated[str, Meta(min_length=1, max_length=300)]
    severity: Severity
    message: Text
    state: Literal["raised", "cleared"] = "raised"
    component: Name | None = None
    value: Number | None = None
    threshold: Number | None = None
    unit: Code | None = None
    since: Time | None = None
    reminder: bool = False

"""Payloads of the events that programs outside the bus publish: signals, orders, accounts, quotes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from tapebus_schema.fields import (
    BrokerTime,
    Code,
    Count,
    Direction,
    Id,
    Integer,
    Level,
    LooseId,
    Lots,
    Money,
    Name,
    Number,
    OrderLots,
    Percent,
    Positive,
    Price,
    Symbol,
    Text,
    Time,
    Volume,
)

#: States of a component that every program agrees on; others are kept, and ``SystemHealth.known`` is False.
HEALTH_STATES = frozenset(("starting", "started", "running", "stopping", "stopped", "error"))


class SignalGenerated(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A trading signal. ``confidence`` is percent; prices are absolute, ``*_pips`` only informative."""

    signal_id: Id
    symbol: Symbol
    direction: Direction
    confidence: Percent
    pattern_type: Name
    entry: Level | None = None
    sl: Level | None = None
    tp: Level | None = None
    stop_pips: Positive | None = None
    target_pips: Positive | None = None
    expires_at: Time | None = None
    timestamp: Time | None = None
    broker_time: BrokerTime | None = None
    risk_reward: Positive | None = None
    quality_score: Number | None = None
    timeframe: Code | None = None
    session: Code | None = None
    signal_class: Code | None = None


class SignalImported(SignalGenerated, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A signal from an old record that does not know its end: nothing follows it and nothing fires on it.

    One whose end is known is imported as a ``signal_outcome``. ``origin`` names the file and the line.
    """

    fired: bool = False
    origin: Text | None = None


class SignalExpired(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A signal that may no longer be fired."""

    signal_id: Id
    reason: Text | None = None


class FireCommand(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """An order on its way to a terminal; ``status`` tells how far it has come (queued, routed ...)."""

    fire_id: Id
    symbol: Symbol
    direction: Direction
    lot: OrderLots
    signal_id: Id | None = None
    user_id: Id | None = None
    entry: Level | None = None
    sl: Level | None = None
    tp: Level | None = None
    execution_mode: Literal["MANUAL", "AUTO", "SEMI_AUTO"] | None = None
    status: Code | None = None
    target_uuid: Id | None = None
    timestamp: Time | None = None
    broker_time: BrokerTime | None = None


class TradeExecuted(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A terminal's answer to a fire command. FILLED means the position is open."""

    fire_id: Id
    ticket: Count | None = None
    position_id: Count | None = None
    symbol: Symbol | None = None
    direction: Direction | None = None
    volume: Lots | None = None
    price: Level | None = None
    sl: Level | None = None
    tp: Level | None = None
    status: Code | None = None
    message: Text | None = None
    retcode: Integer | None = None
    signal_id: Id | None = None
    user_id: Id | None = None
    target_uuid: Id | None = None
    execution_time: Time | None = None
    broker_time: BrokerTime | None = None


class BalanceUpdate(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """An account's figures in account currency. ``user_id`` may stand in the envelope instead."""

    account_number: Id
    balance: Money
    equity: Money
    user_id: Id | None = None
    margin: Money | None = None
    free_margin: Money | None = None
    currency: Code | None = None
    timestamp: Time | None = None
    broker_time: BrokerTime | None = None


class SystemHealth(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """How a component feels. ``uptime`` in seconds, ``cpu_usage`` in percent of one core."""

    component: Name
    status: Annotated[str, Meta(min_length=1, max_length=100)]
    uptime: Positive | None = None
    memory_usage: Positive | None = None
    cpu_usage: Positive | None = None
    message: Text | None = None

    @property
    def known(self) -> bool:
        """Whether ``status`` is one of `HEALTH_STATES`."""
        return self.status in HEALTH_STATES


class UserAction(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """Something a user did. ``user_id`` may stand in the envelope instead."""

    action: Name
    user_id: Id | None = None
    details: dict[str, Any] | None = None
    ip_address: Annotated[str, Meta(max_length=45)] | None = None
    user_agent: Annotated[str, Meta(max_length=500)] | None = None


class MarketData(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """One quote."""

    symbol: Symbol
    bid: Price
    ask: Price
    volume: Volume | None = None
    timestamp: Time | None = None
    broker_time: BrokerTime | None = None


class PatternDetected(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A chart pattern seen on a symbol; not yet a signal."""

    pattern_type: Name
    symbol: Symbol
    confidence: Percent | None = None
    direction: Direction | None = None
    timeframe: Code | None = None
    entry: Level | None = None
    sl: Level | None = None
    tp: Level | None = None
    timestamp: Time | None = None
    broker_time: BrokerTime | None = None


class Position(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """One open position in a terminal's snapshot.

    ``ticket`` may change during a position's life (partial close, swap); ``position_id`` does not. ``comment`` is
    the order's, as far as the terminal kept it.
    """

    ticket: Count
    symbol: Symbol
    direction: Direction
    open_price: Level
    volume: Lots
    position_id: Count | None = None
    fire_id: LooseId | None = None
    current_price: Level | None = None
    pnl: Money | None = None
    magic: Integer | None = None
    comment: LooseId | None = None
    open_time: Time | None = None
    broker_time: BrokerTime | None = None


class EaHeartbeat(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A terminal's account snapshot.

    Complete only when ``open_positions == len(positions)``: an incomplete snapshot may close the
    gate but proves nothing about a missing position.
    """

    target_uuid: Id
    balance: Money
    equity: Money
    open_positions: Annotated[int, Meta(ge=0, le=1_000_000)]
    positions: Annotated[list[Position], Meta(max_length=5000)]
    account_number: Id | None = None
    margin: Money | None = None
    free_margin: Money | None = None
    timestamp: Time | None = None
    broker_time: BrokerTime | None = None

    @property
    def complete(self) -> bool:
        """Whether the list accounts for every position the terminal counted."""
        return self.open_positions == len(self.positions)


class PositionClosed(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A position, or a part of it, was closed; ``volume`` is what was closed, ``profit`` in account currency."""

    ticket: Count
    symbol: Symbol
    volume: Lots
    close_price: Level
    profit: Money
    reason: Code
    target_uuid: Id
    position_id: Count | None = None
    fire_id: LooseId | None = None
    timestamp: Time | None = None
    broker_time: BrokerTime | None = None


class SymbolSpecification(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """What a broker says about one of its symbols; it outranks every configured value.

    ``stops_level`` and ``freeze_level`` are counted in points, ``tick_value`` is account currency that one tick of one
    lot costs when it is lost, ``margin`` account currency held per lot; 0 for either, or for ``volume_limit``, means
    that the terminal knows none. Without ``broker`` the account or terminal tells it, see ``[shared.brokers]``.
    """

    symbol: Symbol
    broker: Name | None = None
    target_uuid: Id | None = None
    account_number: Id | None = None
    digits: Annotated[int, Meta(ge=0, le=12)] | None = None
    point: Price | None = None
    tick_size: Price | None = None
    tick_value: Positive | None = None
    contract_size: Price | None = None
    volume_min: Price | None = None
    volume_step: Price | None = None
    volume_max: Price | None = None
    volume_limit: Positive | None = None
    stops_level: Positive | None = None
    freeze_level: Positive | None = None
    margin: Positive | None = None
    pip: Price | None = None
    base: Code | None = None
    quote: Code | None = None
    trade_mode: Code | None = None
    timestamp: Time | None = None
    broker_time: BrokerTime | None = None


class UserFireMode(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """What a user may fire by itself; a field that is absent leaves what was said before. ``user_id`` may stand in
    the envelope instead."""

    user_id: Id | None = None
    tier: Name | None = None
    auto_fire: bool | None = None
    confidence_band: tuple[Percent, Percent] | None = None
    max_slots: Annotated[int, Meta(ge=0, le=10_000)] | None = None
    risk_pct: Percent | None = None
    reason: Text | None = None

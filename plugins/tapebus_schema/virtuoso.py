"""Payloads of the crypto analysis families: market data, analyses, signal risk and system events."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from tapebus_schema.fields import (
    Code,
    Count,
    Direction,
    Id,
    Level,
    Money,
    Name,
    Number,
    Percent,
    Positive,
    Price,
    Ratio,
    Symbol,
    Text,
    Time,
    Volume,
)

#: Price and size of one level of an order book.
BookLevel = tuple[Price, Volume]
BookSide = Annotated[list[BookLevel], Meta(max_length=5000)]
Scores = dict[Name, Percent]
Indicators = dict[Name, Number]
Side = Literal["BUY", "SELL"]


class Ohlcv(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """One bar; ``timestamp`` is its opening time, ``spread`` the difference of ask and bid as a price."""

    symbol: Symbol
    timeframe: Code
    open: Price
    high: Price
    low: Price
    close: Price
    volume: Volume
    timestamp: Time | None = None
    exchange: Name | None = None
    spread: Positive | None = None


class OrderBook(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A book, best levels first on both sides."""

    symbol: Symbol
    bids: BookSide
    asks: BookSide
    timestamp: Time | None = None
    exchange: Name | None = None


class Trade(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """One trade of the public tape; ``side`` is the taker's."""

    price: Price
    size: Volume
    side: Side
    trade_id: Id | None = None
    timestamp: Time | None = None


class Trades(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """Public trades of one symbol, oldest first."""

    symbol: Symbol
    trades: Annotated[list[Trade], Meta(max_length=5000)]
    exchange: Name | None = None


class Liquidation(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A forced close; ``side`` is that of the liquidation order."""

    symbol: Symbol
    side: Side
    price: Price
    size: Volume
    timestamp: Time | None = None
    exchange: Name | None = None


class TechnicalAnalysis(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """Indicator values by name for one symbol and timeframe."""

    symbol: Symbol
    timeframe: Code
    indicators: Indicators
    score: Percent | None = None
    final_signal: Code | None = None


class VolumeAnalysis(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """Volume figures of one symbol and timeframe; ``volume_ratio`` is against the average."""

    symbol: Symbol
    timeframe: Code
    volume: Volume | None = None
    volume_ratio: Positive | None = None
    buy_volume: Volume | None = None
    sell_volume: Volume | None = None
    indicators: Indicators | None = None
    score: Percent | None = None


class ConfluenceAnalysis(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """How far the dimensions agree, 0 to 100 in all and by dimension."""

    symbol: Symbol
    timeframe: Code
    confluence_score: Percent
    dimension_scores: Scores
    final_signal: Code | None = None


class SignalRisk(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """The risk figures of a signal. ``risk_percent`` of the balance, ``max_loss`` in account currency."""

    signal_id: Id
    symbol: Symbol
    direction: Direction
    confidence: Percent | None = None
    entry: Level | None = None
    sl: Level | None = None
    tp: Level | None = None
    risk_reward: Positive | None = None
    position_size: Positive | None = None
    risk_percent: Percent | None = None
    max_loss: Money | None = None


class SystemComponent(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A component changed state."""

    component: Name
    status: Annotated[str, Meta(min_length=1, max_length=100)]
    message: Text | None = None


class SystemCache(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """What a cache did; ``hit_rate`` between 0 and 1, ``size`` in entries."""

    cache: Name
    operation: Code
    hits: Count | None = None
    misses: Count | None = None
    hit_rate: Ratio | None = None
    size: Count | None = None
    evictions: Count | None = None
    message: Text | None = None


class SystemDatabase(Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """What a database did; ``duration_ms`` in milliseconds."""

    database: Name
    operation: Code
    status: Code | None = None
    duration_ms: Positive | None = None
    rows: Count | None = None
    error: Text | None = None

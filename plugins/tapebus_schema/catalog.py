"""The event types themselves: payload, spellings, rules and policy of each, and their JSON Schema."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import msgspec
from msgspec import Struct

from tapebus.errors import ConfigError
from tapebus.events import EventType, Policy
from tapebus_schema import derived, rules, trading, virtuoso
from tapebus_schema.coerce import Prepare, spellings

LOTS = ("lot", "lots", "volume", "lot_size")
STOP = ("sl", "sl_price", "stop_loss")
TARGET = ("tp", "tp_price", "take_profit")
ENTRY = ("entry", "entry_price", "open_price", "price")
UUID = ("target_uuid", "user_uuid", "uuid")

#: Spellings that mean the same on every type that has the field; domain tables of the bridges in use.
_COMMON: dict[str, tuple[str, ...]] = {
    "symbol": ("pair",),
    "pattern_type": ("pattern",),
    "direction": ("type",),
    "sl": STOP,
    "tp": TARGET,
    "entry": ENTRY,
    "target_uuid": UUID,
    "timestamp": ("ts",),
    "account_number": ("login", "account"),
}
#: What MetaTrader 5 calls the facts of a symbol.
MT5: dict[str, tuple[str, ...]] = {
    "digits": ("SYMBOL_DIGITS",),
    "point": ("SYMBOL_POINT",),
    "tick_size": ("SYMBOL_TRADE_TICK_SIZE", "trade_tick_size"),
    "tick_value": ("SYMBOL_TRADE_TICK_VALUE_LOSS", "SYMBOL_TRADE_TICK_VALUE", "tick_value_loss", "trade_tick_value"),
    "contract_size": ("SYMBOL_TRADE_CONTRACT_SIZE", "trade_contract_size"),
    "volume_min": ("SYMBOL_VOLUME_MIN",),
    "volume_step": ("SYMBOL_VOLUME_STEP",),
    "volume_max": ("SYMBOL_VOLUME_MAX",),
    "volume_limit": ("SYMBOL_VOLUME_LIMIT",),
    "stops_level": ("SYMBOL_TRADE_STOPS_LEVEL", "trade_stops_level"),
    "freeze_level": ("SYMBOL_TRADE_FREEZE_LEVEL", "trade_freeze_level"),
    "base": ("SYMBOL_CURRENCY_BASE", "currency_base"),
    "quote": ("SYMBOL_CURRENCY_PROFIT", "currency_profit"),
    "pip": ("pip_size",),
    "trade_mode": ("SYMBOL_TRADE_MODE",),
}
#: Spellings inside lists, for required fields only: those fail the first try, which is what brings on the second.
NESTED: dict[type[Struct], dict[str, str]] = {
    trading.Position: spellings(
        {
            "direction": ("type",),
            "volume": ("lots", "lot", "lot_size"),
            "symbol": ("pair",),
            "open_price": ("entry_price", "entry", "price_open", "price"),
        }
    ),
    virtuoso.Trade: spellings({"size": ("amount", "qty", "quantity")}),
}


def _type(
    name: str,
    payload: type[Struct],
    *,
    check: Any = None,
    in_order: tuple[str, str] | None = None,
    policy: Policy = "reject",
    broker_offset: float | None = None,
    **extra: tuple[str, ...],
) -> EventType:
    """One event type; `extra` adds spellings by canonical field to the common ones."""
    fields = payload.__struct_fields__
    groups = {field: _COMMON.get(field, ()) + extra.get(field, ()) for field in fields}
    aliases = {alias: field for alias, field in spellings(groups).items() if alias not in fields}
    return EventType(
        name=name,
        payload=payload,
        aliases=aliases,
        check=check,
        in_order=in_order,
        prepare=Prepare(payload, aliases, NESTED, broker_offset),
        policy=policy,
        doc=(payload.__doc__ or "").strip().split("\n")[0],
    )


def default_types(broker_offset: float | None = None) -> list[EventType]:
    """Every event type with its default policy; `broker_offset` as in `Prepare`."""

    def add(name: str, payload: type[Struct], **more: Any) -> None:
        found.append(_type(name, payload, broker_offset=broker_offset, **more))

    found: list[EventType] = []
    opened: dict[str, tuple[str, ...]] = {"volume": LOTS, "price": ENTRY, "execution_time": ("timestamp", "ts")}
    generated = ("generated_at",)
    add("signal_generated", trading.SignalGenerated, check=rules.geometry, timestamp=generated)
    add("signal_imported", trading.SignalImported, check=rules.geometry, timestamp=generated)
    add("signal_expired", trading.SignalExpired)
    add("fire_command", trading.FireCommand, check=rules.geometry, lot=LOTS)
    add("trade_executed", trading.TradeExecuted, **opened)
    add("trade_confirmed", trading.TradeExecuted, **opened)
    add("balance_update", trading.BalanceUpdate, check=rules.user, free_margin=("margin_free",))
    add("system_health", trading.SystemHealth)
    add("user_action", trading.UserAction, check=rules.user)
    # Crossed quotes are real (one recorded day has 18,285): worth keeping and seeing, wrong to trade on.
    add("market_data", trading.MarketData, check=rules.quote, in_order=("bid", "ask"), policy="quarantine")
    add("pattern_detected", trading.PatternDetected)
    add("ea_heartbeat", trading.EaHeartbeat, free_margin=("margin_free",))
    add("position_closed", trading.PositionClosed, volume=LOTS, close_price=("price",), profit=("pnl",))

    add("symbol_specification", trading.SymbolSpecification, **MT5)
    add("user_fire_mode", trading.UserFireMode, check=rules.user)

    add("signal_outcome", derived.SignalOutcome, check=rules.outcome)
    add("gate_verdict", derived.GateVerdict, check=rules.verdict)
    add("slot_reserved", derived.SlotReserved)
    add("slot_opened", derived.SlotOpened)
    add("slot_released", derived.SlotReleased)
    add("pattern_status", derived.PatternStatus, check=rules.pattern)
    add("calibration", derived.Calibration)
    add("alert", derived.Alert)

    size = ("amount", "qty", "quantity")
    add("market_data.ohlcv", virtuoso.Ohlcv, check=rules.bar)
    add("market_data.orderbook", virtuoso.OrderBook, check=rules.book, policy="quarantine")
    add("market_data.trades", virtuoso.Trades)
    add("market_data.liquidations", virtuoso.Liquidation, size=size)
    add("analysis.technical", virtuoso.TechnicalAnalysis)
    add("analysis.volume", virtuoso.VolumeAnalysis)
    add("analysis.confluence", virtuoso.ConfluenceAnalysis)
    add("signal.risk", virtuoso.SignalRisk, check=rules.geometry, direction=("signal_type",))
    add("system.component", virtuoso.SystemComponent)
    add("system.cache", virtuoso.SystemCache)
    add("system.database", virtuoso.SystemDatabase)
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a word that is not among `known`."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def apply_policies(types: Iterable[EventType], policies: Mapping[str, str]) -> list[EventType]:
    """`types` with the policy of each event type named in `policies` replaced.

    Raises `ConfigError` for an event type that is not among `types` and for an unknown policy.
    """
    types = list(types)
    names = {each.name for each in types}
    for name, policy in policies.items():
        if name not in names:
            raise ConfigError(f"plugins.schema.policy.{name}: no such event type; {nearest(name, names)}")
        if policy not in get_args(Policy):
            hint = nearest(str(policy), get_args(Policy))
            raise ConfigError(f"plugins.schema.policy.{name}: {policy!r} is not a policy; {hint}")
    return [msgspec.structs.replace(each, policy=policies.get(each.name, each.policy)) for each in types]


def event_types(config: Mapping[str, Any] | None = None) -> list[EventType]:
    """The event types under the configuration table ``[plugins.schema]``.

    Keys: ``policy`` (event type to ``reject``, ``quarantine`` or ``pass``) and ``broker_utc_offset_hours``
    (how far the broker's server clock is ahead of UTC). Raises `ConfigError` naming key and value.
    """
    config = dict(config or {})
    known = ("policy", "broker_utc_offset_hours")
    for key in config:
        if key not in known:
            raise ConfigError(f"plugins.schema.{key}: unknown key; {nearest(key, known)}")
    offset = config.get("broker_utc_offset_hours")
    if offset is not None and (
        isinstance(offset, bool) or not isinstance(offset, (int, float)) or not -14 <= offset <= 14
    ):
        raise ConfigError(f"plugins.schema.broker_utc_offset_hours: {offset!r} is not a number from -14 to 14")
    policies = config.get("policy", {})
    if not isinstance(policies, Mapping):
        raise ConfigError(f"plugins.schema.policy: {policies!r} is not a table of event type = policy")
    return apply_policies(default_types(offset), policies)

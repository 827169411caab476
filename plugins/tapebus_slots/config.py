"""The keys of ``[plugins.slots]`` with their defaults and limits, and what holds for one user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, structs

from tapebus.errors import ConfigError

Percent = Annotated[float, Meta(ge=0, le=100)]
Seconds = Annotated[float, Meta(gt=0)]
FromZero = Annotated[float, Meta(ge=0)]

#: What a ``user_fire_mode`` event may set for its user.
FIRE_MODE = ("tier", "auto_fire", "confidence_band", "max_slots", "risk_pct")
#: What cannot differ from user to user.
_COMMON = ("user_id", "accounts", "users", "tiers", "symbols")


class PatternConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What one pattern does differently: its own closed confidence band."""

    confidence_band: tuple[Percent, Percent]


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """Times in seconds, percentages 0-100, money in account currency.

    ``tiers`` overrides any other key for the users of one tier, ``users`` for one user id; ``accounts`` says which
    user an EA (its ``target_uuid``) trades for; ``symbols`` holds facts of symbols, see `tapebus_trading.symbols`.
    """

    auto_fire: bool = False
    max_slots: Annotated[int, Meta(ge=0)] = 10
    track_manual: bool = False
    user_id: str = "default"
    tier: str = ""
    accounts: dict[str, str] = {}
    users: dict[str, dict[str, Any]] = {}
    tiers: dict[str, dict[str, Any]] = {}

    confidence_band: tuple[Percent, Percent] = (80.0, 89.0)
    confidence: Literal["raw", "calibrated"] = "raw"
    patterns: dict[str, PatternConfig] = {}
    min_spread_multiple: FromZero = 2.0
    require_on_tick: bool = False
    require_specification: bool = False
    max_quote_age_s: Seconds = 5.0
    max_lateness_s: Seconds = 60.0
    max_conversion_age_s: Seconds = 60.0
    heartbeat_max_age_s: Seconds = 40.0
    allow_opposite: bool = False
    market_hours: bool = False

    risk_pct: Percent = 5.0
    max_total_open_risk_pct: Percent = 10.0
    max_per_currency_risk_pct: Percent = 10.0
    account_currency: str = "USD"
    commission_per_lot: FromZero = 0.0
    slippage_per_lot: FromZero = 0.0
    deviation_points: FromZero = 0.0
    max_lots: Annotated[float, Meta(gt=0)] | None = None
    leverage: Annotated[float, Meta(gt=0)] | None = None
    symbols: dict[str, dict[str, Any]] = {}

    answer_timeout_s: Seconds = 30.0
    snapshot_grace_s: FromZero = 5.0
    balance_jump: Annotated[float, Meta(gt=0)] = 10.0
    stale_age_s: Seconds = 4 * 3600.0

    def __post_init__(self) -> None:
        for band in (self.confidence_band, *(p.confidence_band for p in self.patterns.values())):
            if band[0] > band[1]:
                raise ValueError(f"confidence_band {list(band)}: the lower end comes first")

    def counted_in(self, currency: str | None) -> Config:
        """This configuration for an account that its broker says is kept in `currency`; None says nothing."""
        if not currency or currency.upper() == self.account_currency:
            return self
        return structs.replace(self, account_currency=currency.upper())

    def band(self, pattern: str | None) -> tuple[float, float]:
        """The closed confidence band that applies to `pattern`."""
        own = self.patterns.get(pattern) if pattern else None
        return self.confidence_band if own is None else own.confidence_band


def load(values: dict[str, Any]) -> Config:
    """The configuration in `values`; raises `ConfigError` naming the key that is wrong."""
    config = _convert(values, "plugins.slots")
    for tier, own in config.tiers.items():
        _refuse_common(own, f"plugins.slots.tiers.{tier}", (*_COMMON, "tier"))
        _convert({**values, **own}, f"plugins.slots.tiers.{tier}")
    for user, own in config.users.items():
        _refuse_common(own, f"plugins.slots.users.{user}", _COMMON)
        for_user(values, config, user)
        _known_tier(own.get("tier"), config, f"plugins.slots.users.{user}")
    _known_tier(config.tier, config, "plugins.slots")
    return config


def _known_tier(tier: str | None, config: Config, where: str) -> None:
    """A tier that is spelled wrong would leave its users with the limits of nobody."""
    if tier and config.tiers and tier not in config.tiers:
        raise ConfigError(f"{where}.tier = {tier!r}: not in plugins.slots.tiers; {_near(tier, config.tiers)}")


def _near(word: str, words: Iterable[str]) -> str:
    words = tuple(words)
    near = difflib.get_close_matches(word, words, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(words)}"


def _refuse_common(own: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> None:
    found = [key for key in keys if key in own]
    if found:
        raise ConfigError(f"[{where}] {found[0]}: holds for everybody, write it in [plugins.slots]")


def for_user(values: dict[str, Any], config: Config, user: str, mode: Mapping[str, Any] | None = None) -> Config:
    """What holds for `user`: `values`, then its tier's table, then its own, then its last `mode`, each over the former.

    `mode` holds fields of `FIRE_MODE` as the user's ``user_fire_mode`` events left them. Raises `ConfigError`.
    """
    own, last = config.users.get(user, {}), mode or {}
    tier = last.get("tier", own.get("tier", config.tier))
    theirs = config.tiers.get(tier, {})
    if not (own or last or theirs):
        return config
    return _convert({**values, **theirs, **own, **last}, f"plugins.slots.users.{user}")


def _convert(values: dict[str, Any], where: str) -> Config:
    for key in values:
        if key not in Config.__struct_fields__:
            raise ConfigError(f"{where}.{key}: unknown key; {_near(key, Config.__struct_fields__)}")
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"[{where}] {error}: see the keys in the plugin's README") from None

"""The keys of ``[plugins.slots]`` with their defaults and limits."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from tapebus.errors import ConfigError

Percent = Annotated[float, Meta(ge=0, le=100)]
Seconds = Annotated[float, Meta(gt=0)]


class PatternConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What one pattern does differently: its own closed confidence band."""

    confidence_band: tuple[Percent, Percent]


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """Times in seconds, percentages 0-100, money in account currency.

    ``users`` overrides any other key for one user id; ``accounts`` says which user an EA
    (its ``target_uuid``) trades for; ``symbols`` holds the broker's own contract facts.
    """

    auto_fire: bool = False
    max_slots: Annotated[int, Meta(ge=0)] = 10
    track_manual: bool = False
    user_id: str = "default"
    accounts: dict[str, str] = {}
    users: dict[str, dict[str, Any]] = {}

    confidence_band: tuple[Percent, Percent] = (80.0, 89.0)
    patterns: dict[str, PatternConfig] = {}
    min_spread_multiple: Annotated[float, Meta(ge=0)] = 2.0
    max_quote_age_s: Seconds = 5.0
    max_conversion_age_s: Seconds = 60.0
    heartbeat_max_age_s: Seconds = 40.0
    allow_opposite: bool = False

    risk_pct: Percent = 5.0
    max_total_open_risk_pct: Percent = 10.0
    account_currency: str = "USD"
    commission_per_lot: Annotated[float, Meta(ge=0)] = 0.0
    slippage_per_lot: Annotated[float, Meta(ge=0)] = 0.0
    max_deviation: Annotated[float, Meta(ge=0)] = 0.0
    max_lots: Annotated[float, Meta(gt=0)] | None = None
    symbols: dict[str, dict[str, Any]] = {}

    answer_timeout_s: Seconds = 30.0
    snapshot_grace_s: Annotated[float, Meta(ge=0)] = 5.0
    balance_jump: Annotated[float, Meta(gt=0)] = 10.0
    stale_age_s: Seconds = 4 * 3600.0

    def __post_init__(self) -> None:
        for band in (self.confidence_band, *(p.confidence_band for p in self.patterns.values())):
            if band[0] > band[1]:
                raise ValueError(f"confidence_band {list(band)}: the lower end comes first")

    def band(self, pattern: str | None) -> tuple[float, float]:
        """The closed confidence band that applies to `pattern`."""
        own = self.patterns.get(pattern) if pattern else None
        return self.confidence_band if own is None else own.confidence_band


def load(values: dict[str, Any]) -> Config:
    """The configuration in `values`; raises `ConfigError` naming the key that is wrong."""
    config = _convert(values, "plugins.slots")
    for user in config.users:
        for_user(values, config, user)
    return config


def for_user(values: dict[str, Any], config: Config, user: str) -> Config:
    """`config` with what ``[plugins.slots.users.<user>]`` says differently."""
    own = config.users.get(user)
    return config if not own else _convert({**values, **own}, f"plugins.slots.users.{user}")


def _convert(values: dict[str, Any], where: str) -> Config:
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"[{where}] {error}: see the keys in the plugin's README") from None

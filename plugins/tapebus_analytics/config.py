"""The keys of ``[plugins.analytics]`` with their defaults and limits."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tapebus.errors import ConfigError

Fraction = Annotated[float, Meta(gt=0, lt=1)]
Seconds = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """Times in seconds of event time, rates as fractions.

    ``rule`` is ``evidence`` (an e-value of 1 / ``alpha`` against the pattern's own breakeven) or ``literal`` (less
    than ``threshold``). Neither disables below ``min_signals`` decided trades. ``breakeven`` takes the place of what
    the signals' own reward:risk says. ``cluster_s`` 0 counts every repeat of a signal. ``learn_from`` says whether
    imported outcomes count for status and calibration.
    """

    rule: Literal["evidence", "literal"] = "evidence"
    alpha: Fraction = 0.05
    breakeven: Fraction | None = None
    threshold: Fraction = 0.40
    min_signals: Count = 20
    auto_disable: bool = True
    cooldown_s: Seconds = 7 * 86400.0
    cluster_s: Seconds = 1800.0
    learn_from: Literal["live", "all"] = "live"
    calibrate_from: Count = 50
    refit_every: Count = 50


def load(values: dict[str, Any]) -> Config:
    """The configuration in `values`; raises `ConfigError` naming the key that is wrong."""
    for key in values:
        if key not in Config.__struct_fields__:
            near = difflib.get_close_matches(key, Config.__struct_fields__, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(Config.__struct_fields__)}"
            raise ConfigError(f"plugins.analytics.{key}: unknown key; {hint}")
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"[plugins.analytics] {error}: see the keys in the plugin's README") from None

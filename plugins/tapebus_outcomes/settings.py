"""The configuration of the plugin: ``[plugins.outcomes]``."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import msgspec

from tapebus.errors import ConfigError


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """``max_age_s``: how long a signal without ``expires_at`` is followed, seconds of event time.

    ``mode``: outcomes are decided by quotes (``tick``), by bars (``bar``), or by bars where quotes are missing
    (``auto``). ``max_gap_s``: a hole between two quotes of a symbol longer than this marks an exit decided by
    the quote after it. ``tp_fill``: a target is filled at its ``level`` or at the ``tick`` that
    reached it. ``breakeven_r``: a level left with a smaller result than this many R, or than half a point, is
    neither won nor lost. ``clock_skew_s``: a bar whose envelope is stamped this much before its end is taken for
    one that is still forming. ``remember``: how many finished signals are remembered to refuse a repeated id.
    """

    max_age_s: float = 86_400.0
    mode: Literal["auto", "tick", "bar"] = "auto"
    max_gap_s: float = 60.0
    tp_fill: Literal["level", "tick"] = "level"
    breakeven_r: float = 0.01
    clock_skew_s: float = 5.0
    remember: int = 100_000
    symbols: dict[str, dict[str, Any]] = {}

    @classmethod
    def of(cls, config: dict[str, Any]) -> Settings:
        """The checked settings; raises `ConfigError` naming the key, the value and what is valid."""
        names = cls.__struct_fields__
        for key in config:
            if key not in names:
                near = difflib.get_close_matches(key, names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(names)}"
                raise ConfigError(f"plugins.outcomes.{key}: unknown key; {hint}")
        try:
            made = msgspec.convert(config, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"plugins.outcomes: {error}") from error
        for key in ("max_age_s", "max_gap_s", "remember"):
            value = getattr(made, key)
            if not value > 0:
                raise ConfigError(f"plugins.outcomes.{key} = {value}: must be greater than 0")
        for key in ("breakeven_r", "clock_skew_s"):
            value = getattr(made, key)
            if not value >= 0:
                raise ConfigError(f"plugins.outcomes.{key} = {value}: must not be below 0")
        return made

"""What one unit of a symbol means: digits, pip, contract size and lot limits.

The defaults are typical retail values and only a fallback: a broker's own figures belong into
``[plugins.outcomes.symbols.<SYMBOL>]``. The pip changes displayed pips only, never R.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from tapebus.errors import ConfigError

_FIAT = frozenset(
    [
        "AUD",
        "CAD",
        "CHF",
        "CNH",
        "CZK",
        "DKK",
        "EUR",
        "GBP",
        "HKD",
        "HUF",
        "JPY",
        "MXN",
        "NOK",
        "NZD",
        "PLN",
        "SEK",
        "SGD",
        "THB",
        "TRY",
        "USD",
        "ZAR",
    ]
)


class Symbol(msgspec.Struct, frozen=True, kw_only=True):
    """Trading properties of one symbol; prices are in ``quote`` currency, sizes in lots.

    ``point`` is the smallest displayed price step, ``pip`` the market's convention for display and
    ``contract_size`` the units of ``base`` in 1.00 lot.
    """

    name: str
    digits: int
    point: float
    pip: float
    contract_size: float
    lot_min: float
    lot_step: float
    lot_max: float
    base: str
    quote: str

    @property
    def pip_value(self) -> float:
        """The value of one pip of one lot, in the quote currency."""
        return self.pip * self.contract_size


class _Class(msgspec.Struct, frozen=True):
    digits: int
    pip: float
    contract_size: float
    lot_min: float
    lot_step: float
    lot_max: float


_FX = _Class(5, 0.0001, 100_000, 0.01, 0.01, 100)
_FX_JPY = _Class(3, 0.01, 100_000, 0.01, 0.01, 100)
_INDEX = _Class(1, 1.0, 1, 0.1, 0.1, 100)
_CRYPTO = _Class(2, 1.0, 1, 0.01, 0.01, 10)
_FALLBACK = _Class(5, 0.0001, 1, 0.01, 0.01, 100)
_KNOWN: dict[str, tuple[_Class, str, str]] = {
    "XAUUSD": (_Class(2, 0.1, 100, 0.01, 0.01, 50), "XAU", "USD"),
    "XAGUSD": (_Class(3, 0.01, 5000, 0.01, 0.01, 50), "XAG", "USD"),
    "US30": (_INDEX, "US30", "USD"),
    "GER40": (_INDEX, "GER40", "EUR"),
    "BTCUSD": (_CRYPTO, "BTC", "USD"),
    "ETHUSD": (_CRYPTO, "ETH", "USD"),
}
_OVERRIDES = ("digits", "point", "pip", "contract_size", "lot_min", "lot_step", "lot_max", "base", "quote")


class Symbols:
    """The registry: configured values first, then the built-in defaults. Not thread-safe while filling."""

    def __init__(self, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Raises `ConfigError` for an unknown key and for a value that is not a positive number."""
        self._found: dict[str, Symbol] = {}
        for name, values in (overrides or {}).items():
            self._found[name] = _override(_default(name), values)

    def __getitem__(self, name: str) -> Symbol:
        """The properties of `name`; a symbol nobody described gets those of a five-digit pair."""
        return self._found.get(name) or _default(name)


@lru_cache(4096)
def _default(name: str) -> Symbol:
    upper = name.upper()
    known = _KNOWN.get(upper) or _KNOWN.get(upper[:6])
    if known is not None:
        kind, base, quote = known
    else:
        base, quote = upper[:3], upper[3:6]
        if base in _FIAT and quote in _FIAT:
            kind = _FX_JPY if quote == "JPY" else _FX
        else:
            kind, base, quote = _FALLBACK, upper, ""
    return Symbol(
        name=name, point=round(10.0**-kind.digits, kind.digits), base=base, quote=quote, **msgspec.structs.asdict(kind)
    )


def _override(symbol: Symbol, values: Mapping[str, Any]) -> Symbol:
    place = f"plugins.outcomes.symbols.{symbol.name}"
    changes = dict(values)
    for key in changes:
        if key not in _OVERRIDES:
            near = difflib.get_close_matches(key, _OVERRIDES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(_OVERRIDES)}"
            raise ConfigError(f"{place}.{key}: unknown key; {hint}")
    if "digits" in changes and "point" not in changes and isinstance(changes["digits"], int):
        changes["point"] = 10.0 ** -changes["digits"]
    try:
        made = msgspec.convert({**msgspec.structs.asdict(symbol), **changes}, Symbol)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{place}: {error}") from error
    for key in _OVERRIDES[1:7]:
        value = getattr(made, key)
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{place}.{key} = {value}: must be a positive number")
    return made

"""Contract facts per symbol: built-in fallbacks for sizing and geometry; the broker's values win.

Money and steps are `Decimal` so that lots are exact multiples of a step. Prices are in quote currency.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from msgspec import Struct, structs


class Symbol(Struct, frozen=True):
    """What sizing must know about one symbol.

    ``contract`` is units of the base per 1.00 lot; ``quote`` the currency its profit is counted in.
    ``stops_level`` is the broker's least distance of a stop, as a price difference (0: unknown).
    ``typical_spread`` stands in for the spread only where no quote was ever seen.
    """

    name: str
    quote: str
    tick: Decimal
    contract: Decimal
    volume_min: Decimal
    volume_step: Decimal
    volume_max: Decimal
    typical_spread: Decimal
    stops_level: Decimal = Decimal(0)


_METALS = {
    "XAUUSD": Symbol(
        "XAUUSD", "USD", Decimal("0.01"), Decimal(100), Decimal("0.01"), Decimal("0.01"), Decimal(50), Decimal("0.2")
    ),
    "XAGUSD": Symbol(
        "XAGUSD", "USD", Decimal("0.001"), Decimal(5000), Decimal("0.01"), Decimal("0.01"), Decimal(50), Decimal("0.02")
    ),
}
#: Index CFDs by the usual names: currency and tick.
_INDICES = {
    "US30": ("USD", "0.1"),
    "US500": ("USD", "0.1"),
    "NAS100": ("USD", "0.1"),
    "USTEC": ("USD", "0.1"),
    "GER40": ("EUR", "0.1"),
    "GER30": ("EUR", "0.1"),
    "DE30": ("EUR", "0.1"),
    "UK100": ("GBP", "0.1"),
}
_COINS = ("BTC", "ETH", "LTC", "XRP", "SOL")
_CURRENCIES = frozenset(
    [
        "USD",
        "EUR",
        "GBP",
        "JPY",
        "CHF",
        "CAD",
        "AUD",
        "NZD",
        "CNH",
        "MXN",
        "SEK",
        "NOK",
        "DKK",
        "PLN",
        "HUF",
        "CZK",
        "SGD",
        "HKD",
        "ZAR",
        "TRY",
        "THB",
        "ILS",
    ]
)


def lookup(name: str, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Symbol | None:
    """The facts for `name` (a broker suffix such as ``.r`` or ``m`` is ignored); None where unknown.

    `overrides` holds the broker's values by symbol: ``quote`` as text, figures as text or numbers.
    """
    upper = name.upper()
    found = _builtin(upper)
    given = None if overrides is None else overrides.get(upper, overrides.get(name))
    if given is None:
        return found
    values: dict[str, Any] = {
        key: value if key in ("quote", "name") else Decimal(str(value)) for key, value in given.items()
    }
    if found is not None:
        return structs.replace(found, **values)
    return Symbol(**{"name": upper} | values) if values.keys() >= REQUIRED else None


#: What an override must give for a symbol without built-in facts.
REQUIRED = frozenset({"quote", "tick", "contract", "volume_min", "volume_step", "volume_max", "typical_spread"})


def _builtin(upper: str) -> Symbol | None:
    lot = Decimal("0.01")
    for index, (currency, tick) in _INDICES.items():
        if upper.startswith(index):
            tenth = Decimal("0.1")
            return Symbol(index, currency, Decimal(tick), Decimal(1), tenth, tenth, Decimal(100), Decimal(2))
    pair = upper[:6]
    if pair in _METALS:
        return _METALS[pair]
    if pair.startswith(_COINS) and pair[3:6] in _CURRENCIES:
        return Symbol(pair, pair[3:6], lot, Decimal(1), lot, lot, Decimal(10), Decimal(10))
    base, quote = pair[:3], pair[3:6]
    if base not in _CURRENCIES or quote not in _CURRENCIES:
        return None
    tick, spread = ("0.001", "0.01") if quote == "JPY" else ("0.00001", "0.0001")
    return Symbol(pair, quote, Decimal(tick), Decimal(100_000), lot, lot, Decimal(100), Decimal(spread))

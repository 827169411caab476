"""The registry of symbols: what a pip, a lot and a tick of each are worth, per broker.

Built-in defaults are typical retail values and only a fallback. Over them lie, each winning over the one before:
``[shared.symbols.<SYMBOL>]`` of the configuration, ``[shared.brokers.<BROKER>.symbols.<SYMBOL>]``, the ``symbols``
table of the plugin that asks, and the specification the broker itself has sent (event ``symbol_specification``).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from msgspec import Struct, structs

from tapebus.errors import ConfigError
from tapebus_trading.money import exact


class Symbol(Struct, frozen=True):
    """Trading facts of one symbol; prices in `quote` currency, sizes in lots, all figures exact.

    ``point`` is the smallest displayed price step, ``tick`` the smallest step of the contract and ``pip`` the
    convention for display only: it never touches R, money or lots. ``contract`` is units of `base` per 1.00 lot.
    ``tick_value`` is what the broker says one tick of one lot costs in account currency when it is lost; None: derive
    it from ``contract`` and a conversion rate. ``stops_level`` is the least distance of a stop as a price difference
    (0: none known). ``typical_spread`` stands in for the spread only where no quote was ever seen.
    ``volume_limit`` bounds all positions of the symbol together, ``margin`` is account currency per lot.
    """

    name: str
    base: str
    quote: str
    digits: int
    point: Decimal
    tick: Decimal
    pip: Decimal
    contract: Decimal
    volume_min: Decimal
    volume_step: Decimal
    volume_max: Decimal
    typical_spread: Decimal
    stops_level: Decimal = Decimal(0)
    freeze_level: Decimal = Decimal(0)
    tick_value: Decimal | None = None
    volume_limit: Decimal | None = None
    margin: Decimal | None = None
    trade_mode: str = ""

    @property
    def pip_value(self) -> Decimal:
        """The value of one pip of one lot, in the quote currency."""
        return self.pip * self.contract


#: Stands for the broker where none is asked for: what any terminal said last.
ANY = "*"
_WORDS = frozenset(("base", "quote", "trade_mode"))
#: May be zero; every other figure must be above it.
_FROM_ZERO = frozenset(("stops_level", "freeze_level", "typical_spread"))
_KEYS = tuple(name for name in Symbol.__struct_fields__ if name != "name")
#: What must be given for a symbol without built-in facts.
REQUIRED = frozenset(("quote", "digits", "contract", "volume_min", "volume_step", "volume_max"))
#: What a terminal tells of a symbol when it connects, whatever it is.
HANDSHAKE = ("digits", "point", "tick", "contract", "volume_min", "volume_step", "volume_max", "stops_level", "quote")
# fmt: off
_CURRENCIES = frozenset((
    "AUD", "CAD", "CHF", "CNH", "CZK", "DKK", "EUR", "GBP", "HKD", "HUF", "ILS",
    "JPY", "MXN", "NOK", "NZD", "PLN", "SEK", "SGD", "THB", "TRY", "USD", "ZAR",
))
# fmt: on
_METALS = {"XAUUSD": (2, "0.1", "100", "50", "0.2"), "XAGUSD": (3, "0.01", "5000", "50", "0.02")}
#: Index CFDs by the usual names, with their currency.
_INDICES = {
    "US30": "USD",
    "US500": "USD",
    "NAS100": "USD",
    "USTEC": "USD",
    "GER40": "EUR",
    "GER30": "EUR",
    "DE40": "EUR",
    "DE30": "EUR",
    "UK100": "GBP",
    "JP225": "JPY",
}
_COINS = ("BTC", "ETH", "LTC", "XRP", "SOL")


class Registry:
    """Symbols by name and broker. Not thread-safe: one for each consumer.

    `shared` is the ``[shared]`` table of the configuration, `own` the plugin's ``symbols`` table and `place` how the
    configuration calls the latter. Raises `ConfigError` naming the key of a table that is wrong.
    """

    def __init__(
        self,
        shared: Mapping[str, Any] | None = None,
        own: Mapping[str, Any] | None = None,
        place: str = "symbols",
    ) -> None:
        self._tables: dict[str, list[tuple[str, Mapping[str, Any]]]] = {"": []}
        self._sent: dict[tuple[str, str], dict[str, Any]] = {}
        self._senders: set[str] = set()
        self._found: dict[tuple[str, str], Symbol | None] = {}
        #: The broker of each account or terminal id that the configuration names.
        self.brokers: dict[str, str] = {}
        shared = shared or {}
        common = ("shared.symbols", _table(shared.get("symbols", {}), "shared.symbols"))
        mine = (place, _table(own or {}, place))
        self._tables[""] = [common, mine]
        for broker, given in _table(shared.get("brokers", {}), "shared.brokers").items():
            where = f"shared.brokers.{broker}"
            table = _table(given, where)
            _known(table, ("accounts", "symbols"), where)
            self.brokers |= {str(account): broker for account in table.get("accounts", ())}
            theirs = (f"{where}.symbols", _table(table.get("symbols", {}), f"{where}.symbols"))
            self._tables[broker] = [common, theirs, mine]
        for broker, tables in self._tables.items():
            for _, table in tables:
                for name in table:
                    self.get(name, broker)

    def __getitem__(self, name: str) -> Symbol:
        """The facts for `name`, for display: a symbol nobody described is taken for a pair with five digits."""
        return self.get(name) or _nameless(name)

    def get(self, name: str, broker: str = "") -> Symbol | None:
        """The facts for `name` at `broker` ("": any), or None where nobody knows enough to trade it."""
        key = (name, broker)
        if key not in self._found:
            self._found[key] = self._make(name, broker)
        return self._found[key]

    def broker_of(self, *accounts: str | None) -> str:
        """The broker of the first of `accounts` (account numbers, terminal ids) that the configuration names.

        Else the first of them that has sent facts of its own: what a terminal says then holds for its account alone,
        for it may be at another broker than the next one.
        """
        named = next((self.brokers[each] for each in accounts if each in self.brokers), "")
        return named or next((each for each in accounts if each and each in self._senders), "")

    def specify(self, specification: Any) -> None:
        """Take over what the broker says itself: the payload of a ``symbol_specification`` event.

        Raises `ConfigError` where a figure makes no sense; nothing of it is taken over then.
        """
        name = _field(specification, "symbol")
        named = _field(specification, "broker")
        ids = [each for key in ("target_uuid", "account_number") if (each := _field(specification, key))]
        broker = named or next((self.brokers[each] for each in ids if each in self.brokers), "")
        given = {mine: value for theirs, mine in _SENT.items() if (value := _field(specification, theirs)) is not None}
        own = broker or next(iter(ids), "")
        # how terminals say that there is none, or that they do not know it now
        dropped = {key for key in ("volume_limit", "tick_value", "margin") if given.get(key) == 0}
        given = {key: value for key, value in given.items() if key not in dropped}
        if "point" in given:
            point = exact(given["point"])
        elif "digits" in given:
            point = Decimal(1).scaleb(-int(given["digits"]))
        else:
            point = (self.get(name, own) or _nameless(name)).point
        for level in ("stops_level", "freeze_level"):
            if level in given:
                given[level] = exact(given[level]) * point  # brokers count them in points
        _checked(given, f"symbol_specification of {name}")
        # without a broker: for each account it may be of, and for whoever asks of none
        for sender in (broker,) if broker else (*ids, ANY if ids else ""):
            before = {k: v for k, v in self._sent.get((name, sender), {}).items() if k not in dropped}
            self._sent[name, sender] = before | given
            self._senders.add(sender)
        self._found.clear()

    def unsent(self, name: str, broker: str = "") -> list[str]:
        """Which of `HANDSHAKE` the broker itself has not sent of `name`, as they are called here."""
        sent = self._sent.get((name, ""), {}) | self._sent.get((name, broker or ANY), {})
        return [key for key in HANDSHAKE if key not in sent]

    def specifications(self) -> dict[str, dict[str, str]]:
        """What brokers have sent, as text, to be kept over a restart; see `restore`."""
        return {
            f"{name}\n{broker}": {k: str(v) for k, v in given.items()} for (name, broker), given in self._sent.items()
        }

    def restore(self, specifications: Mapping[str, Mapping[str, str]]) -> None:
        """Take back what `specifications` returned."""
        for key, given in specifications.items():
            name, parted, broker = key.partition("\n")
            if not parted:  # as written before
                broker, _, name = key.partition("/")
            self._sent[name, broker] = dict(given)
            self._senders.add(broker)
        self._found.clear()

    def _make(self, name: str, broker: str) -> Symbol | None:
        symbol = _builtin(name)
        values: dict[str, Any] = {}
        place = ""
        for where, table in self._tables.get(broker, self._tables[""]):
            given = table.get(name, table.get(name.upper()))
            if given is not None:
                place = f"{where}.{name}"
                values |= _checked(_table(given, place), place)
        for sender in ("", broker or ANY):
            values |= _checked(self._sent.get((name, sender), {}), f"symbol_specification of {name}")
        if symbol is None and not values.keys() >= REQUIRED:
            if place:
                missing = ", ".join(sorted(REQUIRED - values.keys()))
                raise ConfigError(f"{place}: nothing is built in for this symbol; give also {missing}")
            return None
        return _built(symbol or _nameless(name), values)


#: Fields of a specification that a broker sends, and how they are called here.
_SENT = {
    "digits": "digits",
    "point": "point",
    "tick_size": "tick",
    "tick_value": "tick_value",
    "contract_size": "contract",
    "volume_min": "volume_min",
    "volume_step": "volume_step",
    "volume_max": "volume_max",
    "volume_limit": "volume_limit",
    "stops_level": "stops_level",
    "freeze_level": "freeze_level",
    "margin": "margin",
    "pip": "pip",
    "base": "base",
    "quote": "quote",
    "trade_mode": "trade_mode",
}


def _built(symbol: Symbol, values: dict[str, Any]) -> Symbol:
    """`symbol` changed by `values`; a point follows the digits, a tick the point, where nobody says otherwise."""
    if "digits" in values:
        values.setdefault("point", Decimal(1).scaleb(-values["digits"]))
    if "point" in values:
        values.setdefault("tick", values["point"])
    return structs.replace(symbol, **values)


def _checked(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    _known(given, _KEYS, place)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key in _WORDS:
            values[key] = str(value)
            continue
        try:
            figure = exact(value)
            least = figure >= 0 if key in _FROM_ZERO or key == "digits" else figure > 0
            usable = figure.is_finite() and least and not isinstance(value, bool)
        except ArithmeticError:
            usable = False
        if not usable or (key == "digits" and figure != int(figure)):
            raise ConfigError(
                f"{place}.{key} = {value!r}: must be a number {'from' if key in _FROM_ZERO else 'above'} 0"
            )
        values[key] = int(figure) if key == "digits" else figure
    return values


def _builtin(name: str) -> Symbol | None:
    """The default for `name`; a broker's suffix such as ``.r`` or ``m`` is ignored."""
    upper = name.upper()
    for index, currency in _INDICES.items():
        if upper.startswith(index):
            return _symbol(name, index, currency, 1, "1", "1", ("0.1", "0.1", "100"), "2")
    base, quote = upper[:3], upper[3:6]
    if upper[:6] in _METALS:
        digits, pip, contract, most, spread = _METALS[upper[:6]]
        return _symbol(name, base, quote, digits, pip, contract, ("0.01", "0.01", most), spread)
    if base in _COINS and quote in _CURRENCIES:
        return _symbol(name, base, quote, 2, "1", "1", ("0.01", "0.01", "10"), "10")
    if base not in _CURRENCIES or quote not in _CURRENCIES:
        return None
    lots = ("0.01", "0.01", "100")
    if quote == "JPY":
        return _symbol(name, base, quote, 3, "0.01", "100000", lots, "0.01")
    return _symbol(name, base, quote, 5, "0.0001", "100000", lots, "0.0001")


def _nameless(name: str) -> Symbol:
    return _symbol(name, name.upper(), "", 5, "0.0001", "1", ("0.01", "0.01", "100"), "0")


def _symbol(
    name: str, base: str, quote: str, digits: int, pip: str, contract: str, lots: tuple[str, str, str], spread: str
) -> Symbol:
    point = Decimal(1).scaleb(-digits)
    least, step, most = (Decimal(each) for each in lots)
    return Symbol(
        name, base, quote, digits, point, point, Decimal(pip), Decimal(contract), least, step, most, Decimal(spread)
    )


def _table(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place} = {value!r}: must be a table, written [{place}]")
    return value


def _known(table: Mapping[str, Any], keys: tuple[str, ...], place: str) -> None:
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(keys)}"
            raise ConfigError(f"{place}.{key}: unknown key; {hint}")


def _field(data: Any, name: str) -> Any:
    return data.get(name) if isinstance(data, Mapping) else getattr(data, name, None)

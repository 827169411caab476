"""When markets are open, and which session of the day a moment belongs to.

The week of currencies runs from Sunday 17:00 to Friday 17:00 in New York, and so does each trading day from 17:00 to
17:00, whatever the clocks elsewhere do. A trading day has the date on which it ends, and that date is what
``[shared.sessions] holidays`` names. Metals begin each day later where ``metals_open`` says so; crypto currencies
never close.

Clocks come from the time zone database of the machine, or of the package ``tzdata``. Where there is neither, the
rules in force in the United States, the European Union and New South Wales in 2026 are used instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from functools import cache
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from msgspec import Struct

from tapebus.errors import ConfigError

Market = Literal["fx", "metals", "crypto"]
#: The two of them that trade most, while both are open.
OVERLAP = "london_new_york"
#: Sessions in the order in which one is preferred where several are open.
SESSIONS = (OVERLAP, "new_york", "london", "tokyo", "sydney")
CLOSED, WEEKEND = "closed", "weekend"

_DAY_ENDS = time(17)
_METALS = ("XAU", "XAG", "XPT", "XPD")
_COINS = ("BTC", "ETH", "LTC", "XRP", "SOL", "BCH", "ADA", "DOG")
#: Business hours by local clock.
_HOURS = {
    "new_york": ("America/New_York", time(8), time(17)),
    "london": ("Europe/London", time(8), time(17)),
    "tokyo": ("Asia/Tokyo", time(9), time(18)),
    "sydney": ("Australia/Sydney", time(7), time(16)),
}


class Hours(Struct, frozen=True, forbid_unknown_fields=True):
    """The table ``[shared.sessions]``; immutable, for any thread.

    ``holidays`` are trading days on which currencies and metals rest. Metals pause from 17:00 to ``metals_open``, New
    York time, every day. ``crypto`` and ``metals`` name further symbols of these markets.
    """

    holidays: frozenset[date] = frozenset()
    metals_open: time = _DAY_ENDS
    crypto: frozenset[str] = frozenset()
    metals: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.metals_open < _DAY_ENDS:
            raise ValueError(f"metals_open = {self.metals_open:%H:%M}: a trading day begins at 17:00")

    def market_of(self, symbol: str) -> Market:
        """The market whose hours `symbol` keeps; what is neither metal nor coin keeps those of currencies."""
        upper = symbol.upper()
        if symbol in self.crypto or upper.startswith(_COINS):
            return "crypto"
        return "metals" if symbol in self.metals or upper.startswith(_METALS) else "fx"

    def is_open(self, market: Market, at: float) -> bool:
        """Whether `market` trades at `at` (Unix seconds)."""
        return self.opened_at(market, at) is not None

    def opened_at(self, market: Market, at: float) -> float | None:
        """When `market` opened last, for a moment at which it is open (0: it never closes); else None."""
        if market == "crypto":
            return 0.0
        now = _local(at, "America/New_York")
        day = _trading_day(now)
        if not self._trades(day):
            return None
        if market == "metals" and self.metals_open > _DAY_ENDS:
            begin = _moment(day - timedelta(1), self.metals_open)
            return begin if at >= begin else None
        while self._trades(day - timedelta(1)):
            day -= timedelta(1)
        return _moment(day - timedelta(1), _DAY_ENDS)

    def session_of(self, at: float, market: Market = "fx") -> str:
        """The name in `SESSIONS` that `at` (Unix seconds) belongs to; ``closed``, or ``weekend`` for crypto, beyond."""
        if market == "crypto" and not self.is_open("fx", at):
            return WEEKEND
        if not self.is_open(market, at):
            return CLOSED
        found = {name for name, (zone, begin, end) in _HOURS.items() if begin <= _local(at, zone).time() < end}
        if {"london", "new_york"} <= found:
            return OVERLAP
        return next((name for name in SESSIONS if name in found), CLOSED)

    def _trades(self, day: date) -> bool:
        return day.weekday() < 5 and day not in self.holidays


def hours(shared: Mapping[str, Any]) -> Hours:
    """The `Hours` of the table ``[shared]``; raises `ConfigError` naming the key that is wrong."""
    given = shared.get("sessions", {})
    for key in given if isinstance(given, Mapping) else ():
        if key not in Hours.__struct_fields__:
            near = difflib.get_close_matches(key, Hours.__struct_fields__, 1, 0.0)[0]
            raise ConfigError(f"shared.sessions.{key}: unknown key; did you mean {near!r}?")
    try:
        days = frozenset(date.fromisoformat(str(each)) for each in given.get("holidays", ()))
        opens = time.fromisoformat(str(given.get("metals_open", _DAY_ENDS)))
        return Hours(days, opens, frozenset(given.get("crypto", ())), frozenset(given.get("metals", ())))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"[shared.sessions] {error}") from None


def week_hour(at: float) -> int:
    """The hour of the week in New York, 0 for Monday 0:00 to 167: what repeats from week to week repeats by it."""
    local = _local(at, "America/New_York")
    return local.weekday() * 24 + local.hour


# -- clocks -------------------------------------------------------------------------------------


def _local(at: float, zone: str) -> datetime:
    return datetime.fromtimestamp(at, UTC).astimezone(_zone(zone))


def _trading_day(local: datetime) -> date:
    return local.date() + timedelta(local.time() >= _DAY_ENDS)


def _moment(day: date, clock: time) -> float:
    return datetime.combine(day, clock, _zone("America/New_York")).timestamp()


@cache
def _zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except ZoneInfoNotFoundError:
        return Ruled(name)


def _sunday(year: int, month: int, which: int) -> datetime:
    """The `which`-th Sunday of a month, 0 for the first, -1 for the last, at 0:00."""
    if which < 0:
        end = datetime(year + month // 12, month % 12 + 1, 1) - timedelta(1)
        return end - timedelta((end.weekday() + 1) % 7)
    first = datetime(year, month, 1)
    return first + timedelta((6 - first.weekday()) % 7 + 7 * which)


#: Hours of standard time; then month, Sunday and UTC hour at which summer time begins and ends.
_RULES: dict[str, tuple[int, tuple[tuple[int, int, int], tuple[int, int, int]] | None]] = {
    "America/New_York": (-5, ((3, 1, 7), (11, 0, 6))),
    "Europe/London": (0, ((3, -1, 1), (10, -1, 1))),
    "Asia/Tokyo": (9, None),
    "Australia/Sydney": (10, ((10, 0, -8), (4, 0, -8))),
}


class Ruled(tzinfo):
    """A zone by the rules of 2026, for machines without a time zone database."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._standard, self._summer = _RULES[name]

    def utcoffset(self, moment: datetime | None) -> timedelta:
        # local times in the hour of a switch are taken as before it; none of our hours begins or ends there
        assert moment is not None
        return self._offset(moment.replace(tzinfo=None) - timedelta(hours=self._standard))

    def dst(self, moment: datetime | None) -> timedelta:
        return self.utcoffset(moment) - timedelta(hours=self._standard)

    def tzname(self, moment: datetime | None) -> str:
        return self._name

    def fromutc(self, moment: datetime) -> datetime:
        return moment + self._offset(moment.replace(tzinfo=None))

    def _offset(self, utc: datetime) -> timedelta:
        summer = False
        if self._summer is not None:
            begin, end = (_sunday(utc.year, m, which) + timedelta(hours=h) for m, which, h in self._summer)
            summer = begin <= utc < end if begin < end else not end <= utc < begin
        return timedelta(hours=self._standard + summer)

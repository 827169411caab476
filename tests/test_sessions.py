"""Market hours and sessions: the week of currencies, metals and coins, summer time, holidays."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapebus.errors import ConfigError
from tapebus_trading import sessions
from tapebus_trading.sessions import CLOSED, OVERLAP, SESSIONS, WEEKEND, Hours, Ruled, hours, week_hour


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.fixture(params=["database", "rules"])
def clock(request, monkeypatch):
    """Both ways to know what local time it is give the same answers."""
    if request.param == "rules":
        monkeypatch.setattr(sessions, "_zone", Ruled)


# In 2026 New York goes over to summer time on 8 March and back on 1 November: 17:00 there is 22:00 UTC or 21:00 UTC.
WEEK = [
    ("a Wednesday noon", "2026-01-14 12:00", True),
    ("Friday one second before the end, winter", "2026-01-16 21:59:59", True),
    ("Friday 17:00 in New York, winter", "2026-01-16 22:00", False),
    ("Saturday", "2026-01-17 12:00", False),
    ("Sunday one second before the beginning, winter", "2026-01-18 21:59:59", False),
    ("Sunday 17:00 in New York, winter", "2026-01-18 22:00", True),
    ("Friday 17:00 in New York, summer", "2026-07-17 21:00", False),
    ("Friday one second before the end, summer", "2026-07-17 20:59:59", True),
    ("Sunday 17:00 in New York, summer", "2026-07-19 21:00", True),
    ("the Friday before the spring switch ends in winter time", "2026-03-06 21:30", True),
    ("the Sunday of the spring switch begins in summer time", "2026-03-08 21:00", True),
    ("one second before that", "2026-03-08 20:59:59", False),
    ("the Friday before the autumn switch ends in summer time", "2026-10-30 21:00", False),
    ("the Sunday of the autumn switch begins in winter time", "2026-11-01 21:30", False),
    ("and is open an hour later", "2026-11-01 22:00", True),
    ("while Europe has switched and America has not, New York counts", "2026-03-27 21:00", False),
]


@pytest.mark.parametrize(("moment", "expected"), [each[1:] for each in WEEK], ids=[each[0] for each in WEEK])
def test_currencies_trade_from_sunday_to_friday_17_in_new_york(clock, moment, expected):
    assert Hours().is_open("fx", at(moment)) is expected
    assert Hours().is_open("crypto", at(moment)), "crypto never closes"


def test_the_stretch_of_a_week_begins_on_sunday_and_after_a_holiday_anew(clock):
    assert Hours().opened_at("fx", at("2026-01-15 03:00")) == at("2026-01-11 22:00")
    assert Hours().opened_at("fx", at("2026-01-17 03:00")) is None
    assert Hours().opened_at("crypto", at("2026-01-17 03:00")) == 0.0
    closed = hours({"sessions": {"holidays": ["2026-01-14"]}})
    assert closed.opened_at("fx", at("2026-01-15 03:00")) == at("2026-01-14 22:00")


def test_a_holiday_closes_the_trading_day_that_ends_on_its_date():
    rest = hours({"sessions": {"holidays": ["2026-12-25"]}})
    for market in ("fx", "metals"):
        assert rest.is_open(market, at("2026-12-24 21:59"))
        assert not rest.is_open(market, at("2026-12-24 22:00"))
        assert not rest.is_open(market, at("2026-12-25 12:00"))
    assert rest.is_open("crypto", at("2026-12-25 12:00"))


def test_metals_pause_after_each_trading_day_where_configured():
    assert Hours().is_open("metals", at("2026-01-14 22:30"))
    paused = hours({"sessions": {"metals_open": "18:00"}})
    assert not paused.is_open("metals", at("2026-01-14 22:00"))
    assert not paused.is_open("metals", at("2026-01-18 22:59")), "on Sunday as well"
    assert paused.opened_at("metals", at("2026-01-14 23:00")) == at("2026-01-14 23:00")
    assert paused.opened_at("metals", at("2026-01-15 21:59")) == at("2026-01-14 23:00")
    assert paused.is_open("fx", at("2026-01-14 22:30"))


@pytest.mark.parametrize(
    ("symbol", "market"),
    [("EURUSD", "fx"), ("XAUUSD", "metals"), ("xagusd.r", "metals"), ("BTCUSD", "crypto"), ("US30", "fx")],
)
def test_symbols_keep_the_hours_of_their_market(symbol, market):
    assert Hours().market_of(symbol) == market


def test_further_symbols_of_a_market_are_configured():
    own = hours({"sessions": {"crypto": ["PEPEUSD"], "metals": ["GOLD"]}})
    assert (own.market_of("PEPEUSD"), own.market_of("GOLD")) == ("crypto", "metals")


DAY = [
    ("Sydney alone", "2026-01-14 21:59", "new_york"),
    ("after New York", "2026-01-14 22:00", "sydney"),
    ("Tokyo wins over Sydney", "2026-01-14 00:00", "tokyo"),
    ("the last minute of Tokyo alone", "2026-01-14 07:59", "tokyo"),
    ("London wins over Tokyo", "2026-01-14 08:00", "london"),
    ("New York opens, winter", "2026-01-14 13:00", OVERLAP),
    ("New York opens, summer", "2026-07-15 12:00", OVERLAP),
    ("three weeks of March the overlap is an hour longer", "2026-03-18 12:30", OVERLAP),
    ("London ends", "2026-01-14 17:00", "new_york"),
    ("Tokyo knows no summer time", "2026-07-15 00:00", "tokyo"),
    ("Saturday", "2026-01-17 12:00", CLOSED),
]


@pytest.mark.parametrize(("moment", "expected"), [each[1:] for each in DAY], ids=[each[0] for each in DAY])
def test_sessions_are_named_by_local_business_hours(clock, moment, expected):
    assert Hours().session_of(at(moment)) == expected


def test_coins_have_a_weekend_of_their_own():
    assert Hours().session_of(at("2026-01-17 12:00"), "crypto") == WEEKEND
    assert Hours().session_of(at("2026-01-14 12:00"), "crypto") == "london"


YEARS = st.floats(at("2010-01-01"), at("2036-01-01"))


@given(YEARS)
def test_every_open_moment_has_a_session_and_a_beginning_that_is_open(moment):
    hours = Hours()
    opened = hours.opened_at("fx", moment)
    assert (hours.session_of(moment) in SESSIONS) is (opened is not None)
    if opened is not None:
        assert opened <= moment < opened + 5 * 86400
        assert hours.is_open("fx", opened)
        assert not hours.is_open("fx", opened - 1)


@given(YEARS, st.sampled_from(sorted(sessions._RULES)))
def test_without_a_time_zone_database_the_clocks_show_the_same(moment, name):
    utc = datetime.fromtimestamp(moment, UTC)
    assert utc.astimezone(Ruled(name)).replace(tzinfo=None) == utc.astimezone(ZoneInfo(name)).replace(tzinfo=None)


def test_the_hour_of_the_week_follows_the_clock_of_new_york():
    assert week_hour(at("2026-01-12 14:30")) == 9  # Monday 9:30
    assert week_hour(at("2026-07-13 13:30")) == 9
    assert week_hour(at("2026-01-12 04:59")) == 167  # Sunday 23:59


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"holiday": []}, "did you mean 'holidays'"),
        ({"holidays": ["Christmas"]}, "Christmas"),
        ({"metals_open": "16:00"}, "begins at 17:00"),
        ({"metals_open": "noon"}, "noon"),
        ({"crypto": 5}, "shared.sessions"),
    ],
)
def test_a_wrong_table_is_refused_by_the_name_of_its_key(table, words):
    with pytest.raises(ConfigError, match=words):
        hours({"sessions": table})

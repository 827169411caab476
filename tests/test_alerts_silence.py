"""What should have come and did not: silence while a market is open, and fewer events than usual."""

from __future__ import annotations

import math

import pytest

from alerts_support import NOON, SILENCE, Desk, at
from tapebus_alerts.usual import Expectation, Usual

# -- silence ------------------------------------------------------------------------------------


def test_silence_is_raised_once_after_its_threshold_and_cleared_once_it_is_over():
    desk = Desk(SILENCE)
    for _ in range(5):
        desk.quote()
        desk.wait(1)
    desk.wait(29)
    assert desk.told == []
    desk.wait(1)
    assert desk.last["value"] == 31.0
    assert desk.last["message"] == "31 s without market_data (limit 30 s)"
    assert (desk.last["threshold"], desk.last["unit"], desk.last["component"]) == (30.0, "s", "alerts")
    desk.wait(100)
    assert desk.told == ["raised quiet"]
    for _ in range(20):
        desk.quote()
        desk.wait(1)
    assert desk.last["severity"] == "info"
    assert desk.last["message"].startswith("over after ")
    assert desk.told == ["cleared quiet"]


def test_a_single_quote_in_the_silence_does_not_clear_it():
    desk = Desk(SILENCE | {"clear_for_s": 40.0})
    desk.quote()
    desk.wait(40)
    desk.quote()
    desk.wait(70)
    assert desk.told == ["raised quiet"]


def test_a_topic_that_never_came_is_silent_unless_the_rule_waits_for_its_first_event():
    desk = Desk(SILENCE)
    desk.wait(40)
    assert desk.told == ["raised quiet"]
    patient = Desk(SILENCE | {"expected": False})
    patient.wait(100)
    assert patient.told == []
    patient.quote()
    patient.restart()
    patient.wait(40)
    assert patient.told == ["raised quiet"], "that it came once is known after a restart"


# Friday 17:00 in New York is 22:00 UTC in winter and 21:00 UTC in summer.
@pytest.mark.parametrize(("closes", "opens"), [
    pytest.param("2026-01-16 22:00", "2026-01-18 22:00", id="winter"),
    pytest.param("2026-07-17 21:00", "2026-07-19 21:00", id="summer"),
    pytest.param("2026-03-06 22:00", "2026-03-08 21:00", id="the weekend of the spring switch"),
    pytest.param("2026-10-30 21:00", "2026-11-01 22:00", id="the weekend of the autumn switch"),
])  # fmt: skip
def test_a_closed_market_is_not_silent_and_an_open_one_is_after_its_grace(closes, opens):
    desk = Desk(SILENCE, now=at(closes) - 22)
    desk.wait(20)
    desk.quote()
    desk.leap(at(opens) - desk.now - 1)
    assert desk.told == []
    desk.wait(300 + 30)
    assert desk.told == []
    desk.wait(3)
    assert desk.told == ["raised quiet"]


def test_what_was_silent_when_the_market_closed_stays_raised_until_there_is_a_quote():
    desk = Desk(SILENCE, now=at("2026-01-16 21:50"))
    desk.quote()
    desk.leap(300)
    assert desk.told == ["raised quiet"]
    desk.leap(at("2026-01-18 22:10") - desk.now)
    assert desk.told == []
    for _ in range(10):
        desk.quote()
        desk.wait(1)
    assert desk.told == ["cleared quiet"]


def test_a_holiday_of_the_configuration_is_closed():
    desk = Desk(SILENCE, sessions={"holidays": ["2026-01-14"]})
    desk.quote()
    desk.wait(100)
    assert desk.told == []


def test_one_silent_symbol_is_told_from_the_busy_ones():
    rule = SILENCE | {"symbols": ["EURUSD", "GBPUSD", "BTCUSD"], "session": "symbol"}
    desk = Desk(rule)
    for second in range(60):
        desk.bench.feed([
            desk.bench.event("market_data", desk.now, {"symbol": symbol, "bid": 1.0, "ask": 1.1})
            for symbol in ("EURUSD", "BTCUSD", "USDJPY", *(["GBPUSD"] if second < 10 else []))
        ])  # fmt: skip
        desk.wait(1)
    assert desk.told == ["raised quiet:GBPUSD"]


def test_on_a_weekend_only_coins_are_expected_where_symbols_keep_their_own_hours():
    rule = SILENCE | {"symbols": ["EURUSD", "BTCUSD"], "session": "symbol"}
    desk = Desk(rule, now=at("2026-01-17 12:00"))
    desk.wait(40)
    assert desk.told == ["raised quiet:BTCUSD"]


def test_a_silent_source_is_told_by_its_name():
    desk = Desk(SILENCE | {"sources": ["feed_a", "feed_b"]})
    for _ in range(40):
        desk.quote(source="feed_a")
        desk.wait(1)
    assert desk.told == ["raised quiet:feed_b"]


def test_a_recording_neither_breaks_a_silence_nor_begins_one():
    desk = Desk(SILENCE | {"expected": False})
    desk.quote(timestamp=at("2014-05-08 12:00"))
    desk.wait(60)
    assert desk.told == [], "a replay that ends is no silence"
    desk.quote()
    desk.wait(25)
    desk.quote(timestamp=at("2014-05-08 12:00"))
    desk.wait(25)
    assert desk.told == ["raised quiet"]


def test_a_machine_that_slept_begins_to_watch_anew():
    desk = Desk(SILENCE)
    desk.quote()
    desk.now += 3600
    desk.look()
    desk.wait(20)
    assert desk.told == []
    desk.wait(20)
    assert desk.told == ["raised quiet"]


def test_a_clock_that_is_set_back_hides_no_silence():
    desk = Desk(SILENCE, {"kind": "lag", "name": "lag", "threshold": 100.0, "for_s": 10.0})
    desk.quote()
    desk.lag_ms = 500.0
    desk.wait(5)
    desk.now -= 3600
    desk.wait(9)
    assert desk.told == []
    desk.wait(40)
    assert sorted(desk.told) == ["raised lag:slow", "raised quiet"]
    desk.now -= 3600
    desk.wait(100)
    assert desk.told == [], "what is raised stays"


def test_a_loss_passes_with_its_window_also_where_the_clock_is_set_back():
    desk = Desk({"kind": "loss", "name": "loss", "of": "dropped", "window_s": 60.0})
    desk.wait(70)
    desk.counts["dropped"] = {"client.full": 3}
    desk.wait(5)
    desk.now -= 3600
    desk.wait(50)
    assert desk.told == ["raised loss"]
    desk.wait(30)
    assert desk.told == ["cleared loss"]


def test_nothing_is_called_silent_while_the_plugin_itself_is_late():
    desk = Desk(SILENCE)
    desk.quote()
    own = desk.figures()
    own["consumers"].append({**own["consumers"][0], "plugin": "alerts", "name": "alerts", "lag_ms": 5000.0})
    desk.figures = lambda: own  # type: ignore[method-assign]
    desk.wait(60)
    assert desk.told == []


# -- fewer than usual ---------------------------------------------------------------------------


def weeks_of_signals(desk: Desk, weeks: int, per_hour: int = 12) -> None:
    """Wednesdays 12 to 16 o'clock with signals at a steady pace, then the next Wednesday at noon."""
    for _ in range(weeks):
        start = desk.now
        desk.restart()  # as good as the pause between the days
        while desk.now < start + 4 * 3600:
            for _ in range(per_hour // 12):
                desk.signal()
            desk.leap(300, 25)
        desk.now = start + 7 * 86400
    desk.told  # noqa: B018 - the clock leapt


FEWER = {"kind": "fewer", "name": "few", "weeks": 3, "threshold": 25.0, "for_s": 0.0, "clear_at": 50.0}


def test_fewer_signals_than_usual_are_told_only_with_enough_history():
    for weeks, expected in ((2, []), (3, ["raised few"])):
        desk = Desk(FEWER, now=NOON - 1)
        weeks_of_signals(desk, weeks, 24)
        desk.restart()
        desk.leap(2 * 3600 + 60)
        assert desk.told == expected, f"after {weeks} weeks"


def test_the_usual_number_of_signals_and_a_slow_hour_are_no_alert():
    desk = Desk(FEWER, now=NOON - 1)
    weeks_of_signals(desk, 4, 24)
    desk.restart()
    for n in range(30):
        if n % 2:
            desk.signal()
            desk.signal()
        desk.leap(240)
    assert desk.told == []


def test_a_topic_that_is_rare_anyway_is_never_called_rarer():
    desk = Desk(FEWER | {"at_least": 30.0}, now=NOON - 1)
    weeks_of_signals(desk, 4, 24)
    desk.restart()
    desk.leap(2 * 3600)
    assert desk.told == []


@pytest.mark.parametrize(("shape", "rate", "count"), [(0.5, 4.0, 0), (24.5, 4.0, 2), (96.5, 4.0, 10), (300.5, 6.0, 31)])
def test_the_chance_of_so_few_is_that_of_a_poisson_count_of_unknown_rate(shape, rate, count):
    """Against the integral over all rates, by the midpoint rule."""

    def density(x: float) -> float:
        return math.exp(shape * math.log(rate) + (shape - 1) * math.log(x) - rate * x - math.lgamma(shape))

    def poisson_at_most(x: float) -> float:
        return math.fsum(math.exp(k * math.log(x) - x - math.lgamma(k + 1)) for k in range(count + 1))

    # the substitution x = u² takes away the pole at 0 of a small shape
    steps, top = 20_000, math.sqrt(shape / rate + 15 * math.sqrt(shape) / rate + 5)
    width = top / steps
    points = ((n + 0.5) * width for n in range(steps))
    expected = math.fsum(2 * u * density(u * u) * poisson_at_most(u * u) * width for u in points)
    assert Expectation(shape, rate, 4).at_most(count) == pytest.approx(expected, rel=1e-3)


def test_what_is_usual_forgets_what_is_long_ago():
    usual = Usual({})
    for week in range(40):
        seen, total = usual.learn(10, 100 if week < 10 else 10)
    assert seen == 12
    assert 10 < total / seen < 20


def test_a_window_over_two_hours_expects_a_share_of_each():
    usual = Usual({10: (4, 40), 11: (8, 160)})
    found = usual.expect([(10, 0.25), (11, 0.75)], 4)
    assert found is not None
    assert found.mean == pytest.approx(0.25 * 40.5 / 4 + 0.75 * 160.5 / 8)
    assert found.weeks == 4
    assert usual.expect([(10, 0.25), (11, 0.75)], 5) is None
    assert usual.expect([(12, 1.0)], 1) is None

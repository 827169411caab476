"""Alert rules: each kind is raised once and cleared once, also over a restart, and never by a closed market."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapebus_alerts
import tapebus_schema
from tapebus.errors import ConfigError
from tapebus.events import Registry
from tapebus.testing import PluginBench
from tapebus_alerts.settings import DEFAULTS, load
from tapebus_alerts.usual import Expectation, Usual
from tapebus_trading.sessions import hours

REGISTRY = Registry(tapebus_schema.tapebus_register_event_types({}))


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


#: A Wednesday noon: every market is open.
NOON = at("2026-01-14 12:00")


class Desk:
    """The plugin under a clock of the test's own, with figures of the test's own where a rule asks for them."""

    def __init__(self, *rules: dict[str, Any], now: float = NOON, **shared: Any) -> None:
        self.now = now
        config = {"rules": list(rules)} if rules else {}
        self.bench = PluginBench(tapebus_alerts, REGISTRY, config, name="alerts")
        self.bench.context.shared = shared
        self.bench.restart()
        self.errors, self.handled, self.lag_events, self.lag_ms = 0, 0, 0, 0.0
        self.counts: dict[str, Any] = {"dropped": {}, "dead_letters": {}, "unexplained": 0, "lost": 0}
        self.feed_lost = 0
        self.full = False
        self.wait(1)

    def figures(self) -> dict[str, Any]:
        state = "store full" if self.full else "running"
        row = {"name": "slow", "plugin": "other", "state": "running", "errors": self.errors, "handled": self.handled}
        return {
            "bus": {**self.counts, "dropped": dict(self.counts["dropped"]), "state": state},
            "consumers": [{**row, "lag_events": self.lag_events, "lag_ms": self.lag_ms}],
            "feed": {"lost": self.feed_lost},
            "producers": [],
        }

    def wait(self, seconds: int) -> None:
        """Let the clock go on, with a look each second."""
        for _ in range(seconds):
            self.now += 1.0
            self.look()

    def look(self) -> None:
        self.bench.context.told = self.figures()
        self.bench.tick(self.now)

    def leap(self, seconds: float, step: float = 25.0) -> None:
        """Let the clock go on fast, without a pause so long that it would count as one."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            self.look()

    def event(self, event_type: str, data: dict[str, Any], timestamp: float | None = None, **envelope: Any) -> None:
        made = self.bench.event(event_type, self.now if timestamp is None else timestamp, data, **envelope)
        self.bench.feed([made])

    def quote(self, symbol: str = "EURUSD", timestamp: float | None = None, **envelope: Any) -> None:
        self.event("market_data", {"symbol": symbol, "bid": 1.1, "ask": 1.2}, timestamp, **envelope)

    def heartbeat(self, terminal: str = "T1", equity: float = 1000.0, balance: float = 1000.0) -> None:
        data = {"target_uuid": terminal, "balance": balance, "equity": equity, "open_positions": 0, "positions": []}
        self.event("ea_heartbeat", data)

    def outcome(self, r: float, fired: bool = True, **more: Any) -> None:
        data = {
            "signal_id": "S",
            "symbol": "EURUSD",
            "direction": "BUY",
            "pattern_type": "P",
            "confidence": 85.0,
            "outcome": "WIN" if r > 0 else "LOSS",
            "opened_at": self.now - 60,
            "closed_at": self.now,
            "duration_s": 60.0,
            "quotes_seen": 10,
            "fired": fired,
            "r": r,
            **more,
        }
        self.event("signal_outcome", data)

    def slots(self, used: int, most: int = 10, user: str = "u1", kind: str = "slot_reserved") -> None:
        data: dict[str, Any] = {"fire_id": "F", "symbol": "EURUSD", "direction": "BUY", "user_id": user}
        if kind == "slot_released":
            data |= {"method": "closed", "evidence": []}
        self.event(kind, data | {"slots_used": used, "slots_max": most})

    def signal(self) -> None:
        data = {"signal_id": "S", "symbol": "EURUSD", "direction": "BUY", "confidence": 85.0, "pattern_type": "P"}
        self.event("signal_generated", data)

    def restart(self) -> None:
        self.bench.restart()

    @property
    def told(self) -> list[str]:
        """What was told since it was asked last, as ``state name``."""
        found = [f"{each.data['state']} {each.data['name']}" for each in self.bench.emitted]
        self.bench.emitted.clear()
        return found

    @property
    def last(self) -> dict[str, Any]:
        data: dict[str, Any] = dict(self.bench.emitted[-1].data)
        return data


SILENCE = {"kind": "silence", "name": "quiet", "topic": "market_data", "threshold": 30.0, "session": "fx"}


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


# -- terminals, slots, accounts -----------------------------------------------------------------


def test_a_stale_heartbeat_is_told_for_its_terminal_alone():
    desk = Desk({"kind": "heartbeat", "name": "beat"})
    for second in range(121):
        if second % 30 == 0:
            desk.heartbeat("T1")
            if second < 60:
                desk.heartbeat("T2")
        desk.wait(1)
    assert desk.told == ["raised beat:T2"]
    desk.heartbeat("T2")
    desk.wait(2)
    assert desk.told == ["cleared beat:T2"]


def test_a_terminal_that_is_gone_for_good_is_forgotten():
    desk = Desk({"kind": "heartbeat", "name": "beat", "forget_s": 600.0, "session": "any"})
    desk.heartbeat()
    desk.leap(500)
    assert desk.told == ["raised beat:T1"]
    desk.leap(200)
    assert desk.last["message"].startswith("no longer watched")
    assert desk.told == ["cleared beat:T1"]
    assert not [key for key in desk.bench.context.state if key.startswith("terminal:")]


def test_full_slots_are_told_for_each_user_and_again_only_after_there_was_one_free():
    desk = Desk({"kind": "slots", "name": "full"}, {"kind": "slots", "name": "over", "threshold": 0.0})
    for used in (8, 9, 10, 11, 10, 9):
        desk.slots(used)
        desk.slots(3, user="u2")
        desk.wait(1)
    assert desk.told == ["raised full:u1", "raised over:u1", "cleared over:u1", "cleared full:u1"]


def test_a_user_without_any_slots_has_none_full():
    desk = Desk({"kind": "slots", "name": "full"})
    desk.slots(0, 0)
    desk.wait(3)
    assert desk.told == []


def test_a_drawdown_in_r_is_measured_from_the_highest_point_of_fired_signals():
    desk = Desk({"kind": "drawdown", "name": "r", "measure": "r", "threshold": 3.0, "clear_at": 1.0})
    for r, fired in [(2.0, True), (-5.0, False), (-1.0, True), (-1.0, True), (-1.0, True)]:
        desk.outcome(r, fired)
        desk.wait(1)
    assert desk.told == [], "three below the highest point is not more than three"
    desk.outcome(-0.5)
    desk.wait(1)
    assert desk.last["value"] == 3.5
    assert desk.told == ["raised r"]
    desk.outcome(1.5)
    desk.wait(1)
    assert desk.told == [], "below the threshold, yet not at what clears it"
    desk.outcome(1.2)
    desk.wait(1)
    assert desk.told == ["cleared r"]


def test_losses_that_were_imported_are_no_drawdown_of_today():
    desk = Desk({"kind": "drawdown", "name": "r", "measure": "r", "threshold": 3.0, "fired_only": False})
    for _ in range(9):
        desk.outcome(-1.0, origin="truth_log.jsonl:1")
    desk.wait(1)
    assert desk.told == []


def test_a_drawdown_ends_when_its_losses_leave_the_window():
    desk = Desk({"kind": "drawdown", "name": "r", "measure": "r", "threshold": 3.0, "window_s": 600.0})
    desk.outcome(-4.0)
    desk.wait(1)
    desk.restart()
    desk.wait(1)
    assert desk.told == ["raised r"]
    desk.leap(620)
    assert desk.told == ["cleared r"]
    assert not [key for key in desk.bench.context.state if key.startswith("r:")]


def test_the_same_outcome_delivered_again_after_a_crash_counts_once():
    desk = Desk({"kind": "drawdown", "name": "r", "measure": "r", "threshold": 3.0})
    desk.outcome(-2.0)
    desk.bench.seq -= 1
    desk.restart()
    desk.outcome(-2.0)
    desk.wait(2)
    assert desk.told == []


def test_a_drawdown_in_percent_is_equity_against_the_highest_balance_of_the_window():
    rule = {"kind": "drawdown", "name": "pct", "measure": "percent", "threshold": 10.0, "clear_at": 5.0}
    desk = Desk(rule, {"kind": "slots"})
    desk.heartbeat(balance=1000.0, equity=1000.0)
    desk.event("balance_update", {"account_number": "77", "balance": 500.0, "equity": 400.0})
    desk.wait(1)
    assert desk.last["value"] == pytest.approx(20.0)
    assert desk.told == ["raised pct:77"]
    desk.heartbeat(balance=950.0, equity=880.0)
    desk.wait(1)
    assert desk.told == ["raised pct:T1"]
    desk.restart()
    desk.wait(3)
    assert desk.told == [], "the equity is not known yet"
    desk.heartbeat(balance=950.0, equity=920.0)
    desk.wait(1)
    assert desk.told == []
    desk.heartbeat(balance=950.0, equity=960.0)
    desk.wait(1)
    assert desk.told == ["cleared pct:T1"]


# -- the bus's own figures ----------------------------------------------------------------------


def test_a_consumer_that_stays_behind_is_told_and_a_short_delay_is_not():
    desk = Desk({"kind": "lag", "name": "lag", "threshold": 1000.0, "for_s": 10.0, "clear_at": 100.0})
    for lag_ms in (5000.0, 0.0):
        desk.lag_ms = lag_ms
        desk.wait(5)
    assert desk.told == []
    desk.lag_ms = 5000.0
    desk.wait(11)
    desk.lag_ms = 500.0
    desk.wait(20)
    assert desk.told == ["raised lag:slow"]
    desk.lag_ms = 50.0
    desk.wait(10)
    assert desk.told == ["cleared lag:slow"]


def test_lag_in_events_of_chosen_consumers_only():
    desk = Desk(
        {"kind": "lag", "name": "mine", "measure": "events", "threshold": 5, "for_s": 0, "consumers": ["slow"]},
        {"kind": "lag", "name": "others", "measure": "events", "threshold": 5, "for_s": 0, "consumers": ["quick"]},
    )
    desk.lag_events = 6
    desk.wait(1)
    assert desk.last["unit"] == "events"
    assert desk.told == ["raised mine:slow"]


def test_an_error_rate_needs_enough_events_and_passes_with_its_window():
    desk = Desk({"kind": "error_rate", "name": "errors", "threshold": 10.0, "window_s": 60.0, "at_least": 20})
    desk.errors, desk.handled = 5, 5
    desk.wait(5)
    assert desk.told == [], "10 events say nothing"
    desk.handled = 20
    desk.wait(1)
    assert desk.last["value"] == 20.0
    assert desk.told == ["raised errors:slow"]
    desk.wait(70)
    assert desk.told == ["cleared errors:slow"]


@pytest.mark.parametrize("of", ["dropped", "lost", "feed"])
def test_a_loss_is_told_when_it_grows_and_cleared_when_it_has_not_for_a_window(of):
    desk = Desk({"kind": "loss", "name": "loss", "of": of, "window_s": 60.0})

    def lose(count: int) -> None:
        if of == "dropped":
            desk.counts["dropped"] = {"client.full": count}
        elif of == "feed":
            desk.feed_lost = count
        else:
            desk.counts["lost"] = count

    desk.wait(70)
    lose(3)
    desk.wait(1)
    assert desk.last["value"] == 3.0
    assert ("client.full 3" in desk.last["message"]) is (of == "dropped")
    desk.wait(30)
    lose(5)
    desk.wait(50)
    assert desk.told == ["raised loss"]
    desk.wait(20)
    assert desk.told == ["cleared loss"]
    lose(6)
    desk.wait(1)
    assert desk.told == ["raised loss"]


def test_what_was_lost_before_the_plugin_watched_is_not_told_but_what_was_while_it_was_down_is():
    desk = Desk({"kind": "loss", "name": "loss", "of": "dropped"})
    desk.counts["dropped"] = {"client.full": 100}
    fresh = Desk({"kind": "loss", "name": "loss", "of": "dropped"})
    fresh.wait(5)
    assert fresh.told == []
    desk.told  # noqa: B018 - the loss of before
    desk.wait(400)
    desk.told  # noqa: B018
    desk.counts["dropped"] = {"client.full": 103}
    desk.restart()
    desk.wait(1)
    assert desk.last["value"] == 3.0
    assert desk.told == ["raised loss"]


def test_unexplained_events_are_told_for_as_long_as_the_books_do_not_close():
    desk = Desk({"kind": "loss", "name": "books", "of": "unexplained", "for_s": 3.0})
    desk.counts["unexplained"] = 2
    desk.wait(1)
    desk.counts["unexplained"] = 0
    desk.wait(5)
    assert desk.told == []
    desk.counts["unexplained"] = 2
    desk.wait(600)
    assert desk.told == ["raised books"]
    desk.counts["unexplained"] = 0
    desk.wait(1)
    assert desk.told == ["cleared books"]


def test_dead_letters_are_told_when_they_become_many():
    desk = Desk({"kind": "dead_letters", "name": "dead", "threshold": 5, "window_s": 60.0})
    desk.wait(70)
    desk.counts["dead_letters"] = {"schema": 4}
    desk.errors = 1
    desk.wait(5)
    assert desk.told == []
    desk.errors = 3
    desk.wait(1)
    assert desk.last["value"] == 7.0
    assert "schema 4" in desk.last["message"]
    assert "slow failed 3" in desk.last["message"]
    desk.wait(80)
    assert desk.told == ["raised dead", "cleared dead"]


def test_a_full_store_is_a_state():
    desk = Desk({"kind": "store_full", "name": "full", "repeat_s": 60.0})
    desk.full = True
    desk.wait(150)
    assert [each.data.get("reminder", False) for each in desk.bench.emitted] == [False, True, True]
    desk.full = False
    desk.wait(2)
    assert desk.told == ["raised full", "raised full", "raised full", "cleared full"]


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
    import math

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


# -- once, over restarts ------------------------------------------------------------------------


def test_a_raised_alert_is_not_raised_again_after_a_restart_and_cleared_when_it_is_over():
    desk = Desk(SILENCE, {"kind": "slots", "name": "full"}, {"kind": "heartbeat", "name": "beat"})
    desk.quote()
    desk.heartbeat()
    desk.slots(10)
    desk.wait(70)
    assert sorted(desk.told) == ["raised beat:T1", "raised full:u1", "raised quiet"]
    for _ in range(3):
        desk.restart()
        desk.now += 5
        desk.wait(80)
    assert desk.told == []
    desk.restart()
    for _ in range(10):
        desk.quote()
        desk.wait(1)
    desk.heartbeat()
    desk.slots(9, kind="slot_released")
    desk.wait(2)
    assert sorted(desk.told) == ["cleared beat:T1", "cleared full:u1", "cleared quiet"]
    assert not [key for key in desk.bench.context.state if key.startswith("raised:")]


def test_failing_on_after_a_restart_is_the_same_alert():
    desk = Desk({"kind": "error_rate", "name": "errors", "threshold": 10.0, "window_s": 60.0, "at_least": 20})
    desk.errors, desk.handled = 10, 10
    desk.wait(1)
    assert desk.told == ["raised errors:slow"]
    desk.errors = desk.handled = 0
    desk.restart()
    for _ in range(50):
        desk.errors += 1
        desk.wait(1)
    assert desk.told == []


def test_an_alert_whose_rule_is_gone_is_cleared_after_the_restart():
    desk = Desk({"kind": "store_full", "name": "full"})
    desk.full = True
    desk.wait(2)
    desk.bench.context.config = {"rules": [{"kind": "store_full", "name": "renamed", "for_s": 99.0}]}
    desk.restart()
    desk.wait(2)
    assert desk.told == ["raised full", "cleared full"]


@given(
    st.lists(st.tuples(st.sampled_from(["bad", "good", "unknown", "restart", "pause"]), st.integers(1, 8)), max_size=40)
)
def test_whatever_happens_each_name_is_raised_and_cleared_in_turn(steps):
    desk = Desk(
        {"kind": "lag", "name": "lag", "threshold": 100.0, "clear_at": 50.0, "for_s": 2.0, "clear_for_s": 3.0},
        {"kind": "slots", "name": "full", "for_s": 1.0},
        SILENCE | {"threshold": 4.0, "clear_for_s": 2.0},
        {"kind": "loss", "name": "loss", "of": "dropped", "window_s": 60.0},
    )
    for what, seconds in steps:
        if what == "restart":
            desk.restart()
        elif what == "pause":
            desk.now += 100
        elif what != "unknown":
            bad = what == "bad"
            desk.lag_ms = 200.0 if bad else 20.0
            desk.slots(10 if bad else 5)
            if bad:
                desk.counts["dropped"] = {"client.full": desk.counts["dropped"].get("client.full", 0) + 1}
            else:
                desk.quote()
        desk.wait(seconds)
    turns: dict[str, list[str]] = {}
    for each in desk.bench.emitted:
        turns.setdefault(each.data["name"], []).append(each.data["state"])
    for name, states in turns.items():
        assert states == ["raised", "cleared"] * (len(states) // 2) + ["raised"] * (len(states) % 2), name
    still = {name for name, states in turns.items() if len(states) % 2}
    kept = {key.removeprefix("raised:") for key in desk.bench.context.state if key.startswith("raised:")}
    assert kept == still, "what is kept is what is raised"


# -- configuration ------------------------------------------------------------------------------


def mistakes() -> Iterator[Any]:
    def rule(**keys: Any) -> dict[str, Any]:
        return {"rules": [keys]}

    yield pytest.param({"ruls": []}, "ruls: unknown key; did you mean 'rules'", id="a key of the table")
    yield pytest.param(rule(kind="silense"), "did you mean 'silence'", id="a kind")
    yield pytest.param(rule(), "no such kind of rule", id="no kind")
    yield pytest.param(rule(kind="lag", threshole=1), "did you mean 'threshold'", id="a key of a rule")
    yield pytest.param(rule(kind="lag", topic="x"), "topic: unknown key", id="a key of another kind")
    yield pytest.param(rule(kind="silence"), "topic", id="what is required")
    yield pytest.param(rule(kind="silence", topic="a*b"), "matches nothing", id="a topic")
    yield pytest.param(rule(kind="silence", topic="x", threshold=0), "threshold", id="a threshold")
    yield pytest.param(rule(kind="silence", topic="x", session="fax"), "session", id="a session")
    yield pytest.param(rule(kind="silence", topic="x", session="symbol"), "needs symbols", id="hours of no symbol")
    yield pytest.param(rule(kind="silence", topic="x", symbols=["A"], sources=["b"]), "another rule", id="both")
    yield pytest.param(rule(kind="loss", of="money"), "of", id="a kind of loss")
    yield pytest.param(rule(kind="lag", clear_at=1e9), "bad side", id="clear_at above")
    yield pytest.param(rule(kind="slots", clear_at=0.0), "bad side", id="clear_at below, where little is bad")
    yield pytest.param(rule(kind="lag", name="a:b"), "colon", id="a colon")
    yield pytest.param(rule(kind="lag", severity="bad"), "severity", id="a severity")
    yield pytest.param({"rules": [{"kind": "lag"}, {"kind": "lag"}]}, "two are called 'lag_ms'", id="the same name")
    yield pytest.param({"rules": {"kind": "lag"}}, r"\[\[plugins.alerts.rules\]\]", id="one table")
    yield pytest.param({"tick_s": 0}, "tick_s", id="no tick")


@pytest.mark.parametrize(("table", "words"), list(mistakes()))
def test_a_mistake_in_the_configuration_is_named(table, words):
    with pytest.raises(ConfigError, match=words):
        load(table)


def test_without_rules_the_built_in_ones_hold_and_beside_own_ones_where_asked_for():
    assert load({}).rules == list(DEFAULTS)
    assert load({"defaults": False}).rules == []
    own = {"kind": "lag", "name": "lag", "threshold": 5.0}
    assert [each.name for each in load({"rules": [own]}).rules] == ["lag"]
    both = load({"rules": [own], "defaults": True}).rules
    assert len(both) == len(DEFAULTS)
    assert next(each for each in both if each.name == "lag").threshold == 5.0


def test_the_built_in_rules_are_ones_that_could_be_written_down():
    import msgspec

    written = [msgspec.to_builtins(each) for each in DEFAULTS]
    plain = [{key: value for key, value in each.items() if value is not None} for each in written]
    assert load({"rules": plain}).rules == list(DEFAULTS)


@pytest.mark.parametrize("page", ["docs/operations.md", "plugins/tapebus_alerts/README.md"])
def test_the_rules_written_down_in_the_documents_are_accepted(page):
    text = (Path(__file__).parents[1] / page).read_text()
    tables = [tomllib.loads(each) for each in re.findall(r"```toml\n(.*?)```", text, re.DOTALL)]
    found = [each["plugins"]["alerts"] for each in tables if "alerts" in each.get("plugins", {})]
    [table] = found
    assert len(load(table).rules) > len(table["rules"]) > 1
    for each in tables:
        hours(each.get("shared", {}))


def test_the_built_in_rules_say_nothing_on_a_quiet_bus():
    desk = Desk()
    desk.leap(4 * 3600)
    assert desk.told == []


def test_an_alert_about_a_long_name_stays_within_what_an_alert_may_be_called():
    desk = Desk({"kind": "slots", "name": "full"})
    desk.slots(10, user="u" * 200)
    desk.slots(10, user="u" * 199 + "v")
    desk.wait(1)
    names = {each.data["name"] for each in desk.bench.emitted}
    assert len(names) == 2
    assert all(len(name) <= 300 for name in names)

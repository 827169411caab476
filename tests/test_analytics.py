"""What the analytics plugin learns from events, tells of it, and keeps over restarts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tapebus_analytics
import tapebus_schema
from tapebus import Publisher, Tape
from tapebus.errors import ConfigError
from tapebus.events import Registry, to_dict
from tapebus.testing import PluginBench
from tapebus_trading.calibration import Curve, fit, score

REGISTRY = Registry(tapebus_schema.tapebus_register_event_types(config={}))
HOUR = 3600.0


class Desk:
    """Feeds signals and outcomes to the plugin; one signal an hour unless told otherwise."""

    def __init__(self, **config: Any) -> None:
        self.bench = PluginBench(tapebus_analytics, REGISTRY, config, name="analytics")
        self.now = 1_700_000_000.0
        self.count = 0

    def signal(self, pattern: str = "SWEEP", *, symbol: str = "EURUSD", confidence: float = 80.0) -> dict[str, Any]:
        self.count += 1
        data = {"signal_id": f"S{self.count}", "symbol": symbol, "direction": "BUY", "pattern_type": pattern}
        data |= {"confidence": confidence}
        self.bench.feed([self.bench.event("signal_generated", self.now, data)])
        return data | {"opened_at": self.now}

    def end(self, signal: dict[str, Any], outcome: str, reward_risk: float | None = 1.5, **more: Any) -> None:
        opened = signal["opened_at"]
        data = signal | {"outcome": outcome, "closed_at": self.now, "duration_s": self.now - opened}
        data |= {"quotes_seen": 9, "fired": False, **more}
        if reward_risk is not None:
            data["risk_reward"] = reward_risk
        self.bench.feed([self.bench.event("signal_outcome", self.now, data)])

    def trade(self, outcome: str, pattern: str = "SWEEP", reward_risk: float | None = 1.5, **more: Any) -> None:
        self.now += HOUR
        self.end(self.signal(pattern, **more), outcome, reward_risk)

    def trades(self, results: str, **more: Any) -> None:
        """One trade a letter: W or L."""
        for letter in results:
            self.trade({"W": "WIN", "L": "LOSS"}[letter], **more)

    def user(self, action: str, pattern: str = "SWEEP", user: str = "7") -> None:
        self.now += 1
        data = {"action": action, "user_id": user, "details": {"pattern_type": pattern}}
        self.bench.feed([self.bench.event("user_action", self.now, data)])

    def told(self, event_type: str = "pattern_status") -> list[dict[str, Any]]:
        return [each.data for each in self.bench.emitted if each.event_type == event_type]

    def statuses(self) -> list[str]:
        return [f"{each['pattern_type']} {each['status']} {each['by']}" for each in self.told()]

    @property
    def metrics(self) -> dict[str, Any]:
        return tapebus_analytics.tapebus_metrics(context=self.bench.context)


# -- patterns ---------------------------------------------------------------------------------------


def test_none_of_two_is_a_recommendation_and_never_a_disable() -> None:
    desk = Desk()
    desk.trades("LL", pattern="FAIR_VALUE_GAP_FILL")
    (told,) = desk.told()
    assert told["status"] == "watch"
    assert told["reason"].startswith("Monitor FAIR_VALUE_GAP_FILL for potential disable")
    assert (told["n"], told["wins"], told["win_rate"], told["low"]) == (2, 0, 0.0, 0.0)
    assert told["high"] == pytest.approx(0.658, abs=5e-4)


def test_nineteen_losses_do_not_disable_and_the_twentieth_does() -> None:
    desk = Desk()
    desk.trades("L" * 19)
    assert desk.statuses() == ["SWEEP watch rule"]
    desk.trades("L")
    assert desk.statuses() == ["SWEEP watch rule", "SWEEP disabled rule"]
    told = desk.told()[-1]
    assert told["since"] == desk.now
    assert told["e_value"] > 20
    assert told["p_value"] == pytest.approx(0.6**20)
    assert told["breakeven"] == pytest.approx(0.4)
    assert "disabled: 0 of 20 won" in told["reason"]


def test_a_status_is_told_on_change_only() -> None:
    desk = Desk()
    desk.trades("LLLLWWWWWWW")
    assert desk.statuses() == ["SWEEP watch rule", "SWEEP active rule"]


def test_a_disabled_pattern_is_followed_in_the_shadow_and_comes_back_after_the_cooldown() -> None:
    desk = Desk(cooldown_s=30 * HOUR)
    desk.trades("L" * 20)
    desk.trades("W" * 29)
    assert desk.statuses()[-1] == "SWEEP disabled rule"
    desk.trades("W" * 2)
    assert desk.statuses()[-1] == "SWEEP active rule"
    # its trial begins anew: the old losses are no evidence any more
    desk.trades("L" * 18)
    assert desk.statuses()[-2:] == ["SWEEP active rule", "SWEEP watch rule"]


def test_the_literal_rule_and_no_automatic_disabling_are_options() -> None:
    literal = Desk(rule="literal")
    literal.trades("WL" * 7 + "L" * 6)
    assert literal.statuses()[-1] == "SWEEP disabled rule"
    recommending = Desk(auto_disable=False)
    recommending.trades("L" * 40)
    assert recommending.statuses() == ["SWEEP watch rule"]


def test_time_outs_and_the_like_are_no_evidence() -> None:
    desk = Desk()
    for outcome in ("TIMEOUT", "CANCELLED", "UNKNOWN", "BREAKEVEN") * 10:
        desk.trade(outcome)
    assert desk.told() == []
    assert desk.metrics["decided"] == 0


def test_imported_outcomes_count_only_where_configured() -> None:
    for learn_from, status in (("live", []), ("all", ["SWEEP watch rule", "SWEEP disabled rule"])):
        desk = Desk(learn_from=learn_from)
        for _ in range(20):
            desk.now += HOUR
            desk.end(desk.signal(), "LOSS", origin="log.jsonl:1")
        assert desk.statuses() == status


# -- users ------------------------------------------------------------------------------------------


def test_a_user_outranks_the_rule_until_the_word_is_taken_back() -> None:
    desk = Desk()
    desk.user("pattern_on")
    desk.trades("L" * 30)
    assert desk.statuses() == ["SWEEP active user:7"]
    desk.user("pattern_auto")
    assert desk.statuses()[-1] == "SWEEP disabled rule"
    desk.user("pattern_on", user="8")
    assert desk.statuses()[-1] == "SWEEP active user:8"
    assert "the rule says disabled" in desk.told()[-1]["reason"]


def test_a_user_may_turn_off_a_pattern_that_wins_or_that_nobody_has_seen() -> None:
    desk = Desk()
    desk.trades("W" * 5)
    desk.user("pattern_off")
    desk.user("pattern_off")
    desk.user("pattern_off", "NEVER_SEEN")
    assert desk.statuses() == ["SWEEP disabled user:7", "NEVER_SEEN disabled user:7"]
    desk.user("pattern_on")
    assert desk.statuses()[-1] == "SWEEP active user:7"


def test_a_pattern_a_user_turns_off_is_named_however_many_names_a_producer_has_made_up() -> None:
    desk = Desk()
    for number in range(tapebus_analytics.engine.MOST_PATTERNS + 1):
        desk.trade("WIN", f"P{number}")
    desk.user("pattern_off", "ONE_MORE")
    assert desk.statuses() == ["ONE_MORE disabled user:7"]
    desk.bench.restart()
    desk.trade("WIN", "ONE_MORE")
    assert tapebus_analytics.tapebus_health(context=desk.bench.context)["message"].count("ONE_MORE") == 1


def test_other_actions_and_actions_without_a_pattern_change_nothing() -> None:
    desk = Desk()
    desk.user("kill_switch_on")
    desk.bench.feed([desk.bench.event("user_action", desk.now, {"action": "pattern_off", "user_id": "7"})])
    assert desk.told() == []
    assert desk.metrics["patterns"] == 0


# -- clusters ---------------------------------------------------------------------------------------


def test_repeats_within_half_an_hour_are_counted_once_by_the_first_opened() -> None:
    desk = Desk()
    first = desk.signal()
    desk.now += 1700
    second = desk.signal()
    desk.now += 1700  # within half an hour of the second, not of the first
    third = desk.signal()
    other = desk.signal(symbol="GBPUSD")
    for signal in (third, second, other, first):  # the first opened ends last
        desk.end(signal, "LOSS")
    assert (desk.metrics["decided"], desk.metrics["repeats"]) == (2, 2)
    desk.now += 1801
    desk.end(desk.signal(), "LOSS")
    assert desk.metrics["decided"] == 3


@pytest.mark.parametrize(("after_s", "repeats"), [(1800.0, 1), (1800.5, 0)])
def test_a_signal_exactly_half_an_hour_after_is_still_a_repeat(after_s: float, repeats: int) -> None:
    desk = Desk()
    desk.trade("WIN")
    desk.now += after_s - HOUR
    desk.trade("WIN")
    assert desk.metrics["repeats"] == repeats


def test_repeats_are_counted_where_clusters_are_off() -> None:
    desk = Desk(cluster_s=0)
    for signal in [desk.signal() for _ in range(20)]:
        desk.end(signal, "LOSS")
    assert desk.statuses()[-1] == "SWEEP disabled rule"


def test_outcomes_whose_signals_were_never_seen_are_placed_by_their_opening() -> None:
    desk = Desk()
    opened = {"symbol": "EURUSD", "direction": "BUY", "pattern_type": "P", "confidence": 80.0}
    for i, at in enumerate((0, 60, 1900, 3601, 9000)):
        desk.end(opened | {"signal_id": f"X{i}", "opened_at": desk.now - 10_000 + at}, "WIN")
    assert (desk.metrics["decided"], desk.metrics["repeats"]) == (3, 2)


def test_what_is_remembered_of_signals_is_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tapebus_analytics.clusters.MOST_OPEN", 5)
    monkeypatch.setattr("tapebus_analytics.clusters.MOST_CLUSTERS", 3)
    desk = Desk()
    for symbol in "ABCDEFGHIJ":
        desk.now += 60
        desk.signal(symbol=symbol)
    keys = set(desk.bench.context.state)
    assert {key for key in keys if key[0] == "s"} == {f"s:S{n}" for n in range(6, 11)}
    kinds = {key for key in keys if key[0] == "k"}
    assert "k:J SWEEP BUY" in kinds and len(kinds) <= 3
    desk.bench.restart()
    desk.signal(symbol="J")
    assert len({key for key in desk.bench.context.state if key[0] == "s"}) == 5


# -- calibration ------------------------------------------------------------------------------------


def test_confidence_is_fitted_anew_every_so_many_trades_on_what_is_past() -> None:
    desk, chance = Desk(calibrate_from=50, refit_every=100), random.Random(3)
    counts: dict[float, tuple[int, int]] = {}
    expected = []
    for i in range(1, 260):
        confidence, win = chance.randint(700, 900) / 10, chance.random() < 0.4
        wins, n = counts.get(confidence, (0, 0))
        counts[confidence] = (wins + win, n + 1)
        desk.trade("WIN" if win else "LOSS", confidence=confidence)
        if i in (100, 200):
            expected.append((fit(counts), score(counts), desk.now))
    versions = desk.told("calibration")
    assert [(each["version"], each["n"], each["method"]) for each in versions] == [
        (1, 100, "shrinkage"),
        (2, 200, "platt"),
    ]
    for told, (curve, judged, at) in zip(versions, expected, strict=True):
        assert judged is not None
        assert told["fitted_to"] == at
        assert (told["brier"], told["skill"], told["ece"]) == pytest.approx((judged.brier, judged.skill, judged.ece))
        published = Curve(told["knots"])
        for confidence in (65, 70, 77.7, 85.2, 95):
            assert published.apply(confidence) == pytest.approx(curve.apply(confidence), abs=1e-3)


def test_every_event_it_emits_is_valid() -> None:
    desk = Desk(cooldown_s=0)
    desk.trades("W" * 30 + "L" * 200 + "W" * 90)
    desk.user("pattern_off", "NEVER_SEEN")
    kinds = {each.event_type for each in desk.bench.emitted}
    assert kinds == {"pattern_status", "calibration"}
    for each in desk.bench.emitted:
        event = desk.bench.event(each.event_type, each.timestamp, each.data)
        check = next(
            t.check for t in tapebus_schema.tapebus_register_event_types(config={}) if t.name == each.event_type
        )
        assert check is None or check(event) is None


# -- restarts ---------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sets(st.integers(0, 119), max_size=4))
def test_a_restart_between_any_two_events_changes_nothing(seed: int, restarts: set[int]) -> None:
    runs = []
    for stops in (set(), restarts):
        desk, chance = Desk(calibrate_from=20, refit_every=20, cooldown_s=10 * HOUR, min_signals=8), random.Random(seed)
        waiting: list[dict[str, Any]] = []
        for i in range(120):
            desk.now += chance.choice([60, 900, 3000])
            what = chance.random()
            if what < 0.5:
                waiting.append(desk.signal(chance.choice("AB"), confidence=chance.randint(600, 990) / 10))
            elif what < 0.97 and waiting:
                signal = waiting.pop(chance.randrange(len(waiting)))
                desk.end(signal, chance.choice(["WIN", "LOSS", "LOSS", "LOSS", "TIMEOUT"]))
            else:
                desk.user(chance.choice(["pattern_on", "pattern_off", "pattern_auto"]), chance.choice("AB"))
            if i in stops:
                desk.bench.restart()
        runs.append((desk.bench.emitted, desk.metrics, dict(desk.bench.context.state)))
    assert runs[0] == runs[1]


def test_state_is_written_by_changed_keys_only() -> None:
    desk = Desk()
    desk.trades("WLWLL" * 4, pattern="A")
    state = desk.bench.context.state
    before = dict(state)
    desk.trades("W", pattern="B", confidence=91.0)
    changed = {key for key in state if before.get(key) != state[key]}
    assert changed == {"p:B", "n:910", "f", "k:EURUSD B BUY"}


# -- configuration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("rule", "gut"), ("alpha", 0), ("alpha", 1), ("min_signals", 0), ("cluster_s", -1), ("minimum", 20)],
)
def test_a_wrong_key_or_value_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        Desk(**{key: value})
    with pytest.raises(ConfigError, match=r"plugins\.analytics\.min_signal: unknown key; did you mean 'min_signals'\?"):
        Desk(min_signal=4)


# -- a real bus -------------------------------------------------------------------------------------


def test_a_killed_bus_tells_every_status_once(make_bus: Callable[..., Any]) -> None:
    """Outcomes before, during and after a kill -9; what is on the tape is what one undisturbed run tells."""
    chance, feed = random.Random(11), []
    for n in range(900):
        opened = 1_700_000_000.0 + 2 * HOUR * n
        signal = {"signal_id": f"S{n}", "symbol": "EURUSD", "direction": "BUY", "pattern_type": chance.choice("ABC")}
        signal["confidence"] = chance.randint(700, 900) / 10
        end = {"outcome": "WIN" if chance.random() < 0.25 else "LOSS", "opened_at": opened, "closed_at": opened + HOUR}
        end |= {"duration_s": HOUR, "quotes_seen": 3, "fired": False, "risk_reward": 1.5}
        feed += [("signal_generated", opened, signal), ("signal_outcome", opened + HOUR, signal | end)]
    undisturbed = PluginBench(tapebus_analytics, REGISTRY, {}, name="analytics")
    undisturbed.feed([undisturbed.event(*each) for each in feed])
    expected = [(each.event_type, each.timestamp, each.data) for each in undisturbed.emitted]
    assert {each[0] for each in expected} == {"pattern_status", "calibration"}

    bus = make_bus(["schema", "store", "analytics"]).start()
    with Publisher("desk", endpoint=bus.acked) as publisher:
        for kind, at, data in feed[:800]:
            publisher.publish(kind, data, timestamp=at)
        bus.wait_for(lambda stats: stats["bus"]["last_seq"] > 400, "to have a part of it")
        bus.kill()
        for kind, at, data in feed[800:]:
            publisher.publish(kind, data, timestamp=at)
        bus.start()
        assert publisher.flush(30)
    bus.wait_for(
        lambda stats: all(each["lag_events"] == 0 for each in stats["consumers"]) and stats["bus"]["last_seq"] >= 1800,
        "to have handled all of it",
    )
    assert bus.stop() == 0
    with Tape.open(bus.data_dir) as tape:
        told = [
            (each.event_type, each.timestamp, to_dict(each)["data"])
            for each in tape.read(topics=["pattern_status", "calibration"])
        ]
        assert sum(1 for _ in tape.read(topics=["signal_outcome"])) == 900
    found, wanted = (msgspec.json.decode(msgspec.json.encode(each)) for each in (told, expected))
    assert found == wanted

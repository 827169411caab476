"""The table of alerts: mistakes are named, and what is written down in the documents holds."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from alerts_support import Desk
from tapebus.errors import ConfigError
from tapebus_alerts.settings import DEFAULTS, load
from tapebus_trading.sessions import hours

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

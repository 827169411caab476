"""The registry of symbols: built-in facts, what the configuration says over them, and what a broker says over all."""

from __future__ import annotations

from decimal import Decimal
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapebus.errors import ConfigError
from tapebus_trading.money import ceil_to_step, exact, floor_to_step
from tapebus_trading.symbols import Registry

#: name, digits, point, pip, contract, least, step, most, quote: the table of typical retail values.
DEFAULTS = [
    ("EURUSD", 5, "0.00001", "0.0001", "100000", "0.01", "0.01", "100", "USD"),
    ("USDJPY", 3, "0.001", "0.01", "100000", "0.01", "0.01", "100", "JPY"),
    ("GBPJPY", 3, "0.001", "0.01", "100000", "0.01", "0.01", "100", "JPY"),
    ("USDCNH", 5, "0.00001", "0.0001", "100000", "0.01", "0.01", "100", "CNH"),
    ("XAUUSD", 2, "0.01", "0.1", "100", "0.01", "0.01", "50", "USD"),
    ("XAGUSD", 3, "0.001", "0.01", "5000", "0.01", "0.01", "50", "USD"),
    ("US30", 1, "0.1", "1", "1", "0.1", "0.1", "100", "USD"),
    ("GER40", 1, "0.1", "1", "1", "0.1", "0.1", "100", "EUR"),
    ("BTCUSD", 2, "0.01", "1", "1", "0.01", "0.01", "10", "USD"),
]
#: The value of one pip of one lot in quote currency.
PIP_VALUES = {"EURUSD": 10, "USDJPY": 1000, "USDCNH": 10, "XAUUSD": 10, "XAGUSD": 50, "US30": 1, "BTCUSD": 1}


@pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: row[0])
def test_a_symbol_nobody_described_has_typical_retail_values(row):
    symbol = Registry()[row[0]]
    found = (symbol.digits, symbol.point, symbol.pip, symbol.contract)
    assert found == (row[1], *(Decimal(each) for each in row[2:5]))
    assert (symbol.volume_min, symbol.volume_step, symbol.volume_max) == tuple(Decimal(each) for each in row[5:8])
    assert symbol.quote == row[8] and symbol.tick == symbol.point


@pytest.mark.parametrize("name", PIP_VALUES)
def test_one_pip_of_one_lot_is_worth_what_the_table_says(name):
    assert Registry()[name].pip_value == PIP_VALUES[name]


def test_gold_has_one_pip_size_and_it_is_the_configured_one():
    assert Registry()["XAUUSD"].pip == Decimal("0.1")
    assert Registry({"symbols": {"XAUUSD": {"pip": 0.01}}})["XAUUSD"].pip == Decimal("0.01")


@pytest.mark.parametrize("name", ["EURUSD.r", "EURUSDm", "eurusd", "XAUUSD.raw"])
def test_the_suffix_of_a_broker_changes_no_fact(name):
    assert Registry()[name].contract == Registry()[name[:6].upper()].contract


def test_nobody_may_trade_a_symbol_of_which_nothing_is_known_but_it_can_be_shown():
    assert Registry().get("SPICE") is None
    assert Registry()["SPICE"].digits == 5


def test_the_plugin_wins_over_the_broker_and_the_broker_over_what_is_common():
    shared = {
        "symbols": {"XAGUSD": {"contract": 2000, "pip": 0.1}},
        "brokers": {"north": {"accounts": ["N-1"], "symbols": {"XAGUSD": {"contract": 1000}}}},
    }
    registry = Registry(shared, {"XAGUSD": {"volume_step": 0.5}})
    assert registry["XAGUSD"].contract == 2000
    north = registry.get("XAGUSD", registry.broker_of(None, "N-1"))
    assert north is not None and (north.contract, north.pip, north.volume_step) == (
        1000,
        Decimal("0.1"),
        Decimal("0.5"),
    )


def test_what_a_broker_sends_wins_over_every_table_and_for_that_broker_only():
    shared = {"brokers": {"north": {"accounts": ["N-1"]}, "south": {"accounts": ["S-1"]}}}
    registry = Registry(shared, {"XAUUSD": {"contract": 10}})
    assert registry.get("XAUUSD", "north").contract == 10
    sent = SimpleNamespace(symbol="XAUUSD", target_uuid="N-1", contract_size=100.0, digits=3, stops_level=50.0)
    registry.specify(sent)
    north = registry.get("XAUUSD", "north")
    assert (north.contract, north.digits, north.tick) == (100, 3, Decimal("0.001"))
    assert north.stops_level == Decimal("0.05")  # points become a price difference
    assert registry.get("XAUUSD", "south").contract == 10


def test_what_brokers_have_sent_is_known_again_after_a_restart():
    registry = Registry({"brokers": {"north": {"accounts": ["N-1"]}}})
    registry.specify(
        {"symbol": "US30", "account_number": "N-1", "contract_size": 5, "volume_step": 0.1, "quote": "USD"}
    )
    again = Registry({"brokers": {"north": {"accounts": ["N-1"]}}})
    again.restore(registry.specifications())
    assert again.get("US30", "north") == registry.get("US30", "north") != registry.get("US30")


def test_a_symbol_that_only_the_broker_knows_can_be_traded_once_it_told_enough():
    registry = Registry()
    registry.specify({"symbol": "COFFEE", "digits": 2, "quote": "USD", "volume_min": 1})
    assert registry.get("COFFEE") is None
    registry.specify({"symbol": "COFFEE", "contract_size": 50, "volume_step": 1, "volume_max": 20})
    coffee = registry.get("COFFEE")
    assert coffee is not None and (coffee.tick, coffee.contract) == (Decimal("0.01"), 50)


@pytest.mark.parametrize(
    ("shared", "own", "message"),
    [
        ({"symbols": {"XAUUSD": {"pipp": 1}}}, {}, "shared.symbols.XAUUSD.pipp: unknown key; did you mean 'pip'?"),
        ({"symbols": {"XAUUSD": {"pip": 0}}}, {}, "shared.symbols.XAUUSD.pip = 0: must be a number above 0"),
        ({"symbols": {"XAUUSD": {"pip": "x"}}}, {}, "shared.symbols.XAUUSD.pip = 'x': must be a number above 0"),
        ({"symbols": {"XAUUSD": 3}}, {}, "shared.symbols.XAUUSD = 3: must be a table"),
        ({"brokers": {"b": {"account": []}}}, {}, "shared.brokers.b.account: unknown key; did you mean 'accounts'?"),
        ({"symbols": {"SPICE": {"digits": 2}}}, {}, "shared.symbols.SPICE: nothing is built in for this symbol"),
        ({}, {"EURUSD": {"digits": 1.5}}, "plugins.p.symbols.EURUSD.digits = 1.5"),
    ],
)
def test_a_wrong_table_is_refused_with_the_key_and_what_is_valid(shared, own, message):
    with pytest.raises(ConfigError) as caught:
        Registry(shared, own, "plugins.p.symbols")
    assert message in str(caught.value)


def test_every_hundredth_up_to_ten_is_a_multiple_of_its_step():
    for hundredths in range(1, 1001):
        value = exact(hundredths / 100)
        assert floor_to_step(value, Decimal("0.01")) == ceil_to_step(value, Decimal("0.01")) == value


@given(st.decimals("0", "100000", places=6), st.decimals("0.0001", "10", places=4))
def test_a_rounded_figure_is_a_multiple_of_the_step_within_one_step(value, step):
    down, up = floor_to_step(value, step), ceil_to_step(value, step)
    assert down % step == 0 == up % step
    assert down <= value <= up and value - down < step and up - value < step

"""What a trade may risk where there are several accounts, terminals or brokers, or where figures come late."""

from __future__ import annotations

from decimal import Decimal

import pytest

import tapebus_slots
from gate_support import KNOWN, T0, decide, known
from slots_support import UUID, Terminal, position
from tapebus_slots.sizing import Quote
from tapebus_slots.view import SlotView
from tapebus_trading.symbols import Registry


def beat(terminal, uuid=UUID, balance=10_000.0, equity=None, count=0, **envelope):
    data = {"target_uuid": uuid, "balance": balance, "equity": balance if equity is None else equity}
    terminal.send("ea_heartbeat", {**data, "open_positions": count, "positions": []}, **envelope)


def judged(terminal, symbol="EURUSD", price=1.17, stop=0.0015, **more):
    """The verdicts on one more signal, by user."""
    terminal.now += 0.1
    quote = {"symbol": symbol, "bid": price, "ask": price}
    data = {"signal_id": f"S{terminal.now}", "symbol": symbol, "direction": "BUY", "confidence": 85.0, **more}
    data |= {"pattern_type": "BB_SCALP", "sl": round(price - stop, 5), "tp": round(price + stop, 5)}
    before = len(terminal.emitted("gate_verdict"))
    make = terminal.bench.event
    terminal.bench.feed([make("market_data", terminal.now, quote), make("signal_generated", terminal.now, data)])
    return {each["user_id"]: each for each in terminal.emitted("gate_verdict")[before:]}


def test_positions_the_broker_counts_and_does_not_list_use_the_total_risk():
    terminal = Terminal(auto_fire=True)
    terminal.heartbeat([position(1)], count=2)
    (verdict,) = judged(terminal).values()
    assert (verdict["fire"], verdict["slots_used"]) == (False, 2)
    assert {"total_risk_exceeded", "currency_risk_exceeded"} <= set(verdict["reasons"])


def test_each_position_nobody_described_counts_as_one_full_trade_in_both_currencies():
    found = decide(slots=SlotView(used=1, maximum=10))
    assert found.plan.limits.open_risk == Decimal(500)
    assert set(found.plan.limits.currencies.values()) == {Decimal(500)}


def test_of_two_accounts_the_one_with_the_least_equity_is_what_risk_is_a_share_of():
    terminal = Terminal(auto_fire=True, accounts={"A": "default", "B": "default"})
    beat(terminal, "A", balance=1000.0)
    beat(terminal, "B", balance=2000.0, equity=100.0)
    assert 0 < judged(terminal)["default"]["risk"] <= 5.0


def test_figures_that_come_late_do_not_replace_newer_ones():
    terminal = Terminal(auto_fire=True)
    beat(terminal, balance=10_000.0)
    first = terminal.now
    terminal.now += 30
    beat(terminal, balance=1000.0)
    newest, terminal.now = terminal.now, first
    beat(terminal, balance=9000.0)
    terminal.now = newest
    assert 0 < judged(terminal)["default"]["risk"] <= 50.0


def test_figures_of_a_clock_that_was_ahead_do_not_mute_those_after_it():
    terminal = Terminal(auto_fire=True)
    terminal.now += 3600
    beat(terminal, balance=10_000.0)
    terminal.now -= 3590
    terminal.send("market_data", {"symbol": "EURUSD", "bid": 1.17, "ask": 1.17})
    beat(terminal, balance=1000.0)
    assert 0 < judged(terminal)["default"]["risk"] <= 50.0


def test_an_order_is_never_larger_than_the_bus_carries():
    terminal = Terminal(auto_fire=True)
    terminal.send("symbol_specification", {"symbol": "EURUSD", "target_uuid": UUID, "volume_max": 1e12})
    beat(terminal, balance=1e15)
    verdict = judged(terminal)["default"]
    assert (verdict["fire"], verdict["lots"]) == (True, 1e6)


@pytest.mark.parametrize(("buy", "tp"), [(True, 100.2), (False, 99.8)])
def test_a_target_that_rounding_moves_to_the_entry_or_beyond_is_refused(buy, tp):
    coarse = known(own={"EURUSD": {"digits": 2, "tick": "0.25", "contract": 1}})
    levels = {"direction": "BUY" if buy else "SELL", "sl": 99.0 if buy else 101.0, "tp": tp, "entry": 100.0}
    found = decide(quotes={"EURUSD": Quote(100.0, 100.0, T0)}, known=coarse, **levels)
    assert found.reasons == ("tp_inside_spread",)
    assert decide(known=KNOWN).fire


def table_of(terminal, user):
    return tapebus_slots._engines[id(terminal.bench.context)].tables[user]


def two_users(terminal):
    engine = tapebus_slots._engines[id(terminal.bench.context)]
    return {user: table.used for user, table in engine.tables.items()}


def test_fires_of_two_users_that_share_an_id_hold_a_slot_each_and_a_close_frees_only_its_own():
    terminal = Terminal(accounts={"UA": "a", "UB": "b"})
    for uuid in ("UA", "UB"):
        terminal.fire("X", target_uuid=uuid)
    for uuid, ticket in (("UA", 11), ("UB", 22)):
        terminal.answer("X", "FILLED", ticket=ticket, target_uuid=uuid)
    assert two_users(terminal) == {"a": 1, "b": 1}
    for _ in range(2):
        terminal.close(22, target_uuid="UB", fire_id="X")
        assert two_users(terminal) == {"a": 1, "b": 0}
    terminal.answer("X", "CLOSED_TP", ticket=11, target_uuid="UA")
    assert two_users(terminal) == {"a": 0, "b": 0}


def test_what_one_terminal_says_of_a_symbol_sizes_no_trade_of_another():
    users = {"a": {"auto_fire": True}, "b": {"auto_fire": True}}
    terminal = Terminal(accounts={"UA": "a", "UB": "b"}, users=users)
    for uuid, contract in (("UA", 5000.0), ("UB", 1000.0)):
        terminal.send("symbol_specification", {"symbol": "XAGUSD", "target_uuid": uuid, "contract_size": contract})
        beat(terminal, uuid)
    for _ in range(2):
        found = judged(terminal, "XAGUSD", 30.0, 0.05)
        assert {user: found[user]["lots"] for user in users} == {"a": 2.0, "b": 10.0}
        terminal.bench.restart()
        terminal.heartbeat([])
        for uuid in ("UA", "UB"):
            for fire in terminal.emitted("fire_command"):
                terminal.answer(fire["fire_id"], "REJECTED", target_uuid=uuid)
            beat(terminal, uuid)


def test_what_a_terminal_at_a_broker_with_a_slash_in_its_name_said_is_known_after_a_restart():
    registry = Registry()
    registry.specify({"symbol": "XAU/USD", "target_uuid": "desk/1", "contract_size": 10, **COMPLETE})
    again = Registry()
    again.restore(registry.specifications())
    assert again.get("XAU/USD", again.broker_of("desk/1")).contract == 10
    assert again.get("XAU/USD").contract == 10


COMPLETE = {"quote": "USD", "digits": 2, "volume_min": 0.01, "volume_step": 0.01, "volume_max": 5}


def test_a_tick_value_or_margin_of_zero_means_that_the_terminal_knows_none():
    registry = Registry()
    registry.specify({"symbol": "US30", "target_uuid": "U", "contract_size": 10, "tick_value": 2.0, "margin": 100.0})
    registry.specify({"symbol": "US30", "target_uuid": "U", "volume_step": 0.03, "tick_value": 0.0, "margin": 0})
    found = registry.get("US30", "U")
    assert (found.contract, found.volume_step) == (10, Decimal("0.03"))
    assert found.tick_value is None and found.margin is None


def test_of_the_signals_entry_and_todays_price_the_nearer_to_the_stop_counts():
    """The market has come near the stop since: what is left is inside the spread, however far the entry was."""
    near = {"EURUSD": Quote(1.16854, 1.16860, T0)}
    assert decide(quotes=near).reasons == ("sl_inside_spread",)
    assert decide(quotes=near, entry=1.16860).reasons == ("sl_inside_spread",)


def test_one_silent_terminal_of_a_user_closes_the_gate():
    terminal = Terminal(auto_fire=True, accounts={"A": "default", "B": "default"})
    beat(terminal, "A")
    terminal.now += 60
    beat(terminal, "B")
    assert judged(terminal)["default"]["reasons"] == ["heartbeat_stale"]


def test_a_terminal_learnt_from_a_fire_is_its_users_after_a_restart():
    terminal = Terminal()
    terminal.fire("X", user_id="a", target_uuid="UA")
    terminal.bench.restart()
    beat(terminal, "UA", count=3)
    assert two_users(terminal) == {"a": 4}


def test_two_terminals_of_one_user_whose_brokers_number_alike_hold_what_each_of_them_lists():
    terminal = Terminal(accounts={"UA": "a", "UB": "a"})
    for uuid in ("UA", "UB"):
        terminal.heartbeat([position(7)], target_uuid=uuid)
    assert len(table_of(terminal, "a").slots) == 2
    terminal.close(7, target_uuid="UB")
    (left,) = table_of(terminal, "a").slots.values()
    assert left.account == "UA"


def test_a_close_at_one_terminal_frees_nothing_at_another():
    terminal = Terminal(accounts={"UA": "a", "UB": "a"})
    terminal.heartbeat([position(7)], target_uuid="UA")
    terminal.close(7, target_uuid="UB")
    terminal.answer("unheard-of", "CLOSED_TP", ticket=7, target_uuid="UB")
    assert two_users(terminal) == {"a": 1}


def test_what_a_terminal_listed_before_it_was_known_moves_to_its_user_also_where_the_names_are_alike():
    terminal = Terminal(accounts={"UA": "a"})
    for uuid in ("UA", "UB"):
        terminal.heartbeat([position(7)], target_uuid=uuid)
    terminal.fire("X", user_id="a", target_uuid="UB")
    assert two_users(terminal) == {"a": 3, "default": 0}
    assert len(table_of(terminal, "a").slots) == 3


def test_a_late_answer_from_the_terminal_of_another_user_with_the_same_fire_id_opens_nothing():
    terminal = Terminal(accounts={"UA": "a", "UB": "b"})
    for uuid in ("UA", "UB"):
        terminal.fire("X", target_uuid=uuid)
    terminal.answer("X", "REJECTED", target_uuid="UA")
    terminal.answer("X", "FILLED", ticket=12, target_uuid="UA")
    (waiting,) = table_of(terminal, "b").slots.values()
    assert (waiting.state, waiting.account) == ("RESERVED", None)


def test_an_answer_to_a_fire_of_nobody_finds_it_whoever_the_terminal_belongs_to():
    terminal = Terminal(accounts={"UA": "a"})
    terminal.fire("X")
    terminal.answer("X", "FILLED", ticket=11, target_uuid="UA")
    assert two_users(terminal) == {"default": 1}

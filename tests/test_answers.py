"""What the answer to an order means: words of terminals and return codes of MetaTrader."""

from __future__ import annotations

import pytest

from slots_support import Terminal
from tapebus_slots.answers import read

#: The classes of return codes, copied from the table in the documentation of MetaTrader and not from the code.
RETCODES = {
    "filled": [10008, 10009, 10010, 10025],
    "retry": [10004, 10020, 10021, 10024, 10028, 10031, 136, 138, 141, 146],
    "unknown": [10012, 10011, -11],
    "refused": [10013, 10014, 10015, 10016, 10022, 10030, 10035, 10038],
    "refused_by_account": [10006, 10007, 10017, 10018, 10019, 10026, 10027, 10029, 10032, 10033, 10034, 10040],
    "refused_by_rule": [10042, 10043, 10044, 10045, 10046],
    "refused_mt4": [129, 130, 131, 132, 134, 148, 149],
    "already": [10036, 10039, 10041, 10023],
}


@pytest.mark.parametrize(("meaning", "code"), [(name, code) for name, codes in RETCODES.items() for code in codes])
def test_a_return_code_alone_decides(meaning, code):
    assert read(None, code) == meaning.partition("_")[0]


@pytest.mark.parametrize(
    ("status", "code", "meaning"),
    [
        ("FILLED", None, "filled"),
        ("Success", 10012, "filled"),
        ("success", 10019, "unknown"),
        ("FAILED", 10009, "unknown"),
        ("FAILED", 10012, "unknown"),
        ("FAILED", 10004, "retry"),
        ("FAILED", 10019, "refused"),
        ("FAILED", 4242, "refused"),
        ("timeout", 10019, "refused"),
        ("CLOSED_PARTIAL", None, "partial"),
        ("CLOSED_BY_HAND", 10012, "closed"),
        ("MARKET_CLOSED", None, "refused"),
        ("SENT", None, "pending"),
        ("SENT", 10009, "filled"),
        (None, None, "pending"),
        (None, 4242, "unknown"),
    ],
)
def test_where_word_and_code_contradict_the_more_cautious_reading_wins(status, code, meaning):
    assert read(status, code) == meaning


@pytest.mark.parametrize(
    ("meaning", "slots"),
    [("filled", 1), ("retry", 1), ("unknown", 1), ("refused", 0), ("refused_by_account", 0), ("already", 1)],
)
def test_each_class_of_codes_does_to_a_waiting_slot_what_it_says(meaning, slots):
    for code in RETCODES[meaning]:
        terminal = Terminal()
        terminal.fire("f0")
        terminal.answer("f0", None, retcode=code)
        assert terminal.metrics() == f"{slots}/10", code

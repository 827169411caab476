"""The sabotages fit the sources they break, so that none rots unseen; running them is ``make sabotage``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from sabotages import SABOTAGES, Sabotage  # noqa: E402


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda each: each.name)
def test_a_sabotage_replaces_one_piece_of_the_source_and_names_tests_that_exist(sabotage: Sabotage):
    assert (ROOT / sabotage.file).read_text().count(sabotage.old) == 1
    assert sabotage.old != sabotage.new
    for test in sabotage.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(), test


def test_there_are_at_least_twelve_and_no_two_of_one_name():
    assert len({each.name for each in SABOTAGES}) == len(SABOTAGES) >= 12

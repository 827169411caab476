"""Storms of orders, fills, closes and heartbeats that come late, twice, out of order or never, judged by the broker."""

from __future__ import annotations

from itertools import count

from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from slot_storm import SlotStorm

#: Explaining a failure of such a machine takes longer than finding it.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)


def test_no_storm_frees_a_held_slot_or_keeps_a_free_one():
    SlotStorm.steps = count()
    chosen = settings(max_examples=100, stateful_step_count=50, deadline=None, phases=PHASES)
    run_state_machine_as_test(SlotStorm, settings=chosen)
    assert next(SlotStorm.steps) > 2_000

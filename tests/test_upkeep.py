"""Upkeep of the tape: sealing and merging keep up in bounded pieces, and change nothing about any event."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

import tapebus_store
from tapebus.blocks import BlockView
from tapebus.store import Block, Commit
from tapebus.tapewriter import rest_after
from tapebus_store.upkeep import MERGE_RUNS, SPARE_BLOCKS

sys.path.insert(0, str(Path(__file__).parent))
from store_support import block, fill, open_store, raws, upkeep


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tapebus_store.LmdbStore]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def test_the_index_is_merged_although_sealing_never_ends(store: tapebus_store.LmdbStore) -> None:
    fill(store, 100)
    for _ in range(60):
        fill(store, 4)
        assert store.maintain(1e12) and store._tape_record.runs <= MERGE_RUNS
    assert store.stats()["blocks_sealed"] > 3 * MERGE_RUNS


def test_one_piece_merges_few_of_the_runs_that_have_piled_up(
    store: tapebus_store.LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tapebus_store.upkeep, "MERGE_RUNS", 1000)
    fill(store, 4 * 5 * MERGE_RUNS // 2)
    upkeep(store)
    monkeypatch.undo()
    left = [5 * MERGE_RUNS // 2]
    assert store._tape_record.runs == left[0]
    while store.maintain(1e12):
        left.append(store._tape_record.runs)
    assert left == [5 * MERGE_RUNS // 2, 3 * MERGE_RUNS // 2] and store._tape_record.runs == MERGE_RUNS // 2
    with store._env.reading() as txn:
        assert txn.stat(store._env.dbs["corr"])["entries"] == 2 + MERGE_RUNS // 2
    hits = [each.first_seq + o for each, offsets in store.blocks_of("c3") for o in offsets]
    assert hits == [seq for seq in range(1, store.last_seq() + 1) if seq % 7 == 3]


def test_small_blocks_press_for_sealing_in_proportion_and_large_ones_do_not(tmp_path: Path) -> None:
    store = open_store(tmp_path, seal_events=20)
    fill(store, 4 * SPARE_BLOCKS, per_block=2)
    store.maintain(0.0)
    assert store.maintain(0.0) == pytest.approx(4 * 0.9, rel=0.05)
    upkeep(store, 0.0)
    assert store.maintain(0.0) == 0.0
    fill(store, SPARE_BLOCKS, per_block=20)
    store.maintain(0.0)
    assert store.maintain(0.0) == 1.0
    store.close()


def test_upkeep_takes_a_tenth_of_the_time_or_more_where_it_presses_but_never_over_a_third() -> None:
    assert rest_after(0.002, 1.0) == pytest.approx(0.2)
    assert rest_after(0.100, 1.0) == pytest.approx(0.9)
    assert rest_after(0.004, 5.0) == pytest.approx(0.04)
    assert rest_after(0.100, 1000.0) == pytest.approx(0.2)


def received(first: int, at: float, count: int = 5) -> Block:
    """A block of `count` events, the first received at `at` and the others a second apart."""
    made = block(first, [(float(seq), 1, f"c{seq}") for seq in range(first, first + count)])
    waits = struct.pack(f"<{count}I", 0, *[1_000_000] * (count - 1))
    head = made.payload[:8] + struct.pack("<Q", int(at * 1e6)) + made.payload[16 : 24 + 4 * count]
    payload = head + waits + made.payload[24 + 8 * count :]
    return replace(made, payload=payload, min_received=at, max_received=at + count - 1)


@pytest.mark.parametrize("leap", [3.0, 4290.0, 4300.0, 86400.0, 1e9, -1.0, -7200.0], ids=str)
def test_every_event_keeps_its_time_of_reception_whatever_the_clock_did(tmp_path: Path, leap: float) -> None:
    store = open_store(tmp_path)
    at, expected = 2e9, []
    for n in range(12):
        made = received(1 + 5 * n, at)
        store.commit(Commit(blocks=[made]))
        expected += [at + i for i in range(5)]
        # also between the fourth and fifth block, which would be sealed together
        at += 5.0 + (leap if n % 3 == 0 else 0.0)
    upkeep(store)
    views = [BlockView(each.payload, each.first_seq) for each in store.blocks()]
    found = [view.received_at(view.first_seq + i) for view in views for i in range(view.count)]
    assert found == expected
    assert store.stats()["blocks_sealed"] > 0
    spans = [(each.min_received, each.max_received) for each in store.blocks()]
    for view, span in zip(views, spans, strict=True):
        assert span == (view.received_at(view.first_seq), view.received_at(view.first_seq + view.count - 1))
    store.close()


def stored(store: tapebus_store.LmdbStore) -> dict[bytes, bytes]:
    with store._env.reading() as txn, txn.cursor(store._env.dbs["blocks"]) as cursor:
        return {bytes(key): bytes(value) for key, value in cursor}


def test_large_blocks_count_as_sealed_as_they_are_and_small_ones_beside_them_are_sealed(tmp_path: Path) -> None:
    store = open_store(tmp_path, seal_events=20)
    made = fill(store, 3, per_block=10) + fill(store, 8, per_block=4) + fill(store, 2, per_block=30)
    before = stored(store)
    upkeep(store)
    after, stats = stored(store), store.stats()
    kept = [layout_key(each.first_seq) for each in (*made[:3], *made[-2:])]
    assert {key: after.get(key) for key in kept} == {key: before[key] for key in kept}
    assert (stats["blocks_sealed"], stats["blocks_hot"], len(after)) == (7, 0, 7)
    assert raws(store.blocks()) == raws(made)
    assert store._tape_record.sealed_to == store.last_seq()
    hits = [each.first_seq + o for each, offsets in store.blocks_of("c3") for o in offsets]
    assert hits == [seq for seq in range(1, store.last_seq() + 1) if seq % 7 == 3]
    store.close()


def layout_key(seq: int) -> bytes:
    return tapebus_store.layout.seq_key(seq)


def test_many_blocks_are_read_in_parts_with_room_for_commits_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tapebus_store.upkeep, "READ_BLOCKS", 10)
    store = open_store(tmp_path, seal_events=50)
    made = fill(store, 60, per_block=1)
    store.maintain(0.0)
    blocks = []
    for _ in range(6):
        before = store._tape_record.txn
        assert store.maintain(0.0) >= (1.0 if not blocks else 0.0)
        blocks.append((store._tape_record.txn > before, store.stats()["blocks_sealed"]))
        made += fill(store, 1, per_block=1)
    assert blocks == [(False, 0)] * 5 + [(True, 1)]
    assert raws(store.blocks()) == raws(made)
    store.close()


def test_what_was_read_for_sealing_is_forgotten_when_retention_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tapebus_store.upkeep, "READ_BLOCKS", 10)
    store = open_store(tmp_path, seal_events=50, max_events=65)
    made = fill(store, 60, per_block=1)
    store.maintain(0.0)
    assert store.maintain(0.0) and store.stats()["blocks_sealed"] == 0
    made += fill(store, 30, per_block=1)
    upkeep(store, 0.0)
    stats = store.stats()
    assert stats["first_seq"] > 10 and stats["blocks_sealed"] == 1
    assert raws(store.blocks(stats["first_seq"] - 1)) == raws(made)[stats["first_seq"] - 1 :]
    store.close()

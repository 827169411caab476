"""The store against a plain model: what was committed is what comes back, through sealing, retention and reopening."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tapebus_store
from tapebus.blocks import BlockView, crc32c
from tapebus.errors import ConfigError, CorruptError, StoreError, StoreFull, TapebusError
from tapebus.events import DeadLetter
from tapebus.store import Commit, ProducerBook, Unit
from tapebus_store.ages import APART_S, Ages

sys.path.insert(0, str(Path(__file__).parent))
from store_support import block, fill, open_store, raws, upkeep


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tapebus_store.LmdbStore]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


event = st.tuples(
    st.floats(0, 1000), st.integers(1, 130), st.one_of(st.none(), st.sampled_from(["a", "b", "sig_1", "ß", ""]))
)


class StoreModel(RuleBasedStateMachine):
    """Random commits, sealing, retention and reopening against lists and dicts."""

    @initialize(kept=st.sampled_from([0, 30]))
    def start(self, kept: int) -> None:
        self.dir = tempfile.TemporaryDirectory()
        self.config = {"max_events": kept, "seal_events": 12}
        self.store = open_store(Path(self.dir.name), **self.config)
        self.events: list[tuple[float, int, str | None, bytes]] = []
        self.books: dict[bytes, ProducerBook] = {}
        self.units: dict[str, int] = {}
        self.state: dict[str, bytes] = {}
        self.letters: list[str] = []

    @rule(groups=st.lists(st.lists(event, min_size=1, max_size=8), max_size=4))
    def commit_events(self, groups: list[list[tuple[float, int, str | None]]]) -> None:
        blocks, first = [], len(self.events) + 1
        for group in groups:
            made = block(first, group)
            blocks.append(made)
            first += len(group)
            raw = raws([made], made.first_seq - 1)
            self.events += [(*each, raw[place]) for place, each in enumerate(group)]
        self.store.commit(Commit(blocks=blocks))

    @rule(who=st.binary(min_size=16, max_size=16), stored=st.integers(0, 1 << 40))
    def commit_book(self, who: bytes, stored: int) -> None:
        book = ProducerBook(who, 7, watermark=stored, rejected={"ingest.schema": 2})
        self.store.commit(Commit(producers=[book]))
        self.books[who] = book

    @rule(
        cursor=st.integers(0, 99),
        state=st.dictionaries(
            st.one_of(st.text(max_size=5), st.sampled_from(["k" * 600, "k" * 600 + "2"])),
            st.one_of(st.none(), st.binary(max_size=20)),
            max_size=4,
        ),
    )
    def commit_unit(self, cursor: int, state: dict[str, bytes | None]) -> None:
        self.store.commit(Commit(units=[Unit("c", cursor, namespace="ns", state=state)]))
        self.units["c"] = cursor
        for key, value in state.items():
            if value is None:
                self.state.pop(key, None)
            else:
                self.state[key] = value

    @rule(detail=st.text(max_size=10))
    def commit_dead(self, detail: str) -> None:
        self.store.commit(Commit(dead=[DeadLetter("schema", "invalid", detail)]))
        self.letters.append(detail)

    @rule()
    def maintain(self) -> None:
        self.store.maintain(1e12)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = open_store(Path(self.dir.name), **self.config)

    def kept(self) -> list[tuple[int, tuple[float, int, str | None, bytes]]]:
        first = self.store.first_seq()
        return [(place + 1, each) for place, each in enumerate(self.events) if place + 1 >= first]

    @invariant()
    def everything_comes_back(self) -> None:
        kept = self.kept()
        assert self.store.last_seq() == len(self.events)
        assert raws(self.store.blocks()) == [each[3] for _, each in kept]
        stats = self.store.stats()
        assert stats["events"] == len(kept)
        assert stats["blocks_hot"] + stats["blocks_sealed"] == len(list(self.store.blocks()))
        assert {each.producer_id: each for each in self.store.producers()} == self.books
        assert {name: unit.cursor for name, unit in self.store.cursors().items()} == self.units
        assert self.store.state("ns") == self.state
        assert [each.detail for each in self.store.dead()] == self.letters
        if self.config["max_events"] and kept:
            newest = list(self.store.blocks())[-1]
            assert len(kept) >= min(len(self.events), newest.count)

    @rule(after=st.integers(0, 60), topic=st.integers(1, 130), since=st.floats(0, 1000), reverse=st.booleans())
    @precondition(lambda self: self.events)
    def filters_lose_nothing(self, after: int, topic: int, since: float, reverse: bool) -> None:
        found = list(self.store.blocks(after, topic_ids=[topic], since=since, reverse=reverse))
        held = {seq for each in found for seq in range(each.first_seq, each.last_seq + 1)}
        assert held >= {s for s, e in self.kept() if s > after and e[1] == topic and e[0] >= since}
        order = [each.first_seq for each in found]
        assert order == sorted(order, reverse=reverse)

    @rule(who=st.sampled_from(["a", "b", "sig_1", "ß", "", "nobody"]))
    def correlation_finds_all(self, who: str) -> None:
        hits = [each.first_seq + offset for each, offsets in self.store.blocks_of(who) for offset in offsets]
        assert hits == [seq for seq, each in self.kept() if each[2] == who]

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.dir.cleanup()


StoreModel.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
test_the_store_agrees_with_a_model = StoreModel.TestCase


def test_sealing_keeps_every_event_and_makes_fewer_smaller_blocks(store: tapebus_store.LmdbStore) -> None:
    fill(store, 200)
    before, size = raws(store.blocks()), store.stats()["block_bytes"]
    upkeep(store)
    stats = store.stats()
    assert raws(store.blocks()) == before
    assert (stats["blocks_sealed"], stats["blocks_hot"]) == (50, 0)
    assert stats["block_bytes"] < size / 2


def test_many_sealed_blocks_share_few_index_runs(store: tapebus_store.LmdbStore) -> None:
    fill(store, 400)
    upkeep(store)
    with store._env.reading() as txn:
        assert txn.stat(store._env.dbs["corr"])["entries"] <= 400 // 4 // 16 + 16
    hits = [each.first_seq + o for each, offsets in store.blocks_of("c3") for o in offsets]
    assert hits == [seq for seq in range(1, 2001) if seq % 7 == 3]


@pytest.mark.parametrize("rule", [{"max_events": 100}, {"max_bytes_kept": 3000}, {"max_age_days": 60 / 86400}])
def test_each_retention_rule_removes_the_oldest_blocks_and_no_book(tmp_path: Path, rule: dict[str, float]) -> None:
    store = open_store(tmp_path, **rule)
    store.commit(Commit(units=[Unit("slow", 1)], producers=[ProducerBook(b"p" * 16, 1, stored=9)]))
    made = fill(store, 50)
    upkeep(store, now=100.0)
    made += fill(store, 50)
    upkeep(store, now=161.0)
    first = store.first_seq()
    assert 1 < first < 500
    assert raws(store.blocks()) == [raw for raw in raws(made) if int(raw.split(b":")[0]) >= first]
    assert store.last_seq() == 500
    assert store.cursors()["slow"].cursor == 1
    assert store.producers()[0].stored == 9
    assert sum(len(offsets) for _, offsets in store.blocks_of("c1")) == sum(s % 7 == 1 for s in range(first, 501))
    store.close()


def aged(path: Path, *steps: tuple[str, float, int]) -> list[int]:
    """The oldest event kept after each step: (boot, what its steady clock shows, blocks written just before)."""
    firsts = []
    for boot, now, blocks in steps:
        store = open_store(path, max_age_days=1, seal_events=5)
        store._upkeep._boot = boot
        fill(store, blocks)
        upkeep(store, now)
        firsts.append(store.first_seq())
        store.close()
    return firsts


DAY = 86400.0


def test_age_is_the_time_that_has_passed_for_certain(tmp_path: Path) -> None:
    within = [("a", 10.0, 4), ("a", 10.0 + DAY / 2, 4), ("a", 9.0 + DAY, 0), ("a", 10.0 + DAY, 0), ("a", 3 * DAY, 4)]
    assert aged(tmp_path / "within one boot", *within) == [1, 1, 1, 21, 41]
    across = [("a", 10.0, 4), ("b", 500.0, 4), ("c", DAY - 501.0, 0), ("c", DAY - 500.0, 0), ("c", DAY, 4)]
    assert aged(tmp_path / "across boots", *across) == [1, 1, 1, 21, 41]


def test_what_was_before_the_first_start_does_not_make_the_tape_older(tmp_path: Path) -> None:
    assert aged(tmp_path, ("a", 1000 * DAY, 4), ("a", 1000.9 * DAY, 0), ("a", 1001 * DAY, 0)) == [1, 1, 16]


def test_marks_of_age_are_few_and_make_nothing_older_than_it_is() -> None:
    ages = Ages()
    written: list[float] = []
    for second in range(100_000):
        written.append(ages.clock)
        ages.advance("a", second)
        if ages.due(len(written), 0.0 if second < 50_000 else 5000.0):
            ages.mark(len(written), 0.0 if second < 50_000 else 5000.0)
        if second % 999 == 0:
            old = ages.older(5000.0)
            assert all(ages.clock - at >= 5000.0 for at in written[:old])
            assert second < 60_000 or ages.clock - written[old] <= 5000.0 * (1 + 2 / 256)
    assert len(ages.marks) <= 260
    long = Ages()
    for n in range(5000):
        long.advance("a", n * APART_S)
        long.mark(n + 1, 0.0)
        assert len(long.marks) <= 1024 and long.marks == sorted(long.marks)


def test_a_tiny_map_grows_by_itself(tmp_path: Path) -> None:
    store = open_store(tmp_path, initial_bytes=1 << 16)
    made = fill(store, 30, per_block=3, size=5000)
    store.commit(Commit(units=[Unit("c", 1, namespace="n", state={"k": bytes(3 << 20)})]))
    assert store.stats()["map_size"] > 3 << 20
    assert raws(store.blocks()) == raws(made)
    store.close()


def test_a_map_at_its_maximum_is_a_state_and_everything_stays_readable(tmp_path: Path) -> None:
    store = open_store(tmp_path, initial_bytes=1 << 17, max_bytes=1 << 18)
    big = Commit(units=[Unit("c", 1, namespace="n", state={"k": bytes(1 << 20)})])
    with pytest.raises(StoreFull, match="max_bytes = 262144"):
        store.commit(big)
    made = fill(store, 3)
    assert raws(store.blocks()) == raws(made)
    assert store.cursors() == {}
    store.close()


def test_a_second_bus_on_the_directory_is_named_by_pid(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(TapebusError, match=rf"another bus \(pid {os.getpid()}\) runs on this data directory"):
        open_store(tmp_path)
    store.close()
    open_store(tmp_path).close()


def test_a_reader_and_the_writer_of_one_process_share_the_environment(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    reader = tapebus_store.tapebus_open_store(tmp_path, {}, True)
    store = open_store(tmp_path)
    made = fill(store, 2)
    assert raws(reader.blocks()) == raws(made)
    store.close()
    assert raws(reader.blocks()) == raws(made)
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        reader.last_seq()


def test_a_directory_without_a_tape_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no tape here yet: start the bus once"):
        tapebus_store.tapebus_open_store(tmp_path / "nothing", {}, True)
    assert not (tmp_path / "nothing").exists()


def test_a_newer_major_version_is_refused_in_one_line(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store._durably(lambda txn, tape: store._put(txn, "meta", b"version", b"tapebus 99.0"))
    store.close()
    for readonly in (True, False):
        with pytest.raises(StoreError, match=r"written by store version 99\.0.*upgrade tapebus"):
            tapebus_store.tapebus_open_store(tmp_path, {}, readonly)


def test_blocks_that_do_not_continue_the_tape_are_refused(store: tapebus_store.LmdbStore) -> None:
    fill(store, 1)
    with pytest.raises(StoreError, match="bus_seq 9 cannot follow bus_seq 5"):
        store.commit(Commit(blocks=[block(9, [(1.0, 1, None)])]))
    assert store.last_seq() == 5


def test_an_unknown_setting_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"plugins\.store: .*max_byte`.*max_bytes"):
        tapebus_store.tapebus_open_store(Path("/nonexistent"), {"max_byte": 1}, False)


def test_files_are_private(tmp_path: Path) -> None:
    open_store(tmp_path / "data").close()
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "data").rglob("*")}
    files = dict.fromkeys(("bus.lock", "data.mdb", "lock.mdb", "mark", "reserve"), 0o600)
    assert modes == {**files, "tape": 0o700}


def test_old_dead_letters_make_room_and_ids_are_never_used_again(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_dead=3)
    store.commit(Commit(dead=[DeadLetter("ingest", "malformed", str(i), raw=bytes(70_000)) for i in range(5)]))
    kept = [(each.id, each.detail, len(each.raw)) for each in store.dead()]
    assert kept == [(3, "2", 65536), (4, "3", 65536), (5, "4", 65536)]
    store.commit(Commit(settled=[4, 5, 99], dead=[DeadLetter("ingest", "malformed")]))
    assert [each.id for each in store.dead(after=3)] == [6]
    assert [each.id for each in store.dead(limit=1)] == [3]
    store.close()


@pytest.mark.parametrize("database", ["blocks", "corr", "producers", "cursors", "state", "dead", "meta"])
def test_a_flipped_bit_is_reported_and_never_returned(tmp_path: Path, database: str) -> None:
    """Each byte of one record in turn: a clean error, or exactly what was committed."""
    store = open_store(tmp_path)
    store.commit(
        Commit(
            blocks=[block(1, [(1.0, 1, "a"), (2.0, 2, "b")])],
            producers=[ProducerBook(b"p" * 16, 1, stored=2)],
            units=[Unit("c", 2, namespace="n", state={"k": b"value"})],
            dead=[DeadLetter("schema", "x", raw=b"raw")],
        )
    )

    def everything() -> Any:
        store._verified.clear()
        return msgspec.to_builtins(
            [
                list(store.blocks()),
                list(store.blocks_of("a")),
                store.producers(),
                store.cursors(),
                store.state("n"),
                list(store.dead()),
                store.last_seq(),
            ]
        )

    sound = everything()
    with store._env.env.begin() as txn, txn.cursor(store._env.dbs[database]) as cursor:
        records = [(key, value) for key, value in cursor if key != b"version"]
    for key, value in records:
        for place in range(len(value)):
            damaged = bytearray(value)
            damaged[place] ^= 1 << place % 8
            with store._env.env.begin(write=True) as txn:
                txn.put(key, bytes(damaged), db=store._env.dbs[database])
            try:
                assert everything() == sound
            except CorruptError as error:
                assert "tape" in str(error)
        with store._env.env.begin(write=True) as txn:
            txn.put(key, value, db=store._env.dbs[database])
    assert everything() == sound
    store.close()


def test_a_missing_block_is_named_by_its_range(store: tapebus_store.LmdbStore) -> None:
    fill(store, 5)
    with store._env.env.begin(write=True) as txn:
        txn.delete((11).to_bytes(8, "big"), db=store._env.dbs["blocks"])
    with pytest.raises(CorruptError, match=r"bus_seq 11\.\.15 is missing"):
        list(store.blocks())
    with pytest.raises(CorruptError, match=r"bus_seq 11\.\.15 is missing"):
        list(store.blocks(reverse=True))


def long_store(path: Path, **config: Any) -> tuple[tapebus_store.LmdbStore, list[tuple[float, int]]]:
    """A tape with runs of all levels: type 2 at first only, 3 once in 300; event time and type of each."""
    store = open_store(path, **config)
    written: list[tuple[float, int]] = []
    while len(written) < 2500:
        first = len(written) + 1
        group = []
        for seq in range(first, first + 5):
            kind = 3 if seq % 300 == 7 else 2 if seq % 4 == 0 and seq < 400 else 1
            group.append((float(seq % 900), kind, f"c{seq}" if seq % 7 == 0 else None))
        written += [each[:2] for each in group]
        store.commit(Commit(blocks=[block(first, group, size=300)]))
        if first % 100 == 1 and first < 2300:
            upkeep(store)
    return store, written


@pytest.fixture(scope="module")
def long_tape(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[tuple[float, int]]]]:
    store, written = long_store(tmp_path_factory.mktemp("long"))
    yield store, written
    store.close()


@given(
    after=st.integers(0, 2600),
    kinds=st.one_of(st.none(), st.sets(st.integers(1, 4), max_size=2)),
    since=st.one_of(st.none(), st.floats(-1, 905)),
    until=st.one_of(st.none(), st.floats(-1, 905)),
    reverse=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_what_is_skipped_by_the_index_held_nothing_that_was_asked_for(
    long_tape: tuple[Any, list[tuple[float, int]]],
    after: int,
    kinds: set[int] | None,
    since: float | None,
    until: float | None,
    reverse: bool,
) -> None:
    store, written = long_tape
    found = list(store.blocks(after, topic_ids=kinds, since=since, until=until, reverse=reverse))
    order = [each.first_seq for each in found]
    assert order == sorted(set(order), reverse=reverse)
    held = {seq for each in found for seq in range(each.first_seq, each.last_seq + 1)}
    wanted = {
        seq
        for seq, (at, kind) in enumerate(written, 1)
        if seq > after
        and (kinds is None or kind in kinds)
        and (since is None or at >= since)
        and (until is None or at <= until)
    }
    assert wanted <= held
    views = [BlockView(each.payload, each.first_seq) for each in found]
    there = {view.first_seq + i: view.raw(view.first_seq + i) for view in views for i in range(view.count)}
    assert all(there[seq].startswith(b"%d:" % seq) for seq in wanted)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("asked", [{"topic_ids": [2]}, {"topic_ids": [4]}, {"since": 899.5}, {"until": -1.0}], ids=str)
def test_blocks_of_what_is_rare_are_found_without_looking_at_all_others(
    long_tape: tuple[Any, list[tuple[float, int]]],
    asked: dict[str, Any],
    reverse: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, _ = long_tape
    looked = []
    inner = tapebus_store.layout.decode_header
    monkeypatch.setattr(tapebus_store.layout, "decode_header", lambda *given: looked.append(1) or inner(*given))
    found = list(store.blocks(reverse=reverse, **asked))
    assert len(found) == (20 if asked == {"topic_ids": [2]} else 0)
    # those that match, the run they end in, and what is not sealed yet
    assert len(looked) <= len(found) + 16 + store.stats()["blocks_hot"] + 2
    assert store.stats()["blocks_sealed"] > 100


def test_a_tape_of_the_first_store_version_is_read_and_rewritten_as_it_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tapebus_store.runs._RUN
    with monkeypatch.context() as before:
        # what version 1 wrote: one checksum over each run, sealed blocks in one piece
        before.setattr(tapebus_store.layout, "PARTS_FROM", 1 << 60)
        before.setattr(
            tapebus_store.runs,
            "encode",
            lambda key, run, level, span=None: plain.pack(level, 0, crc32c(run, crc32c(key))) + run,
        )
        store, written = long_store(tmp_path)
        store._durably(lambda txn, tape: store._put(txn, "meta", b"version", b"tapebus 1.0"))
        store.close()

    def check(reader: Any) -> None:
        assert [int(raw.split(b":")[0]) for raw in raws(reader.blocks())] == list(range(1, reader.last_seq() + 1))
        for seq in (7, 700, 2499):
            assert [b.first_seq + o for b, offsets in reader.blocks_of(f"c{seq}") for o in offsets] == [seq]
        twos = {seq for seq, (_, kind) in enumerate(written, 1) if kind == 2}
        assert twos <= {seq for b in reader.blocks(topic_ids=[2]) for seq in range(b.first_seq, b.last_seq + 1)}

    reader = tapebus_store.tapebus_open_store(tmp_path, {}, True)
    assert reader.verify() == []
    check(reader)
    reader.close()
    store = open_store(tmp_path)
    check(store)
    fill(store, 100)
    upkeep(store)
    check(store)
    assert store.verify() == []
    with store._env.reading() as txn, txn.cursor(store._env.dbs["corr"]) as cursor:
        levels = [(tapebus_store.runs.is_plain(value), value[0]) for _, value in cursor]
    assert {(True, 2), (False, 2)} <= set(levels), "what was merged before is left, what is merged now is new"
    store.close()
    reader = tapebus_store.tapebus_open_store(tmp_path, {}, True)
    with reader._env.reading() as txn:
        assert reader._get(txn, "meta", b"version") == b"tapebus 2.0"
    reader.close()

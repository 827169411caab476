"""Reading and following the tape: filters, limits, typed events, and a bus that writes at the same time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tapebus_store
from tapebus import hookimpl
from tapebus.cli import main
from tapebus.errors import StoreError
from tapebus.events import DeadLetter, EventType
from tapebus.store import Commit, Unit
from tapebus.tape import Tape

sys.path.insert(0, str(Path(__file__).parent))
from store_support import block_of, open_store

TOPICS = {1: "trade_executed", 2: "market.tick", 3: "market.bar", 4: "unheard_of"}


class Trade(msgspec.Struct, frozen=True):
    price: float


class Types:
    """Registers one of the types on the tape."""

    @hookimpl
    def tapebus_register_event_types(self) -> list[EventType]:
        return [EventType("trade_executed", Trade, aliases={"px": "price"})]


PLUGINS = (Types(), tapebus_store)


def wire(seq: int, **fields: Any) -> dict[str, Any]:
    topic = TOPICS[1 + seq % 4]
    made = {"event_type": topic, "timestamp": 1000.0 - seq % 10, "source": "test", "data": {"price": float(seq)}}
    if seq % 3 == 0:
        made["correlation_id"] = f"sig_{seq % 5}"
    return made | fields


def write(store: tapebus_store.LmdbStore, first: int, last: int, per_block: int = 7) -> None:
    for start in range(first, last + 1, per_block):
        seqs = range(start, min(start + per_block, last + 1))
        block = block_of(start, [(1 + seq % 4, wire(seq)) for seq in seqs])
        store.commit(Commit(blocks=[block], topics=TOPICS))


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tape]:
    path = tmp_path_factory.mktemp("tape")
    store = open_store(path)
    write(store, 1, 60)
    while store.maintain(1e12):
        pass
    write(store, 61, 100)
    store.commit(Commit(dead=[DeadLetter("schema", "invalid", bus_seq=3)]))
    store.close()
    with Tape.open(path, plugins=PLUGINS) as opened:
        yield opened


def test_registered_types_come_back_typed_and_others_as_they_are(tape: Tape) -> None:
    events = list(tape.read(limit=4))
    assert [event.event_type for event in events] == ["market.tick", "market.bar", "unheard_of", "trade_executed"]
    assert isinstance(events[3].data, Trade)
    assert events[3].data.price == 4.0
    assert events[0].data == {"price": 1.0}
    assert msgspec.json.decode(events[3].raw) == wire(4)
    assert events[2].correlation_id == "sig_3"


@given(
    after=st.integers(0, 110),
    topics=st.one_of(
        st.none(), st.lists(st.sampled_from([*TOPICS.values(), "market.*", "*", "market", "nothing.*"]), max_size=2)
    ),
    since=st.one_of(st.none(), st.floats(988, 1002)),
    until=st.one_of(st.none(), st.floats(988, 1002)),
    who=st.sampled_from([None, None, "sig_0", "sig_4", "nobody"]),
    limit=st.one_of(st.none(), st.integers(0, 20)),
    reverse=st.booleans(),
    last=st.one_of(st.none(), st.integers(0, 20)),
)
@settings(max_examples=150, deadline=None)
def test_read_returns_exactly_what_a_scan_of_all_events_would(
    tape: Tape,
    after: int,
    topics: list[str] | None,
    since: float | None,
    until: float | None,
    who: str | None,
    limit: int | None,
    reverse: bool,
    last: int | None,
) -> None:
    def wanted(event: dict[str, Any]) -> bool:
        name, at = event["event_type"], event["timestamp"]
        return (
            (topics is None or any(t in (name, "*") or (t == "market.*" and name[:7] == "market.") for t in topics))
            and (since is None or at >= since)
            and (until is None or at < until)
            and (who is None or event.get("correlation_id") == who)
        )

    expected = [seq for seq in range(after + 1, 101) if wanted(wire(seq))]
    if last is not None:
        expected = expected[max(0, len(expected) - last) :]
    if reverse:
        expected.reverse()
    found = tape.read(after, topics, since, until, who, limit, reverse, last)
    assert [event.bus_seq for event in found] == (expected if limit is None else expected[:limit])


def test_the_tape_says_what_it_holds(tape: Tape) -> None:
    assert (tape.first_seq, tape.last_seq) == (1, 100)
    assert tape.stats()["events"] == 100
    assert [letter.bus_seq for letter in tape.dead_letters()] == [3]


def test_the_state_of_a_plugin_is_read_while_its_bus_writes_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.commit(Commit(units=[Unit("slots", 1, namespace="slots", state={"a": b"1", "b": b"2"})]))
    with Tape.open(tmp_path, plugins=PLUGINS) as tape:
        assert tape.state("slots") == {"a": b"1", "b": b"2"}
        store.commit(Commit(units=[Unit("slots", 2, namespace="slots", state={"a": None, "b": b"3"})]))
        assert tape.state("slots") == {"b": b"3"}
        assert tape.state("slot") == {}
    store.close()


def test_a_follower_gets_every_event_once_and_in_order_while_the_bus_writes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 1, 10)
    last = 400

    def bus() -> None:
        for start in range(11, last, 10):
            write(store, start, start + 9, 3)
            store.maintain(1e12)

    with Tape.open(tmp_path, plugins=PLUGINS) as tape:
        thread = threading.Thread(target=bus)
        seqs = []
        for event in tape.follow(after=5, idle_timeout=30):
            if not seqs:
                thread.start()
            seqs.append(event.bus_seq)
            if event.bus_seq == last:
                break
        thread.join()
    store.close()
    assert seqs == list(range(6, last + 1))


def test_a_follower_starts_at_the_newest_event_and_filters(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 1, 10)
    with Tape.open(tmp_path, plugins=PLUGINS) as tape:
        assert list(tape.follow(idle_timeout=0)) == []
        assert [e.bus_seq for e in tape.follow(0, ["market.*"], idle_timeout=0)] == [1, 2, 5, 6, 9, 10]
    store.close()


def test_retention_behind_a_reader_ends_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_events=20)
    write(store, 1, 100)
    with Tape.open(tmp_path, plugins=PLUGINS) as tape:
        while store.maintain(1e12):
            pass
        seqs = [event.bus_seq for event in tape.read(after=3)]
        assert seqs == list(range(tape.first_seq, 101))
        assert seqs[0] > 4
    store.close()


def test_without_a_store_plugin_the_missing_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="add 'store' to the plugins"):
        Tape.open(tmp_path, plugins=[Types()])


def test_a_closed_tape_says_so(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    tape = Tape.open(tmp_path, plugins=PLUGINS)
    tape.close()
    tape.close()
    with pytest.raises(StoreError, match="closed"):
        list(tape.read())


def test_query_prints_the_newest_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(tmp_path)
    write(store, 1, 30)
    store.close()

    def query(*options: str) -> list[int]:
        assert main(["query", "--json", "--data-dir", str(tmp_path), *options]) == 0
        return [msgspec.json.decode(line)["bus_seq"] for line in capsys.readouterr().out.splitlines()]

    assert query("--last", "3") == [28, 29, 30]
    assert query("--last", "3", "--topic", "market.*") == [25, 26, 29, 30][1:]
    assert query("--last", "3", "--reverse", "--limit", "2") == [30, 29]
    assert query("--last", "0") == []

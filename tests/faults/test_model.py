"""The way from the socket to the disk against a dictionary: ingest, ring, tape thread and LMDB store, all of them real.

Hypothesis chooses what producers send and when the bus is held, killed, restarted, pruned or full; after every step the
tape, the books and the acknowledgements must be what a few lists say.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import hypothesis.strategies as st
import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peer import Peer

from bus_support import PATIENCE, wait_until
from store_support import open_store, raws
from tapebus import tapewriter, wire
from tapebus._ingest import Ingest
from tapebus._ring import Ring
from tapebus._topics import Topics
from tapebus.errors import StoreError, StoreFull
from tapebus.tapewriter import TapeWriter

NAMES = ("one", "two")
PLACES = {1: "client.encode", 2: "client.ring_full", 3: "client.spool_full", 4: "client.exit_abandoned"}
#: A map that says it has one key and ends.
BROKEN = b"\x81\xa1x"
#: A disk that forgets nothing is enough here: crashes lose what was not committed, the power stays on.
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Entry(NamedTuple):
    """What the bus took from a producer in one go; every `count` events of it use up a number of the producer."""

    name: str
    kind: str
    count: int
    raws: tuple[bytes, ...] = ()
    place: int = 0


def event(name: str, n: int, size: int) -> bytes:
    data = {"n": n, "text": "x" * size}
    return msgspec.msgpack.encode({"event_type": f"t{n % 3}", "timestamp": float(n), "source": name, "data": data})


class Gated:
    """The store behind a door: closed, a commit reaches the disk and nobody hears of it; `dead`, none does any more."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.door = threading.Lock()
        self.writing = threading.Lock()
        self.dead = self.full = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def commit(self, commit: Any) -> None:
        with self.writing:
            if self.dead:
                raise StoreError("killed")
            if self.full:
                raise StoreFull("full for the test")
            self._store.commit(commit)
        with self.door:
            pass

    def maintain(self, now: float) -> float:
        with self.writing:
            return float(self._store.maintain(now))


class Life:
    """One life of the bus on a directory, until it is stopped or killed."""

    def __init__(self, directory: Path, limits: dict[str, Any]) -> None:
        self.directory = directory
        self.store = Gated(open_store(directory, **limits))
        self.zmq = zmq.Context()
        topics = Topics()
        topics.load(self.store.topics())
        self.ring = Ring(topics, 1024, next_seq=self.store.last_seq() + 1)
        for book in self.store.producers():
            self.ring.producer(book.producer_id, book.epoch, book.source, book)
        self.ingest = Ingest(self.ring, 1)
        self.router = self.zmq.socket(zmq.ROUTER)
        self.router.linger = 0
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.endpoint = f"tcp://127.0.0.1:{self.router.bind_to_random_port('tcp://127.0.0.1')}"
        self.ingest.add(self.router, router=True)
        self.errors: list[BaseException] = []
        self.tape = TapeWriter(
            self.ring, self.ingest, self.store, self.errors.append, dict, lambda *words, **more: None
        )
        self.receiver = threading.Thread(target=self.ingest.run, daemon=True)
        self.tape.start()
        self.receiver.start()

    def end(self) -> None:
        """Finish what is in hand and close."""
        self.ingest.stop()
        self.receiver.join(PATIENCE)
        self.ring.stop()
        self.tape.join(PATIENCE)
        assert not self.receiver.is_alive() and not self.tape.is_alive()
        self.router.close(0)
        self.zmq.term()
        self.store.close()

    def kill(self, to: Path) -> None:
        """Leave to the next life, in `to`, what a kill at this moment leaves on the disk."""
        with self.store.writing:
            shutil.copytree(self.directory / "tape", to / "tape")
            self.store.dead = True
        if self.store.door.locked():
            self.store.door.release()
        self.end()
        shutil.rmtree(self.directory)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="tb-model-", dir=FAST))
        self.context = zmq.Context()
        self.steady = 1000.0
        self.patch = mock.patch.multiple(tapewriter, steady_clock=lambda: self.steady, REGAIN_S=0.005)
        self.patch.start()
        self.lives = 0
        self.log: list[Entry] = []
        #: How many entries of the log are on disk for certain.
        self.safe = 0
        self.life: Any = None
        self.peers: dict[str, Peer] = {}

    @initialize(
        max_events=st.sampled_from([0, 0, 30, 200]),
        max_age_days=st.sampled_from([0, 0, 1]),
        seal_events=st.sampled_from([3, 20, 4096]),
    )
    def begin(self, **limits: Any) -> None:
        self.limits = {"initial_bytes": 1 << 16, **limits}
        self._live(self.root / "0")
        for name in NAMES:
            peer = self.peers[name] = Peer(self.context, self.life.endpoint, name, [])
            assert peer.connect() == 0

    def _live(self, directory: Path) -> None:
        self.life = Life(directory, self.limits)

    def teardown(self) -> None:
        if self.held:
            self.life.store.door.release()
        if self.life is not None:
            self.life.store.full = False
            self.life.end()
        for peer in self.peers.values():
            peer.drop()
        self.context.term()
        self.patch.stop()
        shutil.rmtree(self.root)

    # -- what the model knows -----------------------------------------------------------------------

    @property
    def held(self) -> bool:
        return self.life is not None and self.life.store.door.locked()

    @property
    def open(self) -> bool:
        return not self.held and not self.life.store.full

    def taken(self, name: str, entries: list[Entry] | None = None) -> int:
        """The last number of `name` that is accounted for."""
        return sum(each.count for each in (self.log if entries is None else entries) if each.name == name)

    def _numbered(self, name: str, upto: int, size: int = 0) -> None:
        """Let `name` have events numbered up to `upto`."""
        events = self.peers[name].events
        events += [event(name, n, size) for n in range(len(events) + 1, upto + 1)]

    def _heard(self, name: str) -> list[tuple[int, int]]:
        """Wait until the bus has acted on all that `name` sent; the refusals it gave meanwhile."""
        peer = self.peers[name]
        peer.pongs, before = 0, len(peer.nacks)
        peer.send(wire.PING, wire.S_HELLO.pack(self.taken(name)))
        peer.hear(lambda: peer.pongs == 1)
        return peer.nacks[before:]

    # -- producers ----------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), count=st.integers(1, 6), size=st.sampled_from([0, 0, 0, 300, 20_000]))
    def publish(self, name: str, count: int, size: int) -> None:
        first = self.taken(name) + 1
        self._numbered(name, first + count - 1, size)
        self._batch(name, first, first + count - 1)

    @rule(name=st.sampled_from(NAMES), counts=st.lists(st.integers(1, 9), min_size=2, max_size=6))
    def publish_much(self, name: str, counts: list[int]) -> None:
        for count in counts:
            self.publish(name, count, 0)

    @rule(name=st.sampled_from(NAMES), back=st.integers(1, 400), more=st.integers(0, 4))
    def resend(self, name: str, back: int, more: int) -> None:
        """Everything or some of what the bus has already, and perhaps what it has not."""
        last = self.taken(name) + more
        first = max(1, self.taken(name) + 1 - back)
        if first <= last:
            self._numbered(name, last)
            self._batch(name, first, last)

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 20), length=st.integers(1, 10))
    def resend_a_piece(self, name: str, back: int, length: int) -> None:
        first = max(1, self.taken(name) - back)
        last = min(first + length - 1, self.taken(name))
        if first <= last:
            self._batch(name, first, last)

    def _batch(self, name: str, first: int, last: int) -> None:
        peer, known = self.peers[name], self.taken(name)
        peer.batch(first, last)
        assert self._heard(name) == []
        if last > known:
            # a frame is well-formed as a whole or not at all, the part that is known already included
            sound = BROKEN not in peer.events[first - 1 : last]
            found = tuple(peer.events[known:last]) if sound else ()
            self.log.append(Entry(name, "events" if sound else "refused", last - known, found))

    @rule(name=st.sampled_from(NAMES), ahead=st.integers(2, 9))
    def out_of_order(self, name: str, ahead: int) -> None:
        first = self.taken(name) + ahead
        self._numbered(name, first)
        self.peers[name].batch(first, first)
        assert self._heard(name) == [(self.taken(name) + 1, wire.NACK_SEQUENCE)]

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 3))
    def damaged_on_the_way(self, name: str, back: int) -> None:
        first, last = max(1, self.taken(name) - back), self.taken(name) + 1
        self._numbered(name, last)
        self.peers[name].batch(first, last, crc=12345)
        assert self._heard(name) == [(self.taken(name) + 1, wire.NACK_CRC)]

    @rule(name=st.sampled_from(NAMES), count=st.integers(1, 3))
    def damaged_by_the_sender(self, name: str, count: int) -> None:
        first = self.taken(name) + 1
        self._numbered(name, first + count - 1)
        peer = self.peers[name]
        peer.events[first - 1 :] = [BROKEN] * count
        peer.batch(first, first + count - 1)
        assert self._heard(name) == []
        self.log.append(Entry(name, "refused", count))

    @rule(name=st.sampled_from(NAMES))
    def of_another_epoch(self, name: str) -> None:
        self._numbered(name, self.taken(name) + 1)
        self.peers[name].batch(self.taken(name) + 1, self.taken(name) + 1, epoch=8)
        assert self._heard(name) == [(0, wire.NACK_UNKNOWN)]

    @rule(
        name=st.sampled_from(NAMES), back=st.integers(0, 5), length=st.integers(0, 5), place=st.sampled_from([*PLACES])
    )
    def gap(self, name: str, back: int, length: int, place: int) -> None:
        known = self.taken(name)
        first, last = max(1, known + 1 - back), known + length
        if first > last:
            return
        self._numbered(name, last)
        self.peers[name].gap(first, last, place)
        assert self._heard(name) == []
        if last > known:
            self.log.append(Entry(name, "dropped", last - known, place=place))

    @rule(name=st.sampled_from(NAMES))
    def reconnect(self, name: str) -> None:
        peer = self.peers[name]
        before = peer.durable
        durable = peer.connect()
        assert before <= durable <= self.taken(name)
        assert durable == self.taken(name) or not self.open

    # -- the bus ------------------------------------------------------------------------------------

    @precondition(lambda self: self.open)
    @rule()
    def hold(self) -> None:
        self._settle()
        self.life.store.door.acquire()

    @precondition(lambda self: self.held)
    @rule()
    def let_go(self) -> None:
        self.life.store.door.release()

    @precondition(lambda self: self.open)
    @rule()
    def fill_the_disk(self) -> None:
        self._settle()
        self.life.store.full = True

    @precondition(lambda self: self.life.store.full)
    @rule()
    def free_the_disk(self) -> None:
        self.life.store.full = False

    @rule()
    def kill(self) -> None:
        acknowledged = {name: peer.durable for name, peer in self.peers.items()}
        for peer in self.peers.values():
            peer.drop()
        self.lives += 1
        to = self.root / str(self.lives)
        self.life.kill(to)
        self._live(to)
        self._find_what_is_left()
        for name, least in acknowledged.items():
            assert self.taken(name) >= least, "acknowledged and gone"
            peer = self.peers[name]
            peer._endpoint, peer.durable = self.life.endpoint, 0
            # what is lost was never acknowledged: its producer has it still and may say it differently now
            assert peer.connect() == self.taken(name)
            del peer.events[self.taken(name) :]

    def _find_what_is_left(self) -> None:
        """Some beginning of the log, at least all that was safe, and all of the books agree about which."""
        fits = [n for n in range(self.safe, len(self.log) + 1) if self._books(self.log[:n]) == self._found_books()]
        assert fits, f"the books on disk fit no moment since the last acknowledgement: {self._found_books()}"
        del self.log[fits[-1] :]
        self.safe = len(self.log)

    @precondition(lambda self: self.open)
    @rule()
    def restart(self) -> None:
        self._settle()
        directory = self.life.directory
        self.life.end()
        self._live(directory)
        for name, peer in self.peers.items():
            peer._endpoint = self.life.endpoint
            assert peer.connect() == self.taken(name)

    @precondition(lambda self: self.open)
    @rule(hours=st.sampled_from([0, 1, 12, 13, 25]))
    def time_passes(self, hours: int) -> None:
        """Let upkeep run: it seals, prunes and merges."""
        self._settle()
        self.steady += hours * 3600.0
        before = self.life.store.first_seq()
        for _ in range(3):
            self.life.tape._upkeep_at = 0.0
            self.life.ring.wake_tape()
            wait_until(lambda: self.life.tape._upkeep_at > 0.0, "upkeep")
        limits, last = self.limits, self.life.store.last_seq()
        first = self.life.store.first_seq()
        assert before <= first <= max(last, 1)
        if not limits["max_age_days"] and (not limits["max_events"] or last - before < limits["max_events"]):
            assert first == before, "nothing had to go"

    # -- what must hold -----------------------------------------------------------------------------

    def _settle(self) -> None:
        """Wait until everything taken is on disk and acknowledged."""
        life = self.life
        wait_until(lambda: life.ring.fill[0] == 0 and life.tape.done_seq == life.ring.last_seq, "the tape to follow")
        for name, peer in self.peers.items():
            taken = self.taken(name)
            peer.hear(lambda peer=peer, taken=taken: peer.durable >= taken)
            assert peer.durable == taken
        assert life.errors == []
        self.safe = len(self.log)

    @staticmethod
    def _books(entries: list[Entry]) -> dict[str, tuple[Any, ...]]:
        out = {}
        for name in NAMES:
            mine = [each for each in entries if each.name == name]
            dropped: dict[str, int] = {}
            for each in mine:
                if each.kind == "dropped":
                    dropped[PLACES[each.place]] = dropped.get(PLACES[each.place], 0) + each.count
            refused = sum(each.count for each in mine if each.kind == "refused")
            stored = sum(each.count for each in mine if each.kind == "events")
            rejected = {"ingest.malformed": refused} if refused else {}
            if mine:
                out[name] = (sum(each.count for each in mine), stored, rejected, dropped)
        return out

    def _found_books(self) -> dict[str, tuple[Any, ...]]:
        found = {book.source: book for book in self.life.store.producers()}
        return {n: (b.watermark, b.stored, b.rejected, b.dropped) for n, b in found.items() if b.watermark}

    @invariant()
    def tape_books_and_acknowledgements_are_those_of_the_model(self) -> None:
        if self.life is None or not self.peers or not self.open:
            return
        self._settle()
        store = self.life.store
        expected = [raw for each in self.log if each.kind == "events" for raw in each.raws]
        first, last = store.first_seq(), store.last_seq()
        assert last == len(expected)
        assert raws(list(store.blocks())) == expected[first - 1 :]
        assert self._found_books() == self._books(self.log)
        assert all(book.highest_seq >= book.watermark for book in store.producers())


@pytest.mark.timeout(7200)
def test_tape_books_and_acknowledgements_are_those_of_a_simple_model(size, seed, figures):
    steps = {"steps": 0, "kills": 0}

    class Counted(Machine):
        def teardown(self) -> None:
            steps["kills"] += self.lives
            steps["steps"] += len(self.log)
            super().teardown()

    examples = size(50, 1000, 10_000)
    run_state_machine_as_test(
        seeded(seed)(Counted),
        settings=settings(
            max_examples=examples,
            stateful_step_count=size(15, 40, 60),
            deadline=None,
            database=None,
            # making a failure smaller would take longer than the rest: what is printed repeats it
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    figures.update(examples=examples, entries=steps["steps"], kills=steps["kills"])

"""Spools: what a publisher's file holds after any death of its process, and who takes it over."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bus_support import PATIENCE, quote, wait_until
from scripted_bus import PATIENCE_S, Bus
from tapebus import spool as spools
from tapebus._outbox import Outbox
from tapebus.errors import UsageError
from tapebus.publisher import Publisher

CORE = str(Path(__file__).parents[1] / "core")
EVENTS, BYTES = 8, 300
MARK, SECTOR = 2048, 512


@pytest.fixture
def bus():
    bus = Bus()
    yield bus
    bus.kill()


@pytest.fixture
def spool_dir(tmp_path):
    return tmp_path / "spool"


def numbers(box: Outbox) -> tuple[dict[int, bytes], list[tuple[int, int, int]]]:
    """Events by number and dropped ranges, as a sender would find them."""
    events, gaps, seq = {}, [], box.first_pending
    while seq < box.next_seq:
        if (gap := box.gap_at(seq)) is not None:
            gaps.append(gap)
            seq = gap[1] + 1
        else:
            body, n = box.build_batch(seq, 1, 1 << 20)
            assert n == 1
            events[seq] = body[5:]
            seq += 1
    return events, gaps


def recovered(memory: bytes) -> tuple[Outbox, int]:
    box = Outbox(EVENTS, BYTES, memory=bytearray(memory))
    return box, box.recover()


class SpoolModel(RuleBasedStateMachine):
    """An outbox in a file that a disk hears of now and then; killed or cut from power after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = bytearray(spools.RECORDS_AT + BYTES)
        self.box = Outbox(EVENTS, BYTES, memory=self.memory, epoch=7, careful=True)
        self.disk = bytes(self.memory)
        self.promised: set[bytes] = set()  # published, on the disk, and not acknowledged
        self.epoch = 7
        self.made = 0

    @rule(size=st.integers(1, 60))
    def publish(self, size):
        self.made += 1
        self.box.append(msgspec.msgpack.encode([self.made, bytes(size)]))

    @rule(place=st.sampled_from([1, 2]))
    def drop(self, place):
        self.box.drop(place)

    @precondition(lambda self: self.box.first_pending < self.box.next_seq)
    @rule(data=st.data())
    def ack(self, data):
        upto = data.draw(st.integers(self.box.first_pending, self.box.next_seq - 1))
        for seq, event in numbers(self.box)[0].items():
            if seq <= upto:
                self.promised.discard(event)
        self.box.ack(upto)

    @rule()
    def renumber(self):
        self.epoch += 1
        self.box.renumber(self.epoch)

    @rule()
    def sync(self):
        point = self.box.point
        self.disk = bytes(self.memory)
        self.promised = set(numbers(self.box)[0].values())
        self.box.synced(point[1])

    @invariant()
    def a_kill_leaves_exactly_what_was_waiting(self):
        box, torn = recovered(self.memory)
        events, gaps = numbers(self.box)
        found, holes = numbers(box)
        assert (found, torn, box.epoch) == (events, 0, self.epoch)
        assert box.next_seq == self.box.next_seq
        # ranges may have been joined
        assert sum(last - first + 1 for first, last, _ in holes) == sum(last - first + 1 for first, last, _ in gaps)

    @rule(data=st.data())
    def a_power_cut_leaves_what_the_disk_had_been_told(self, data):
        size = len(self.memory)
        newer = data.draw(st.sets(st.integers(0, size // SECTOR)))
        torn = bytearray(self.disk)
        for sector in newer:
            torn[sector * SECTOR : (sector + 1) * SECTOR] = self.memory[sector * SECTOR : (sector + 1) * SECTOR]
        assert self.promised <= set(numbers(recovered(torn)[0])[0].values())


SpoolModel.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
test_a_spool_holds_what_was_waiting_after_any_kill_and_what_was_synced_after_any_power_cut = SpoolModel.TestCase


def test_a_record_cut_anywhere_takes_nothing_else_with_it():
    memory = bytearray(spools.RECORDS_AT + BYTES)
    box = Outbox(EVENTS, BYTES, memory=memory)
    box.append(b"first")
    box.drop(1)
    before = bytes(memory)
    box.append(b"second")
    after = bytes(memory)
    changed = [at for at in range(spools.RECORDS_AT, len(memory)) if before[at] != after[at]]
    tears = 0
    for cut in range(len(changed)):
        page = bytearray(before)
        for at in changed[:cut]:
            page[at] = after[at]
        found, torn = recovered(page)
        assert numbers(found) == ({1: b"first"}, [(2, 2, 1)])
        tears += torn
    assert tears
    # the record is whole, only its number was not given yet
    page = bytearray(after)
    page[MARK : spools.RECORDS_AT] = before[MARK : spools.RECORDS_AT]
    assert numbers(recovered(page)[0]) == ({1: b"first", 3: b"second"}, [(2, 2, 1)])


def test_a_damaged_record_is_never_sent():
    memory = bytearray(spools.RECORDS_AT + BYTES)
    box = Outbox(EVENTS, BYTES, memory=memory)
    for event in (b"first", b"second", b"third"):
        box.append(event)
    memory[memory.index(b"second")] ^= 1
    found, torn = recovered(memory)
    assert torn == 1
    # what follows a torn record cannot be found any more, but it is on the books
    assert numbers(found) == ({1: b"first"}, [(2, 3, 4)])


def run_python(code: str, *args: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": CORE}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        check=check,
        timeout=60,
        env=environ,
        capture_output=True,
        text=True,
    )


#: Publishes the numbers ARGV[3]..ARGV[4] to ARGV[1] through a spool in ARGV[2], says the count, and dies of SIGKILL.
KILLED = """
import os, signal, sys
from tapebus.publisher import Publisher
pub = Publisher("guard", sys.argv[1], spool="crash", spool_dir=sys.argv[2])
kept = sum(pub.publish("t", {"i": i}) for i in range(int(sys.argv[3]), int(sys.argv[4])))
print(kept, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(endpoint: str, spool_dir: Path, first: int, last: int) -> None:
    done = run_python(KILLED, endpoint, spool_dir, first, last, check=False)
    assert (done.returncode, int(done.stdout)) == (-9, last - first), done.stderr


def test_the_next_publisher_of_the_source_sends_first_what_a_killed_one_left(bus, spool_dir):
    absent = bus.endpoint
    bus.kill()
    killed(absent, spool_dir, 0, 1000)
    killed(absent, spool_dir, 1000, 1500)
    with Publisher("guard", absent, spool="crash", spool_dir=spool_dir) as pub:
        assert pub.stats()["adopted"] == 1500
        for i in range(1500, 2000):
            assert pub.publish("t", {"i": i})
        again = Bus(absent)
        try:
            assert pub.flush(PATIENCE_S)
            assert [event["data"]["i"] for events in again.events.values() for event in events.values()] == list(
                range(2000)
            )
            assert len(again.hw) == 3
        finally:
            again.kill()
    assert list(spool_dir.iterdir()) == []


def test_a_flush_without_events_of_its_own_waits_for_what_a_predecessor_left(bus, spool_dir):
    absent = bus.endpoint
    bus.kill()
    killed(absent, spool_dir, 0, 1000)
    with Publisher("guard", absent, spool="crash", spool_dir=spool_dir) as pub:
        assert not pub.flush(0.05)
        again = Bus(absent)
        try:
            assert pub.flush(PATIENCE_S)
            assert sum(len(events) for events in again.events.values()) == 1000
            assert pub.flush(0.0)
        finally:
            again.kill()


def test_a_publisher_that_ends_leaves_the_rest_in_its_spool_and_says_so(bus, spool_dir):
    with Publisher("guard", "tcp://127.0.0.1:1", spool="crash", spool_dir=spool_dir) as pub:
        assert pub.publish("t", {"i": 1})
        pub.close()
        stats = pub.stats()
        assert (stats["in_flight"], stats["dropped"]) == (1, {})
        assert not pub.publish("t", {"i": 2})
    assert len(list(spool_dir.iterdir())) == 1


def test_a_publisher_that_ends_at_once_lets_go_of_what_it_has_taken_over(bus, spool_dir):
    killed(bus.endpoint, spool_dir, 0, 10)
    pub = Publisher("guard", bus.endpoint, spool="crash", spool_dir=spool_dir)
    orphans = list(pub._orphans)
    assert orphans
    pub._sender.stop()
    pub.close()
    wait_until(lambda: not any(each.held for each in orphans), "the orphans to be let go")


def test_a_full_spool_is_counted_by_number_and_place(bus, spool_dir):
    bus.credit = (0, 0)
    with Publisher("guard", bus.endpoint, spool="crash", spool_dir=spool_dir, capacity_events=3) as pub:
        assert [pub.publish("t", {"i": i}) for i in range(5)] == [True] * 3 + [False] * 2
        assert pub.stats()["dropped"] == {"client.spool_full": 2}
        bus.credit = (100, 100_000)
        assert pub.flush(PATIENCE_S)
        assert bus.gaps == [(4, 5, 3)]


def test_what_a_killed_producer_dropped_reaches_the_books(bus, spool_dir):
    code = KILLED.replace("print(kept, flush=True)", 'pub.publish("t", object()); print(kept, flush=True)')
    absent = bus.endpoint
    bus.kill()
    run_python(code, absent, spool_dir, 0, 3, check=False)
    again = Bus(absent)
    try:
        with Publisher("guard", absent, spool="crash", spool_dir=spool_dir):
            again.wait_for(lambda: again.gaps)
        assert again.gaps == [(4, 4, 1)]
        assert again.stored() == [0, 1, 2]
    finally:
        again.kill()


FORK = """
import os, sys
from tapebus.publisher import Publisher
pub = Publisher("guard", sys.argv[1], spool="crash", spool_dir=sys.argv[2])
for i in range(100): pub.publish("t", {"i": i})
pid = os.fork()
if pid == 0:
    for i in range(1000, 1100): pub.publish("t", {"i": i})
    assert pub.stats()["spool"] == "crash" and pub.stats()["published"] == 100
    os._exit(0)  # says no goodbye
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
files = os.listdir(sys.argv[2])
assert len(files) == 2, files
for i in range(100, 200): pub.publish("t", {"i": i})
os._exit(0)
"""


def test_a_forked_child_has_a_spool_of_its_own(bus, spool_dir):
    absent = bus.endpoint
    bus.kill()
    run_python(FORK, absent, spool_dir)
    again = Bus(absent)
    try:
        with Publisher("guard", absent, spool="crash", spool_dir=spool_dir):
            again.wait_for(lambda: len(again.stored()) == 300)
        lives = sorted([event["data"]["i"] for event in events.values()] for events in again.events.values())
        assert [life for life in lives if life] == [list(range(200)), list(range(1000, 1100))]
    finally:
        again.kill()


def test_a_spool_in_use_is_nobody_elses(spool_dir):
    with Publisher("guard", "tcp://127.0.0.1:1", spool="crash", spool_dir=spool_dir) as one:
        one.publish("t", {})
        with Publisher("guard", "tcp://127.0.0.1:1", spool="crash", spool_dir=spool_dir) as other:
            assert other.stats()["adopted"] == 0
        assert one.stats()["in_flight"] == 1


def test_files_are_private_and_foreign_ones_are_left_alone(bus, spool_dir, tmp_path, caplog):
    absent = "tcp://127.0.0.1:1"
    killed(absent, spool_dir, 0, 10)
    (orphan,) = spool_dir.iterdir()
    assert stat.S_IMODE(spool_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(orphan.stat().st_mode) == 0o600
    elsewhere = tmp_path / "elsewhere.spool"
    orphan.rename(elsewhere)
    (spool_dir / "link.spool").symlink_to(elsewhere)
    (spool_dir / "strange.spool").write_bytes(b"no spool")
    whole = elsewhere.read_bytes()
    (spool_dir / "short.spool").write_bytes(whole[:-1])
    (spool_dir / "flipped.spool").write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    os.mkfifo(spool_dir / "pipe.spool", 0o600)
    names = {path.name for path in spool_dir.iterdir()}
    if os.getuid() == 0:
        (spool_dir / "foreign.spool").write_bytes(whole)
        os.chown(spool_dir / "foreign.spool", 12345, 12345)
        names.add("foreign.spool")
    with Publisher("guard", absent, spool="crash", spool_dir=spool_dir) as pub:
        assert pub.stats()["adopted"] == 0
    assert {path.name for path in spool_dir.iterdir()} == names
    told = [record.getMessage() for record in caplog.records]
    for name in ("strange", "short", "flipped"):
        assert sum(f"{name}.spool is left alone" in line for line in told) == 1, told


def test_an_orphan_of_another_source_or_bus_is_left_to_them(spool_dir):
    killed("tcp://127.0.0.1:1", spool_dir, 0, 10)
    for source, endpoint in (("other", "tcp://127.0.0.1:1"), ("guard", "tcp://127.0.0.1:2")):
        with Publisher(source, endpoint, spool="crash", spool_dir=spool_dir) as pub:
            assert pub.stats()["adopted"] == 0
    with Publisher("guard", "tcp://localhost:1", spool="crash", spool_dir=spool_dir) as pub:
        assert pub.stats()["adopted"] == 10


NO_ROOM = """
import resource, sys
from tapebus.publisher import Publisher
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
pub = Publisher("guard", sys.argv[1], spool="crash", spool_dir=sys.argv[2])
assert all(pub.publish("t", {"i": i}) for i in range(10))
assert pub.stats()["spool"] == "memory"
"""


def test_without_room_for_a_spool_a_publisher_warns_and_keeps_events_in_memory(spool_dir):
    done = run_python(NO_ROOM, "tcp://127.0.0.1:1", spool_dir)
    assert "no spool for guard, its events are kept in memory only" in done.stderr
    assert "File too large" in done.stderr
    assert list(spool_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda path: path.write_text(""), "File exists"),
        (lambda path: path.symlink_to(path.parent), "not a directory"),
    ],
)
def test_a_directory_that_is_none_is_refused(spool_dir, caplog, prepare, why):
    prepare(spool_dir)
    with Publisher("guard", "tcp://127.0.0.1:1", spool="crash", spool_dir=spool_dir) as pub:
        assert pub.stats()["spool"] == "memory"
    assert why in caplog.text


def test_a_directory_for_all_users_is_left_as_it_is(spool_dir, caplog):
    spool_dir.mkdir()
    spool_dir.chmod(0o1777)
    with Publisher("guard", "tcp://127.0.0.1:1", spool="crash", spool_dir=spool_dir) as pub:
        assert pub.stats()["spool"] == "memory"
    assert stat.S_IMODE(spool_dir.stat().st_mode) == 0o1777
    assert "other users may write there" in caplog.text


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(spool_dir, caplog):
    spool_dir.mkdir(mode=0o700)
    os.chown(spool_dir, 12345, 12345)
    with Publisher("guard", "tcp://127.0.0.1:1", spool="crash", spool_dir=spool_dir) as pub:
        assert pub.stats()["spool"] == "memory"
    assert "belongs to another user (uid 12345)" in caplog.text


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "btrfs"])
def test_a_file_system_that_may_take_its_word_back_is_refused(spool_dir, caplog, monkeypatch, kind):
    monkeypatch.setattr(spools, "_file_system", lambda directory: kind)
    with Publisher("guard", "tcp://127.0.0.1:1", spool="crash", spool_dir=spool_dir) as pub:
        assert pub.stats()["spool"] == "memory"
    assert f"{kind} does not keep its promise" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the types of its mounts in /proc")
def test_the_type_of_a_file_system_is_found_by_its_mount_point(spool_dir):
    assert spools._file_system(Path("/proc/self")) == "proc"
    assert spools._file_system(Path("/dev/shm")) == "tmpfs"
    assert spools._file_system(spool_dir) not in ("", "proc")


def test_mode_and_directory_come_from_the_environment_too(spool_dir, monkeypatch):
    monkeypatch.setenv("TAPEBUS_SPOOL", "crash")
    monkeypatch.setenv("TAPEBUS_SPOOL_DIR", str(spool_dir))
    with Publisher("guard", "tcp://127.0.0.1:1") as pub:
        assert pub.stats()["spool"] == "crash"
        assert len(list(spool_dir.iterdir())) == 1
    with pytest.raises(UsageError, match="spool='disk'"):
        Publisher("guard", spool="disk")


def test_a_bus_that_forgot_gets_new_numbers_that_survive_a_kill(bus, spool_dir):
    box = spools.create(spool_dir, "guard", bus.endpoint, 100, 1 << 16, 5, False)
    with contextlib.closing(contextlib.ExitStack()):
        for event in (b"a", b"b", b"c"):
            box.outbox.append(event)
        box.outbox.ack(1)
        box.outbox.renumber(9)
        box.outbox.append(b"d")
    producer_id = box.identity[0]
    box.let_go()
    (orphan,) = spools.orphans(spool_dir, lambda facts: True)
    assert orphan.identity == (producer_id, 9)
    assert numbers(orphan.outbox) == ({1: b"b", 2: b"c", 3: b"d"}, [])
    orphan.let_go()


def test_the_disk_hears_of_a_power_spool_while_there_is_no_bus(spool_dir, monkeypatch):
    synced = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        real(fd)
        synced.append(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with Publisher("guard", "tcp://127.0.0.1:1", spool="power", spool_dir=spool_dir, spool_sync_ms=1) as pub:
        for _ in range(3):
            seen = len(synced)
            assert pub.publish("t", {})
            wait_until(lambda seen=seen: len(synced) > seen, "a sync")


def test_a_failed_sync_is_said_once_and_not_repeated(spool_dir, monkeypatch, caplog):
    tried = []

    def fdatasync(fd: int) -> None:
        tried.append(fd)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    caplog.set_level(logging.ERROR, "tapebus.publisher")
    with Publisher("guard", "tcp://127.0.0.1:1", spool="power", spool_dir=spool_dir, spool_sync_ms=1) as pub:
        assert pub.publish("t", {})
        wait_until(lambda: pub.stats()["spool"] == "crash", "the failure to show")
        for _ in range(100):
            assert pub.publish("t", {})
    assert len(tried) == 1
    assert caplog.text.count("but no power cut") == 1


def test_acknowledged_room_of_a_power_spool_is_used_again(bus, spool_dir):
    options = {"capacity_bytes": 20_000, "spool": "power", "spool_dir": spool_dir, "spool_sync_ms": 1}
    with Publisher("guard", bus.endpoint, **options) as pub:
        for i in range(2000):
            wait_until(lambda i=i: pub.publish("t", {"i": i}), "room in the spool")
        assert pub.flush(PATIENCE_S)
        assert bus.stored() == list(range(2000))


def test_the_bus_takes_what_a_dead_producer_left(embed, spool_dir):
    options = f"spool_dir = '{spool_dir}'\nspool_reap_s = 0.05"
    bus = embed(["schema", "store"], bus=options)
    endpoint, elsewhere = bus.acked, "tcp://127.0.0.1:1"
    bus.stop()
    code = KILLED.replace('publish("t", {"i": i})', 'publish("user_action", {"user_id": "u", "action": str(i)})')
    run_python(code, endpoint, spool_dir, 0, 500, check=False)
    run_python(code, elsewhere, spool_dir, 0, 5, check=False)
    assert len(list(spool_dir.iterdir())) == 2
    again = embed(["schema", "store"], bus=options, again=bus)
    wait_until(lambda: len(list(spool_dir.iterdir())) == 1, "the bus to empty the spool")
    with again.tape() as tape:
        found = [event.data.action for event in tape.read(topics=["user_action"])]
    assert found == [str(i) for i in range(500)]
    book = next(each for each in again.runtime.stats()["producers"] if each["source"] == "guard")
    assert (book["stored"], book["in_flight"], book["unexplained"]) == (500, 0, 0)


def test_a_durable_publish_is_true_only_once_the_event_is_on_disk(bus):
    with Publisher("guard", bus.endpoint) as pub:
        assert pub.publish("t", {"i": 1}, durable=True, timeout=PATIENCE_S)
        assert bus.stored() == [1]
        bus.reject = {2}
        assert not pub.publish("t", {"i": 2}, durable=True, timeout=PATIENCE_S)
        assert pub.publish("t", {"i": 3}, durable=True, timeout=PATIENCE_S)
        assert not pub.publish("t", {"i": object()}, durable=True, timeout=PATIENCE_S)
    with Publisher("guard", "tcp://127.0.0.1:1") as absent:
        assert not absent.publish("t", {"i": 4}, durable=True, timeout=0.01)


def test_a_bus_without_a_store_makes_nothing_durable(embed):
    bus = embed(["schema"])
    with bus.publisher() as pub:
        assert not pub.publish("market_data", quote(1), durable=True, timeout=PATIENCE)
        assert pub.stats()["acked"] == 1

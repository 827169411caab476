"""What a full disk, a full map, a failing disk, a damaged tape and a long one mean for a running bus."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from bus_support import PATIENCE, wait_until
from store_support import block_of
from tapebus import Publisher, Tape
from tapebus.store import Commit, Unit
from tapebus_store import LmdbStore, StoreConfig, layout, quarantine
from tapebus_store.pages import PageFile
from tapebus_store.room import RESERVE_BYTES

STORE = ["schema", "store"]
MiB = 1 << 20
NOISE = json.dumps({"event_type": "noise", "timestamp": 1.0, "source": "x", "data": {"text": "x" * 3000}}).encode()


@pytest.fixture
def mount(data_dir: Path) -> Iterator[Callable[..., None]]:
    """``mount(directory, options)``: a small tmpfs there, unmounted when the buses of the test have ended."""
    mounted: list[Path] = []

    def do(directory: Path, options: str) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"{options},mode=700", "tmpfs", str(directory)]
        if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs takes root")
        mounted.append(directory)

    yield do
    for each in reversed(mounted):
        subprocess.run(["umount", "-l", str(each)], check=True)


def quote(number: int) -> dict[str, Any]:
    return {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2, "volume": float(number)}


class Source:
    """A publisher that counts from 1, and what of it is on the tape."""

    def __init__(self, bus: Any) -> None:
        self.bus = bus
        self.publisher = Publisher("source", endpoint=bus.acked)
        self.published = 0

    def publish(self, count: int) -> None:
        for _ in range(count):
            self.published += 1
            assert self.publisher.publish("market_data", quote(self.published), timestamp=float(self.published))

    def on_tape(self) -> list[int]:
        with Tape.open(self.bus.data_dir) as tape:
            return [int(e.data.volume) for e in tape.read(topics=["market_data"]) if e.source == "source"]

    def check(self) -> None:
        assert self.publisher.flush(PATIENCE)
        assert self.publisher.stats()["acked"] == self.published
        assert self.on_tape() == list(range(1, self.published + 1))


def alerts(bus: Any, name: str = "store_full") -> list[str]:
    with Tape.open(bus.data_dir) as tape:
        return [event.data.state for event in tape.read(topics=["alert"]) if event.data.name == name]


def free(path: Path) -> int:
    space = os.statvfs(path)
    return space.f_bavail * space.f_frsize


def fill_up(path: Path, name: str, left: int) -> Path:
    """A file that leaves `left` bytes of the file system."""
    ballast = path / name
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free(path) - left))
    return ballast


@pytest.mark.timeout(3600)
def test_a_full_disk_is_told_of_on_the_tape_loses_nothing_and_ends_by_itself(mount, make_bus, size, chance, figures):
    cycles = size(2, 10, 50)
    bus = make_bus(STORE, "[plugins.store]\ninitial_bytes = 1048576\n")
    mount(bus.data_dir, f"size={24 + cycles}m")
    bus.start()
    source = Source(bus)
    resumed: list[float] = []
    stuck = 0
    with zmq.Context() as context, context.socket(zmq.PUSH) as legacy:
        legacy.setsockopt(zmq.LINGER, 0)
        legacy.connect(bus.ingest)
        for cycle in range(cycles):
            ballast = [fill_up(bus.data_dir, "ballast", chance.randrange(0, 200_000))]
            while bus.stats()["bus"]["state"] != "store full":
                if source.publisher.stats()["in_flight"] < 5000:
                    source.publish(500)
            wait_until(lambda cycle=cycle: alerts(bus).count("raised") == cycle + 1, "the alert on the tape")
            if cycle % 2:
                # somebody takes the reserve's room as well, and a sender that knows no credit goes on
                ballast.append(fill_up(bus.data_dir, "more", 0))
                said = bus.log.read_text().count("acknowledging stops")
                while bus.log.read_text().count("acknowledging stops") == said:
                    legacy.send(NOISE)
                    threading.Event().wait(0.005)
                stuck += 1
            acked = source.publisher.stats()["acked"]
            source.publish(100)
            assert source.publisher.stats()["acked"] == acked
            for each in ballast:
                each.unlink()
            began = time.monotonic()
            wait_until(lambda: bus.stats()["bus"]["state"] == "running", "the bus to go on")
            resumed.append(time.monotonic() - began)
            wait_until(lambda cycle=cycle: alerts(bus).count("cleared") == cycle + 1, "the end of the alert")
            source.check()
    figures.update(cycles=cycles, nothing_could_be_written=stuck, resume_s_max=round(max(resumed), 2))
    figures.update(acked=source.published, lost=0, deaths=0)
    source.publisher.close()
    assert (bus.data_dir / "tape" / "reserve").stat().st_blocks * 512 >= RESERVE_BYTES
    assert alerts(bus) == ["raised", "cleared"] * cycles
    assert bus.stop() == 0


def test_a_bus_starts_on_a_full_disk_and_waits_for_room(mount, make_bus):
    bus = make_bus(STORE, "[plugins.store]\ninitial_bytes = 1048576\n")
    mount(bus.data_dir, "size=24m")
    bus.start()
    source = Source(bus)
    source.publish(1000)
    source.check()
    bus.kill()
    (bus.data_dir / "tape" / "reserve").unlink()
    ballast = fill_up(bus.data_dir, "ballast", 0)
    bus.start()
    bus.wait_for(lambda stats: stats["bus"]["state"] == "store full", "to see the full disk")
    source.publish(10)
    ballast.unlink()
    source.check()
    bus.wait_for(lambda stats: stats["bus"]["state"] == "running", "to go on")
    source.publisher.close()
    assert bus.stop() == 0


def test_a_file_system_without_inodes_hinders_nothing_once_the_tape_is_there(mount, make_bus):
    bus = make_bus(STORE)
    mount(bus.data_dir, "size=64m,nr_inodes=64")
    bus.start()
    made = []
    try:
        while True:
            made.append(bus.data_dir / f"inode{len(made)}")
            made[-1].touch()
    except OSError:
        pass
    source = Source(bus)
    source.publish(1000)
    source.check()
    bus.kill()
    bus.start()
    source.publish(1000)
    source.check()
    source.publisher.close()
    assert bus.stats()["bus"]["state"] == "running"
    assert bus.stop() == 0


def test_the_map_grows_under_load_and_its_limit_is_a_state_with_an_alert(make_bus, size, figures):
    limit = size(16, 256, 1024) * MiB
    bus = make_bus(STORE, f"[plugins.store]\ninitial_bytes = 65536\nmax_bytes = {limit}\n")
    bus.start()
    with Publisher("source", endpoint=bus.acked) as publisher:
        published = 0
        began = time.monotonic()
        while bus.stats()["bus"]["state"] == "running":
            for _ in range(200):
                if publisher.stats()["in_flight"] >= 1000:
                    break
                # noise, so that nothing is gained by compressing it
                action = {"user_id": "u", "action": "noise", "details": {"noise": os.urandom(1500).hex()}}
                published += publisher.publish("user_action", action)
        seconds = time.monotonic() - began
        # sealing may make room again meanwhile: the end of the alert follows then
        wait_until(lambda: alerts(bus)[:1] == ["raised"], "the alert on the tape")
        log = bus.log.read_text()
        stalls = sorted(float(each) for each in re.findall(r"the map grew to \d+ bytes in ([0-9.]+) ms", log))
        figures.update(from_bytes=65536, to_bytes=limit, growths=len(stalls), stall_ms_max=stalls[-1])
        figures.update(stall_ms_median=stalls[len(stalls) // 2], events_per_s=round(published / seconds))
        assert (bus.data_dir / "tape" / "data.mdb").stat().st_size <= limit + MiB
        assert f"max_bytes = {limit}" in log or "has reached plugins.store.max_bytes" in log
        acked = publisher.stats()["acked"]
        bus.kill()
        bus.config_file.write_text(bus.config_file.read_text().replace(str(limit), str(limit * 4)))
        bus.start()
        assert publisher.flush(PATIENCE)
        assert publisher.stats()["acked"] >= acked
        with Tape.open(bus.data_dir) as tape:
            assert sum(1 for _ in tape.read(topics=["user_action"])) == published
    assert bus.stop() == 0


@pytest.fixture
def disk(data_dir: Path) -> Iterator[Callable[[Path], Path]]:
    """``disk(directory)``: an ext4 of its own there, which may be told that it has an error; its node in sysfs."""
    made: list[Path] = []

    def do(directory: Path) -> Path:
        image = data_dir / "ext4.img"
        with image.open("wb") as file:
            file.truncate(64 * MiB)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
            pytest.skip("a file system of its own takes root and mkfs.ext4")
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        mounting = ["mount", "-o", "loop,errors=remount-ro", str(image), str(directory)]
        if subprocess.run(mounting, check=False, capture_output=True).returncode:
            pytest.skip("a loop device cannot be mounted here")
        made.append(directory)
        directory.chmod(0o700)
        found = subprocess.run(["findmnt", "-no", "SOURCE", str(directory)], capture_output=True, text=True, check=True)
        return Path("/sys/fs/ext4") / Path(found.stdout.strip()).name / "trigger_fs_error"

    yield do
    for each in made:
        subprocess.run(["umount", "-l", str(each)], check=True)


def test_a_file_system_that_turns_read_only_ends_the_bus_with_74(disk, make_bus):
    bus = make_bus(STORE)
    trigger = disk(bus.data_dir)
    if not trigger.exists():
        pytest.skip("this kernel cannot be told of an error of ext4")
    bus.start()
    source = Source(bus)
    source.publish(1000)
    source.check()
    acked = source.publisher.stats()["acked"]
    trigger.write_text("a test")
    source.publish(10)
    assert bus.process.wait(PATIENCE) == 74
    bus.process = None
    assert source.publisher.stats()["acked"] == acked
    assert source.on_tape()[:1000] == list(range(1, 1001))
    source.publisher.close()
    critical = [line for line in bus.log.read_text().splitlines() if " CRITICAL" in line]
    assert len(critical) == 1
    assert "the commit failed" in critical[0]


# -- damage ---------------------------------------------------------------------------------------


def tapebus(bus: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tapebus", *arguments, "--config", str(bus.config_file)],
        capture_output=True,
        text=True,
        check=False,
        env=bus.environ(),
    )


def damage_a_block(data: Path) -> tuple[int, int]:
    """Spoil the events of one block in the middle of a tape; the first and the last of them."""
    with PageFile(data) as file:
        assert file.newest is not None
        nodes = list(file.walk(file.databases(file.newest)["blocks"].root))
        node = nodes[len(nodes) // 2]
        assert node.value is not None
        header = layout.decode_header(node.key, node.value)
    broken = node.value[:-1] + bytes([node.value[-1] ^ 0xFF])
    data.write_bytes(data.read_bytes().replace(node.value, broken))
    return header.first_seq, header.last_seq


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_damaged_tape_is_set_aside_and_its_loss_is_told_everywhere(make_bus, how, figures):
    bus = make_bus(STORE, "[plugins.store]\nseal_events = 200\n").start()
    source = Source(bus)
    for _ in range(20):
        source.publish(100)
        assert source.publisher.flush(PATIENCE)
    if how == "killed":
        bus.kill()
    else:
        assert bus.stop() == 0
    file = bus.data_dir / "tape" / "data.mdb"
    first, last = damage_a_block(file)
    damaged = file.read_bytes()

    found = tapebus(bus, "check")
    assert found.returncode == 74
    assert "start the bus, which saves what is sound" in found.stdout
    # the bus meets the damage while it reads, or looks for it because it was killed too often
    quarantine.spoil_mark(file.parent, quarantine.DAMAGED, "a test")
    began = time.monotonic()
    bus.start()
    source.publish(100)
    assert source.publisher.flush(PATIENCE)
    figures["start_to_first_ack_s"] = round(time.monotonic() - began, 2)

    kept = [each for each in file.parent.glob("data.mdb.damaged-*")]
    assert [each.read_bytes()[8192:] for each in kept] == [damaged[8192:]]
    lost = last - first + 1
    assert bus.stats()["bus"]["lost"] == lost
    assert bus.stats()["store"]["holes"] == [[first, last]]
    assert alerts(bus, "store_damaged") == ["raised"]
    assert f"{lost} lost (bus_seq {first}..{last})" in bus.log.read_text()
    with Tape.open(bus.data_dir) as tape:
        seqs = [event.bus_seq for event in tape.read()]
        assert seqs == [*range(1, first), *range(last + 1, tape.last_seq + 1)]
        assert tape.holes == [(first, last)]
        backwards = [event.bus_seq for event in tape.read(reverse=True)]
        assert backwards == seqs[::-1]
    assert len(source.on_tape()) >= source.published - lost
    source.publisher.close()
    found = tapebus(bus, "check")
    assert f"bus_seq {first}..{last} was lost to damage" in found.stdout
    assert kept[0].name in found.stdout
    assert bus.stop() == 0


def test_damage_met_while_running_ends_the_bus_and_the_next_start_mends_it(make_bus):
    """A bus that reads a broken block cannot go on past it; it says so, ends with 74, and is well after a restart."""
    bus = make_bus(STORE, "[plugins.store]\nseal_events = 200\n").start()
    source = Source(bus)
    for _ in range(20):
        source.publish(100)
        assert source.publisher.flush(PATIENCE)
    assert bus.stop() == 0
    # what has to judge every event once begins at the beginning, and so comes to read the broken block
    store = LmdbStore(bus.data_dir, StoreConfig())
    store.commit(Commit(units=[Unit("tapebus:judge", 0)]))
    store.close()
    first, last = damage_a_block(bus.data_dir / "tape" / "data.mdb")
    bus.spawn()
    assert bus.process.wait(PATIENCE) == 74
    bus.process = None
    assert f"bus_seq {first}..{last}" in bus.log.read_text()
    bus.start()
    source.publish(10)
    assert source.publisher.flush(PATIENCE)
    assert bus.stats()["bus"]["lost"] == last - first + 1
    source.publisher.close()
    assert bus.stop() == 0


# -- length ---------------------------------------------------------------------------------------


def build_long(data_dir: Path, count: int) -> None:
    """A tape of about `count` quotes, a correlation id on every fiftieth, sealed as upkeep does it."""
    per_block = 4096
    store = LmdbStore(data_dir, StoreConfig(seal_events=per_block))
    try:
        commit = Commit(topics={1: "market_data"})
        while store.last_seq() < count:
            first = store.last_seq() + 1
            events = [(1, long_event(seq)) for seq in range(first, first + per_block)]
            commit.blocks = [block_of(first, events)]
            store.commit(commit)
            commit = Commit()
            store.maintain(0.0)
        while store.maintain(0.0):
            pass
    finally:
        store.close()


def long_event(seq: int) -> dict[str, Any]:
    event: dict[str, Any] = {"event_type": "market_data", "timestamp": float(seq), "source": "long", "data": quote(seq)}
    if seq % 50 == 0:
        event["correlation_id"] = f"signal-{seq}"
    return event


@pytest.mark.timeout(7200)
def test_the_first_acknowledgement_after_a_kill_does_not_wait_for_the_length_of_the_tape(make_bus, size, figures):
    count = size(100_000, 2_000_000, 10_000_000)
    bus = make_bus(STORE)
    build_long(bus.data_dir, count)
    with Tape.open(bus.data_dir) as tape:
        count = tape.last_seq
    figures.update(events=count, bytes=(bus.data_dir / "tape" / "data.mdb").stat().st_size)
    bus.start()
    first_acks: list[float] = []
    published = 0
    for _ in range(3):
        with Publisher("source", endpoint=bus.acked) as publisher:
            published += publisher.publish("market_data", quote(1))
            assert publisher.flush(PATIENCE)
        bus.kill()
        began = time.monotonic()
        bus.spawn()
        with Publisher("source", endpoint=bus.acked) as publisher:
            published += publisher.publish("market_data", quote(1))
            assert publisher.flush(PATIENCE)
            first_acks.append(time.monotonic() - began)
    figures["exec_to_first_ack_s"] = [round(each, 2) for each in first_acks]
    began = time.monotonic()
    with Tape.open(bus.data_dir) as tape:
        assert tape.last_seq >= count + published
        figures["open_ms"] = round((time.monotonic() - began) * 1e3, 1)
        queries = []
        for seq in (count // 2 // 50 * 50, count // 3 // 50 * 50):
            began = time.monotonic()
            assert [event.bus_seq for event in tape.read(correlation_id=f"signal-{seq}")] == [seq]
            queries.append(round((time.monotonic() - began) * 1e3, 1))
        figures["correlation_query_ms_first_then"] = queries
    assert bus.stop() == 0


# -- refusals -------------------------------------------------------------------------------------


def test_a_tape_of_a_newer_version_is_refused_with_one_line_and_left_alone(make_bus):
    bus = make_bus(STORE)
    store = LmdbStore(bus.data_dir, StoreConfig())
    store._durably(lambda txn, tape: store._put(txn, "meta", b"version", b"tapebus 99.0"))
    store.close()
    before = (bus.data_dir / "tape" / "data.mdb").read_bytes()
    for command in ("run", "query"):
        refused = tapebus(bus, command)
        assert refused.returncode == 74
        assert "written by store version 99.0" in refused.stderr.splitlines()[-1]
        assert "upgrade tapebus" in refused.stderr.splitlines()[-1]
    assert (bus.data_dir / "tape" / "data.mdb").read_bytes() == before


def test_a_data_directory_of_somebody_else_is_refused(make_bus):
    bus = make_bus(STORE)
    bus.data_dir.mkdir(mode=0o700)
    if os.geteuid() != 0:
        pytest.skip("giving a directory away takes root")
    os.chown(bus.data_dir, 12345, 12345)
    refused = tapebus(bus, "run")
    assert refused.returncode == 78
    assert "belongs to" in refused.stderr.splitlines()[-1]

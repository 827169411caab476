"""Power cuts on a real file system: the volume under a running bus stops and forgets what was not synced."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_plugins import DERIVED, TRIGGERS, install
from ledger import Checker, Verdict
from producers import Producer, finish

from bus_support import wait_until
from tapebus import Publisher

HERE = Path(__file__).parent
#: EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN: no further write reaches the disk, the journal is not flushed either.
SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
SIZE = {"ext4": 96 << 20, "xfs": 320 << 20}
RATES = {"elite_guard": 500, "webapp": 1500}
COUNT = """
import sys
from tapebus import Tape
with Tape.open(sys.argv[1]) as tape:
    print(sum(1 for event in tape.read(topics=["market_data", "user_action"])))
"""


class Volume:
    """A file system in a file, mounted through a loop device."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.image = directory / f"{kind}.image"
        self.path = directory / "volume"
        self.path.mkdir()
        with self.image.open("wb") as file:
            file.truncate(SIZE[kind])
        subprocess.run([f"mkfs.{kind}", "-q", self.image], check=True, capture_output=True)

    def mount(self) -> None:
        done = subprocess.run(
            ["mount", "-o", "loop", self.image, self.path], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no loop mount: {done.stderr.strip()}")

    def cut(self) -> None:
        """Take the power away from the disk."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, NO_LOG_FLUSH.to_bytes(4, "little"))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        """Unmount once the last process that died with the bus has let go."""
        wait_until(
            lambda: subprocess.run(["umount", self.path], capture_output=True, check=False).returncode == 0, "umount"
        )

    def close(self) -> None:
        """Leave no mount behind, whatever has happened."""
        if self.path.is_mount():
            subprocess.run(["umount", "--lazy", self.path], check=True, capture_output=True)
        self.image.unlink()


@pytest.fixture
def volume(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Volume]:
    kind = request.param
    if os.geteuid() != 0:
        pytest.skip("not root: nothing can be mounted")
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"no mkfs.{kind}")
    made = Volume(tmp_path, kind)
    try:
        made.mount()
        yield made
    finally:
        made.close()


def move(bus: Any, data_dir: Path) -> None:
    """Put the data directory of a bus elsewhere; configuration and log stay."""
    bus.config_file.write_text(bus.config_file.read_text().replace(str(bus.data_dir), str(data_dir)))
    bus.data_dir = data_dir


def cut(volume: Volume, bus: Any, pause: float) -> None:
    """Cut the power after `pause` seconds, and mount what is left."""
    threading.Event().wait(pause)
    volume.cut()
    bus.kill()
    volume.unmount()
    volume.mount()


def compare(checker: Checker) -> Verdict:
    """What is on the tape, against the ledgers as they were before it was read."""
    for stream in checker.streams.values():
        stream.ledger.read_on()
    checker.read_on()
    return checker.verdict()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("volume", ["ext4", "xfs"], indirect=True)
def test_what_was_acknowledged_outlives_power_cuts(
    volume: Volume,
    make_bus: Callable[..., Any],
    tmp_path: Path,
    size: Callable[..., Any],
    chance: Any,
    figures: dict[str, Any],
) -> None:
    bus = make_bus(["schema", "store", *DERIVED], "[plugins.store]\nseal_events = 1000")
    install(bus, tmp_path / "plugins")
    move(bus, volume.path / "data")
    recoveries, cycles = [], size(2, 100, 500)
    bus.start()
    producers = [Producer(bus.acked, source, tmp_path, rate=rate) for source, rate in RATES.items()]
    ledgers = [each.ledger for each in producers]
    checker = Checker(bus.data_dir, ledgers, TRIGGERS)
    try:
        wait_until(lambda: all(each.acked for each in producers), "the first acknowledgements")
        for cycle in range(cycles):
            cut(volume, bus, chance.uniform(0.0, 0.3))
            verdict = compare(checker)
            assert not verdict.wrong, (cycle, verdict)
            begun = time.monotonic()
            bus.spawn()
            wait_until(
                lambda begun=begun: any(each.read_on().acked_at > begun for each in ledgers), "an acknowledgement"
            )
            recoveries.append(max(each.acked_at for each in ledgers) - begun)
        ends = finish(producers)
        whole = Checker(bus.data_dir, ledgers, TRIGGERS)
        whole.read_on()
        wait_until(lambda: not whole.read_on() and not whole.underived(), "every derived event", 60.0 + cycles * 5.0)
        verdict = whole.verdict(bus.stats())
        assert not verdict.wrong, verdict
        assert verdict.stored == sum(each["published"] for each in ends)
        assert bus.stop() == 0
        assert "saving what is sound" not in bus.log.read_text()
    finally:
        for each in producers:
            each.kill()
        bus.kill()
    ordered = sorted(recoveries)
    figures |= {"cycles": cycles, "first_ack_s_p95": round(ordered[int(len(ordered) * 0.95)], 2)} | verdict.figures()


@pytest.mark.parametrize("volume", ["ext4"], indirect=True)
def test_a_writer_that_does_not_sync_is_found_out(volume, make_bus, tmp_path, figures):
    bus = make_bus(["schema", "store"])
    move(bus, volume.path / "data")
    bus.command = [sys.executable, str(HERE / "traced_bus.py"), str(bus.config_file), "nosync"]
    bus.variables |= {"RECORD_TRACE": "/dev/null", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    bus.start()
    producer = Producer(bus.acked, "elite_guard", tmp_path, rate=3000)
    try:
        wait_until(lambda: producer.acked > 1000, "acknowledgements")
        cut(volume, bus, 0.0)
        acked = producer.acked
        # in a process of its own: what such a writer leaves behind may kill whoever opens it
        found = subprocess.run([sys.executable, "-c", COUNT, bus.data_dir], capture_output=True, text=True, check=False)
        kept = int(found.stdout) if found.returncode == 0 else 0
    finally:
        producer.kill()
        bus.kill()
    figures |= {"acked": acked, "lost": acked - kept}
    assert kept < acked


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("volume", ["ext4"], indirect=True)
def test_what_a_power_spool_had_synced_outlives_the_power_cut(volume, make_bus, tmp_path, size, chance, figures):
    """There is no bus when the power goes; the successor of the dead producer sends what it left."""
    rate, sent, windows = 2000, 0, []
    bus = make_bus(["schema", "store"])
    for cycle in range(size(1, 50, 200)):
        spool = volume.path / f"spool{cycle}"
        variables = {"TAPEBUS_SPOOL": "power", "TAPEBUS_SPOOL_DIR": str(spool)}
        source = f"producer{cycle}"
        producer = Producer(bus.acked, source, tmp_path, rate=rate, window=0, variables=variables)
        try:
            promised = chance.randrange(1, 500)
            # half a second later, ten times as long as the spool may take to reach the disk
            wait_until(lambda one=producer, n=promised + rate // 2: one.ledger.read_on().intended >= n, "events")
            volume.cut()
        finally:
            producer.kill()
        volume.unmount()
        volume.mount()
        bus.start()
        with Publisher(source, bus.acked, spool="power", spool_dir=spool):
            wait_until(lambda place=spool: len(list(place.glob("*.spool"))) < 2, "the old spool to be sent")
        assert bus.stop() == 0
        checker = Checker(bus.data_dir, [producer.ledger])
        checker.seq = sent
        verdict, sent = compare(checker), checker.seq
        assert not verdict.wrong, verdict
        assert verdict.stored >= promised
        windows.append((producer.ledger.intended - verdict.stored) / rate)
    figures |= {"cycles": len(windows), "lost_ms_max": round(max(windows) * 1000)}

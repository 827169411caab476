"""Stopping: SIGTERM finishes what was received within ``bus.drain_s``, a second signal does not wait."""

from __future__ import annotations

import signal

import pytest

from bus_support import quote, wait_until
from tapebus import Publisher, Tape

#: Seconds: generous, because only the exit code and the data matter here.
GENEROUS = 20.0
HANGING = """
import threading
from tapebus import Consumer, hookimpl

@hookimpl
def tapebus_register_consumers(context):
    def handle(batch):
        (context.data_dir / "hangs").write_text("")
        threading.Event().wait(FOREVER)

    return [Consumer(name="hanging", topics=["*"], handler=handle, mode="MODE")]
"""


def test_sigterm_with_100_000_events_queued_loses_nothing_acknowledged(make_bus):
    bus = make_bus().start()
    publisher = Publisher("test", endpoint=bus.acked, capacity_events=200_000, capacity_bytes=64 << 20)
    for n in range(1, 100_001):
        assert publisher.publish("market_data", quote(n))
    wait_until(lambda: publisher.stats()["acked"] > 0, "a first acknowledgement")
    assert bus.end(signal.SIGTERM, GENEROUS) == 0
    acked = publisher.stats()["acked"]
    with Tape.open(bus.data_dir) as tape:
        kept = [int(event.data.volume) for event in tape.read(topics=["market_data"])]
    assert kept == list(range(1, len(kept) + 1))
    assert len(kept) >= acked > 0
    bus.start()
    assert publisher.flush(60.0)
    publisher.close()
    assert bus.end(signal.SIGTERM, GENEROUS) == 0
    with Tape.open(bus.data_dir) as tape:
        kept = [int(event.data.volume) for event in tape.read(topics=["market_data"])]
    assert kept == list(range(1, 100_001))


def test_consumers_have_seen_everything_when_the_bus_has_stopped(make_bus):
    bus = make_bus().start()
    with Publisher("test", endpoint=bus.acked) as publisher:
        for n in range(20_000):
            assert publisher.publish("market_data", quote(n))
        assert publisher.flush(60.0)
    assert bus.end(signal.SIGINT, GENEROUS) == 0
    with Tape.open(bus.data_dir) as tape:
        quotes = [event.bus_seq for event in tape.read(topics=["market_data"])]
        cursors = {name: unit.cursor for name, unit in tape._reader.cursors().items()}
    assert len(quotes) == 20_000
    assert cursors
    assert min(cursors.values()) >= quotes[-1]


@pytest.fixture
def hanging(make_bus, tmp_path):
    """A bus with a consumer that never returns, and an event in its hands."""

    def start(mode: str, drain_s: float):
        (tmp_path / "tapebus_hanging.py").write_text(HANGING.replace("MODE", mode).replace("FOREVER", "600"))
        info = tmp_path / "tapebus_hanging-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tapebus-hanging\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[tapebus.plugins]\nhanging = tapebus_hanging\n")
        bus = make_bus(["schema", "store", "hanging"])
        bus.config_file.write_text(bus.config_file.read_text().replace("[bus]\n", f"[bus]\ndrain_s = {drain_s}\n"))
        bus.python_path = [str(tmp_path)]
        bus.start()
        with Publisher("test", endpoint=bus.acked) as publisher:
            for n in range(1000):
                publisher.publish("market_data", quote(n))
            assert publisher.flush(30.0)
        wait_until((bus.data_dir / "hangs").exists, "the consumer to hang")
        return bus

    return start


@pytest.mark.parametrize("mode", ["inline", "thread"])
def test_a_hanging_consumer_cannot_keep_the_bus_from_stopping_in_order(hanging, mode):
    bus = hanging(mode, 0.5)
    assert bus.end(signal.SIGTERM, GENEROUS) == 0, bus.output()
    with Tape.open(bus.data_dir) as tape:
        assert len(list(tape.read(topics=["market_data"]))) == 1000
        assert tape._reader.cursors()["hanging"].cursor == 0


def test_a_second_signal_forces_the_end(hanging):
    bus = hanging("inline", 600)
    process, bus.process = bus.process, None
    process.send_signal(signal.SIGTERM)

    def ended() -> bool:
        # a signal that comes while another is being delivered may be merged with it, as by an impatient hand
        process.send_signal(signal.SIGINT)
        return process.poll() is not None

    try:
        wait_until(ended, "the end by a second signal", GENEROUS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    with Tape.open(bus.data_dir) as tape:
        assert len(list(tape.read(topics=["market_data"]))) == 1000


def test_a_terminal_that_goes_away_ends_the_bus_in_order_however_often_it_says_so(make_bus):
    bus = make_bus(["schema", "store"]).start()
    with Publisher("test", endpoint=bus.acked) as publisher:
        assert publisher.publish("market_data", quote(1)) and publisher.flush(GENEROUS)
    bus.process.send_signal(signal.SIGHUP)
    assert bus.end(signal.SIGHUP, GENEROUS) == 0
    assert "unexplained 0" in bus.output()


def test_a_bus_under_nohup_outlives_its_terminal(make_bus):
    bus = make_bus(["schema", "store"])
    bus.command = ["nohup", *bus.command]
    bus.start()
    bus.process.send_signal(signal.SIGHUP)
    assert bus.stats()
    assert bus.end(signal.SIGTERM, GENEROUS) == 0

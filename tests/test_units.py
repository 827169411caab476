"""One unit of work: derived events, state and cursor survive kill -9 together or not at all."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from bus_support import Seen, plugin, quote, wait_until
from tapebus import Consumer, Publisher, Tape, hookimpl

COUNTER = """
from tapebus import Consumer, hookimpl

@hookimpl
def tapebus_register_consumers(context):
    def handle(batch):
        for event in batch:
            context.state["count"] = b"%d" % (int(context.state.get("count", b"0")) + 1)
            context.emit("counted", {"of": event.bus_seq, "volume": event.data.volume}, cause=event)

    return [Consumer(name="counter", topics=["market_data"], handler=handle, mode="MODE", start="first")]
"""


def install(site: Path, name: str, source: str) -> None:
    """A plugin as pip would leave it in `site`."""
    (site / f"tapebus_{name}.py").write_text(source)
    info = site / f"tapebus_{name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tapebus-{name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[tapebus.plugins]\n{name} = tapebus_{name}\n")


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["inline", "thread"])
def test_derived_events_are_neither_lost_nor_doubled_by_killing_the_bus(make_bus, tmp_path, mode):
    install(tmp_path, "counter", COUNTER.replace("MODE", mode))
    bus = make_bus(["schema", "store", "counter"])
    bus.python_path = [str(tmp_path)]
    bus.start()
    chance = random.Random(mode)
    with Publisher("test", endpoint=bus.acked) as publisher:
        published = 0
        for _ in range(5):
            for _ in range(4000):
                published += 1
                assert publisher.publish("market_data", quote(published))
            enough = published - chance.randrange(4000)
            wait_until(lambda enough=enough: derived_count(bus) >= enough, "derived events")
            bus.kill()
            consistent(bus)
            bus.start()
        assert publisher.flush(60.0)
    bus.wait_for(lambda stats: stats["bus"]["last_seq"] >= 2 * published, "to derive the rest")
    assert bus.stop() == 0
    consistent(bus)
    assert [event.data["volume"] for event in derived(bus)] == list(range(1, published + 1))


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["inline", "thread", "process"])
def test_a_consumer_that_begins_now_sees_all_since_its_first_start_although_the_bus_died_at_once(
    make_bus, tmp_path, mode
):
    install(tmp_path, "counter", COUNTER.replace("MODE", mode).replace('"first"', '"now"'))
    bus = make_bus(["schema", "store", "counter"])
    bus.python_path = [str(tmp_path)]
    with Publisher("test", endpoint=bus.acked) as publisher:
        bus.variables = {"TAPEBUS_FAILPOINT": "tape.after_commit:1", "TAPEBUS_BUS_PUBLISH_HEARTBEAT": "false"}
        bus.spawn()
        assert publisher.publish("market_data", quote(1))
        assert bus.process.wait(30.0) == -signal.SIGKILL
        bus.variables = {}
        bus.start()
        assert publisher.publish("market_data", quote(2))
        assert publisher.flush(30.0)
        wait_until(lambda: len(derived(bus)) >= 2, "derived events")
    assert [event.data["volume"] for event in derived(bus)] == [1, 2]
    assert bus.stop() == 0


def derived(bus: object) -> list:
    with Tape.open(bus.data_dir) as tape:
        return list(tape.read(topics=["counted"]))


def derived_count(bus: object) -> int:
    with Tape.open(bus.data_dir) as tape:
        return int(tape._reader.state("counter").get("count", b"0"))


def consistent(bus: object) -> None:
    """Every input up to the cursor has exactly one derived event; the state is their number."""
    with Tape.open(bus.data_dir) as tape:
        unit = tape._reader.cursors().get("counter")
        cursor = unit.cursor if unit is not None else 0
        inputs = [event.bus_seq for event in tape.read(topics=["market_data"]) if event.bus_seq <= cursor]
        made = list(tape.read(topics=["counted"]))
        count = int(tape._reader.state("counter").get("count", b"0"))
    assert [event.data["of"] for event in made] == inputs
    assert [event.causation_id for event in made] == [f"bus:{seq}" for seq in inputs]
    assert count == len(inputs)


def test_what_a_plugin_emits_is_an_event_like_any_other(embed):
    seen = Seen()

    @hookimpl
    def tapebus_register_consumers(context):
        def handle(batch):
            for event in batch:
                context.emit("user_action", {"user_id": "7", "action": f"saw {event.bus_seq}"}, cause=event)

        return [Consumer(name="echo", topics=["market_data"], handler=handle)]

    echo = plugin()
    echo.tapebus_register_consumers = tapebus_register_consumers
    all_of_it = plugin(Consumer(name="seen", topics=["user_action"], handler=seen))
    bus = embed(["schema", "store"], ("echo", echo), ("seen", all_of_it))
    with bus.publisher() as publisher:
        for n in range(200):
            publisher.publish("market_data", quote(n), correlation_id=f"C{n}", timestamp=5.0 + n)
        assert publisher.flush(30.0)
    wait_until(lambda: len(seen.events) == 200, "all derived events")
    with bus.tape() as tape:
        inputs = {event.bus_seq: event for event in tape.read(topics=["market_data"])}
        kept = list(tape.read(topics=["user_action"]))
    assert [event.bus_seq for event in kept] == seen.seqs
    for event in kept:
        cause = inputs[int(event.causation_id.removeprefix("bus:"))]
        assert event.data.action == f"saw {cause.bus_seq}"
        assert (event.source, event.correlation_id, event.timestamp) == ("echo", cause.correlation_id, cause.timestamp)


def test_save_may_change_state_and_state_is_there_after_a_restart(embed):
    class Lazy:
        """Keeps its count in memory and writes it down only when asked to."""

        def __init__(self) -> None:
            self.count = 0
            self.found = ""

        @hookimpl
        def tapebus_register_consumers(self, context):
            self.found = context.state.get("count", b"").decode()
            self.count = int(self.found or 0)

            def handle(batch):
                self.count += len(list(batch))

            def save():
                context.state["count"] = b"%d" % self.count

            return [Consumer(name="lazy", topics=["*"], handler=handle, save=save)]

    bus = embed(["schema", "store"], ("lazy", Lazy()))
    bus.publish(250)
    bus.stop()
    lazy = Lazy()
    bus = embed(["schema", "store"], ("lazy", lazy), again=bus)
    assert lazy.found == "250"
    bus.publish(50)
    bus.stop()
    with Tape.open(bus.data_dir) as tape:
        assert tape._reader.state("lazy") == {"count": b"300"}

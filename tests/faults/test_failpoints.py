"""Die at every named place, one after the other, under load, and find everything acknowledged on the tape, once."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from fault_plugins import DERIVED, TRIGGERS, install
from ledger import Checker
from producers import Producer, finish

from bus_support import PATIENCE, wait_until
from tapebus import Publisher, Tape
from tapebus.failpoints import NAMES, VARIABLE
from tapebus_store import LmdbStore, StoreConfig
from tapebus_store.upkeep import MERGE_RUNS

#: Settings that bring the bus to a place which is otherwise seldom reached.
SETTINGS = {
    "store.before_grow": {"TAPEBUS_PLUGINS_STORE_INITIAL_BYTES": "65536"},
    "store.after_grow": {"TAPEBUS_PLUGINS_STORE_INITIAL_BYTES": "65536"},
    "store.in_seal": {"TAPEBUS_PLUGINS_STORE_SEAL_EVENTS": "64"},
    "store.in_merge": {
        "TAPEBUS_PLUGINS_STORE_SEAL_EVENTS": str(1 << 40),
        "TAPEBUS_PLUGINS_STORE_SEAL_BYTES": str(1 << 40),
    },
    # five seconds: what the checker has read long ago
    "store.in_drop": {"TAPEBUS_PLUGINS_STORE_MAX_AGE_DAYS": str(5 / 86400)},
}
#: Reached while the tape is new or the bus starts or stops: once is all there is.
ONCE = ("start.", "stop.", "store.created", "store.salvaged", "store.set_aside")
ONCE += ("store.before_grow", "store.after_grow", "store.in_seal", "store.in_merge", "store.in_drop")
ONCE += ("tape.before_upkeep", "tape.after_upkeep")
ONCE += ("supervisor.before_child", "supervisor.after_child", "worker.started", "worker.stopping")
ONCE += ("sender.before_hello", "sender.on_welcome", "sender.before_bye")
HITS = 12
NOISE = 20


class Rig:
    """A bus with consumers of every mode, two producers that live through everything, a subscriber, bad events."""

    def __init__(self, bus: Any, directory: Path, chance: random.Random) -> None:
        self.bus = bus
        self.directory = directory
        self.chance = chance
        self.reached: list[str] = []
        install(bus, directory / "plugins")
        # the first life ends while the tape is made
        self._life("store.created")
        assert self._end() == -signal.SIGKILL
        self.producers = [Producer(bus.acked, source, directory, rate=1500) for source in ("elite_guard", "webapp")]
        self.checker = Checker(bus.data_dir, [each.ledger for each in self.producers], TRIGGERS)
        self.noise = Publisher("noise", endpoint=bus.acked)
        self.noisy = 0

    def kill_at(self, name: str) -> None:
        """One life of the bus, or of a producer beside it, that ends at `name`."""
        if name == "store.created":
            return
        if name == "store.in_merge":
            self._seal_until_merge()
        if name in ("store.salvaged", "store.set_aside"):
            self._break_a_meta_page()
        if name.startswith("sender."):
            self._life("")
            self._end_producer(name)
            self.bus.kill()
        else:
            self._life(name)
            self._work(name)
        assert self._was_reached(name), f"nobody reached {name}"
        if name in ("store.salvaged", "store.set_aside"):
            # readers refuse the damaged tape until a bus has replaced it
            self._life("")
            self._wait(lambda stats: True, "to answer")
            self.bus.kill()
        self.reached.append(name)
        self.checker.read_on()
        verdict = self.checker.verdict()
        assert not verdict.wrong, (name, verdict)

    def _was_reached(self, name: str) -> bool:
        """Whether somebody has died at `name` since this life began."""
        with self.bus.log.open("rb") as log:
            log.seek(self._log_from)
            return f"failpoint {name} reached".encode() in log.read()

    def _life(self, name: str) -> None:
        armed = {VARIABLE: self._armed(name)} if name else {}
        self.bus.variables = {**SETTINGS.get(name, {}), **armed}
        self._log_from = self.bus.log.stat().st_size if self.bus.log.exists() else 0
        self.bus.spawn()

    def _armed(self, name: str) -> str:
        return name if name.startswith(ONCE) else f"{name}:{self.chance.randint(1, HITS)}"

    def _work(self, name: str) -> None:
        if name.startswith(("stop.", "worker.stopping")):
            self._acknowledged()
            self._wait(lambda stats: self.bus.consumer("processed")["handled"], "to have its worker at work")
            self.bus.process.send_signal(signal.SIGTERM)
            code = self._end()
            assert code == (0 if name.startswith("worker.") else -signal.SIGKILL), name
        elif name.startswith("worker."):
            wait_until(lambda: self._was_reached(name), f"the worker to die at {name}")
            self.bus.kill()
        else:
            self._disturb()
            assert self._end() == -signal.SIGKILL, name

    def _end(self) -> int:
        process, self.bus.process = self.bus.process, None
        try:
            return int(process.wait(PATIENCE))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"the bus did not die: {self.bus.variables}\n{self.bus.output()}")

    def _wait(self, condition: Any, what: str) -> None:
        self.bus.wait_for(condition, what)

    def _acknowledged(self) -> None:
        before = [each.acked for each in self.producers]
        wait_until(
            lambda: all(each.acked > count for each, count in zip(self.producers, before, strict=True)),
            "acknowledgements",
        )

    def _disturb(self) -> None:
        """Publish events that break a rule until the bus is dead, and listen to the feed all the while."""
        deadline = time.monotonic() + PATIENCE
        with subscribed(self.bus.feed):
            while self.bus.process.poll() is None and time.monotonic() < deadline:
                if self.noise.stats()["in_flight"] < 10 * NOISE:
                    for _ in range(NOISE):
                        self.noisy += self.noise.publish("market_data", {"symbol": "X" * 40, "bid": 1.0, "ask": 1.0})
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.bus.process.wait(0.05)

    def _seal_until_merge(self) -> None:
        """Bring the tape to where the next piece of upkeep merges the index."""
        while not self._is_ready_to_merge():
            self.bus.variables = {**SETTINGS["store.in_merge"], VARIABLE: f"tape.after_ack:{4 * MERGE_RUNS}"}
            self.bus.spawn()
            assert self._end() == -signal.SIGKILL

    def _is_ready_to_merge(self) -> bool:
        """Seal what there is, until the index has to be merged; False where there is too little for that."""
        store = LmdbStore(self.bus.data_dir, StoreConfig(seal_events=1))
        try:
            while store._tape_record.runs < MERGE_RUNS:
                if not store.maintain(0.0):
                    return False
            return True
        finally:
            store.close()

    def _break_a_meta_page(self) -> None:
        """Damage the tape where it costs no event: the older of its two meta pages."""
        with (self.bus.data_dir / "tape" / "data.mdb").open("r+b") as file:
            head = file.read(8192)
            txns = [int.from_bytes(head[base + 144 : base + 152], "little") for base in (0, 4096)]
            file.seek(4096 if txns[0] > txns[1] else 0)
            file.write(bytes(4096))

    def _end_producer(self, name: str) -> None:
        source = f"mortal-{len(self.reached)}"
        with self.bus.log.open("ab") as log:
            mortal = Producer(
                self.bus.acked, source, self.directory, rate=500, variables={VARIABLE: self._armed(name)}, stderr=log
            )
        self.checker.add(mortal.ledger)
        try:
            if name == "sender.before_bye":
                wait_until(lambda: mortal.acked, "acknowledgements")
                mortal.ask_to_end()
            assert mortal.process.wait(PATIENCE) == -signal.SIGKILL, name
        finally:
            mortal.kill()

    def finish(self) -> Any:
        """A last life in peace, in which everything arrives; the verdict."""
        self._life("")
        self._wait(lambda stats: True, "to answer")
        finish(self.producers)
        assert self.noise.flush(PATIENCE)
        self.noise.close()
        wait_until(lambda: self.checker.read_on() or not self.checker.underived(), "every derived event")
        wait_until(lambda: self.checker.read_on() == 0 and not self.checker.underived(), "every derived event")
        last = self.checker.seq
        self._wait(lambda stats: all(each["cursor"] >= last for each in stats["consumers"]), "all cursors")
        stats = self.bus.stats()
        verdict = self.checker.verdict(stats)
        assert self.bus.stop() == 0
        with Tape.open(self.bus.data_dir) as tape:
            letters = [letter.bus_seq for letter in tape.dead_letters() if letter.place == "schema"]
        assert len(letters) == len(set(letters)), "an event was judged twice"
        assert len(letters) == self.noisy
        return verdict


@contextlib.contextmanager
def subscribed(endpoint: str) -> Iterator[None]:
    """A subscriber that reads nothing: the feed has to send all the same."""
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.subscribe(b"")
        socket.connect(endpoint)
        yield


@pytest.mark.timeout(7200)
def test_dying_at_any_named_place_loses_doubles_and_reorders_nothing(make_bus, tmp_path, size, chance, figures):
    rounds = size(1, 4, 20)
    totals: dict[str, int] = {}
    for number in range(rounds):
        bus = make_bus(["schema", "store", *DERIVED], "[plugins.store]\nmax_dead = 100000")
        directory = tmp_path / str(number)
        directory.mkdir()
        rig = Rig(bus, directory, chance)
        try:
            names = [name for name in NAMES if name != "store.created"]
            chance.shuffle(names)
            # the map grows while the tape is small; upkeep has something to do once it is not
            names.sort(key=lambda name: (not name.endswith("_grow"), name in ("store.in_drop", "store.in_merge")))
            for name in names:
                rig.kill_at(name)
            verdict = rig.finish()
        finally:
            for each in rig.producers:
                each.kill()
            rig.noise.close()
        assert not verdict.wrong, verdict
        assert {*rig.reached, "store.created"} == set(NAMES)
        for key, value in verdict.figures().items():
            totals[key] = totals.get(key, 0) + value
    figures.update(names=len(NAMES), rounds=rounds, deaths=len(NAMES) * rounds, **totals)

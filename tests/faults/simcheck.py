"""Opens the states of a simulated disk as the bus would, and compares each with what the bus had promised.

``simcheck.py ORDERS``, JSON with the arguments of `run`, writes one JSON line: how many states were seen, how many of
them differed, and the violations found. ``root/at`` tells which state a process that died was at.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from simdisk import Call, Image, crash_states, read_trace

import tapebus_store
from tapebus.blocks import BlockView
from tapebus.events import DeadLetter
from tapebus.store import Block, Commit, ProducerBook, Unit

sys.path.insert(0, str(Path(__file__).parents[1]))
from store_support import block as small_block

#: Every so many states the tape is also continued: commits and upkeep on top of what the power cut left.
CONTINUE_EVERY = 10
SHOWN = 20


class Mark(msgspec.Struct):
    kind: str
    commit: Commit | None = None
    producers: list[ProducerBook] = []
    first_seq: int = 1
    last_seq: int = 0
    cursors: list[Unit] = []


class Content(NamedTuple):
    """All that the store must hold after a number of transactions."""

    last_seq: int = 0
    first_seq: int = 1
    producers: dict[tuple[bytes, int], ProducerBook] = {}
    cursors: dict[str, Unit] = {}
    state: dict[tuple[str, str], bytes] = {}
    topics: dict[int, str] = {}
    counters: dict[str, int] = {}
    dead: int = 0


class Promise(NamedTuple):
    """At one moment: transactions returned from, transactions begun, the account of each producer as acknowledged."""

    ended: int = 0
    begun: int = 0
    acked: dict[tuple[bytes, int], int] = {}


class Oracle:
    """What the marks of a trace say, kept in plain lists and dictionaries."""

    def __init__(self, calls: list[Call]) -> None:
        self.contents = [Content()]
        self.events: list[bytes] = [b""]
        self.hits: dict[bytes, list[int]] = {}
        self.dead: list[DeadLetter] = []
        self.promises: list[Promise] = []
        decode = msgspec.msgpack.Decoder(Mark).decode
        promise = Promise()
        for call in calls:
            self.promises.append(promise)
            if call.kind == "m":
                promise = self._take(decode(call.data), promise)
        self.promises.append(promise)

    def _take(self, mark: Mark, promise: Promise) -> Promise:
        if mark.kind == "ack":
            acked = promise.acked | {(book.producer_id, book.epoch): book.watermark for book in mark.producers}
            return promise._replace(acked=acked)
        if mark.kind == "opened":
            return self._resolve(mark, promise)
        if mark.kind == "begin":
            assert mark.commit is not None
            self._add(mark.commit)
            return promise._replace(begun=promise.begun + 1)
        if mark.kind == "failed":
            self._forget(self.contents.pop())
            return promise._replace(begun=promise.begun - 1)
        self.contents[-1] = self.contents[-1]._replace(first_seq=mark.first_seq)
        return promise._replace(ended=promise.ended + 1)

    def _resolve(self, mark: Mark, promise: Promise) -> Promise:
        """A bus has started: whether the transaction that its predecessor was killed in had come through."""
        found = mark.last_seq, {unit.consumer: unit.cursor for unit in mark.cursors}
        while len(self.contents) > 1 and promise.begun > promise.ended:
            content = self.contents[-1]
            if found == (content.last_seq, {name: unit.cursor for name, unit in content.cursors.items()}):
                break
            self._forget(self.contents.pop())
            promise = promise._replace(begun=promise.begun - 1)
        self.contents[-1] = self.contents[-1]._replace(first_seq=mark.first_seq)
        return promise._replace(ended=promise.begun)

    def _add(self, commit: Commit) -> None:
        old = self.contents[-1]
        for block in commit.blocks:
            view = BlockView(block.payload, block.first_seq)
            self.events += [view.raw(seq) for seq in range(block.first_seq, block.last_seq + 1)]
            for place in range(0, len(block.corr), 8):
                offset = int.from_bytes(block.corr[place + 4 : place + 8], "little")
                self.hits.setdefault(block.corr[place : place + 4], []).append(block.first_seq + offset)
        self.dead += commit.dead
        state = dict(old.state)
        for unit in commit.units:
            for key, value in unit.state.items():
                if value is None:
                    state.pop((unit.namespace, key), None)
                else:
                    state[unit.namespace, key] = value
        self.contents.append(
            Content(
                len(self.events) - 1,
                old.first_seq,
                old.producers | {(book.producer_id, book.epoch): book for book in commit.producers},
                old.cursors | {unit.consumer: unit for unit in commit.units},
                state,
                old.topics | commit.topics,
                old.counters | commit.counters,
                len(self.dead),
            )
        )

    def _forget(self, content: Content) -> None:
        before = self.contents[-1]
        del self.events[before.last_seq + 1 :], self.dead[before.dead :]
        for seqs in self.hits.values():
            while seqs and seqs[-1] > before.last_seq:
                seqs.pop()


class Checker:
    """Compares opened stores with the oracle; `complain` raises `Violation`."""

    def __init__(self, oracle: Oracle, config: dict[str, Any], chance: random.Random) -> None:
        self.oracle = oracle
        self.config = config
        self.chance = chance
        self._known: set[tuple[int, int]] = set()

    def check(self, data_dir: Path, promise: Promise, go_on: bool) -> None:
        store = open_store(data_dir, self.config)
        try:
            for notice in getattr(store._env, "notices", []):
                raise Violation(f"repaired: {notice}")
            content = self._content(store, promise)
            self._events(store, content)
            self._index(store, content)
            for worker in data_dir.glob("workers/*"):
                self._worker(worker, content)
            if go_on:
                self._continue(store, content)
        finally:
            store.close()

    def _content(self, store: Any, promise: Promise) -> Content:
        """Everything but the events must be as after one and the same transaction."""
        last = store.last_seq()
        books = {(book.producer_id, book.epoch): book for book in store.producers()}
        for key, watermark in promise.acked.items():
            have = books[key].watermark if key in books else 0
            if have < watermark:
                raise Violation(f"lost: {watermark} events of a producer were acknowledged, {have} are on the disk")
        cursors = store.cursors()
        for unit in cursors.values():
            if unit.cursor > last:
                raise Violation(f"cursor: {unit.consumer} is at {unit.cursor}, the tape ends at {last}")
        why: list[str] = []
        for number in range(promise.ended, promise.begun + 1):
            content = self.oracle.contents[number]
            why.append(self._difference(store, content, last, books, cursors))
            if not why[-1]:
                return content
        raise Violation(f"transaction: neither before nor after the last one: {'; '.join(why)}")

    def _difference(
        self, store: Any, content: Content, last: int, books: dict[tuple[bytes, int], ProducerBook], cursors: Any
    ) -> str:
        found = store.first_seq(), last
        if found != (content.first_seq, content.last_seq):
            return f"the tape has {found} instead of {(content.first_seq, content.last_seq)}"
        if books != content.producers:
            return "accounts of producers"
        if {name: (u.cursor, u.ahead) for name, u in cursors.items()} != {
            name: (u.cursor, u.ahead) for name, u in content.cursors.items()
        }:
            return f"cursors {cursors} instead of {content.cursors}"
        spaces = {space for space, _ in self.oracle.contents[-1].state}
        if {(space, key): value for space in spaces for key, value in store.state(space).items()} != content.state:
            return "state of plugins"
        if store.topics() != content.topics or store.counters() != content.counters:
            return "topics or counters"
        expected = [msgspec.structs.replace(each, id=0) for each in self.oracle.dead[: content.dead]]
        if [msgspec.structs.replace(each, id=0) for each in store.dead()] != expected:
            return "dead letters"
        return ""

    def _events(self, store: Any, content: Content) -> None:
        """The tape is gapless up to its end, and every event is the one that was committed."""
        events, place = self.oracle.events, content.first_seq - 1
        for block in store.blocks():
            if block.first_seq != place + 1:
                raise Violation(f"gap: after bus_seq {place} comes {block.first_seq}")
            place = block.last_seq
            mark = (block.first_seq, hash(block.payload))
            if mark not in self._known:
                view = BlockView(block.payload, block.first_seq)
                if [view.raw(seq) for seq in range(block.first_seq, place + 1)] != events[block.first_seq : place + 1]:
                    raise Violation(f"content: bus_seq {block.first_seq}..{place} are not what was committed")
                self._known.add(mark)
        if place != content.last_seq:
            raise Violation(f"end: the blocks end at {place}, the tape at {content.last_seq}")

    def _index(self, store: Any, content: Content) -> None:
        """The correlation index names exactly the events that carry an id, as far as they are kept."""
        first = store.first_seq()
        for key in self.chance.sample(sorted(self.oracle.hits), min(3, len(self.oracle.hits))):
            found = [seq for seq in store._hits(int.from_bytes(key, "little")) if seq >= first]
            if found != [seq for seq in self.oracle.hits[key] if first <= seq <= content.last_seq]:
                raise Violation(f"index: hash {key.hex()} gives other events than were committed")

    def _worker(self, directory: Path, content: Content) -> None:
        """The store of a plugin process: it has seen nothing that is not on the tape, and owes what it emitted."""
        name = directory.name
        store = open_store(directory, {})
        try:
            for notice in getattr(store._env, "notices", []):
                raise Violation(f"worker repaired: {notice}")
            cursor = store.cursors().get(name)
            if cursor is not None and cursor.cursor > content.last_seq:
                raise Violation(f"worker: at {cursor.cursor}, the tape ends at {content.last_seq}")
            kept = store.state(name)
        finally:
            store.close()
        epoch = int.from_bytes(kept.get("\0epoch", b""), "big")
        emitted = int.from_bytes(kept.get("\0next", b"\1"), "big") - 1
        owed = sorted(int(key.removeprefix("\0out:")) for key in kept if key.startswith("\0out:"))
        if owed != list(range(emitted - len(owed) + 1, emitted + 1)):
            raise Violation(f"worker: owes {len(owed)} events with a hole, the last is {emitted}")
        taken = max((book.watermark for key, book in content.producers.items() if key[1] == epoch and epoch), default=0)
        if not emitted - len(owed) <= taken <= emitted:
            raise Violation(f"worker: emitted {emitted}, owes {len(owed)}, the tape has {taken}")

    def _continue(self, store: Any, content: Content) -> None:
        last = content.last_seq
        added: list[Block] = []
        for _ in range(3):
            added.append(small_block(last + 1, [(1e9 + last + n, 1, None) for n in range(1, 6)]))
            store.commit(Commit([added[-1]]))
            last = added[-1].last_seq
            store.maintain(time.time())
        place = store.first_seq() - 1
        for block in store.blocks():
            if block.first_seq != place + 1:
                raise Violation(f"continued: after bus_seq {place} comes {block.first_seq}")
            view = BlockView(block.payload, block.first_seq)
            for seq in range(block.first_seq, block.last_seq + 1):
                if seq <= content.last_seq and view.raw(seq) != self.oracle.events[seq]:
                    raise Violation(f"continued: bus_seq {seq} changed under later commits")
            place = block.last_seq
        if place != last:
            raise Violation(f"continued: the tape ends at {place} instead of {last}")


def look_in_this_process(real: Any) -> Any:
    """The look at a tape before it is opened, without a child: this process may die of it just as well."""

    def run(module: str, *arguments: str, timeout: float | None = None) -> Any:
        if module != "tapebus_store.preflight":
            return real(module, *arguments, timeout=timeout)
        found = io.StringIO()
        with contextlib.redirect_stdout(found):
            code = importlib.import_module(module).main(list(arguments))
        return subprocess.CompletedProcess(arguments, code, found.getvalue().encode(), b"")

    return run


class Violation(AssertionError):
    """What a power cut would have done to the promises of the bus."""


def open_store(data_dir: Path, config: dict[str, Any]) -> Any:
    """As the start of the bus does."""
    return tapebus_store.tapebus_open_store(data_dir, config, False)


def write_image(root: Path, image: Image) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, content in image.items():
        if content is None:
            (root / path).mkdir(mode=0o700)
        elif isinstance(content, int):
            with (root / path).open("wb") as file:
                file.truncate(content)
        else:
            (root / path).write_bytes(content)


def run(trace: str, root: str, seed: int, count: int, skip: int, config: dict[str, Any]) -> dict[str, Any]:
    """Check the states of one seed from number `skip` on."""
    calls, place = read_trace(Path(trace)), Path(root)
    oracle, chance = Oracle(calls), random.Random(seed)
    checker = Checker(oracle, config, random.Random(seed + 1))
    # what is opened here lies in memory: nothing has to reach a disk, and zeros need no room
    os.fsync = lambda fd: None  # type: ignore[assignment]
    os.posix_fallocate = lambda fd, offset, length: os.ftruncate(fd, offset + length)
    quarantine = importlib.import_module("tapebus_store.quarantine")
    quarantine._run = look_in_this_process(quarantine._run)
    at = os.open(place / "at", os.O_WRONLY | os.O_CREAT, 0o600)
    seen, different, violations = 0, set(), []
    for number, (calls_done, image) in enumerate(crash_states(calls, count, chance)):
        if number < skip:
            continue
        os.pwrite(at, b"%10d %10d" % (number, calls_done), 0)
        seen += 1
        different.add(hash(tuple(image.items())))
        write_image(place / "disk", image)
        try:
            checker.check(place / "disk" / "data", oracle.promises[calls_done], number % CONTINUE_EVERY == 0)
        except Exception as error:
            violations.append(f"state {number}, after call {calls_done}: {type(error).__name__}: {error}")
    return {"states": seen, "different": len(different), "violated": len(violations), "violations": violations[:SHOWN]}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(
        json.dumps(
            run(
                Path(given["trace"]), Path(given["root"]), given["seed"], given["count"], given["skip"], given["config"]
            )
        )
    )

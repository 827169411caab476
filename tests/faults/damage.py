"""What the tests of damaged tapes share: a tape with everything on it, what was written, and the judge of a case.

``damage.py DIRECTORY`` reads cases from standard input, one JSON object a line, and answers each with a line. It is
a process of its own so that a damaged file that kills it kills no test.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec

import tapebus_store
from store_support import block_of, open_store, raws, upkeep
from tapebus.errors import StoreError
from tapebus.events import DeadLetter
from tapebus.store import Commit, ProducerBook, Unit
from tapebus_store import preflight, quarantine, salvage
from tapebus_store.pages import BRANCH, LEAF, OVERFLOW, PageFile
from tapebus_store.quarantine import DAMAGED, Mark

KEPT = 1500


def envelope(seq: int, padding: str) -> dict[str, Any]:
    correlation = {"correlation_id": f"c{seq % 50}"} if seq % 3 else {}
    return {"timestamp": float(seq), "event_type": f"topic_{1 + seq % 5}", **correlation, "data": {"padding": padding}}


def number_of(raw: bytes) -> int:
    """The sequence number that `envelope` wrote into an event."""
    return int(raw[len(b'{"timestamp":') : raw.index(b".")])


def build(path: Path, chance: random.Random) -> dict[str, Any]:
    """A tape with sealed, hot, small and large blocks, retention behind it and all books; what is on it.

    What is there is written down here and not read back from the tape.
    """
    store = open_store(path, seal_events=40, max_events=KEPT)
    written: dict[int, bytes] = {}
    books: dict[bytes, ProducerBook] = {}
    cursors: dict[str, int] = {}
    state: dict[str, bytes] = {}
    commits = 0
    while store.last_seq() < KEPT + 400:
        commits += 1
        first = store.last_seq() + 1
        padding = chance.choice((20, 150, 700))
        events = [
            (1 + seq % 5, envelope(seq, chance.randbytes(padding).hex()))
            for seq in range(first, first + chance.choice((1, 1, 3, 20)))
        ]
        made = block_of(first, events)
        written.update(enumerate(raws([made]), first))
        book = ProducerBook(bytes([commits % 40]) * 16, 1 + commits % 40, f"source{commits % 40}", first, first, first)
        books[book.producer_id] = book
        name, key = f"consumer{commits % 7}", f"key{chance.randrange(150)}"
        cursors[name], state[key] = made.last_seq, chance.randbytes(chance.choice((20, 200)))
        dead = [DeadLetter("schema", "broken", f"letter {commits}", bus_seq=first)] if commits % 9 == 0 else []
        store.commit(
            Commit(
                blocks=[made],
                producers=[book],
                units=[Unit(name, made.last_seq, namespace="plugin", state={key: state[key]})],
                dead=dead,
                topics={number: f"topic_{number}" for number in range(1, 6)} if commits == 1 else {},
                counters={"rejected.x": commits},
            )
        )
        if commits % 10 == 0:
            upkeep(store)
    first_seq = store.first_seq()
    truth = {
        "first": first_seq,
        "last": store.last_seq(),
        "events": {seq: raw.hex() for seq, raw in written.items() if seq >= first_seq},
        "books": {key.hex(): book.watermark for key, book in books.items()},
        "cursors": cursors,
        "state": {key: value.hex() for key, value in state.items()},
        "topics": {str(number): f"topic_{number}" for number in range(1, 6)},
        "counters": {"rejected.x": commits},
        "dead": [letter.id for letter in store.dead()],
    }
    store.close()
    truth["pages"] = {str(page): seqs for page, seqs in block_pages(path / "tape" / "data.mdb").items()}
    return truth


def block_pages(data: Path) -> dict[int, list[int]]:
    """The sequence numbers whose events are lost with a page, by page: leaves and overflow pages of blocks."""
    found: dict[int, list[int]] = {}
    with PageFile(data) as file:
        assert file.newest is not None
        root = file.databases(file.newest)["blocks"].root
        waiting = [root]
        while waiting:
            number = waiting.pop()
            page = file.page(number)
            nodes = file.nodes(page)
            kind = int.from_bytes(page[10:12], "little")
            assert kind in (BRANCH, LEAF, OVERFLOW)
            if kind == BRANCH:
                waiting += [low | high << 16 | flags << 32 for low, high, flags, _, _ in nodes]
                continue
            for low, high, flags, at, key in nodes:
                first, size = int.from_bytes(key, "big"), low | high << 16
                head = int.from_bytes(page[at : at + 8], "little") if flags & 1 else number
                value = file.overflow(head, size) if flags & 1 else page[at : at + size]
                count = tapebus_store.layout.decode_header(key, value).events
                pages = range(head, head - (-(16 + size) // 4096)) if flags & 1 else [number]
                for each in pages:
                    found.setdefault(each, []).extend(range(first, first + count))
    return found


def apply(data: Path, case: dict[str, Any]) -> None:
    """Do to a file what the case says."""
    raw = bytearray(data.read_bytes())
    if case["kind"] == "flip":
        for bit in case["bits"]:
            raw[bit >> 3] ^= 1 << (bit & 7)
    elif case["kind"] == "cut":
        del raw[case["size"] :]
    elif case["kind"] == "zero":
        for page in case["pages"]:
            raw[page * 4096 : (page + 1) * 4096] = bytes(4096)
    elif case["kind"] == "swap":
        raw[:4096], raw[4096:8192] = raw[4096:8192], raw[:4096]
    data.write_bytes(raw)


def read_all(reader: Any) -> dict[str, Any]:
    """Everything on a tape, in the form of `build`."""
    events = raws(reader.blocks())
    return {
        "events": {number_of(raw): raw.hex() for raw in events},
        "order": len(events),
        "books": {book.producer_id.hex(): book.watermark for book in reader.producers()},
        "cursors": {name: unit.cursor for name, unit in reader.cursors().items()},
        "state": {key: value.hex() for key, value in reader.state("plugin").items()},
        "topics": {str(number): name for number, name in reader.topics().items()},
        "counters": reader.counters(),
        "dead": [letter.id for letter in reader.dead()],
    }


def wrong(found: dict[str, Any], truth: dict[str, Any]) -> list[str]:
    """What was returned that was never written."""
    out = []
    for part in ("events", "books", "cursors", "state", "topics", "counters"):
        for key, value in found[part].items():
            if truth[part].get(key) != value:
                out.append(f"{part} {key}")
    if not set(found["dead"]) <= set(truth["dead"]):
        out.append("dead letters")
    if len(found["events"]) != found["order"]:
        out.append("events twice")
    return out


def correlated(reader: Any, number: int) -> set[int]:
    """The sequence numbers that the index names for a correlation id."""
    return {each.first_seq + offset for each, offsets in reader.blocks_of(f"c{number}") for offset in offsets}


def chain(events: Any, number: int) -> set[int]:
    """Those of `events` that were written with that correlation id."""
    return {seq for seq in events if seq % 3 and seq % 50 == number}


def judge_reader(path: Path, truth: dict[str, Any], case: int) -> tuple[str, list[str]]:
    """A reader on the damaged tape: ``same``, ``refused`` or ``less``, and what was wrong."""
    try:
        reader = tapebus_store.tapebus_open_store(path, {}, True)
        try:
            found = read_all(reader)
            hits = correlated(reader, case % 50)
        finally:
            reader.close()
    except StoreError:
        return "refused", []
    parts = ("events", "books", "cursors", "state", "topics", "dead")
    complete = hits >= chain(truth["events"], case % 50) and all(found[part] == truth[part] for part in parts)
    return "same" if complete else "less", wrong(found, truth)


def judge_bus(path: Path, truth: dict[str, Any], case: int) -> dict[str, Any]:
    """A bus that starts on the damaged tape, after the damage was noticed: what it has, what it says it lost."""
    quarantine.write_mark(path / "tape", Mark(DAMAGED, "a test", truth["last"]))
    store = open_store(path, max_events=0)
    try:
        found = read_all(store)
        holes = {seq for first, last in store.holes() for seq in range(first, last + 1)}
        missing = set(truth["events"]) - set(found["events"])
        ends_at = store.last_seq()
        next_one = block_of(ends_at + 1, [(1, envelope(ends_at + 1, ""))])
        store.commit(Commit(blocks=[next_one]))
        problems = wrong({**found, "cursors": {}}, truth)
        problems += [f"cursor of {name}" for name, at in found["cursors"].items() if at < truth["cursors"][name]]
        problems += [] if ends_at >= truth["last"] else [f"bus_seq {ends_at + 1} is given again"]
        if not correlated(store, case % 50) >= chain(found["events"], case % 50):
            problems.append("the index does not name an event that is there")
        problems += [] if missing <= holes else ["events are missing without a word"]
        problems += ["an event that is there is called lost"] if holes & set(found["events"]) else []
        if raws(store.blocks(ends_at)) != raws([next_one]):
            problems.append("what is written afterwards is not there")
        return {
            "problems": problems,
            "missing": sorted(missing),
            "called_lost": len(holes),
            "replaced": len(store.notices),
            "books": sum(len(truth[part]) - len(found[part]) for part in ("books", "cursors", "state", "topics")),
            "dead": len(truth["dead"]) - len(found["dead"]),
        }
    finally:
        store.close()


def run_here(module: str, *arguments: str, timeout: float | None = None) -> CompletedProcess[bytes]:
    """The children of a start within this process, which may die as well: thousands of cases would take hours."""
    main = {"tapebus_store.preflight": preflight.main, "tapebus_store.salvage": salvage.main}[module]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(list(arguments))
    return CompletedProcess([module], code, out.getvalue().encode(), b"")


def main(directory: str) -> None:
    logging.disable(logging.CRITICAL)
    quarantine._run = run_here
    truth = msgspec.json.decode(Path(directory, "truth.json").read_bytes())
    truth["events"] = {int(seq): raw for seq, raw in truth["events"].items()}
    for line in sys.stdin:
        case = json.loads(line)
        path = Path(directory, f"case{case['number']}")
        (path / "tape").mkdir(parents=True)
        try:
            shutil.copy(Path(directory, "sound", "tape", "data.mdb"), path / "tape" / "data.mdb")
            apply(path / "tape" / "data.mdb", case)
            answer = dict(zip(("reader", "wrong"), judge_reader(path, truth, case["number"]), strict=True))
            answer["bus"] = judge_bus(path, truth, case["number"])
        finally:
            shutil.rmtree(path, ignore_errors=True)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])

"""kill -9 while two processes publish: what was acknowledged is on the tape, once and in order, and the books close."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from bus_support import wait_until
from tapebus import Tape

LEDGER = Path(__file__).with_name("ledger.py")
SOURCES = ("elite_guard", "webapp")
CYCLES = 5


def acknowledged(file: Path) -> int:
    lines = file.read_text().splitlines() if file.exists() else []
    # the last line may be half written
    return max((int(line.split()[1]) for line in lines[:-1] if line.startswith("acked ")), default=0)


def volumes(bus: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {source: [] for source in SOURCES}
    with Tape.open(bus.data_dir) as tape:
        for event in tape.read(topics=["market_data"]):
            found[event.source].append(int(event.data.volume))
    return found


def test_nothing_acknowledged_is_lost_or_doubled_by_killing_the_bus_again_and_again(make_bus, tmp_path):
    bus = make_bus(["schema", "store"]).start()
    ledgers = {source: tmp_path / source for source in SOURCES}
    producers = [
        subprocess.Popen([sys.executable, str(LEDGER), bus.acked, source, str(file)], stdin=subprocess.PIPE)
        for source, file in ledgers.items()
    ]
    chance = random.Random(9)
    try:
        for _ in range(CYCLES):
            more = chance.randrange(1, 4000)
            for file in ledgers.values():
                goal = acknowledged(file) + more
                wait_until(lambda file=file, goal=goal: acknowledged(file) >= goal, "acknowledgements")
            bus.kill()
            promised = {source: acknowledged(file) for source, file in ledgers.items()}
            kept = volumes(bus)
            for source in SOURCES:
                assert kept[source] == list(range(1, len(kept[source]) + 1)), source
                assert len(kept[source]) >= promised[source], source
            bus.start()
        for each in producers:
            each.stdin.close()
        assert [each.wait(60) for each in producers] == [0, 0]
    finally:
        for each in producers:
            each.kill()
            each.wait()
    published = {}
    for source, file in ledgers.items():
        word, count, acked = file.read_text().splitlines()[-1].split()
        assert (word, acked) == ("end", count), source
        published[source] = int(count)
    assert volumes(bus) == {source: list(range(1, count + 1)) for source, count in published.items()}
    books = {book["source"]: book for book in bus.stats()["producers"] if book["source"] in SOURCES}
    for source, count in published.items():
        book = books[source]
        assert book["highest_seq"] == book["stored"] + book["rejected"] + book["dropped"] + book["in_flight"]
        assert (book["stored"], book["in_flight"], book["unexplained"]) == (count, 0, 0)
    assert bus.stats()["bus"]["unexplained"] == 0
    assert bus.stop() == 0

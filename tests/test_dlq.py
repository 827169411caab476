"""Dead letters: readable, chosen by any of their marks, and handed once more to nobody but who failed on them."""

from __future__ import annotations

import json
import threading
from typing import Any

import msgspec
import pytest

from bus_support import pushing, quote, wait_until
from tapebus import Publisher, Tape
from tapebus.cli import main
from tapebus.errors import StoreFull
from tapebus.events import DeadLetter
from tapebus.store import Commit
from test_units import install

FRAGILE = """
from tapebus import Consumer, hookimpl

@hookimpl
def tapebus_register_consumers(context):
    def handle(batch):
        for event in batch:
            number = int(event.data.volume)
            if number % 10 == 3 and not (context.data_dir / "mended").exists():
                raise ValueError("cannot bear %d" % number)
            count = int(context.state.get("count", b"0")) + 1
            context.state["count"] = b"%d" % count
            context.emit("handled", {"n": number, "count": count}, cause=event)

    return [Consumer(name="fragile", topics=["market_data"], handler=handle, mode="MODE", start="first")]
"""
WITNESS = """
from tapebus import Consumer, hookimpl

@hookimpl
def tapebus_register_consumers(context):
    def handle(batch):
        for event in batch:
            context.emit("witnessed", {"n": int(event.data.volume)}, cause=event)

    return [Consumer(name="witness", topics=["market_data"], handler=handle, start="first")]
"""


def run(capsys: Any, *args: str) -> tuple[int, str]:
    capsys.readouterr()
    try:
        code = main(list(args))
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def numbers(bus: Any, topic: str) -> list[int]:
    with Tape.open(bus.data_dir) as tape:
        return [event.data["n"] for event in tape.read(topics=[topic])]


def letters(bus: Any) -> list[Any]:
    with Tape.open(bus.data_dir) as tape:
        return list(tape.dead_letters())


@pytest.mark.parametrize("mode", ["inline", "thread", "process"])
def test_a_mended_plugin_gets_what_it_missed_and_nobody_else_sees_it_twice(
    make_bus, tmp_path, capsys, monkeypatch, mode
):
    install(tmp_path, "fragile", FRAGILE.replace("MODE", mode))
    install(tmp_path, "witness", WITNESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    bus = make_bus(["schema", "store", "fragile", "witness"])
    bus.python_path = [str(tmp_path)]
    bus.start()
    where = ["--config", str(bus.config_file)]
    with Publisher("test", endpoint=bus.acked) as publisher:
        for n in range(1, 31):
            publisher.publish("market_data", quote(n))
        assert publisher.flush(30.0)
    wait_until(lambda: len(letters(bus)) == 3 and len(numbers(bus, "handled")) == 27, "the plugin to fail on three")
    seqs = [each.bus_seq for each in letters(bus)]

    code, out = run(capsys, "dlq", "replay", "--plugin", "fragile", "--json", *where)
    again = json.loads(out)
    assert (code, again["handled"], len(again["failed"])) == (1, [], 3)
    assert [each.bus_seq for each in letters(bus)] == seqs, "the same three, each once"
    assert [each.id for each in letters(bus)] == again["failed"] == [4, 5, 6]

    if mode == "inline":
        assert bus.stop() == 0
        bus.start()
    (bus.data_dir / "mended").touch()
    code, out = run(capsys, "dlq", "replay", "--reason", "error", "--seq", f"{seqs[0]}..{seqs[1]}", *where)
    assert (code, out) == (0, "2 handled by the consumer that had failed\n")
    assert [each.bus_seq for each in letters(bus)] == seqs[2:]
    assert run(capsys, "dlq", "replay", "--all", *where)[0] == 0
    assert letters(bus) == []
    expected = [n for n in range(1, 31) if n % 10 != 3] + [3, 13, 23]
    wait_until(lambda: len(numbers(bus, "handled")) == 30, "what the plugin emitted")
    assert numbers(bus, "handled") == expected
    assert numbers(bus, "witnessed") == list(range(1, 31))
    assert bus.consumer("fragile")["state"] == "running"
    assert bus.stop() == 0
    with Tape.open(bus.data_dir) as tape:
        assert [event.data["count"] for event in tape.read(topics=["handled"])] == list(range(1, 31))
        assert len(list(tape.read(topics=["market_data"]))) == 30, "nothing was published again"


def test_a_letter_whose_consumer_is_gone_or_not_ready_stays(make_bus, tmp_path, capsys, monkeypatch):
    install(tmp_path, "fragile", FRAGILE.replace("MODE", "thread"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("tapebus.cli.dlq.PATIENCE_S", 0.5)
    bus = make_bus(["schema", "store", "fragile"])
    bus.python_path = [str(tmp_path)]
    bus.start()
    where = ["--config", str(bus.config_file)]
    with Publisher("test", endpoint=bus.acked) as publisher:
        publisher.publish("market_data", quote(3))
        assert publisher.flush(30.0)
    wait_until(lambda: letters(bus), "the dead letter")
    (bus.data_dir / "mended").touch()
    bus.request("pause", consumer="fragile")
    code, out = run(capsys, "dlq", "replay", "--all", *where)
    assert (code, out) == (1, "1 wait for their consumer, which is not ready: 1\n")
    bus.request("resume", consumer="fragile")
    wait_until(lambda: not letters(bus), "what waited to be handled")
    (bus.data_dir / "mended").unlink()
    with Publisher("test", endpoint=bus.acked) as publisher:
        publisher.publish("market_data", quote(13))
        assert publisher.flush(30.0)
    wait_until(lambda: letters(bus), "the second dead letter")
    assert bus.stop() == 0
    bus.config_file.write_text(bus.config_file.read_text().replace(', "fragile"', ""))
    bus.start()
    code, out = run(capsys, "dlq", "replay", "--all", *where)
    assert (code, out) == (1, "1 have no consumer any more: 2\n")
    assert len(letters(bus)) == 1


def test_bytes_are_shown_as_what_they_are_and_every_verb_takes_every_filter(make_bus, capsys):
    bus = make_bus(["schema", "store"]).start()
    where = ["--config", str(bus.config_file)]
    envelope = {
        "event_type": "market_data",
        "timestamp": 1.0,
        "source": "ünï",
        "data": {"symbol": "EURUSD", "bid": "x"},
    }
    frames = [
        msgspec.json.encode(envelope),
        msgspec.msgpack.encode(envelope),
        b"\xff\x00nonsense\x1b[31m",
        b"plain words",
        b'{"no": "event"}',
    ]
    with pushing(bus.ingest) as send:
        for count, frame in enumerate(frames, 1):
            send(frame)
            wait_until(lambda count=count: len(letters(bus)) == count, "the dead letter")
    code, out = run(capsys, "dlq", "list", "--json", *where)
    listed = [json.loads(line) for line in out.splitlines()]
    assert (code, [each["raw_encoding"] for each in listed]) == (0, ["utf-8", "hex", "hex", "utf-8", "utf-8"])
    assert [each["raw"] for each in listed[:4]] == [frames[0].decode(), frames[1].hex(), frames[2].hex(), "plain words"]
    assert [each["event"] for each in listed] == [envelope, envelope, None, None, {"no": "event"}]
    first, second, third, fourth, _ = (run(capsys, "dlq", "show", str(each["id"]), *where)[1] for each in listed)
    assert '"symbol": "EURUSD"' in first and '"symbol": "EURUSD"' in second and "MessagePack" in second
    assert "\\\\" not in first + second + fourth
    assert "ff 00 6e 6f" in third and "nonsense" in third and "\x1b" not in third
    assert "'plain words'" in fourth
    assert json.loads(run(capsys, "dlq", "show", "1", "--json", *where)[1]) == listed[0]
    seq = listed[0]["bus_seq"]
    for choice, ids in (
        (["--id", "2", "--id", "3"], [2, 3]),
        (["--topic", "market_data"], [1, 2]),
        (["--place", "ingest"], [3, 4, 5]),
        (["--reason", listed[0]["reason"]], [1, 2]),
        (["--seq", f"{seq}"], [1]),
        (["--seq", f"{seq + 1}.."], [2]),
        (["--since", str(listed[2]["at"])], [3, 4, 5]),
        (["--until", str(listed[2]["at"])], [1, 2]),
        (["--plugin", "nobody"], []),
    ):
        for verb in ("list", "show"):
            code, out = run(capsys, "dlq", verb, *choice, "--json", *where)
            assert (code, [json.loads(line)["id"] for line in out.splitlines()]) == (0, ids), (verb, choice)
    code, out = run(capsys, "dlq", "replay", "--place", "ingest", "--json", *where)
    assert (code, json.loads(out)) == (0, {"published": [], "unreadable": [3, 4, 5]})
    code, out = run(
        capsys, "dlq", "purge", "--seq", f"..{seq}", "--reason", listed[0]["reason"], "--yes", "--json", *where
    )
    assert json.loads(out) == {"purged": [1]}
    wait_until(lambda: [each.id for each in letters(bus)] == [2, 3, 4, 5], "one to go")


def test_a_letter_and_the_one_that_takes_its_place_change_in_one_commit_and_a_full_disk_is_waited_for(embed):
    bus = embed(["schema", "store"])
    store, tape = bus.runtime.store, bus.runtime.tape
    tape.bury(DeadLetter("plugin.p", "error", "before", 1))
    wait_until(lambda: letters(bus), "the first letter")
    commit, commits, busy = store.commit, [], threading.Event()

    def note(what: Commit) -> None:
        if not busy.is_set():
            # a consumer's thread reports while the tape thread is in the middle of a commit
            busy.set()
            tape.bury(DeadLetter("plugin.p", "error", "after", 1))
            tape.purge([1])
        elif what.settled and len(commits) < 2:
            commits.append(what)
            store.shortage = "full for the test"
            raise StoreFull("full for the test")
        commit(what)
        assert len(letters(bus)) == 1, "both or neither"

    store.commit = note
    bus.publish(1)
    wait_until(lambda: [each.detail for each in letters(bus)] == ["after"], "the second letter")
    assert [(each.settled, [letter.detail for letter in each.dead]) for each in commits] == [([1], ["after"])] * 2
    bus.publish(1)
    assert bus.runtime.stats()["store"]["dead_letters"] == 1


def test_thousands_of_letters_are_purged_at_once(make_bus, capsys):
    bus = make_bus(["schema", "store"]).start()
    with pushing(bus.ingest) as send:
        for n in range(8000):
            send(b"nonsense %d" % n)
    bus.wait_for(lambda stats: stats["store"]["dead_letters"] == 8000, "to bury them")
    assert run(capsys, "dlq", "purge", "--all", "--yes", "--config", str(bus.config_file)) == (0, "8000 purged\n")
    bus.wait_for(lambda stats: stats["store"]["dead_letters"] == 0, "to purge them")

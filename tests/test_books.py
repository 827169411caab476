"""The books: closed from outside too, with a bus and without one, by sums and by counting; one list of places."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import zmq

from bus_support import pushing, quote, wait_until
from tapebus import Publisher, Tape, books, places, wire
from tapebus.blocks import crc32c
from tapebus.cli import main
from tapebus.cli.books import _explain
from tapebus.events import PLUGIN_REASONS
from tapebus.store import MAX_GAPS, Commit, Gap, ProducerBook

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("client", "ingest", "legacy", "plugin", "relay")


def report(capsys, config_file: Path, *options: str) -> tuple[int, dict]:
    code = main(["check", "--books", "--json", *options, "--config", str(config_file)])
    return code, json.loads(capsys.readouterr().out)


class Client:
    """The acknowledged protocol by hand, for what a well-behaved publisher never sends."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = 10_000
        self.socket.connect(endpoint)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(0)

    def say(self, kind: int, rest: bytes) -> None:
        self.socket.send(wire.HEAD.pack(kind, 0, wire.VERSION, b"p" * 16, 7) + rest)

    def hello(self, highest: int = 0) -> int:
        self.say(wire.HELLO, wire.S_HELLO.pack(highest) + msgspec.msgpack.encode({"source": "by_hand"}))
        frame = self.socket.recv()
        assert frame[0] == wire.WELCOME
        return int(wire.S_WELCOME.unpack_from(frame, wire.HEAD.size)[1])

    def until_acked(self, seq: int) -> None:
        while wire.S_ACK.unpack_from(self.socket.recv(), wire.HEAD.size)[0] < seq:
            pass

    def batch(self, base: int, body: bytes, count: int) -> None:
        self.say(wire.BATCH, wire.S_BATCH.pack(base, count, crc32c(body), base + count - 1) + body)


def event(n: int) -> dict:
    return {"event_type": "market_data", "timestamp": 1.7e9 + n, "source": "by_hand", "data": quote(n)}


def batch_of(events: list[dict]) -> bytes:
    return b"\xdd" + len(events).to_bytes(4, "big") + b"".join(map(msgspec.msgpack.encode, events))


def test_the_books_name_every_range_that_is_not_on_the_tape_also_after_the_bus_is_gone(capsys, make_bus):
    bus = make_bus(["schema", "store"]).start()
    with Client(bus.acked) as client:
        assert client.hello() == 0
        client.batch(1, batch_of([event(n) for n in range(10)]), 10)
        client.say(wire.GAP, wire.S_GAP.pack(11, 14, 14, 2))
        client.say(wire.GAP, wire.S_GAP.pack(15, 20, 20, 2))
        client.batch(21, b"\xdd\0\0\0\3" + b"\xc1" * 9, 3)
        client.say(wire.GAP, wire.S_GAP.pack(24, 24, 30, 1))
        client.until_acked(24)
    with pushing(bus.ingest) as send:
        send(b"{broken")
        send(json.dumps(event(1)).encode())
    bus.wait_for(lambda s: s["bus"]["rejected"].get("ingest.malformed") == 4, "to count what is broken")
    bus.wait_for(lambda s: s["producers"] and any(p["source"] == "unsequenced" for p in s["producers"]), "the event")
    code, live = report(capsys, bus.config_file)
    assert (code, live["bus"]["unexplained"]) == (0, 0)
    assert live["bus"]["line"].startswith("books: ")
    bus.kill()
    code, found = report(capsys, bus.config_file, "--deep")
    assert (code, found["bus"], found["tape"]["closed"]) == (0, None, True)
    [account] = [each for each in found["producers"] if each["source"] == "by_hand"]
    assert (account["highest_seq"], account["stored"], account["in_flight"], account["unexplained"]) == (30, 10, 6, 0)
    assert account["rejected"] == {"ingest.malformed": 3}
    assert account["dropped"] == {"client.ring_full": 10, "client.encode": 1}
    gaps = [(gap["first"], gap["last"], gap["events"], gap["place"]) for gap in account["gaps"]]
    assert gaps == [
        (11, 20, 10, "client.ring_full"),
        (21, 23, 3, "ingest.malformed"),
        (24, 24, 1, "client.encode"),
    ]
    assert found["counted"]["missing"] == 0
    assert found["counted"]["by_source"]["by_hand"] == {"counted": 11, "accounts": 10}
    assert main(["check", "--books", "--config", str(bus.config_file)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"by_hand .* 11 +20 +10 +client.ring_full", text)
    assert "no bus is running" in text and "unexplained 0" in text
    # the ranges are carried over, and the producer goes on where it was
    bus.start()
    with Client(bus.acked) as client:
        assert client.hello(30) == 24
        client.say(wire.GAP, wire.S_GAP.pack(25, 30, 30, 1))
        client.until_acked(30)
    _, found = report(capsys, bus.config_file)
    [account] = [each for each in found["producers"] if each["source"] == "by_hand"]
    assert account["gaps"][-1]["first"] == 24 and account["gaps"][-1]["last"] == 30
    assert (account["in_flight"], account["unexplained"]) == (0, 0)
    assert bus.stop() == 0


def test_an_account_that_does_not_close_is_named_and_the_command_fails(capsys, make_bus):
    from tapebus_store import tapebus_open_store

    bus = make_bus(["schema", "store"])
    bus.data_dir.mkdir(0o700, parents=True)
    store = tapebus_open_store(data_dir=bus.data_dir, config={}, readonly=False)
    store.commit(Commit(producers=[ProducerBook(b"q" * 16, 3, "cheat", 9, 5, 9, {"ingest.malformed": 3})]))
    store.close()
    code, found = report(capsys, bus.config_file)
    assert (code, found["tape"]["unexplained"], found["tape"]["stray"]) == (1, 1, -5)
    assert main(["check", "--books", "--config", str(bus.config_file)]) == 1
    assert "unexplained 1" in capsys.readouterr().out
    assert main(["check", "--deep", "--config", str(bus.config_file)]) == 2


def test_an_account_names_its_newest_gaps_and_sums_all():
    book = ProducerBook(b"p" * 16, 1)
    for n in range(MAX_GAPS + 10):
        book.note_gap(Gap(3 * n, 3 * n, "client.ring_full", 1.0))
    assert len(book.gaps) == MAX_GAPS and book.gaps[-1].first == 3 * (MAX_GAPS + 9)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(book), type=ProducerBook)
    assert again == book
    # accounts written before gaps were named are read as having none
    old = {"producer_id": b"p" * 16, "epoch": 1, "watermark": 4, "stored": 4}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=ProducerBook).gaps == []


def test_the_books_of_the_bus_itself_and_of_unnumbered_senders_outlive_it(capsys, make_bus):
    bus = make_bus(["schema", "store"])
    for n in range(1, 4):
        bus.start()
        with pushing(bus.ingest) as send:
            send(json.dumps(event(n)).encode())
            send(b"{broken")
            bus.wait_for(lambda s, n=n: s["bus"]["rejected"].get("ingest.malformed") == n, "to refuse what is broken")
            bus.wait_for(
                lambda s: s["books"]["in_flight"] == 0 and s["bus"]["received"] == s["bus"]["stored"], "to commit"
            )
        bus.kill() if n == 1 else bus.stop()
        code, found = report(capsys, bus.config_file, "--deep")
        assert (code, found["tape"]["stray"], found["counted"]["missing"]) == (0, 0, 0)
        [account] = [each for each in found["producers"] if each["source"] == "unsequenced"]
        assert account["stored"] == n


def old(number: int, last_bus_seq: int, in_flight: int = 0) -> ProducerBook:
    found = ProducerBook(bytes([number]) * 16, 1, "script", 3, 2, 3 + in_flight, {"ingest.malformed": 1})
    found.last_bus_seq = last_bus_seq
    return found


def test_accounts_of_producers_long_gone_are_added_up_once_their_events_are_gone():
    accounts = [old(1, 90), old(2, 60), old(3, 40), old(4, 75), old(5, 40, in_flight=2)]
    kept, gone = books.fold(accounts, 50, 70)
    assert [each.producer_id[0] for each in gone] == [3, 5]
    [total] = [each for each in kept if each.producer_id == books.FINISHED]
    assert (total.watermark, total.stored, total.highest_seq, total.rejected) == (6, 4, 8, {"ingest.malformed": 2})
    before = books.summary(map(books.account, accounts), 10)
    after = books.summary(map(books.account, kept), 10)
    assert (after.published, after.stored, after.rejected, after.in_flight) == (
        (before.published, before.stored, before.rejected, before.in_flight)
    )
    assert books.fold(kept, 50, 70) == (kept, []), "nothing is added twice"
    assert books.fold(accounts, 50, 0) == (accounts, []), "where no time has passed for certain nobody is long gone"
    assert books.fold(accounts, 50, 39) == (accounts, []), "nor before the tape is old enough"
    # too many accounts: events may still be on the tape, but nothing may be on its way
    kept, gone = books.fold([*accounts, old(6, 60, in_flight=1)], 1, 70, many=5)
    assert [each.producer_id[0] for each in gone] == [2, 3]


def test_a_bus_forgets_old_accounts_at_its_start_and_the_sums_stay(capsys, make_bus):
    from tapebus_store import books as records
    from tapebus_store import tapebus_open_store
    from tapebus_store.ages import Ages

    bus = make_bus(["schema", "store"], extra="[plugins.store]\nmax_events = 1")
    bus.start()
    with Publisher("lately", endpoint=bus.acked) as publisher:
        assert publisher.publish("note", {}) and publisher.flush(10.0)
    assert bus.stop() == 0
    store = tapebus_open_store(data_dir=bus.data_dir, config={}, readonly=False)
    long_gone = [ProducerBook(bytes([n]) * 16, 1, "script", 3, 0, 3, {"ingest.malformed": 3}) for n in range(1, 60)]
    store.commit(Commit(producers=long_gone))
    # forty days ago the tape had no event yet, as far as its marks tell
    ages = Ages(clock=40 * 86400.0, marks=[(0.0, 1)])
    store._durably(lambda txn, tape: store._put(txn, "meta", records.AGES_KEY, records.encode(ages)))
    store.close()
    before = report(capsys, bus.config_file)[1]["tape"]
    assert main(["check", "--books", "--config", str(bus.config_file)]) == 0
    assert "accounts more" in capsys.readouterr().out
    bus.start()
    assert bus.stop() == 0
    code, found = report(capsys, bus.config_file)
    assert code == 0 and found["tape"]["rejected"] == before["rejected"] == 59 * 3
    assert {each["source"] for each in found["producers"]} >= {"finished", "lately"}
    assert not [each for each in found["producers"] if each["source"] == "script"]


def test_a_publisher_that_runs_out_of_room_leaves_its_gaps_on_the_tape(capsys, make_bus, free_ports):
    bus = make_bus(["schema", "store"])
    with Publisher("burst", endpoint=bus.acked, capacity_events=64) as publisher:
        kept = [publisher.publish("market_data", quote(n)) for n in range(500)]
        bus.start()
        assert publisher.publish("market_data", quote(0)) in (True, False)
        wait_until(lambda: publisher.stats()["in_flight"] == 0 and publisher.flush(10.0), "everything to be told")
        stats = publisher.stats()
    lost = stats["dropped"]["client.ring_full"]
    assert lost >= kept.count(False) > 0
    code, found = report(capsys, bus.config_file)
    [account] = [each for each in found["producers"] if each["source"] == "burst"]
    assert code == 0 and account["dropped"] == {"client.ring_full": lost}
    assert sum(gap["events"] for gap in account["gaps"]) == lost
    assert account["highest_seq"] == 501 == account["stored"] + lost


def test_stats_shows_who_is_here_folds_who_is_gone_and_closes_the_books_in_one_line(capsys, make_bus):
    bus = make_bus(["schema", "store", "slots"]).start()
    for n in range(3):
        script = f"from tapebus import Publisher\nwith Publisher('script{n}', endpoint={bus.acked!r}) as p:\n"
        script += "    p.publish('note', {}); assert p.flush(10)"
        subprocess.run([sys.executable, "-c", script], check=True)
    with Publisher("here", endpoint=bus.acked) as publisher:
        publisher.publish("note", {})
        assert publisher.flush(10.0)
        bus.wait_for(lambda s: sum(p["connected"] for p in s["producers"]) == 1, "to notice who has left")
        assert main(["stats", "--config", str(bus.config_file)]) == 0
        text = capsys.readouterr().out
        assert "here" in text and "script1" not in text
        assert "and 3 finished or away: 3 stored, 0 rejected, 0 dropped, 0 in flight" in text
        assert re.search(r"books: \d+ producers, \d+ published = \d+ stored \+ 0 rejected .* unexplained 0", text)
        assert re.search(r"^slots .*slots 0/10", text, re.M)
        assert main(["stats", "--all", "--config", str(bus.config_file)]) == 0
        assert "script1" in capsys.readouterr().out


# -- one list ------------------------------------------------------------------------------------


def names_in_the_source() -> dict[str, str]:
    """Every text of the form ``family.name`` in the program, with the file it is in."""
    pattern = re.compile(rf"^({'|'.join(FAMILIES)})\.[a-z_*.]+$")
    found = {}
    for path in [*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and pattern.match(node.value):
                found[node.value] = path.name
    for path in (ROOT / "core").rglob("*.pyx"):
        for name in re.findall(rf"\"((?:{'|'.join(FAMILIES)})\.[a-z_]+)\"", path.read_text()):
            found[name] = path.name
    return found


def test_no_place_is_counted_that_is_not_on_the_list():
    found = names_in_the_source()
    assert {"legacy.shed", "ingest.malformed", "client.ring_full"} <= set(found)
    listed = {each.name for each in places.EVERY} | {"ingest.sock"}  # which is a file
    assert {name: file for name, file in found.items() if name not in listed and not places.known(name)} == {}


@pytest.mark.parametrize("name", ["plugin.slots.error", "relay.telegram.failed", "legacy.shed", "ingest.rate"])
def test_the_list_knows_its_names(name):
    assert places.known(name)


def test_the_list_knows_every_reason_for_which_a_consumer_buries():
    assert [reason for reason in PLUGIN_REASONS if not places.known(f"plugin.slots.{reason}")] == []


@pytest.mark.parametrize("name", ["client.", "plugin.error", "relay.telegram.lost", "legacy", "ingest.other", ""])
def test_the_list_knows_no_other(name):
    assert not places.known(name)


def test_the_list_is_printed_in_the_documentation():
    page = (ROOT / "docs" / "wire-format.md").read_text()
    for each in places.EVERY:
        name = each.name.replace("*", "<name>")
        assert f"| {each.code or ''} | `{name}` | {each.meaning} |".replace("|  |", "| |") in page, name


def test_what_a_bus_counts_is_on_the_list(embed):
    bus = embed(["schema", "store"])
    bus.publish(3)
    with pushing(bus.ingest) as send:
        send(b"{broken")
        wait_until(lambda: bus.runtime.stats()["bus"]["rejected"], "the refusal")
    stats = bus.runtime.stats()
    assert all(map(places.known, [*stats["bus"]["rejected"], *stats["bus"]["dropped"]]))
    with bus.tape() as tape:
        wait_until(lambda: tape.accounts()[1] == 3, "the commit")
        accounts, last_seq = tape.accounts()
    total = books.summary(accounts, last_seq)
    assert total.closed and total.stored == last_seq


def test_counting_the_tape_finds_what_the_accounts_promise(embed):
    bus = embed(["schema", "store"])
    bus.publish(500)
    bus.publish(500, first=500)
    with Tape.open(bus.data_dir) as tape:
        seen: list[int] = []
        assert tape.count_by_source(1000, seen.append) == ({"test": 1000}, [])
        assert tape.count_by_source(700) == ({"test": 700}, [])
        assert seen[-1] == 1000 and seen == sorted(seen)


def test_what_retention_removes_during_the_count_is_not_missing(embed, capsys, monkeypatch):
    bus = embed(["schema", "store"], extra="[plugins.store]\nmax_events = 300\n")
    for n in range(10):
        bus.publish(50, first=50 * n)

    def first_seq():
        return bus.runtime.store.first_seq()

    wait_until(lambda: first_seq() > 1, "retention to remove something before the count")

    @contextlib.contextmanager
    def while_counting(what, total):
        def progress(seq):
            if not told:
                told.append(seq)
                bus.publish(400, first=500)
                wait_until(lambda: first_seq() > seq, "retention to remove what was counted")

        yield progress

    told: list[int] = []
    monkeypatch.setattr("tapebus.cli.books.progress_bar", while_counting)
    data_dir = ["--data-dir", str(bus.data_dir)]
    code = main(["check", "--books", "--json", "--deep", *data_dir])
    found = json.loads(capsys.readouterr().out)["counted"]
    assert told and (code, found["missing"]) == (0, 0)
    assert found["removed"] > 0 and found["removed"] + found["by_source"]["test"]["counted"] == 500


@pytest.mark.parametrize(
    ("absent", "holes", "kept_from", "expected"),
    [
        ([range(1, 101)], [], 101, (100, 0)),
        ([range(1, 101)], [(1, 100)], 101, (0, 100)),
        ([range(1, 101), range(200, 210)], [(51, 80), (200, 209)], 101, (70, 40)),
        ([range(5, 7)], [], 1, (0, 0)),
        ([], [(1, 50)], 101, (0, 0)),
    ],
)
def test_what_damage_took_from_the_head_of_a_tape_is_not_called_retention(absent, holes, kept_from, expected):
    assert _explain(absent, holes, kept_from) == expected

"""The embedded runtime over real sockets and a real tape: books, dead letters, restarts, clear refusals."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import msgspec
import pytest

from bus_support import Seen, plugin, pushing, quote, wait_until
from tapebus import Config, Consumer, EventType, Publisher, Runtime, Tape, hookimpl
from tapebus.errors import ConfigError, PluginError, TapebusError


def envelope(event_type: str, data: object, **more: object) -> dict:
    return {"event_type": event_type, "timestamp": 1_700_000_000.0, "source": "test", "data": data, **more}


# -- what is wrong is counted -----------------------------------------------------------------------

MALFORMED = {
    "empty": b"",
    "text": b"not an event",
    "cut JSON": b'{"event_type": "market_data", "timestamp": 1.0, "sou',
    "cut MessagePack": msgspec.msgpack.encode(envelope("market_data", quote(1)))[:-5],
    "a number": b"17",
    "no event_type": json.dumps({"timestamp": 1.0, "source": "x", "data": {}}).encode(),
    "deep nesting": b"[" * 5000,
    "noise": bytes(range(256)),
}
INVALID = {
    "wrong type": envelope("market_data", {"symbol": "EURUSD", "bid": [1], "ask": 1.2}),
    "missing field": envelope("signal_generated", {"signal_id": "S1"}),
    "ask below bid": envelope("market_data", {"symbol": "EURUSD", "bid": 1.2, "ask": 1.1}),
    "unknown direction": envelope("fire_command", {"fire_id": "F", "symbol": "EURUSD", "direction": "UP", "lot": 1}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_frame_that_is_no_event_is_counted_and_listed_as_a_dead_letter(embed, name):
    bus = embed(["schema", "store"])
    with pushing(bus.ingest) as send:
        send(MALFORMED[name])
        send(json.dumps(envelope("market_data", quote(1))).encode())
        stats = wait_until(lambda: (s := bus.runtime.stats())["bus"]["stored"] == 1 and s, "the good event")
    assert sum(stats["bus"]["rejected"].values()) == 1
    with bus.tape() as tape:
        [letter] = wait_until(lambda: list(tape.dead_letters()), "the dead letter")
        [event] = tape.read()
    assert (letter.place, letter.reason, letter.raw) == ("ingest", "malformed", MALFORMED[name])
    assert letter.detail
    assert event.data.volume == 1


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_event_stays_on_the_tape_and_is_a_dead_letter_that_names_it(embed, name):
    seen = Seen()
    bus = embed(["schema", "store"], ("seen", plugin(Consumer(name="seen", topics=["*"], handler=seen))))
    with pushing(bus.ingest) as send:
        send(json.dumps(INVALID[name]).encode())
        send(json.dumps(envelope("market_data", quote(1))).encode())
        wait_until(lambda: seen.seqs, "the good event")
    with bus.tape() as tape:
        [letter] = wait_until(lambda: list(tape.dead_letters()), "the dead letter")
        assert tape.last_seq == 2
    assert seen.seqs == [2]
    assert (letter.place, letter.bus_seq, letter.event_type) == ("schema", 1, INVALID[name]["event_type"])
    assert letter.detail
    assert sum(bus.runtime.stats()["bus"]["dead_letters"].values()) == 1


def test_text_that_is_not_utf_8_is_a_dead_letter_and_harms_nobody(embed):
    seen = Seen()
    bus = embed(["schema", "store"], ("seen", plugin(Consumer(name="seen", topics=["*"], handler=seen))))
    with pushing(bus.ingest) as send:
        send(b'{"event_type": "\xff\xfe", "timestamp": 1.0, "source": "x", "data": {}}')
        send(b'{"event_type": "user_action", "timestamp": 1.0, "source": "\xff", "data": {"user_id":"7","action":"a"}}')
        send(json.dumps(envelope("market_data", quote(1))).encode())
        wait_until(lambda: seen.events and refused(bus) == 2, "the good event and two refusals")
    assert [event.event_type for event in seen.events] == ["market_data"]
    with bus.tape() as tape:
        wait_until(lambda: len(list(tape.dead_letters())) == 2, "the dead letters")
        assert len(list(tape.read())) == tape.last_seq


def test_not_a_number_never_reaches_a_consumer(embed):
    seen = Seen()
    bus = embed(["schema", "store"], ("seen", plugin(Consumer(name="seen", topics=["*"], handler=seen))))
    with pushing(bus.ingest) as send:
        send(msgspec.msgpack.encode(envelope("market_data", {"symbol": "X", "bid": float("nan"), "ask": 1.0})))
        send(b'{"event_type":"market_data","timestamp":1.0,"source":"x","data":{"symbol":"X","bid":NaN,"ask":1.0}}')
        send(json.dumps(envelope("market_data", quote(1))).encode())
        wait_until(lambda: seen.events, "the good event")
        wait_until(lambda: refused(bus) == 2, "both to be counted")
    assert len(seen.events) == 1


def refused(bus: object) -> int:
    figures = bus.runtime.stats()["bus"]
    return sum(figures["dead_letters"].values()) + sum(figures["rejected"].values())


def test_an_oversized_frame_is_counted_and_its_beginning_kept(embed):
    bus = embed(["schema", "store"])
    frame = json.dumps(envelope("user_action", {"user_id": "7", "action": "a", "details": {"x": "y" * (256 << 10)}}))
    with pushing(bus.ingest) as send:
        send(frame[: (256 << 10) + 32].encode())
        stats = wait_until(lambda: (s := bus.runtime.stats())["bus"]["rejected"] and s, "the count")
        send(json.dumps(envelope("market_data", quote(1))).encode())
        wait_until(lambda: bus.runtime.stats()["bus"]["stored"] == 1, "the good event")
    assert stats["bus"]["rejected"] == {"ingest.oversize": 1}
    with bus.tape() as tape:
        [letter] = wait_until(lambda: list(tape.dead_letters()), "the dead letter")
    assert letter.reason == "oversize"
    assert letter.raw == frame[: 64 << 10].encode()


def test_an_unknown_event_type_is_kept_with_a_plain_payload(embed):
    seen = Seen()
    bus = embed(["schema", "store"], ("seen", plugin(Consumer(name="seen", topics=["*"], handler=seen))))
    with pushing(bus.ingest) as send:
        send(json.dumps(envelope("made_up", {"a": [1, {"b": None}]})).encode())
        wait_until(lambda: seen.events, "the event")
    assert seen.events[0].event_type == "made_up"
    assert seen.events[0].data == {"a": [1, {"b": None}]}
    with bus.tape() as tape:
        assert [event.data for event in tape.read()] == [{"a": [1, {"b": None}]}]


def test_unknown_event_types_can_be_refused_with_a_count(embed):
    seen = Seen()
    one = ("seen", plugin(Consumer(name="seen", topics=["*"], handler=seen)))
    bus = embed(["schema", "store"], one, bus='unknown_types = "reject"')
    with pushing(bus.ingest) as send:
        send(json.dumps(envelope("made_up", {})).encode())
        send(json.dumps(envelope("market_data", quote(1))).encode())
        wait_until(lambda: seen.events, "the good event")
    assert [event.event_type for event in seen.events] == ["market_data"]
    with bus.tape() as tape:
        [letter] = wait_until(lambda: list(tape.dead_letters()), "the dead letter")
    assert (letter.bus_seq, letter.event_type) == (1, "made_up")


# -- books ------------------------------------------------------------------------------------------


def test_the_books_of_a_publisher_close_exactly(embed):
    bus = embed(["schema", "store"])
    with bus.publisher("elite_guard") as publisher:
        for n in range(5000):
            publisher.publish("market_data", quote(n))
        assert publisher.flush(30.0)
        own = publisher.stats()
    [book] = [each for each in bus.runtime.stats()["producers"] if each["source"] == "elite_guard"]
    assert (book["highest_seq"], book["stored"], book["rejected"], book["dropped"]) == (5000, 5000, 0, 0)
    assert (book["in_flight"], book["unexplained"]) == (0, 0)
    assert book["producer_id"] == own["producer_id"]
    assert own["acked"] == own["published"] == 5000
    assert own["durable"]
    with bus.tape() as tape:
        assert [event.data.volume for event in tape.read()] == list(range(5000))


def test_events_dropped_in_the_client_are_in_the_books_of_the_bus(embed):
    bus = embed(["schema", "store"])
    with bus.publisher("small", capacity_events=4) as publisher:
        for n in range(20_000):
            publisher.publish("market_data", quote(n))
        publisher.flush(30.0)
        own = publisher.stats()
        # the last gap is reported with the next frame at the latest
        publisher.publish("market_data", quote(0)) and publisher.flush(30.0)
        book = wait_until(
            lambda: next((b for b in bus.runtime.stats()["producers"] if b["source"] == "small"), None), "the book"
        )
    assert sum(own["dropped"].values()) > 0
    assert book["unexplained"] == 0
    assert book["highest_seq"] == book["stored"] + book["rejected"] + book["dropped"] + book["in_flight"]


def test_what_the_embedding_program_publishes_takes_the_same_way(embed):
    seen = Seen()
    bus = embed(["schema", "store"], ("seen", plugin(Consumer(name="seen", topics=["user_action"], handler=seen))))
    bus.runtime.publish("user_action", {"user_id": "7", "action": "login"}, correlation_id="C1")
    wait_until(lambda: seen.events, "the event")
    with bus.tape() as tape:
        [event] = tape.read(correlation_id="C1")
    assert (event.bus_seq, event.source, event.data.action) == (1, "tapebus", "login")


# -- without a store ----------------------------------------------------------------------------------


def test_without_a_store_the_bus_runs_and_says_that_acknowledged_means_dispatched(embed):
    seen = Seen()
    bus = embed(["schema"], ("seen", plugin(Consumer(name="seen", topics=["*"], handler=seen))))
    with bus.publisher() as publisher:
        for n in range(1000):
            publisher.publish("market_data", quote(n))
        assert publisher.flush(30.0)
        assert publisher.stats()["acked"] == 1000
        assert publisher.stats()["durable"] is False
    wait_until(lambda: len(seen.events) == 1000, "all events")
    assert seen.seqs == list(range(1, 1001))
    assert bus.runtime.stats()["bus"]["acks_mean"] == "dispatched"


# -- again and again ------------------------------------------------------------------------------------


def test_consumers_resume_after_a_restart_and_a_new_one_may_see_the_whole_tape(embed):
    def consumers(old: Seen, new: Seen | None = None) -> list:
        made = [("old", plugin(Consumer(name="old", topics=["*"], handler=old)))]
        if new is not None:
            made.append(("new", plugin(Consumer(name="new", topics=["*"], handler=new, start="first"))))
        return made

    first, second, whole = Seen(), Seen(), Seen()
    bus = embed(["schema", "store"], *consumers(first))
    bus.publish(300)
    bus.stop()
    assert first.seqs == list(range(1, 301))
    bus = embed(["schema", "store"], *consumers(second, whole), again=bus)
    bus.publish(200, first=300)
    wait_until(lambda: len(second.events) >= 200 and len(whole.events) >= 500, "both consumers")
    bus.stop()
    assert second.seqs == list(range(301, 501))
    assert whole.seqs == list(range(1, 501))


def test_types_that_come_after_thousands_of_others_reach_their_consumers_and_readers_as_well(embed):
    def late(name: str, mode: str, seen: Seen) -> tuple:
        return name, plugin(Consumer(name=name, topics=["late.*", "registered_late"], handler=seen, mode=mode))

    inline, thread, again = Seen(), Seen(), Seen()
    bus = embed(["schema", "store"], late("inline", "inline", inline), late("thread", "thread", thread))
    with bus.publisher() as publisher:
        for n in range(5000):
            publisher.publish(f"early.{n}", {"n": n})
        for n in range(3):
            publisher.publish(f"late.{n}", {"n": n})
        assert publisher.flush(30.0)
    wait_until(lambda: len(inline.events) >= 3 and len(thread.events) >= 3, "both consumers")
    for seen in (inline, thread):
        assert [event.event_type for event in seen.events] == ["late.0", "late.1", "late.2"]
    with bus.tape() as tape:
        assert [event.event_type for event in tape.read(topics=["late.1", "early.4999"])] == ["early.4999", "late.1"]
        assert [event.event_type for event in tape.read(topics=["late.*"], reverse=True)] == [
            "late.2",
            "late.1",
            "late.0",
        ]
    bus.stop()

    # a type that is registered only now still gets a number, and with it its payload and its rules
    class Payload(msgspec.Struct):
        n: int

    @hookimpl
    def tapebus_register_event_types():
        return [EventType("registered_late", Payload, aliases={"number": "n"})]

    types = ("types", plugin(tapebus_register_event_types=tapebus_register_event_types))
    bus = embed(["schema", "store"], types, late("inline", "inline", again), again=bus)
    with bus.publisher() as publisher:
        publisher.publish("registered_late", {"number": 7})
        publisher.publish("late.9", {"n": 9})
        assert publisher.flush(30.0)
    wait_until(lambda: len(again.events) >= 2, "the types of the second run")
    assert [(event.event_type, type(event.data)) for event in again.events] == [
        ("registered_late", Payload),
        ("late.9", dict),
    ]
    assert again.events[0].data.n == 7


def test_a_thread_consumer_resumes_at_its_cursor(embed):
    def made(seen: Seen) -> tuple:
        return ("t", plugin(Consumer(name="t", topics=["*"], handler=seen, mode="thread", start="first")))

    first, second = Seen(), Seen()
    bus = embed(["schema", "store"], made(first))
    bus.publish(300)
    bus.stop()
    bus = embed(["schema", "store"], made(second), again=bus)
    bus.publish(200, first=300)
    bus.stop()
    assert first.seqs == list(range(1, 301))
    assert second.seqs == list(range(301, 501))


def test_the_books_survive_a_restart(embed):
    bus = embed(["schema", "store"])
    bus.publish(100)
    with pushing(bus.ingest) as send:
        send(b"nonsense")
        wait_until(lambda: bus.runtime.stats()["bus"]["rejected"], "the count")
    before = bus.runtime.stats()
    bus.stop()
    bus = embed(["schema", "store"], again=bus)
    after = bus.runtime.stats()
    assert after["producers"] == before["producers"]
    assert after["bus"]["rejected"] == before["bus"]["rejected"]
    assert after["bus"]["stored"] == 100


def test_the_tape_can_be_read_and_followed_by_others_while_the_bus_runs(embed):
    bus = embed(["schema", "store"])
    bus.publish(10)
    with bus.tape() as tape:
        follower = tape.follow(after=0, idle_timeout=30.0)
        assert [next(follower).bus_seq for _ in range(10)] == list(range(1, 11))
        bus.publish(10, first=10)
        assert [next(follower).data.volume for _ in range(10)] == list(range(10, 20))
        assert tape.last_seq == 20


def test_two_buses_run_one_after_the_other_in_one_process(embed):
    for _ in range(2):
        bus = embed(["schema", "store"])
        bus.publish(50)
        bus.stop()
        with Tape.open(bus.data_dir) as tape:
            assert tape.last_seq == 50


def test_stopping_twice_or_before_starting_does_nothing(embed, data_dir):
    Runtime(Config.load(data_dir=data_dir / "never", environ={})).stop()
    bus = embed(["schema", "store"])
    bus.stop()
    bus.stop()


# -- refusals ---------------------------------------------------------------------------------------------


def refusal(embed, kind: type[TapebusError], *plugins: tuple, names: tuple = ("schema", "store"), **more) -> str:
    with pytest.raises(kind) as caught:
        embed(list(names), *plugins, **more)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_a_port_in_use_is_named_and_nothing_is_left_running(embed):
    bus = embed(["schema", "store"])
    bus.stop()
    port = int(bus.ingest.rpartition(":")[2])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        message = refusal(embed, TapebusError, again=bus, listening="wait_s = 0.1")
    assert "listen.ingest" in message
    assert str(port) in message
    embed(["schema", "store"], again=bus).publish(1)


def test_a_second_bus_on_a_data_directory_is_refused_with_the_pid_of_the_first(embed, free_ports):
    bus = embed(["schema", "store"])
    feed, ingest, acked = endpoints(free_ports(3))
    other = SimpleNamespace(data_dir=bus.data_dir, feed=feed, ingest=ingest, acked=acked)
    message = refusal(embed, TapebusError, again=other)
    assert str(os.getpid()) in message
    bus.publish(1)


def endpoints(ports: list[int]) -> list[str]:
    return [f"tcp://127.0.0.1:{port}" for port in ports]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_data_directory_is_named(embed):
    bus = embed(["schema", "store"])
    bus.stop()
    bus.data_dir.chmod(0o000)
    try:
        assert str(bus.data_dir) in refusal(embed, TapebusError, again=bus)
    finally:
        bus.data_dir.chmod(0o700)


def test_a_data_directory_that_is_a_file_is_named(embed):
    bus = embed(["schema", "store"])
    bus.stop()
    file = bus.data_dir.with_name("file")
    file.write_text("")
    other = SimpleNamespace(data_dir=file, feed=bus.feed, ingest=bus.ingest, acked=bus.acked)
    assert str(file) in refusal(embed, TapebusError, again=other)


def test_an_unknown_plugin_is_refused_with_the_nearest_name(embed):
    message = refusal(embed, PluginError, names=("schema", "stroe"))
    assert "'stroe'" in message
    assert "'store'" in message
    assert PluginError.exit_code == 78


def test_a_plugin_without_hooks_is_refused(embed):
    assert "'bare'" in refusal(embed, PluginError, ("bare", SimpleNamespace()))


def test_consumers_that_wait_for_each_other_are_refused_by_name(embed):
    def one(name: str, after: str) -> tuple:
        return (name, plugin(Consumer(name=name, topics=["*"], handler=print, after=[after])))

    message = refusal(embed, PluginError, one("a", "b"), one("b", "a"))
    assert "cycle" in message
    assert "a, b" in message


def test_two_consumers_of_one_name_are_refused(embed):
    twice = plugin(*(Consumer(name="same", topics=["*"], handler=print) for _ in range(2)))
    assert "'same'" in refusal(embed, PluginError, ("twice", twice))


def test_a_plugin_that_mixes_modes_is_refused(embed):
    mixed = plugin(
        Consumer(name="a", topics=["*"], handler=print), Consumer(name="b", topics=["*"], handler=print, mode="thread")
    )
    assert "'mixed'" in refusal(embed, PluginError, ("mixed", mixed))


def test_a_plugin_that_fails_to_start_leaves_the_data_directory_and_ports_free(embed):
    @hookimpl
    def tapebus_start(context: object) -> None:
        raise ConfigError("[plugins.bad] key: wrong")

    bus = embed(["schema", "store"])
    bus.stop()
    bad = plugin(tapebus_start=tapebus_start)
    assert refusal(embed, ConfigError, ("bad", bad), again=bus) == "[plugins.bad] key: wrong"
    embed(["schema", "store"], again=bus).publish(1)


def test_an_order_that_names_an_absent_consumer_is_fine(embed):
    order: list[str] = []

    def one(name: str, *after: str) -> tuple:
        handler = lambda batch: [order.append(name) for _ in batch]  # noqa: E731
        return (name, plugin(Consumer(name=name, topics=["*"], handler=handler, after=list(after))))

    bus = embed(["schema", "store"], one("last", "first", "absent"), one("first"))
    bus.publish(1)
    wait_until(lambda: len(order) == 2, "both consumers")
    assert order == ["first", "last"]


def test_publishing_loads_no_part_of_the_bus():
    code = "import sys, tapebus; tapebus.Publisher; print([m for m in sys.modules if m in ('tapebus.runtime', 'lmdb')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert Publisher.__module__ == "tapebus.publisher"

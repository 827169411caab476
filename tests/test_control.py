"""The control socket of a running bus: figures, pause and resume, purge, and nothing for others."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
import zmq

from bus_support import Seen, plugin, pushing, wait_until
from tapebus import Config, Consumer
from tapebus.control import request
from tapebus.errors import BusNotRunning, TapebusError


def test_stats_hold_what_others_rely_on(embed):
    seen = Seen()
    bus = embed(["schema", "store"], ("seen", plugin(Consumer(name="seen", topics=["*"], handler=seen))))
    bus.publish(10)
    wait_until(lambda: len(seen.events) == 10, "all events")
    stats = bus.request("stats")
    assert {"uptime_s", "last_seq", "received", "stored", "rejected", "dropped", "rss_bytes"} <= set(stats["bus"])
    assert (stats["bus"]["last_seq"], stats["bus"]["received"], stats["bus"]["stored"]) == (10, 10, 10)
    [producer] = stats["producers"]
    assert {"producer_id", "source", "highest_seq", "stored", "rejected", "dropped", "in_flight"} <= set(producer)
    [consumer] = stats["consumers"]
    keys = {"name", "plugin", "mode", "cursor", "lag_events", "lag_ms", "handled", "errors", "state"}
    assert keys <= set(consumer)
    assert (consumer["name"], consumer["handled"], consumer["errors"]) == ("seen", 10, 0)


@pytest.mark.parametrize("mode", ["inline", "thread"])
def test_a_paused_consumer_gets_nothing_and_after_resume_everything_once(embed, mode):
    paused, other = Seen(), Seen()
    bus = embed(
        ["schema", "store"],
        ("p", plugin(Consumer(name="p", topics=["*"], handler=paused, mode=mode))),
        ("other", plugin(Consumer(name="other", topics=["*"], handler=other))),
    )
    bus.publish(10)
    wait_until(lambda: bus.consumer("p")["cursor"] == 10, "the first ten")
    assert bus.request("pause", consumer="p")["state"] == "paused"
    bus.publish(3000, first=10)
    wait_until(lambda: len(other.events) == 3010, "the other consumer")
    assert len(paused.events) <= 3010
    waiting = bus.consumer("p")
    assert waiting["state"] == "paused"
    assert bus.request("resume", consumer="p")["state"] == "running"
    wait_until(lambda: len(paused.events) >= 3010, "the rest from the tape")
    bus.publish(10, first=3010)
    wait_until(lambda: len(paused.events) >= 3020, "what came afterwards")
    assert paused.seqs == list(range(1, 3021))


def test_commands_that_name_nobody_are_answered_with_the_names(embed):
    bus = embed(["schema", "store"], ("seen", plugin(Consumer(name="seen", topics=["*"], handler=print))))
    with pytest.raises(TapebusError, match=r"'nobody'.*seen"):
        bus.request("pause", consumer="nobody")
    with pytest.raises(TapebusError, match=r"unknown command.*stats"):
        bus.request("explode")


def test_dead_letters_are_purged_by_id(embed):
    bus = embed(["schema", "store"])
    with bus.tape() as tape:
        with pushing(bus.ingest) as send:
            for n in range(5):
                send(b"nonsense %d" % n)
            wait_until(lambda: len(list(tape.dead_letters())) == 5, "five dead letters")
        ids = [letter.id for letter in tape.dead_letters()]
        bus.request("dlq_purge", ids=ids[:3])
        wait_until(lambda: [letter.id for letter in tape.dead_letters()] == ids[3:], "three to go")


def test_nonsense_on_the_control_socket_is_answered_and_harms_nobody(embed):
    bus = embed(["schema", "store"])
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 30_000)
        socket.connect(bus.config.control_endpoint)
        for frame in (b"", b"\xff\xfe", b"[]", b"[" * 5000, b'{"cmd": 7}', b'{"cmd": "dlq_purge", "ids": "x"}'):
            socket.send(frame)
            assert b'"error"' in socket.recv()
    bus.publish(1)


@pytest.mark.parametrize("number", [-1, 2**63, 2**64, 10**20])
@pytest.mark.parametrize("command", ["dlq_purge", "dlq_replay"])
def test_a_number_that_no_dead_letter_can_have_is_refused_and_the_bus_goes_on(embed, command, number):
    bus = embed(["schema", "store"])
    with pytest.raises(TapebusError, match=r"ids\[1\]"):
        bus.request(command, ids=[1, number])
    bus.publish(1)
    assert bus.request("stats")["bus"]["stored"] == 1


def test_only_the_owner_reaches_the_sockets(embed):
    bus = embed(["schema", "store"])
    path = bus.config.control_endpoint.removeprefix("ipc://")
    assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0
    assert stat.S_IMODE(os.stat(bus.data_dir).st_mode) == 0o700


def test_no_bus_is_one_clear_line(data_dir):
    with pytest.raises(BusNotRunning, match="tapebus run"):
        request(Config.load(data_dir=data_dir, environ={}), {"cmd": "stats"})


def test_a_stopped_bus_no_longer_answers(embed):
    bus = embed(["schema", "store"])
    bus.stop()
    with pytest.raises(BusNotRunning):
        request(bus.config, {"cmd": "stats"}, timeout=0.2)


def test_an_unknown_field_in_a_request_is_refused(embed):
    bus = embed(["schema", "store"])
    with pytest.raises(TapebusError, match="extra"):
        bus.request("stats", extra=1)


ASK = """
import os, sys, zmq
socket = zmq.Context().socket(zmq.DEALER)
os.setgid(4343); os.setuid(4343)
socket.linger, socket.rcvtimeo = 0, 20_000
socket.connect(sys.argv[1])
socket.send(b'{"cmd": "stats"}')
print(socket.recv().decode())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_even_where_the_modes_let_it_in(embed, data_dir):
    bus = embed(["schema", "store"])
    path = bus.config.control_endpoint.removeprefix("ipc://")
    for place in (data_dir, bus.data_dir, os.path.dirname(path), path):
        os.chmod(place, 0o777)
    done = subprocess.run(
        [sys.executable, "-c", ASK, bus.config.control_endpoint],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "belongs to uid 0" in done.stdout, done.stderr
    assert "last_seq" in str(bus.request("stats"))

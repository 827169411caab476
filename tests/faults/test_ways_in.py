"""The ways in when something is wrong: a tape that stands still, a port still taken, leftovers, no descriptors left."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import zmq

from bus_support import listening, pushing, quote, wait_until
from tapebus import Publisher, Tape
from test_legacy import LEGACY, envelope

FRAME = json.dumps(envelope("market_data", LEGACY["market_data"][0])).encode()


def received(stats: Any) -> int:
    """Events of fire-and-forget senders that are stored or shed."""
    stored = sum(each["stored"] for each in stats["producers"] if each["producer_id"] == "ingest")
    return int(stored + stats["bus"]["dropped"].get("legacy.shed", 0))


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def test_a_tape_that_stands_still_blocks_no_push_client_and_what_is_shed_is_counted(make_bus, size, figures):
    bus = make_bus(["schema", "store"]).start()
    count = size(80_000, 500_000, 2_000_000)
    with pushing(bus.ingest) as send:
        send(FRAME)
        bus.wait_for(lambda s: received(s) == 1, "the first event")
        # the files of the tape may not grow: the commit fails as on a full disk
        _, hard = resource.prlimit(bus.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(
            bus.process.pid, resource.RLIMIT_FSIZE, ((bus.data_dir / "tape/data.mdb").stat().st_size, hard)
        )
        longest, sent = 0.0, 1
        while sent < count:
            began = time.monotonic()
            send(FRAME)
            longest = max(longest, time.monotonic() - began)
            sent += 1
        stats = bus.wait_for(lambda s: s["bus"]["state"] == "store full", "to notice that the disk is full")
        bus.wait_for(lambda s: s["bus"]["dropped"].get("legacy.shed", 0) > 0, "to shed")
        resource.prlimit(bus.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        stats = bus.wait_for(lambda s: received(s) == sent and s["bus"]["state"] == "running", "to go on")
        send(FRAME)
        bus.wait_for(lambda s: received(s) == sent + 1, "the next event")
    shed = stats["bus"]["dropped"]["legacy.shed"]
    figures.update(sent=sent, shed=shed, longest_send_s=round(longest, 3))
    # a second until the stall is certain; the rest is a loaded machine
    assert longest < 10
    assert bus.stop() == 0
    with Tape.open(bus.data_dir) as tape:
        assert sum(1 for _ in tape.read(topics=["market_data"])) == sent + 1 - shed


def test_a_pub_that_exists_is_attached_and_its_events_are_kept_as_published(make_bus, free_ports):
    [port] = free_ports(1)
    source = f'[[sources]]\nname = "old"\ntype = "sub"\nconnect = "tcp://127.0.0.1:{port}"\n'
    bus = make_bus(["schema", "store"], extra=source)
    sent = {kind: envelope(kind, data, "S1") for kind, (data, _) in LEGACY.items()}
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        publisher.linger = 0
        publisher.bind(f"tcp://127.0.0.1:{port}")
        bus.start()
        with listening(None, bus.feed, b"bitten.") as subscriber:
            subscriber.rcvtimeo = 50
            repeated: dict[str, dict[str, Any]] = {}

            def arrived() -> bool:
                for each in sent.values():
                    publisher.send(json.dumps(each).encode())
                try:
                    while True:
                        found = json.loads(subscriber.recv_multipart()[1])
                        if found["source"] == "elite_guard":  # the bus publishes its own health too
                            repeated[found["event_type"]] = found
                except zmq.Again:
                    return repeated.keys() == sent.keys()

            wait_until(arrived, "every type of event on the feed")
    with Tape.open(bus.data_dir) as tape:
        for kind, found in repeated.items():
            assert tape.raw(found.pop("bus_seq")) == json.dumps(sent[kind]).encode()
            assert found == sent[kind]


def test_recorded_payloads_are_kept_to_the_byte_inside_the_envelope_they_are_given(make_bus, shared_data, free_ports):
    files = [*sorted((shared_data / "legacy").glob("*.jsonl")), shared_data / "wire" / "hydrax_ea.jsonl"]
    lines = [line for file in files for line in file.read_bytes().splitlines() if line.startswith(b"{")]
    [port] = free_ports(1)
    source = f'[[sources]]\nname = "old"\ntype = "pull"\nbind = "tcp://127.0.0.1:{port}"\ntopic = "recorded"\n'
    bus = make_bus(["schema", "store"], extra=source).start()
    with pushing(f"tcp://127.0.0.1:{port}") as send:
        for line in lines:
            send(line)
        bus.wait_for(
            lambda s: sum(p["stored"] for p in s["producers"] if p["source"] == "old") == len(lines),
            "all that was sent",
        )
    with Tape.open(bus.data_dir) as tape:
        kept = [tape.raw(event.bus_seq) for event in tape.read(topics=["recorded"])]
    assert len(kept) == len(lines) > 5000
    assert [line for raw, line in zip(kept, lines, strict=True) if not raw.endswith(b'"data":' + line + b"}")] == []


def test_a_port_that_is_still_taken_is_waited_for(make_bus, figures):
    bus = make_bus(["schema", "store"])
    with socket.socket() as other:
        other.bind(("127.0.0.1", port_of(bus.acked)))
        other.listen()
        starting = threading.Thread(target=bus.start)
        starting.start()
        wait_until(lambda: "in use; waiting" in bus.output(), "the bus to say that it waits")
        other.close()
        freed = time.monotonic()
        starting.join(30)
    figures["listening_after_s"] = round(time.monotonic() - freed, 2)
    with Publisher("script", endpoint=bus.acked) as publisher:
        assert publisher.publish("market_data", quote(1)) and publisher.flush(30.0)
    assert bus.stop() == 0


def test_a_port_that_stays_taken_ends_the_start_and_a_signal_ends_the_wait(make_bus):
    bus = make_bus(["schema", "store"])
    text = bus.config_file.read_text().replace("[listen]\n", "[listen]\nwait_s = 0.2\n")
    patient = bus.config_file.with_name("patient.toml")
    patient.write_text(bus.config_file.read_text())
    bus.config_file.write_text(text)
    command = [sys.executable, "-m", "tapebus", "run", "--config"]
    with socket.socket() as other:
        other.bind(("127.0.0.1", port_of(bus.ingest)))
        other.listen()
        done = subprocess.run(
            [*command, str(bus.config_file)], capture_output=True, text=True, env=bus.environ(), timeout=60
        )
        assert done.returncode == 1
        assert "listen.ingest: cannot listen on" in done.stderr.splitlines()[-1]
        with subprocess.Popen(
            [*command, str(patient)], stderr=subprocess.PIPE, text=True, env=bus.environ()
        ) as waiting:
            while "in use; waiting" not in waiting.stderr.readline():
                assert waiting.poll() is None
            waiting.send_signal(signal.SIGTERM)
            assert waiting.wait(30) == 1
            assert "told to stop while waiting" in waiting.stderr.read()


def test_files_left_by_a_killed_bus_and_foreign_ones_at_their_place_do_not_stop_the_next(make_bus):
    bus = make_bus(["schema", "store"]).start()
    bus.kill()
    left = sorted(path for path in bus.config.runtime_dir.iterdir() if path.is_socket())
    assert left, "a killed bus leaves its sockets"
    bus.start()
    assert bus.stop() == 0
    for path in left:
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
    bus.start()
    with Publisher("script", endpoint=bus.acked) as publisher:
        assert publisher.publish("market_data", quote(1)) and publisher.flush(30.0)
    assert bus.stop() == 0


def test_without_descriptors_who_is_connected_is_served_and_the_others_are_afterwards(make_bus, size, figures):
    bus = make_bus(["schema", "store"]).start()
    with Publisher("early", endpoint=bus.acked) as early:
        assert early.publish("market_data", quote(0)) and early.flush(30.0)
        used = len(os.listdir(f"/proc/{bus.process.pid}/fd"))
        _, hard = resource.prlimit(bus.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(bus.process.pid, resource.RLIMIT_NOFILE, (max(64, used + 8), hard))
        crowd = []
        try:
            for n in range(size(200, 500, 1000)):
                each = socket.socket()
                crowd.append(each)
                each.settimeout(0.2)
                try:
                    each.connect(("127.0.0.1", port_of((bus.acked, bus.ingest, bus.feed)[n % 3])))
                except OSError:
                    continue  # the queue of the kernel is full as well
            for n in range(1, 101):
                assert early.publish("market_data", quote(n))
                assert early.flush(30.0), "who is connected must be served"
        finally:
            for each in crowd:
                each.close()
        began = time.monotonic()
        with Publisher("late", endpoint=bus.acked) as late:
            assert late.publish("market_data", quote(0)) and late.flush(30.0)
        figures.update(connections=len(crowd), served_again_after_s=round(time.monotonic() - began, 2))
    stats = bus.wait_for(lambda s: True, "to answer")
    assert stats["books"]["unexplained"] == 0
    assert bus.stop() == 0

"""Connections that are not what they seem, on all ports of a running bus: nobody else notices."""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import zmq
from hostile import honest, in_order

from bus_support import PATIENCE, listening, wait_until
from tapebus import wire

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x04PUSH"
#: A ClientHello of TLS 1.3, cut after its list of ciphers.
TLS = bytes.fromhex("1603010200010001fc0303") + bytes(range(32)) + bytes.fromhex("20") + bytes(32) + b"\0\x02\x13\x01"
#: SO_LINGER of 0: closing sends a reset.
RESET = struct.pack("ii", 1, 0)


def _bytes(chance: random.Random) -> bytes:
    return chance.randbytes(chance.choice((1, 10, 64, 500, 5000)))


def _greeting(chance: random.Random) -> bytes:
    out = bytearray(GREETING)
    for _ in range(chance.choice((1, 1, 5))):
        out[chance.randrange(len(out))] = chance.randrange(256)
    return bytes(out) + chance.choice((b"", READY, chance.randbytes(50)))


def _half(chance: random.Random) -> bytes:
    whole = GREETING + READY
    return whole[: chance.randrange(len(whole))]


def _frames(chance: random.Random) -> bytes:
    """A sound handshake, then frames with impossible flags and sizes."""
    size = chance.choice((0, 1, 255, wire.MAX_FRAME, 2**31, 2**63, 2**64 - 1))
    flags = chance.choice((0, 1, 2, 3, 4, 6, 7, 255))
    head = struct.pack(">BQ", flags, size) if flags & 2 else struct.pack("BB", flags, size & 255)
    return GREETING + READY + head + chance.randbytes(chance.choice((0, 10, 300)))


def _http(chance: random.Random) -> bytes:
    verb = chance.choice((b"GET / HTTP/1.1", b"POST /publish HTTP/1.0", b"PRI * HTTP/2.0"))
    return verb + b"\r\nHost: 127.0.0.1:5571\r\nContent-Length: 99999\r\n\r\n" + b"{}" * chance.randrange(50)


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "random bytes": _bytes,
    "bad greeting": _greeting,
    "half a handshake": _half,
    "bad frames": _frames,
    "HTTP": _http,
    "TLS": lambda chance: TLS,
    "nothing": lambda chance: b"",
}


def port(endpoint: str) -> tuple[str, int]:
    host, _, number = endpoint.removeprefix("tcp://").partition(":")
    return host, int(number)


def strike(address: tuple[str, int], words: bytes, reset: bool) -> None:
    """Connect, say `words`, leave: politely or with a reset."""
    with socket.socket() as attacker:
        attacker.settimeout(PATIENCE)
        # a bus that has had enough of us may close first
        with suppress(ConnectionError, BrokenPipeError):
            attacker.connect(address)
            attacker.sendall(words)
            if reset:
                attacker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def descriptors(bus: Any) -> int:
    return len(os.listdir(f"/proc/{bus.process.pid}/fd"))


def test_no_connection_of_any_kind_harms_the_bus_or_its_honest_clients(make_bus, size, chance, figures):
    bus = make_bus(["schema", "store"]).start()
    addresses = [port(each) for each in (bus.feed, bus.ingest, bus.acked)]
    total, made = size(300, 20_000, 100_000), 0
    before = descriptors(bus)
    started = time.monotonic()
    with honest(bus) as producer, listening(None, bus.feed, b"bitten.market_data") as feed:
        while made < total:
            name = chance.choice(list(KINDS))
            strike(chance.choice(addresses), KINDS[name](chance), reset=chance.random() < 0.5)
            made += 1
            if made % 100 == 0:
                assert bus.process.poll() is None, bus.output()
        assert feed.recv_multipart()[0] == b"bitten.market_data", "the feed goes on"
        during = producer.published
    wait_until(lambda: descriptors(bus) <= before + 20, "the bus to close what was left open")
    stats = bus.stats()
    assert bus.stop() == 0
    in_order(bus, producer.published)
    assert during and stats["bus"]["unexplained"] == 0
    figures.update(
        connections=made,
        honest=producer.published,
        refused=stats["bus"]["rejected"],
        rss_mb=round(stats["bus"]["rss_bytes"] / 1e6),
        connections_per_s=round(made / (time.monotonic() - started)),
    )


def test_idle_sockets_and_a_storm_of_resets_leave_room_for_others(make_bus, size, chance, figures):
    bus = make_bus(["schema", "store"]).start()
    addresses = [port(each) for each in (bus.feed, bus.ingest, bus.acked)]
    idle, storm = 500, size(300, 5_000, 20_000)
    held = []
    try:
        with honest(bus) as producer:
            for n in range(idle):
                held.append(socket.create_connection(addresses[n % 3], PATIENCE))
                # some stay silent, some stop in the middle of the handshake
                held[-1].sendall(_half(chance) if n % 2 else b"")
            for n in range(storm):
                strike(addresses[n % 3], b"", reset=True)
            with honest(bus) as late:
                wait_until(lambda: late.published > 100, "a client that comes during all this to be served")
    finally:
        for each in held:
            each.close()
    stats = bus.stats()
    assert bus.stop() == 0
    found = sum(book["stored"] for book in stats["producers"] if book["source"] == "honest")
    assert found == producer.published + late.published
    figures.update(idle=idle, resets=storm, stored=found, rss_mb=round(stats["bus"]["rss_bytes"] / 1e6))


def test_messages_of_twenty_thousand_parts_are_one_message_each(make_bus, size, figures):
    bus = make_bus(["schema", "store"]).start()
    rounds, parts = size(2, 20, 200), 20_000
    last = b'{"event_type":"a","timestamp":1,"source":"parts","data":{}}'
    with honest(bus) as producer, zmq.Context() as context:
        for kind, endpoint in ((zmq.PUSH, bus.ingest), (zmq.DEALER, bus.acked)):
            with context.socket(kind) as sender:
                sender.linger = int(PATIENCE * 1000)
                sender.sndtimeo = int(PATIENCE * 1000)
                sender.connect(endpoint)
                for _ in range(rounds):
                    sender.send_multipart([b"x" * 100] * (parts - 1) + [last])
        stats = bus.wait_for(
            lambda stats: stats["bus"]["rejected"].get("ingest.malformed", 0) == rounds, "to count them"
        )
        stats = bus.wait_for(lambda stats: _stored(stats, "unsequenced") == rounds, "to store the last parts")
    assert bus.stop() == 0
    in_order(bus, producer.published)
    figures.update(messages=2 * rounds, parts=parts, rss_mb=round(stats["bus"]["rss_bytes"] / 1e6))


def _stored(stats: Any, source: str) -> int:
    return next((book["stored"] for book in stats["producers"] if book["source"] == source), 0)

"""Parts of the security tests: an ingest thread behind real sockets, key files, and what this process listens on."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tapebus import wire
from tapebus._ingest import Ingest
from tapebus._ring import Ring
from tapebus._topics import Topics
from tapebus.blocks import BlockView, crc32c
from tapebus.curve import Door, Keys, as_client
from tapebus.security import Identity, Rights, Security

PATIENCE_MS = 20_000
ID = b"s" * 16


def pair(server: bytes = b"") -> Keys:
    return Keys(*zmq.curve_keypair(), server)


def frame(*types: str) -> bytes:
    """A batch frame with one event of each of `types`."""
    events = [
        msgspec.msgpack.encode({"event_type": kind, "timestamp": 1.5, "source": "t", "data": {"n": n}})
        for n, kind in enumerate(types)
    ]
    return b"\xdd" + struct.pack(">I", len(events)) + b"".join(events)


class Gate:
    """One ROUTER and one PULL socket of an ingest thread, reached over `transport` by one client.

    ``ipc`` and ``curve`` peers are known by uid and key, ``tcp`` peers only as local ones. The test plays the
    tape thread. Without `identities` nobody is restricted.
    """

    def __init__(self, transport: str, directory: Path, *identities: Identity, known: bool = True, **options: Any):
        self.zmq = zmq.Context()
        self.far = zmq.Context()
        self.ring = Ring(Topics(), 1024)
        self.legacy = self.ring.producer(b"legacy".ljust(16), 0, "legacy", sequenced=False)
        self.samples: list[tuple[bytes, str]] = []
        self.server, self.client = pair(), pair()
        # the test's own user or key stands for the one that is named
        who = {"ipc": {"uid": os.getuid()}, "curve": {"key": self.client.public.decode()}, "tcp": {"loopback": True}}
        named = [
            msgspec.structs.replace(each, **who[transport]) if number == 0 and known else each
            for number, each in enumerate(identities)
        ]
        self.rights = Rights(Security(identities=named), owner=None if known else os.getuid() + 1)
        self.ingest = Ingest(self.ring, 7, True, max_frame=1 << 18, **options)
        self.ingest.samples = lambda raw, reason: self.samples.append((raw, reason))
        self.ingest.restrict(self.rights)
        self.door = Door(self.zmq, self.server, self.rights) if transport == "curve" else None
        if self.door is not None:
            self.door.open()
        peers = {"ipc": "ipc", "curve": "curve", "tcp": "loopback"}[transport]
        self.endpoints = []
        for kind in (zmq.ROUTER, zmq.PULL):
            socket = self.zmq.socket(kind)
            socket.linger = 0
            if self.door is not None:
                self.door.guard(socket, "publish")
            socket.bind(f"ipc://{directory}/{kind}" if transport == "ipc" else "tcp://127.0.0.1:*")
            self.endpoints.append(socket.LAST_ENDPOINT.rstrip(b"\0").decode())
            self.ingest.add(socket, self.legacy, router=kind == zmq.ROUTER, peers=peers)
        self.dealer, self.push = self.connect(zmq.DEALER), self.connect(zmq.PUSH)
        self.thread = threading.Thread(target=self.ingest.run, daemon=True)
        self.thread.start()

    def connect(self, kind: int, keys: Keys | None = None) -> Any:
        socket = self.far.socket(kind)
        socket.linger = 0
        socket.rcvtimeo = PATIENCE_MS
        if self.door is not None:
            as_client(socket, keys or self.client._replace(server=self.server.public))
        socket.connect(self.endpoints[kind == zmq.PUSH])
        return socket

    def close(self) -> None:
        self.ingest.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.far.destroy(linger=0)
        if self.door is not None:
            self.door.close()
        self.zmq.destroy(linger=0)

    def send(self, kind: int, body: bytes, socket: Any = None, producer: bytes = ID) -> None:
        (socket or self.dealer).send(wire.HEAD.pack(kind, 0, wire.VERSION, producer, 1) + body)

    def receive(self, wanted: int, socket: Any = None) -> bytes:
        """The body of the next frame of type `wanted`."""
        while True:
            answer = (socket or self.dealer).recv()
            if answer[0] == wanted:
                return bytes(answer[wire.HEAD.size :])

    def hello(self, socket: Any = None, producer: bytes = ID) -> None:
        self.send(wire.HELLO, wire.S_HELLO.pack(0), socket, producer)
        self.receive(wire.WELCOME, socket)

    def batch(self, base: int, *types: str) -> None:
        body = frame(*types)
        head = wire.S_BATCH.pack(base, len(types), crc32c(body), base + len(types) - 1)
        self.send(wire.BATCH, head + body)

    def commit(self) -> list[str]:
        """Pack what is in the ring and acknowledge it; the event types that went to the tape."""
        assert self.ring.wait(PATIENCE_MS), "nothing arrived"
        block, _, changed = self.ring.pack()
        self.ring.acknowledge(changed)
        if block is None:
            return []
        view = BlockView(block.payload, block.first_seq)
        return [msgspec.msgpack.decode(view.raw(block.first_seq + n))["event_type"] for n in range(block.count)]

    def told(self, last: int) -> list[tuple[int, int, int]]:
        """The refused ranges in the acknowledgements up to `last`."""
        found: list[tuple[int, int, int]] = []
        while True:
            body = self.receive(wire.ACK)
            durable, _, _, _ = wire.S_ACK.unpack_from(body)
            found += wire.S_REJECT.iter_unpack(body[wire.S_ACK.size :])
            if durable >= last:
                return found

    @property
    def book(self) -> Any:
        return self.ring.account(self.ring.identities[ID, 1])


def listening() -> set[str]:
    """The addresses this process listens on over TCP, as the kernel shows them."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in inodes:
                found.add(address(local.split(":")[0]))
    return found


def address(text: str) -> str:
    """An address of ``/proc/net/tcp``, little-endian words in hexadecimal, as people write it."""
    import ipaddress

    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))

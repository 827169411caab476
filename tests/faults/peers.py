"""Ways to get numbered events from a producer into a durable place, each as its project documents it; ours among them.

Every system offers the same few calls, so that one ledger and one schedule of kills fit all. ``send`` gives an event
to the system as a program would and answers whether the system has taken responsibility for it; a caller that has to
wait is held for at most `PATIENCE_S`. ``kill`` is SIGKILL to whatever receives, ``start`` starts it (again), and
``stored`` is what is there in the end. Run as a script this file is the receiver of the ZeroMQ systems.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

#: Seconds a caller is held before it gives an event up, where the system's own default is for ever.
PATIENCE_S = 1.0


class System:
    """One way; ``name`` and ``settings`` are for the table."""

    name = ""
    settings = ""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        raise NotImplementedError

    def connect(self) -> None:
        """Become ready to send; events 0 are only for trying."""
        raise NotImplementedError

    def send(self, n: int) -> bool:
        raise NotImplementedError

    def finish(self) -> None:
        """Give what is on its way a fair time to arrive."""
        raise NotImplementedError

    def stored(self) -> list[int]:
        raise NotImplementedError

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        self.kill()


class ZeroMQ(System):
    """A producer that connects, a receiver that binds and appends each number to a file before it takes the next."""

    kind = zmq.PUB
    peer = ""

    def __init__(self, directory: Path, port: int) -> None:
        super().__init__()
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.file = directory / f"{self.peer}.txt"
        self.context = zmq.Context()
        self.socket = self.context.socket(self.kind)

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, self.peer, self.endpoint, str(self.file)])

    def connect(self) -> None:
        self.socket.connect(self.endpoint)
        until(lambda: self.send(0) and self.file.exists() and self.file.stat().st_size, "the first event to arrive")

    def send(self, n: int) -> bool:
        with contextlib.suppress(zmq.Again):
            self.socket.send(b"%d" % n, zmq.NOBLOCK)
            return True
        if not self.socket.poll(int(PATIENCE_S * 1000), zmq.POLLOUT):
            return False
        with contextlib.suppress(zmq.Again):
            self.socket.send(b"%d" % n, zmq.NOBLOCK)
            return True
        return False

    def finish(self) -> None:
        size = -1
        while size != (now := self.file.stat().st_size):
            size = now
            threading.Event().wait(0.7)

    def stored(self) -> list[int]:
        return [int(line) for line in self.file.read_text().split() if line != "0"]

    def close(self) -> None:
        super().close()
        self.context.destroy(0)


class PubSub(ZeroMQ):
    name = "ZeroMQ PUB → SUB"
    settings = "defaults (HWM 1,000); the SUB socket binds, and writes each event to a file"
    kind = zmq.PUB
    peer = "sub"


class PushPull(ZeroMQ):
    name = "ZeroMQ PUSH → PULL"
    settings = "defaults (HWM 1,000); the PULL socket binds, and writes each event to a file"
    kind = zmq.PUSH
    peer = "pull"


class Redis(System):
    """One stream; an event is accepted when XADD has answered, and sent again after a lost connection."""

    name = "Redis Streams"
    settings = "defaults (RDB snapshots, appendonly no)"
    options: tuple[str, ...] = ()

    def __init__(self, directory: Path, port: int) -> None:
        super().__init__()
        self.port = port
        self.directory = directory / f"redis{len(self.options)}"
        self.directory.mkdir()
        self.link: Link | None = None

    @staticmethod
    def missing() -> str:
        return "" if shutil.which("redis-server") else "redis-server is not installed (Debian: redis-server)"

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.DEVNULL)

    def connect(self) -> None:
        until(lambda: self._ask("PING") == b"PONG", "redis-server to answer")

    def _ask(self, *words: str) -> Any:
        """The answer, None when there is no connection or the server is still loading."""
        try:
            if self.link is None:
                self.link = Link(self.port)
            return self.link.ask(*words)
        except (OSError, EOFError):
            if self.link is not None:
                self.link.close()
            self.link = None
            return None

    def send(self, n: int) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while self._ask("XADD", "events", "*", "n", str(n)) is None:
            if time.monotonic() > deadline:
                return False
            threading.Event().wait(0.01)
        return True

    def finish(self) -> None:
        self.connect()

    def stored(self) -> list[int]:
        return [int(fields[1]) for _, fields in self._ask("XRANGE", "events", "-", "+")]

    def close(self) -> None:
        super().close()
        if self.link is not None:
            self.link.close()


class RedisAppendOnly(Redis):
    name = "Redis Streams, append-only"
    settings = "appendonly yes, appendfsync everysec (its default)"
    options = ("--appendonly", "yes")


class Link:
    """A connection that speaks just enough of the Redis protocol."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        self.socket.settimeout(60.0)
        self.file = self.socket.makefile("rb")

    def ask(self, *words: str) -> Any:
        parts = [b"$%d\r\n%b\r\n" % (len(word), word.encode()) for word in words]
        self.socket.sendall(b"*%d\r\n%b" % (len(parts), b"".join(parts)))
        return self._answer()

    def _answer(self) -> Any:
        line = self.file.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError
        kind, rest = line[:1], line[1:-2]
        if kind == b"*":
            return [self._answer() for _ in range(int(rest))]
        if kind == b"$":
            return self.file.read(int(rest) + 2)[:-2]
        if kind == b"-":
            return None  # it is loading what it had
        return rest

    def close(self) -> None:
        self.file.close()
        self.socket.close()


class Tapebus(System):
    name = "tapebus"
    settings = "defaults; an event is accepted when publish() says True"

    def __init__(self, bus: Any) -> None:
        super().__init__()
        from tapebus import Publisher

        self.bus = bus
        self.publisher = Publisher("ledger", endpoint=bus.acked)

    def start(self) -> None:
        self.bus.start()

    def kill(self) -> None:
        self.bus.kill()

    def connect(self) -> None:
        assert self.publisher.publish("market_data", _quote(0)) and self.publisher.flush(30.0)

    def send(self, n: int) -> bool:
        return self.publisher.publish("market_data", _quote(n))

    def finish(self) -> None:
        self.publisher.flush(60.0)

    def stored(self) -> list[int]:
        from tapebus import Tape

        with Tape.open(self.bus.data_dir) as tape:
            found = [int(event.data.volume) for event in tape.read(topics=["market_data"])]
        return [n for n in found if n]

    def close(self) -> None:
        self.publisher.close()
        super().close()


def _quote(n: int) -> dict[str, Any]:
    return {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2, "volume": float(n)}


def until(condition: Callable[[], Any], what: str, patience_s: float = 30.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        threading.Event().wait(0.01)


def receive(peer: str, endpoint: str, file: str) -> None:
    out = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with zmq.Context() as context, context.socket(zmq.SUB if peer == "sub" else zmq.PULL) as incoming:
        if peer == "sub":
            incoming.subscribe(b"")
        incoming.bind(endpoint)
        while True:
            os.write(out, incoming.recv() + b"\n")


if __name__ == "__main__":
    receive(*sys.argv[1:])

"""Redis Streams with the append-only file, through redis-py with its C parser.

The settings are those that Redis' own pages recommend for throughput, and a few more in its favour: a Unix socket
instead of TCP, XADD in pipelines of 100, no snapshots beside the append-only file and no rewriting of it during the
run, RESP parsed by hiredis. The consumer reads up to 1,000 entries a call with a group and acknowledges them in the
same round trip as the next read. Its server, two producers and the consumer are processes of their own, as with us.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from bench.peers.peer import PATIENCE_S, Kind, Ledger, Peer, Skipped, Wrong, decoder, list_decoder, percentiles
from bench.peers.processes import BATCH, PACKED_PIPELINE, STREAM, Producers, directory, frames_of, server

GROUP = "bench"
READ = 1000


def _need() -> str:
    """The path of the server; raises `Skipped`."""
    path = shutil.which("redis-server")
    if path is None:
        raise Skipped("redis-server is not installed (Debian: apt-get install redis-server)")
    try:
        version("redis")
    except PackageNotFoundError:
        raise Skipped("the Python package redis is not installed (make bench does)") from None
    return path


class Entries:
    """Reads the stream as the one consumer of its group; what was read is acknowledged with the next read."""

    def __init__(self, client: Any, most: int = READ) -> None:
        self._client, self._most = client, most
        self._read: list[bytes] = []
        client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)

    def next(self) -> list[bytes]:
        """The payloads of up to `most` entries, waited for; none after `PATIENCE_S`."""
        pipe = self._client.pipeline(transaction=False)
        if self._read:
            pipe.xack(STREAM, GROUP, *self._read)
        pipe.xreadgroup(GROUP, "one", {STREAM: ">"}, count=self._most, block=round(PATIENCE_S * 1e3))
        answer = pipe.execute()[-1]
        entries = answer[0][1] if answer else []
        self._read = [entry[0] for entry in entries]
        return [entry[1][b"e"] for entry in entries]

    def finish(self) -> None:
        """Acknowledge what was read last; raises `Wrong` when the server then still waits for something."""
        if self._read:
            self._client.xack(STREAM, GROUP, *self._read)
        pending = self._client.xpending(STREAM, GROUP)["pending"]
        if pending:
            raise Wrong(f"{pending} entries were read and not acknowledged")


class RedisPacked(Peer):
    """`BATCH` events an entry: as quick as it gets, and Redis does not know the events any more."""

    kind: ClassVar[Kind] = "durable"
    #: Events an entry, the producer that makes such, and commands of its pipelines.
    _events, _way, _pipeline = BATCH, "redis-packed", PACKED_PIPELINE

    def __init__(self, name: str, fsync: str, promise: str) -> None:
        self.name, self._fsync, self.promise = name, fsync, promise

    @property
    def version(self) -> str:
        told = subprocess.run([_need(), "--version"], capture_output=True, text=True, check=True).stdout
        return f"redis-server {told.split('v=')[1].split()[0]}, redis-py {version('redis')}"

    @contextmanager
    def _serving(self) -> Iterator[tuple[Any, str]]:
        """A connected client and the path of the server's socket."""
        path = _need()
        import redis

        with directory() as place:
            socket = f"{place}/r.sock"
            command = [path, "--port", "0", "--unixsocket", socket, "--dir", str(place), "--save", ""]
            command += ["--appendonly", "yes", "--appendfsync", self._fsync, "--auto-aof-rewrite-percentage", "0"]
            with server(command, place / "redis.log", Path(socket).exists):
                client = redis.Redis(unix_socket_path=socket, protocol=2)
                try:
                    yield client, socket
                finally:
                    client.close()

    def throughput(self, count: int) -> dict[str, Any]:
        packed = self._events > 1
        decode, ledger = list_decoder() if packed else decoder(), Ledger()
        expected = frames_of(count, self._events)
        with self._serving() as (client, socket), Producers(self._way, socket, count) as producers:
            entries = Entries(client, READ // self._events)
            producers.go()
            batch = entries.next()
            ledger.start()
            while batch:
                for raw in batch:
                    decode(raw)
                ledger.handled += batch
                if len(ledger.handled) >= expected:
                    break
                batch = entries.next()
            ledger.stop()
            entries.finish()
            sent = producers.sent()
            if client.xlen(STREAM) != expected:
                raise Wrong(f"the stream has {client.xlen(STREAM)} of {expected} entries")
            if packed:
                ledger.unpack()
            return ledger.result(
                sent,
                appendfsync=self._fsync,
                transport="unix socket",
                events_per_entry=self._events,
                pipeline=self._pipeline,
                read_count=READ // self._events,
            )


class RedisStreams(RedisPacked):
    """One event an entry."""

    _events, _way, _pipeline = 1, "redis", BATCH

    def latency(self, count: int) -> dict[str, Any]:
        decode, seconds = decoder(), []
        with self._serving() as (client, socket), Producers("redis-paced", socket, count, 1) as producers:
            entries = Entries(client)
            producers.go()
            while len(seconds) < count and (batch := entries.next()):
                events = [decode(raw) for raw in batch]
                now = time.time()
                seconds += [now - event.timestamp for event in events]
            return percentiles(seconds, count)


_CACHED = "in the server's memory, on its way to the file: a power cut takes up to a second of it, a kill -9 nothing"
_SYNCED = "in the append-only file, synced: what was acknowledged survives a power cut"

PEERS = [
    RedisStreams("redis-everysec", "everysec", _CACHED),
    RedisStreams("redis-always", "always", _SYNCED),
    RedisPacked("redis-everysec-packed", "everysec", f"100 events are one entry to it; {_CACHED}"),
    RedisPacked("redis-always-packed", "always", f"100 events are one entry to it; {_SYNCED}"),
]

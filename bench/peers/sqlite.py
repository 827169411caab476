"""PUSH → PULL → JSON → SQLite: what most collectors of events look like, written as well as that can be.

One process takes JSON events off a PULL socket, reads them with the standard library and inserts them with a prepared
statement in transactions of up to 100, fewer when no more are there. WAL; ``synchronous`` NORMAL syncs at checkpoints
only, so a power cut takes the last commits, FULL syncs each commit. Two indexes, by type and time and by correlation
id. Nothing is acknowledged to the producer. The clock stops after the last commit; the events that are checked are
those in the file.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import zmq
from bench.peers.peer import PATIENCE_S, Kind, Ledger, Peer, percentiles
from bench.peers.processes import Producers, directory
from bench.peers.zeromq import HWM, pulling

TRANSACTION = 100
_SCHEMA = """
CREATE TABLE events (id INTEGER PRIMARY KEY, event_type TEXT NOT NULL, timestamp REAL NOT NULL, source TEXT NOT NULL,
    correlation_id TEXT, user_id TEXT, session_id TEXT, event TEXT NOT NULL);
CREATE INDEX by_type ON events (event_type, timestamp);
CREATE INDEX by_correlation ON events (correlation_id) WHERE correlation_id IS NOT NULL;
"""
_INSERT = (
    "INSERT INTO events (event_type, timestamp, source, correlation_id, user_id, session_id, event)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
)


def _row(raw: bytes) -> tuple[Any, ...]:
    event = json.loads(raw)
    get = event.get
    return (
        event["event_type"],
        event["timestamp"],
        event["source"],
        get("correlation_id"),
        get("user_id"),
        get("session_id"),
        raw.decode(),
    )


def _waiting(socket: zmq.Socket[bytes]) -> list[bytes]:
    """Up to `TRANSACTION` frames: the first is waited for, the others are taken if they are there."""
    frames: list[bytes] = []
    try:
        frames.append(socket.recv())
        while len(frames) < TRANSACTION:
            frames.append(socket.recv(zmq.NOBLOCK))
    except zmq.Again:
        pass
    return frames


class Sqlite(Peer):
    """One setting of ``synchronous``."""

    kind: ClassVar[Kind] = "durable"

    def __init__(self, name: str, synchronous: str, promise: str) -> None:
        self.name, self._synchronous, self.promise = name, synchronous, promise

    @property
    def version(self) -> str:
        return f"SQLite {sqlite3.sqlite_version}, pyzmq {zmq.pyzmq_version()}"

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        with directory() as place:
            # transactions are begun and ended by hand
            database = sqlite3.connect(place / "events.db", isolation_level=None)
            try:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute(f"PRAGMA synchronous = {self._synchronous}")
                database.executescript(_SCHEMA)
                yield database
            finally:
                database.close()

    @staticmethod
    def _store(database: sqlite3.Connection, frames: list[bytes]) -> list[tuple[Any, ...]]:
        rows = [_row(raw) for raw in frames]
        database.execute("BEGIN")
        database.executemany(_INSERT, rows)
        database.execute("COMMIT")
        return rows

    def throughput(self, count: int) -> dict[str, Any]:
        ledger = Ledger()
        with ExitStack() as held:
            socket, endpoint = held.enter_context(pulling())
            database = held.enter_context(self._database())
            producers = held.enter_context(Producers("push-json", endpoint, count))
            producers.go()
            socket.poll(PATIENCE_S * 1e3)
            ledger.start()
            done = 0
            while done < count and (frames := _waiting(socket)):
                self._store(database, frames)
                done += len(frames)
            ledger.stop()
            ledger.handled = [each.encode() for (each,) in database.execute("SELECT event FROM events ORDER BY id")]
            return ledger.result(
                producers.sent(),
                as_json=True,
                journal="WAL",
                synchronous=self._synchronous,
                transaction=TRANSACTION,
                hwm=HWM,
                transport="ipc",
            )

    def latency(self, count: int) -> dict[str, Any]:
        seconds: list[float] = []
        with ExitStack() as held:
            socket, endpoint = held.enter_context(pulling())
            database = held.enter_context(self._database())
            producers = held.enter_context(Producers("push-json-paced", endpoint, count, 1))
            producers.go()
            while len(seconds) < count and (frames := _waiting(socket)):
                rows = self._store(database, frames)
                now = time.time()
                seconds += [now - row[1] for row in rows]
            return percentiles(seconds, count)


PEERS = [
    Sqlite(
        "sqlite-normal",
        "NORMAL",
        "none to the producer; a committed event survives a kill -9, the last commits do not survive a power cut",
    ),
    Sqlite("sqlite-full", "FULL", "none to the producer; a committed event survives a power cut"),
]

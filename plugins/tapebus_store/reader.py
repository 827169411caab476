"""Reading the tape: short transactions, checksums before anything is believed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import zstandard

from tapebus.blocks import corr_hash, find_corr
from tapebus.errors import CorruptError
from tapebus.events import DeadLetter
from tapebus.store import Block, ProducerBook, Unit
from tapebus_store import books, layout, runs
from tapebus_store.environment import Environment, MiB, acquire, release
from tapebus_store.preflight import inspect

#: One read transaction hands out at most this much before it is closed; the first fewer blocks, as many are content
#: with few events.
FIRST_BLOCKS = 2
CHUNK_BLOCKS = 256
CHUNK_BYTES = 4 * MiB
#: Headers looked at within one transaction while nothing matches.
CHUNK_HEADERS = 4096

#: Beyond every ``bus_seq``.
END = 1 << 63

_decode_dead = msgspec.msgpack.Decoder(DeadLetter).decode


class LmdbReader:
    """Read access to a tape; every call may come from any thread and takes short transactions.

    While a tape is being read, small blocks may be merged: a block handed out may then begin with
    events that an earlier block held already, so carry the last ``bus_seq`` seen from block to block.
    """

    def __init__(self, data_dir: Path, *, readonly: bool = True, map_size: int = 256 * MiB) -> None:
        self._environment: Environment | None = None
        self._env = acquire(Path(data_dir) / "tape", readonly=readonly, map_size=map_size)
        self._environment = self._env
        self._verified: set[tuple[int, int, int]] = set()
        if readonly:
            try:
                self._check_version()
            except BaseException:
                self.close()
                raise

    def _check_version(self) -> None:
        with self._env.reading() as txn:
            version = self._get(txn, "meta", books.VERSION_KEY)
        books.check_version(version or b"", self._env.path)

    def _get(self, txn: lmdb.Transaction, database: str, key: bytes) -> bytes | None:
        value = txn.get(key, db=self._env.dbs[database])
        return None if value is None else layout.unguard(database, key, bytes(value))

    def _entries(self, database: str, prefix: bytes = b"") -> list[tuple[bytes, bytes]]:
        """All entries of a small database whose key starts with `prefix`, verified."""
        with self._env.reading() as txn:
            return self._entries_in(txn, database, prefix)

    def _entries_in(self, txn: lmdb.Transaction, database: str, prefix: bytes = b"") -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        with txn.cursor(self._env.dbs[database]) as cursor:
            if not cursor.set_range(prefix):
                return found
            for key, value in cursor:
                name = bytes(key)
                if not name.startswith(prefix):
                    break
                found.append((name, layout.unguard(database, name, bytes(value))))
        return found

    def _tape(self) -> books.TapeRecord:
        with self._env.reading() as txn:
            return self._tape_in(txn)

    def _tape_in(self, txn: lmdb.Transaction) -> books.TapeRecord:
        value = self._get(txn, "meta", books.TAPE_KEY)
        return books.TapeRecord() if value is None else books.decode_tape(value)

    def last_seq(self) -> int:
        """The newest ``bus_seq`` on disk, 0 on an empty tape."""
        return self._tape().last_seq

    def first_seq(self) -> int:
        """The oldest ``bus_seq`` still kept; ``last_seq() + 1`` when nothing is kept."""
        with self._env.reading() as txn:
            return self._first(txn)

    def _first(self, txn: lmdb.Transaction) -> int:
        with txn.cursor(self._env.dbs["blocks"]) as cursor:
            if cursor.first():
                return layout.key_seq(cursor.key())
        value = self._get(txn, "meta", books.TAPE_KEY)
        return 1 if value is None else books.decode_tape(value).last_seq + 1

    # -- holes ----------------------------------------------------------------------------------

    def holes(self) -> list[tuple[int, int]]:
        """Inclusive ranges of ``bus_seq`` that damage took from the tape, in order; reading passes over them."""
        with self._env.reading() as txn:
            return self._holes(txn)

    def lost_events(self) -> int:
        """How many events damage has taken from the tape so far."""
        return self._tape().lost

    def verify(self) -> list[str]:
        """Read the whole file without mapping it; what is wrong with it, as sentences. Only while no bus writes."""
        return inspect(self._env.path / "data.mdb", "whole")

    def _holes(self, txn: lmdb.Transaction) -> list[tuple[int, int]]:
        found = []
        with txn.cursor(self._env.dbs["meta"]) as cursor:
            more = cursor.set_range(books.HOLE_PREFIX)
            while more and bytes(key := cursor.key()).startswith(books.HOLE_PREFIX):
                hole = books.decode_hole(layout.unguard("meta", bytes(key), bytes(cursor.value())))
                found.append((hole.first, hole.last))
                more = cursor.next()
        return found

    def _is_hole(self, txn: lmdb.Transaction, first: int, last: int) -> bool:
        """Whether all of `first`..`last` is known to be lost."""
        for start, end in self._holes(txn):
            if start <= first <= end:
                first = end + 1
        return first > last

    def _refuse_gap(self, txn: lmdb.Transaction, first: int, last: int) -> None:
        if not self._is_hole(txn, first, last):
            raise CorruptError(f"tape: bus_seq {first}..{last} is missing")

    def topics(self) -> dict[int, str]:
        """Event type names by the id used inside blocks."""
        skip = len(books.TOPIC_PREFIX)
        return {int(key[skip:]): value.decode() for key, value in self._entries("meta", books.TOPIC_PREFIX)}

    def counters(self) -> dict[str, int]:
        """The counters as last committed."""
        skip = len(books.COUNTER_PREFIX)
        return {key[skip:].decode(): int(value) for key, value in self._entries("meta", books.COUNTER_PREFIX)}

    # -- blocks ---------------------------------------------------------------------------------

    def blocks(
        self,
        after: int = 0,
        *,
        topic_ids: Iterable[int] | None = None,
        since: float | None = None,
        until: float | None = None,
        reverse: bool = False,
    ) -> Iterator[Block]:
        """Blocks that may hold events after `after` matching the filters; newest first if `reverse`.

        `since` and `until` are event times in Unix seconds, both inclusive. With `topic_ids` the events of other types
        may be without their bytes. Raises `CorruptError` with the ``bus_seq`` range when a checksum fails or a block
        is missing.
        """
        wanted = _Filter(None if topic_ids is None else frozenset(topic_ids), since, until)
        unpack = zstandard.ZstdDecompressor()
        place, bound, most = after, END, FIRST_BLOCKS
        while True:
            if reverse:
                chunk, bound = self._chunk_back(after, bound, wanted, most)
                done = bound <= after + 1
            else:
                chunk, place, done = self._chunk(place, wanted, most)
            most = min(most * 4, CHUNK_BLOCKS)
            for header, excerpt in chunk:
                yield layout.decode_block(header, excerpt, unpack)
            if done:
                return

    def _chunk(self, after: int, wanted: _Filter, most: int) -> tuple[list[_Taken], int, bool]:
        """At most `most` matching blocks after `after`, the last ``bus_seq`` looked at, whether the end was reached."""
        chunk: list[_Taken] = []
        size = seen = 0
        known = after if wanted.narrows else END
        with self._env.reading() as txn, txn.cursor(self._env.dbs["blocks"]) as cursor:
            found = cursor.set_range(layout.seq_key(after + 1))
            if not (found and layout.key_seq(cursor.key()) == after + 1):
                found = (cursor.prev() if found else cursor.last()) or cursor.first()
            while found:
                if after >= known:
                    before, (after, known) = after, self._skip(txn, after, wanted)
                    if after > before:
                        found = cursor.set_range(layout.seq_key(after + 1))
                        continue
                header = layout.decode_header(cursor.key(), value := cursor.value())
                if header.last_seq > after:
                    if header.first_seq > after + 1 and (seen or after >= self._first(txn)):
                        self._refuse_gap(txn, after + 1, header.first_seq - 1)
                    after = header.last_seq
                    seen += 1
                    if wanted.match(header):
                        chunk.append((header, layout.excerpt(header, value, wanted.topics)))
                        size += chunk[-1][1].size
                    if size >= CHUNK_BYTES or len(chunk) >= most or seen >= CHUNK_HEADERS:
                        return chunk, after, False
                found = cursor.next()
        return chunk, after, True

    def _skip(self, txn: lmdb.Transaction, after: int, wanted: _Filter) -> tuple[int, int]:
        """Go from `after` on past all that cannot match by what the index runs say; and where to ask them again."""
        with txn.cursor(self._env.dbs["corr"]) as cursor:
            found = cursor.prev() if cursor.set_range(layout.seq_key(after + 2)) else cursor.last()
            if not found:
                return after, layout.key_seq(cursor.key()) - 1 if cursor.first() else END
            while found:
                span = runs.span_of(bytes(cursor.key()), cursor.value())
                if span is None or not span.first <= after + 1 <= span.last:
                    return after, layout.key_seq(cursor.key()) - 1 if cursor.next() else END
                if wanted.match(span):
                    return after, span.last
                after = span.last
                found = cursor.next()
            return after, END

    def _chunk_back(self, after: int, bound: int, wanted: _Filter, most: int) -> tuple[list[_Taken], int]:
        """At most `most` matching blocks below `bound` in reverse order, and the new bound (0 when done)."""
        chunk: list[_Taken] = []
        size = seen = 0
        known = END - 1 if wanted.narrows else 0
        with self._env.reading() as txn, txn.cursor(self._env.dbs["blocks"]) as cursor:
            found = cursor.prev() if cursor.set_range(layout.seq_key(bound)) else cursor.last()
            while found:
                if bound <= known:
                    before, (bound, known) = bound, self._skip_back(txn, bound, wanted)
                    if bound < before:
                        found = cursor.prev() if cursor.set_range(layout.seq_key(bound)) else cursor.last()
                        continue
                header = layout.decode_header(cursor.key(), value := cursor.value())
                if header.last_seq <= after:
                    return chunk, 0
                if bound < END and header.last_seq < bound - 1:
                    self._refuse_gap(txn, header.last_seq + 1, bound - 1)
                bound = header.first_seq
                seen += 1
                if wanted.match(header):
                    chunk.append((header, layout.excerpt(header, value, wanted.topics)))
                    size += chunk[-1][1].size
                if size >= CHUNK_BYTES or len(chunk) >= most or seen >= CHUNK_HEADERS:
                    return chunk, bound
                found = cursor.prev()
        return chunk, 0

    def _skip_back(self, txn: lmdb.Transaction, bound: int, wanted: _Filter) -> tuple[int, int]:
        """As `_skip`, from `bound` downwards."""
        with txn.cursor(self._env.dbs["corr"]) as cursor:
            found = cursor.prev() if cursor.set_range(layout.seq_key(bound)) else cursor.last()
            while found:
                span = runs.span_of(bytes(cursor.key()), cursor.value())
                if span is None or not span.first < bound <= span.last + 1 or wanted.match(span):
                    return bound, layout.key_seq(cursor.key())
                bound = span.first
                found = cursor.prev()
            return bound, 0

    def blocks_of(self, correlation_id: str) -> Iterator[tuple[Block, list[int]]]:
        """Blocks, in bus order, with the offsets of events that probably carry `correlation_id`.

        The index holds hashes: compare the id of each event. Events elsewhere in the blocks may be without their
        bytes. Raises `CorruptError`.
        """
        hits = self._hits(corr_hash(correlation_id))
        unpack = zstandard.ZstdDecompressor()
        place = 0
        while place < len(hits):
            found = self._block_at(hits[place])
            if found is None:
                place += 1
                continue
            header, excerpt = found
            offsets = []
            while place < len(hits) and hits[place] <= header.last_seq:
                offsets.append(hits[place] - header.first_seq)
                place += 1
            yield layout.decode_block(header, excerpt, unpack, offsets), offsets

    def _hits(self, wanted: int) -> list[int]:
        """Sequence numbers in the index under the hash `wanted`, ascending."""
        hits: list[int] = []
        with self._env.reading() as txn, txn.cursor(self._env.dbs["corr"]) as cursor:
            for key, value in cursor:
                first = layout.key_seq(key)
                hits.extend(first + offset for offset in self._find(bytes(key), value, wanted))
        return sorted(hits)

    def _find(self, key: bytes, value: bytes | memoryview, wanted: int) -> list[int]:
        """As `runs.find`; a plain run, whose checksum is over all of it, is verified once only."""
        if not runs.is_plain(value):
            return runs.find(key, value, wanted)
        mark = (layout.key_seq(key), len(value), runs.mark_of(value))
        if mark not in self._verified:
            runs.entries_of(key, value)
            if len(self._verified) > 100_000:
                self._verified.clear()
            self._verified.add(mark)
        return find_corr(value[runs.PLAIN_HEAD :], wanted)

    def _block_at(self, seq: int) -> _Taken | None:
        """The stored block that holds `seq`; None where retention has removed it."""
        with self._env.reading() as txn, txn.cursor(self._env.dbs["blocks"]) as cursor:
            found = cursor.prev() if cursor.set_range(layout.seq_key(seq + 1)) else cursor.last()
            if not found:
                return None
            header = layout.decode_header(cursor.key(), value := cursor.value())
            if header.last_seq < seq:
                self._refuse_gap(txn, header.last_seq + 1, seq)
                return None
            return header, layout.excerpt(header, value)

    # -- books ----------------------------------------------------------------------------------

    def producers(self) -> list[ProducerBook]:
        """The account of every producer ever seen."""
        return [books.decode_producer(value) for _, value in self._entries("producers")]

    def books(self) -> tuple[int, list[ProducerBook], dict[str, int]]:
        """The newest ``bus_seq``, the accounts and the counters, all of one moment."""
        with self._env.reading() as txn:
            last_seq = self._tape_in(txn).last_seq
            accounts = self._entries_in(txn, "producers")
            counters = self._entries_in(txn, "meta", books.COUNTER_PREFIX)
        skip = len(books.COUNTER_PREFIX)
        return (
            last_seq,
            [books.decode_producer(value) for _, value in accounts],
            {key[skip:].decode(): int(value) for key, value in counters},
        )

    def cursors(self) -> dict[str, Unit]:
        """The last closed unit of each consumer, without its state."""
        return {key.decode(): books.decode_cursor(key.decode(), value) for key, value in self._entries("cursors")}

    def state(self, namespace: str) -> dict[str, bytes]:
        """The durable state of one plugin, in key order (keys beyond 500 bytes last)."""
        return dict(books.decode_state(value) for _, value in self._entries("state", books.state_prefix(namespace)))

    def dead(self, after: int = 0, limit: int | None = None) -> Iterator[DeadLetter]:
        """Dead letters with an id above `after`, oldest first."""
        left = limit
        while left is None or left > 0:
            chunk = self._dead_chunk(after, 256 if left is None else min(left, 256))
            yield from chunk
            if not chunk:
                return
            after = chunk[-1].id
            left = None if left is None else left - len(chunk)

    def _dead_chunk(self, after: int, size: int) -> list[DeadLetter]:
        chunk: list[DeadLetter] = []
        with self._env.reading() as txn, txn.cursor(self._env.dbs["dead"]) as cursor:
            found = cursor.set_range(layout.seq_key(after + 1))
            while found and len(chunk) < size:
                key = bytes(cursor.key())
                chunk.append(_decode_dead(layout.unguard("dead", key, bytes(cursor.value()))))
                found = cursor.next()
        return chunk

    def stats(self) -> dict[str, Any]:
        """Figures for people and monitors; sizes in bytes, ``bytes_per_event`` includes the index."""
        tape, info = self._tape(), self._env.env.info()
        stored = tape.block_bytes + tape.corr_bytes
        return {
            "first_seq": self.first_seq(),
            "last_seq": tape.last_seq,
            "events": tape.events,
            "blocks_hot": tape.hot_blocks,
            "blocks_sealed": tape.sealed_blocks,
            "blocks_damaged": tape.damaged,
            "block_bytes": tape.block_bytes,
            "index_bytes": tape.corr_bytes,
            "raw_bytes": tape.raw_bytes,
            "bytes_per_event": round(stored / tape.events, 2) if tape.events else 0.0,
            "bytes_on_disk": (self._env.path / "data.mdb").stat().st_size,
            "map_size": info["map_size"],
            "readers": info["num_readers"],
            "dead_letters": tape.dead,
            "lost_events": tape.lost,
            "holes": [list(each) for each in self.holes()],
            "damaged_files": sorted(each.name for each in self._env.path.glob("data.mdb.damaged-*")),
        }

    def close(self) -> None:
        """Give the tape back; a second call does nothing."""
        if self._environment is not None:
            environment, self._environment = self._environment, None
            release(environment)


class _Filter:
    """Which block headers, and which spans of them, are worth reading further."""

    __slots__ = ("mask", "narrows", "since", "topics", "until")

    def __init__(self, topics: frozenset[int] | None, since: float | None, until: float | None) -> None:
        self.topics = topics
        self.mask = None if topics is None else sum({1 << (each % 64) for each in topics})
        self.since = since
        self.until = until
        self.narrows = not (topics is None and since is None and until is None)

    def match(self, blocks: layout.Header | runs.Span) -> bool:
        return (
            (self.mask is None or bool(blocks.topics & self.mask))
            and (self.since is None or blocks.max_time >= self.since)
            and (self.until is None or blocks.min_time <= self.until)
        )


_Taken = tuple[layout.Header, layout.Excerpt]

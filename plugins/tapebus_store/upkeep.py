"""Upkeep of the tape: sealing small blocks, merging index runs, retention, dead readers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import lmdb
import zstandard
from msgspec.structs import replace

from tapebus.blocks import MAX_WAIT_S, merge_payloads, merge_runs
from tapebus.errors import CorruptError
from tapebus.failpoints import failpoint
from tapebus.store import Block, boot_id
from tapebus_store import books, layout, runs
from tapebus_store.ages import Ages
from tapebus_store.environment import Environment

if TYPE_CHECKING:
    from tapebus_store.writer import StoreConfig

Work = Callable[[lmdb.Transaction, books.TapeRecord], None]
Put = Callable[[lmdb.Transaction, str, bytes, bytes], None]

#: So many one-event blocks are merged even before ``seal_events`` is reached: reading them costs.
MAX_HOT_BLOCKS = 1024
#: Blocks are read for sealing so many at a time, with room for commits in between.
READ_BLOCKS = 256
#: So many large blocks are declared sealed at once.
ADOPT_BLOCKS = 64
#: So many blocks that sealing would save are no hurry; with twice as many, sealing gets twice the time.
SPARE_BLOCKS = 256
#: So many runs of level 1 become one of level 2; 10 million events then make about 170 runs.
MERGE_RUNS = 16
#: One piece of retention removes at most this many blocks.
DROP_BLOCKS = 64
READER_CHECK_S = 10.0
DAY_S = 86400.0


class Upkeep:
    """Chooses and does one bounded piece of upkeep at a time, on the writer's thread."""

    def __init__(self, environment: Environment, config: StoreConfig, put: Put) -> None:
        self._env = environment
        self._put = put
        self._config = config
        self._checked_at = 0.0
        self._ages = Ages()
        self._boot = boot_id()
        self._compress = zstandard.ZstdCompressor(level=3)
        self._expand = zstandard.ZstdDecompressor()
        #: Hot blocks that were read for the next sealed one, oldest first, and their size as stored.
        self._read: list[Block] = []
        self._read_bytes = 0

    def older(self, seconds: float) -> int:
        """The last ``bus_seq`` that is older than `seconds`, or than ``max_age_days`` where that is less."""
        return self._ages.older(min(seconds, self._max_age) if self._max_age else seconds)

    def keep_time(self, ages: Ages) -> None:
        """Continue from what the tape knows about its age."""
        self._ages = ages

    def check_readers(self, now: float) -> None:
        """Free the slots of dead readers, which would keep old pages from being used again."""
        if abs(now - self._checked_at) >= READER_CHECK_S:
            self._checked_at = now
            self._env.env.reader_check()

    def next_piece(self, tape: books.TapeRecord, now: float) -> Work | None:
        """What is due most at `now` on the steady clock, as a transaction body; None when nothing is."""
        self._ages.advance(self._boot, now)
        if self._ages.due(tape.last_seq, self._max_age):
            return self._mark
        if self._too_much(tape):
            return self._drop
        # before sealing, which makes more of them and may have no end
        if tape.runs >= MERGE_RUNS:
            return self._merge
        if (
            tape.hot_events >= self._config.seal_events
            or tape.hot_raw >= self._config.seal_bytes
            or tape.hot_blocks >= MAX_HOT_BLOCKS
        ):
            return self._seal
        return None

    def pressing(self, tape: books.TapeRecord, now: float) -> float:
        """0 when nothing is due, else at least 1 and in proportion to the blocks that sealing would save.

        Large blocks, as they come at the highest rates, are as good as sealed ones and do not press.
        """
        if self.next_piece(tape, now) is None:
            return 0.0
        sealed = max(tape.hot_events / self._config.seal_events, tape.hot_raw / self._config.seal_bytes)
        return max(1.0, (tape.hot_blocks - sealed) / SPARE_BLOCKS)

    # -- sealing --------------------------------------------------------------------------------

    def prepare(self, work: Work, tape: books.TapeRecord) -> bool:
        """Read a bounded part of what `work` will seal; whether there is more to be read before."""
        if work != self._seal:
            return False
        with self._env.reading() as txn, txn.cursor(self._env.dbs["blocks"]) as cursor:
            found = cursor.set_range(layout.seq_key(tape.sealed_to + 1))
            if self._read and found and layout.key_seq(cursor.key()) == self._read[0].first_seq:
                found = cursor.set_range(layout.seq_key(self._read[-1].last_seq + 1))
            else:
                self._read, self._read_bytes = [], 0
            return found and self._read_on(cursor)

    def _read_on(self, cursor: lmdb.Cursor) -> bool:
        """Read hot blocks from `cursor` on, at most `READ_BLOCKS`; whether more may belong to the same sealed block.

        A large block ends the group, and one with damaged events.
        """
        blocks, config, found = self._read, self._config, True
        events, raw = sum(each.count for each in blocks), sum(len(each.payload) for each in blocks)
        for _ in range(READ_BLOCKS):
            if not found or events >= config.seal_events or raw >= config.seal_bytes or len(blocks) >= MAX_HOT_BLOCKS:
                return False
            value = cursor.value()
            header = layout.decode_header(cursor.key(), value)
            if self._is_large(header) or (blocks and not _continues(blocks[-1], header)):
                return False
            try:
                blocks.append(layout.decode_block(header, layout.excerpt(header, value), self._expand))
            except CorruptError:
                return False
            self._read_bytes += len(value)
            events += header.events
            raw += header.raw_length
            found = cursor.next()
        return bool(found)

    def _is_large(self, header: layout.Header) -> bool:
        """Whether a block is as good as a sealed one as it is."""
        return 2 * header.events >= self._config.seal_events or 2 * header.raw_length >= self._config.seal_bytes

    def _seal(self, txn: lmdb.Transaction, tape: books.TapeRecord) -> None:
        """Replace the oldest hot blocks by one sealed block, and their index runs by one run.

        Large ones stay as they are: from now on they count as sealed. So does one with damaged events.
        """
        if self._read:
            self._replace(txn, tape, self._read)
        else:
            spans = self._adopt(txn, tape)
            if spans:
                found = self._take_runs(txn, tape, spans[0].first, spans[-1].last)
                tape.runs += self._put_run(txn, tape, found, 1, runs.join(spans))
        failpoint("store.in_seal")

    def _adopt(self, txn: lmdb.Transaction, tape: books.TapeRecord) -> list[runs.Span]:
        """Count the oldest hot blocks as sealed: a damaged one, or as many large ones as there are in a row."""
        spans: list[runs.Span] = []
        with txn.cursor(self._env.dbs["blocks"]) as cursor:
            found = cursor.set_range(layout.seq_key(tape.sealed_to + 1))
            for n in range(ADOPT_BLOCKS):
                if not found:
                    break
                header = layout.decode_header(cursor.key(), cursor.value())
                large = self._is_large(header)
                if n and not large:
                    break
                tape.damaged += not large
                tape.hot_blocks -= 1
                tape.hot_events -= header.events
                tape.hot_raw -= header.raw_length
                tape.sealed_blocks += 1
                tape.sealed_to = header.last_seq
                spans.append(runs.span_of_block(header))
                found = cursor.next() and large
        return spans

    def _replace(self, txn: lmdb.Transaction, tape: books.TapeRecord, blocks: list[Block]) -> None:
        """Put one sealed block in the place of `blocks`, the oldest hot ones."""
        merged = Block(
            first_seq=blocks[0].first_seq,
            count=sum(each.count for each in blocks),
            min_time=min(each.min_time for each in blocks),
            max_time=max(each.max_time for each in blocks),
            min_received=min(each.min_received for each in blocks),
            max_received=max(each.max_received for each in blocks),
            topics=0,
            payload=merge_payloads([each.payload for each in blocks]) if len(blocks) > 1 else blocks[0].payload,
        )
        with txn.cursor(self._env.dbs["blocks"]) as cursor:
            cursor.set_key(layout.seq_key(merged.first_seq))
            for each in blocks:
                merged.topics |= each.topics
                cursor.delete()
        value = layout.encode_block(merged, self._compress, layout.SEALED)
        txn.put(layout.seq_key(merged.first_seq), value, db=self._env.dbs["blocks"])
        raw = sum(len(each.payload) for each in blocks)
        tape.block_bytes += len(value) - self._read_bytes
        tape.raw_bytes += len(merged.payload) - raw
        tape.hot_blocks -= len(blocks)
        tape.hot_events -= merged.count
        tape.hot_raw -= raw
        tape.sealed_blocks += 1
        tape.sealed_to = merged.last_seq
        found = self._take_runs(txn, tape, merged.first_seq, merged.last_seq)
        tape.runs += self._put_run(txn, tape, found, 1, runs.span_of_block(merged))

    # -- the correlation index ------------------------------------------------------------------

    def _merge(self, txn: lmdb.Transaction, tape: books.TapeRecord) -> None:
        """Merge the oldest runs of level 1 into one of level 2."""
        last, count = self._oldest_runs(txn, tape)
        found = self._take_runs(txn, tape, tape.merged_to + 1, last)
        self._put_run(txn, tape, found, 2, runs.merge_spans(found))
        tape.merged_to, tape.runs = last, tape.runs - count if last < tape.sealed_to else 0
        failpoint("store.in_merge")

    def _oldest_runs(self, txn: lmdb.Transaction, tape: books.TapeRecord) -> tuple[int, int]:
        """The last ``bus_seq`` before which `MERGE_RUNS` runs of level 1 begin, and how many they are."""
        count = 0
        with txn.cursor(self._env.dbs["corr"]) as cursor:
            found = cursor.set_range(layout.seq_key(tape.merged_to + 1))
            while found and layout.key_seq(cursor.key()) <= tape.sealed_to:
                if count == MERGE_RUNS:
                    return layout.key_seq(cursor.key()) - 1, count
                count += runs.level_of(cursor.value()) == 1
                found = cursor.next()
        return tape.sealed_to, count

    def _take_runs(
        self, txn: lmdb.Transaction, tape: books.TapeRecord, first: int, last: int
    ) -> list[tuple[bytes, bytes]]:
        """Remove the runs that begin within `first`..`last`; their keys and values."""
        found: list[tuple[bytes, bytes]] = []
        with txn.cursor(self._env.dbs["corr"]) as cursor:
            more = cursor.set_range(layout.seq_key(first))
            while more and layout.key_seq(cursor.key()) <= last:
                found.append((bytes(cursor.key()), bytes(cursor.value())))
                tape.corr_bytes -= len(found[-1][1])
                more = cursor.delete() and len(cursor.key()) > 0
        return found

    def _put_run(
        self,
        txn: lmdb.Transaction,
        tape: books.TapeRecord,
        found: list[tuple[bytes, bytes]],
        level: int,
        span: runs.Span | None,
    ) -> int:
        """Write one run with the entries of the stored runs `found`; returns how many were written (0 or 1)."""
        if span is None and not found:
            return 0
        key = layout.seq_key(span.first) if span is not None else found[0][0]
        base = layout.key_seq(key)
        entries = [(bytes(runs.entries_of(at, run)), layout.key_seq(at) - base) for at, run in found]
        value = runs.encode(key, merge_runs(entries), level, span)
        txn.put(key, value, db=self._env.dbs["corr"])
        tape.corr_bytes += len(value)
        return 1

    # -- retention ------------------------------------------------------------------------------

    @property
    def _max_age(self) -> float:
        return self._config.max_age_days * DAY_S

    def _mark(self, txn: lmdb.Transaction, tape: books.TapeRecord) -> None:
        """Note where the tape ends now, so that its age can be told later."""
        ages = replace(self._ages, marks=self._ages.marks[:])
        ages.mark(tape.last_seq, self._max_age)
        self._put(txn, "meta", books.AGES_KEY, books.encode(ages))
        self._ages = ages

    def _too_much(self, tape: books.TapeRecord) -> bool:
        """Whether a retention rule is broken by the oldest block. The newest block is always kept."""
        if tape.hot_blocks + tape.sealed_blocks < 2:
            return False
        config = self._config
        if not (config.max_age_days or config.max_events or config.max_bytes_kept):
            return False
        with self._env.reading() as txn, txn.cursor(self._env.dbs["blocks"]) as cursor:
            if not cursor.first():
                return False
            return self._breaks(tape, layout.decode_header(cursor.key(), cursor.value()))

    def _breaks(self, tape: books.TapeRecord, oldest: layout.Header) -> bool:
        """Whether a tape whose oldest block is `oldest` still has too much, by any of the rules."""
        config = self._config
        if config.max_events and tape.events > config.max_events:
            return True
        if config.max_bytes_kept and tape.block_bytes + tape.corr_bytes > config.max_bytes_kept:
            return True
        return bool(config.max_age_days) and oldest.last_seq <= self._ages.older(self._max_age)

    def _drop(self, txn: lmdb.Transaction, tape: books.TapeRecord) -> None:
        """Remove oldest blocks that break a rule, a bounded number, and index runs wholly before the rest."""
        kept_from = 0
        with txn.cursor(self._env.dbs["blocks"]) as cursor:
            for _ in range(DROP_BLOCKS):
                if tape.hot_blocks + tape.sealed_blocks < 2 or not cursor.first():
                    break
                value = cursor.value()
                header = layout.decode_header(cursor.key(), value)
                if not self._breaks(tape, header):
                    break
                self._forget(tape, header, len(value))
                cursor.delete()
            if cursor.first():
                kept_from = layout.key_seq(cursor.key())
        self._drop_runs(txn, tape, kept_from)
        failpoint("store.in_drop")

    @staticmethod
    def _forget(tape: books.TapeRecord, header: layout.Header, size: int) -> None:
        tape.events -= header.events
        tape.block_bytes -= size
        tape.raw_bytes -= header.raw_length
        if header.last_seq <= tape.sealed_to:
            tape.sealed_blocks -= 1
        else:
            tape.hot_blocks -= 1
            tape.hot_events -= header.events
            tape.hot_raw -= header.raw_length

    def _drop_runs(self, txn: lmdb.Transaction, tape: books.TapeRecord, kept_from: int) -> None:
        """Remove each run whose successor begins at or before the first kept block."""
        with txn.cursor(self._env.dbs["corr"]) as cursor:
            while cursor.first():
                key, size, level = cursor.key(), len(cursor.value()), runs.level_of(cursor.value())
                if not cursor.next() or layout.key_seq(cursor.key()) > kept_from:
                    return
                txn.delete(key, db=self._env.dbs["corr"])
                tape.corr_bytes -= size
                if level == 1:
                    tape.runs -= 1


def _continues(block: Block, header: layout.Header) -> bool:
    """Whether events of the next block may share one with those of `block`.

    Not where some between them are lost, so that none moves into their place; nor after a wait that one block cannot
    tell or a step of the clock backwards, so that every event keeps its time of reception.
    """
    waited = header.min_received - block.max_received
    return header.first_seq == block.last_seq + 1 and 0 <= waited < MAX_WAIT_S

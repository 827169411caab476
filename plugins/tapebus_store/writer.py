"""Writing the tape: one transaction per commit, durable before it returns."""

from __future__ import annotations

import errno
import os
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import zstandard
from msgspec.structs import replace

from tapebus.errors import ConfigError, CorruptError, StoreError, StoreFull, TapebusError
from tapebus.failpoints import failpoint
from tapebus.store import Block, Commit, Unit
from tapebus_store import books, layout, runs
from tapebus_store.environment import InstanceLock, MiB
from tapebus_store.pages import PageFile
from tapebus_store.quarantine import CLOSED, DAMAGED, FAILED, SHORT_RUN_S, Mark, read_mark, spoil_mark, write_mark
from tapebus_store.reader import LmdbReader
from tapebus_store.room import FULL, MARGIN_BYTES, Reserve
from tapebus_store.upkeep import Upkeep

GiB = 1 << 30
#: What the map may grow beyond ``max_bytes`` to tell that it is full.
MAP_RESERVE = 1 << 20
DISK_FULL = "the disk is full"
MAP_FULL = "the tape has reached plugins.store.max_bytes"
NO_RESERVE = "the disk has no room for the reserve"
#: With less room than this an I/O error of a write is taken for a full disk.
LITTLE_SPACE = 4 * MiB


class StoreConfig(msgspec.Struct, forbid_unknown_fields=True):
    """``[plugins.store]``: sizes in bytes; 0 switches a retention rule off.

    ``max_bytes`` bounds the map (and so the file), ``initial_bytes`` is where it starts. The three
    retention rules hold together: the oldest blocks go until each of them is met.
    """

    max_bytes: int = 64 * GiB
    initial_bytes: int = 256 * MiB
    max_age_days: float = 0.0
    max_bytes_kept: int = 0
    max_events: int = 0
    max_dead: int = 10_000
    seal_events: int = 4096
    seal_bytes: int = 512 * 1024

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.initial_bytes < 64 * 1024 or self.max_bytes < self.initial_bytes:
            raise ValueError("initial_bytes must be at least 65536 and at most max_bytes")
        if self.seal_events < 1 or self.seal_bytes < 1:
            raise ValueError("seal_events and seal_bytes must be at least 1")


def store_config(config: dict[str, Any]) -> StoreConfig:
    """`config` as checked settings; raises `ConfigError`."""
    try:
        return msgspec.convert(config, StoreConfig)
    except msgspec.ValidationError as error:
        names = ", ".join(StoreConfig.__struct_fields__)
        raise ConfigError(f"plugins.store: {error}; the keys are {names}") from error


class LmdbStore(LmdbReader):
    """The tape of one running bus. Reads from any thread, everything else from one thread only."""

    def __init__(self, data_dir: Path, config: StoreConfig) -> None:
        self._config = config
        self._failed: str | None = None
        self._sound = True
        self._hot = zstandard.ZstdCompressor(level=1)
        #: Why room is short, "" while it is not. Commits then use up the reserve: take in no more than must be.
        self.shortage = ""
        self._opened_at = time.monotonic()
        self._lock = InstanceLock(Path(data_dir))
        try:
            super().__init__(data_dir, readonly=False, map_size=config.initial_bytes)
        except BaseException:
            self._lock.release()
            raise
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """Check the version, read the tape's record and clear reader slots of dead processes."""
        self._env.env.reader_check()
        self._tape_record = books.TapeRecord()
        with self._env.reading() as txn:
            version = self._get(txn, "meta", books.VERSION_KEY)
            record = self._get(txn, "meta", books.TAPE_KEY)
            ages = self._get(txn, "meta", books.AGES_KEY)
            with txn.cursor(self._env.dbs["blocks"]) as cursor:
                newest = layout.decode_header(cursor.key(), cursor.value()).last_seq if cursor.last() else None
            if version is not None:
                books.check_version(version, self._env.path)
            if record is not None:
                self._tape_record = books.decode_tape(record)
            last = self._tape_record.last_seq
            if newest is not None and newest != last and not self._is_hole(txn, newest + 1, last):
                reason = f"the newest block ends at bus_seq {newest}, the tape's record says {last}"
                self.suspect(reason)
                raise CorruptError(f"{self._env.path}: {reason}: start again, which saves what is sound")
        self._reserve = Reserve(self._env.path)
        if not self._reserve.take():
            self.shortage = NO_RESERVE
        self._upkeep = Upkeep(self._env, self._config, self._put)
        if ages is not None:
            self._upkeep.keep_time(books.decode_ages(ages))
        if version is None or books.is_older(version) or self._mirror_is_empty():
            failpoint("store.created")
            self._durably(self._write_first)

    def _mirror_is_empty(self) -> bool:
        with self._env.reading() as txn:
            return int(txn.stat(self._env.dbs[books.MIRROR])["entries"]) == 0

    def _write_first(self, txn: lmdb.Transaction, tape: books.TapeRecord) -> None:
        """Name the version, and give a tape that is older than the mirror its second copies."""
        for name in books.MIRRORED:
            with txn.cursor(self._env.dbs[name]) as cursor:
                found = [(bytes(key), bytes(value)) for key, value in cursor]
            for key, value in found:
                self._put(txn, name, key, layout.unguard(name, key, value))
        self._put(txn, "meta", books.VERSION_KEY, books.encode_version())

    @property
    def notices(self) -> list[str]:
        """What had to be done before this tape could be opened, as sentences for people; usually nothing."""
        return self._env.notices

    def suspect(self, reason: str) -> None:
        """Let the next start look at the whole tape before it is opened; from any thread."""
        self._sound = False
        spoil_mark(self._env.path, DAMAGED, reason)

    # -- the transaction ------------------------------------------------------------------------

    def _durably(self, write: Any, *arguments: Any) -> Any:
        """Run ``write(txn, tape, *arguments)`` in one transaction and make it durable.

        `tape` is a copy of the tape's record; it is written at the end and kept on success. The map
        grows as far as allowed; then, or on a full disk, the reserve is used up and ``shortage`` says
        why; when that is not enough `StoreFull` is raised and nothing has happened. After any other
        failure every later call raises `StoreError`: a failed fsync cannot be repeated, the kernel
        may have thrown the pages away.
        """
        self._env.check_process()
        if self._failed is not None:
            raise StoreError(f"{self._env.path}: no commit after an earlier failure ({self._failed}): restart the bus")
        while True:
            tape = replace(self._tape_record)
            try:
                with self._env.env.begin(write=True) as txn:
                    result = write(txn, tape, *arguments)
                    tape.txn = txn.id()
                    self._put(txn, "meta", books.TAPE_KEY, books.encode(tape))
            except lmdb.MapFullError as error:
                failpoint("store.before_grow")
                if not self._widen():
                    raise StoreFull(
                        f"{self._env.path}: the tape has reached plugins.store.max_bytes = "
                        f"{self._config.max_bytes}: raise it or keep less"
                    ) from error
                failpoint("store.after_grow")
                continue
            except TapebusError:
                raise
            except Exception as error:
                if not self._is_full(error):
                    self._failed = str(error)
                    spoil_mark(self._env.path, FAILED, str(error))
                    raise StoreError(f"{self._env.path}: the commit failed: {error}") from error
                self.shortage = DISK_FULL
                if not self._reserve.release():
                    raise StoreFull(f"{self._env.path}: no space left on the disk: free some") from error
                continue
            self._tape_record = tape
            return result

    def _widen(self) -> bool:
        """Grow the map; at its greatest size once more by the reserve, so that this can be told on the tape."""
        limit = self._config.max_bytes
        if self._env.grow(limit):
            return True
        self.shortage = MAP_FULL
        return self._env.grow(limit + MAP_RESERVE)

    def regain(self) -> bool:
        """Look whether there is room again and take the reserve back; True when ``shortage`` is over."""
        self._env.check_process()
        if not self._reserve.take(MARGIN_BYTES):
            self.shortage = DISK_FULL
        elif self._env.env.info()["map_size"] > self._config.max_bytes and self._pages_free() < MAP_RESERVE:
            self.shortage = MAP_FULL
        else:
            self.shortage = ""
        return not self.shortage

    def _pages_free(self) -> int:
        """Bytes of the map, up to ``max_bytes``, that no tree uses."""
        with PageFile(self._env.path / "data.mdb") as file:
            meta = file.newest
            if meta is None:
                return 0
            used = meta.last_page + 1 - len(file.free_pages(meta))
            return self._config.max_bytes - used * file.page_size

    def _is_full(self, error: Exception) -> bool:
        """Whether `error` means no room. LMDB reports a write cut short by a full disk as EIO."""
        text = str(error)
        if isinstance(error, lmdb.DiskError) or any(os.strerror(code) in text for code in FULL):
            return True
        if os.strerror(errno.EIO) not in text:
            return False
        space = os.statvfs(self._env.path)
        if space.f_bavail * space.f_frsize < LITTLE_SPACE:
            return True
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        size = (self._env.path / "data.mdb").stat().st_size
        return limit != resource.RLIM_INFINITY and size + LITTLE_SPACE > limit

    def _put(self, txn: lmdb.Transaction, database: str, key: bytes, value: bytes) -> None:
        txn.put(key, layout.guard(key, value), db=self._env.dbs[database])
        again = books.mirror_key(database, key) if database in books.MIRRORED else b""
        if again:
            txn.put(again, layout.guard(again, value), db=self._env.dbs[books.MIRROR])

    def _delete(self, txn: lmdb.Transaction, database: str, key: bytes) -> None:
        txn.delete(key, db=self._env.dbs[database])
        again = books.mirror_key(database, key)
        if again:
            txn.delete(again, db=self._env.dbs[books.MIRROR])

    # -- commit ---------------------------------------------------------------------------------

    def commit(self, commit: Commit) -> None:
        """Make `commit` durable before returning. ``counters`` replace the stored values of their names.

        Raises `StoreFull` when disk or map are full (nothing was written, try again later) and
        `StoreError` on an I/O error or for blocks that do not continue the tape.
        """
        self._env.check_process()
        expected = self._tape_record.last_seq + 1
        for block in commit.blocks:
            if block.first_seq != expected or block.count < 1:
                raise StoreError(f"tape: a block at bus_seq {block.first_seq} cannot follow bus_seq {expected - 1}")
            expected += block.count
        encoded = [(block, layout.encode_block(block, self._hot)) for block in commit.blocks]
        self._durably(self._write_commit, commit, encoded)

    def _write_commit(
        self, txn: lmdb.Transaction, tape: books.TapeRecord, commit: Commit, encoded: list[tuple[Block, bytes]]
    ) -> None:
        dbs = self._env.dbs
        for block, value in encoded:
            key = layout.seq_key(block.first_seq)
            txn.put(key, value, db=dbs["blocks"], append=True)
            if block.corr:
                run = runs.encode(key, block.corr, 0)
                txn.put(key, run, db=dbs["corr"], append=True)
                tape.corr_bytes += len(run)
            tape.last_seq = block.last_seq
            tape.events += block.count
            tape.block_bytes += len(value)
            tape.raw_bytes += len(block.payload)
            tape.hot_blocks += 1
            tape.hot_events += block.count
            tape.hot_raw += len(block.payload)
            tape.newest = max(tape.newest, block.max_received)
        for book in commit.producers:
            self._put(txn, "producers", books.producer_key(book), books.encode(book))
        for book in commit.forgotten:
            self._delete(txn, "producers", books.producer_key(book))
        for unit in commit.units:
            self._write_unit(txn, unit)
        for number, name in commit.topics.items():
            self._put(txn, "meta", books.TOPIC_PREFIX + str(number).encode(), name.encode())
        for name, figure in commit.counters.items():
            self._put(txn, "meta", books.COUNTER_PREFIX + name.encode(), str(figure).encode())
        if commit.settled:
            self._purge(txn, tape, commit.settled)
        for letter in commit.dead:
            tape.last_dead += 1
            tape.dead += 1
            key = layout.seq_key(tape.last_dead)
            self._put(txn, "dead", key, books.encode(replace(letter, id=tape.last_dead, raw=letter.raw[: 64 * 1024])))
        if tape.dead > self._config.max_dead:
            self._drop_oldest_dead(txn, tape)
        failpoint("store.in_commit")

    def _write_unit(self, txn: lmdb.Transaction, unit: Unit) -> None:
        self._put(txn, "cursors", unit.consumer.encode(), books.encode_cursor(unit))
        for name, value in unit.state.items():
            key = books.state_key(unit.namespace, name)
            if value is None:
                self._delete(txn, "state", key)
            else:
                self._put(txn, "state", key, books.encode_state(name, value))

    def _drop_oldest_dead(self, txn: lmdb.Transaction, tape: books.TapeRecord) -> None:
        with txn.cursor(self._env.dbs["dead"]) as cursor:
            while tape.dead > self._config.max_dead and cursor.first():
                cursor.delete()
                tape.dead -= 1

    # -- upkeep ---------------------------------------------------------------------------------

    def maintain(self, now: float) -> float:
        """Do one bounded piece of upkeep; how much the rest presses, 0 for none. `now` is what `steady_clock` shows."""
        self._env.check_process()
        self._note_long_run()
        self._upkeep.check_readers(now)
        work = self._upkeep.next_piece(self._tape_record, now)
        if work is None:
            return 0.0
        if self._upkeep.prepare(work, self._tape_record):
            return self._upkeep.pressing(self._tape_record, now)
        damaged = self._tape_record.damaged
        self._durably(work)
        if self._tape_record.damaged > damaged:
            self.suspect("a block could not be sealed")
        return self._upkeep.pressing(self._tape_record, now)

    def older(self, seconds: float) -> int:
        """The last ``bus_seq`` on the tape for `seconds`, or for ``max_age_days`` where that is less; 0 for none."""
        return self._upkeep.older(seconds)

    def _purge(self, txn: lmdb.Transaction, tape: books.TapeRecord, ids: list[int]) -> None:
        tape.dead -= sum(txn.delete(layout.seq_key(each), db=self._env.dbs["dead"]) for each in ids)

    def _note_long_run(self) -> None:
        """After some seconds this run is none of those that a damaged tape may have ended."""
        if self._opened_at and time.monotonic() - self._opened_at > SHORT_RUN_S:
            self._opened_at = 0.0
            mark = read_mark(self._env.path)
            if mark is not None and mark.short_runs:
                mark.short_runs = 0
                with suppress(OSError):
                    write_mark(self._env.path, mark)

    def close(self) -> None:
        """Close the tape and release the data directory; a second call does nothing."""
        env = self._environment
        sound = env is not None and env._pid == os.getpid() and self._failed is None and self._settle() and self._sound
        super().close()
        if sound and env is not None and env.references == 0:
            with suppress(OSError):
                write_mark(env.path, Mark(CLOSED, "", self._tape_record.last_seq))
        self._lock.release()

    def _settle(self) -> bool:
        """Commit once more, so that either of the two meta pages leads to everything; whether that worked."""
        try:
            self._durably(lambda txn, tape: None)
        except (StoreError, AttributeError):
            return False
        return True

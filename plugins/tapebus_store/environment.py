"""The LMDB environment: opened once per process, shared by its readers and its writer.

LMDB loses its locks when one process opens the same file twice, so handles on one directory share
one `Environment`, counted by references.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb

from tapebus.errors import CorruptError, StoreError, TapebusError
from tapebus_store.books import MIRROR
from tapebus_store.preflight import look
from tapebus_store.quarantine import admit, mark_open, sync_directory

log = logging.getLogger("tapebus.store")
DATABASES = ("blocks", "corr", "producers", "cursors", "state", "dead", "meta")
MiB = 1 << 20
MAX_READERS = 512

_shared: dict[Path, Environment] = {}
_locks: list[int] = []
_inherited: dict[Path, Environment] = {}
_mutex = threading.Lock()


def _after_fork() -> None:
    """A child starts without environments and without the parent's hold on its lock file.

    The parent's handles stay referenced and unused: closing them here would touch its lock table.
    """
    global _mutex
    _mutex = threading.Lock()
    _inherited.update(_shared)
    _shared.clear()
    for fd in _locks:
        with suppress(OSError):
            os.close(fd)
    _locks.clear()


os.register_at_fork(after_in_child=_after_fork)


class InstanceLock:
    """The exclusive lock on a data directory; released by the kernel when the process ends, however it ends."""

    def __init__(self, data_dir: Path) -> None:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = data_dir / "bus.lock"
        self._pid = os.getpid()
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise TapebusError(
                f"{data_dir}: another bus (pid {owner}) runs on this data directory: "
                "stop it, or choose another --data-dir"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{self._pid}\n".encode(), 0)
        _locks.append(self._fd)

    def release(self) -> None:
        if self._fd >= 0 and self._pid == os.getpid():
            _locks.remove(self._fd)
            # A child forked a moment ago may still share the descriptor: closing ours would not unlock.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
        self._fd = -1


class Environment:
    """One open LMDB environment. Reads from any thread; `exclusive` and writes from one thread only."""

    def __init__(self, path: Path, *, readonly: bool, map_size: int) -> None:
        self.path = path
        self.readonly = readonly
        self.map_size = map_size
        self.references = 0
        #: What had to be done to the file before it could be opened, as sentences.
        self.notices: list[str] = []
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._reading = 0
        self._waiting = 0
        self._exclusive = False
        self._open()

    def _open(self) -> None:
        data = self.path / "data.mdb"
        size = data.stat().st_size if data.exists() else 0
        map_size = self.map_size
        while map_size < size + size // 4:
            map_size *= 2
        try:
            self.env = lmdb.open(
                str(self.path),
                map_size=map_size,
                max_dbs=len(DATABASES) + 8,
                max_readers=MAX_READERS,
                readonly=self.readonly,
                create=not self.readonly,
                readahead=False,
                mode=0o600,
            )
            self.dbs = self._open_databases()
        except (lmdb.NotFoundError, lmdb.ReadonlyError) as error:
            raise StoreError(f"{self.path}: no tape here yet: start the bus once, or check --data-dir") from error
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
            raise CorruptError(f"{data}: this is not a usable tape ({error}): restore it from a backup") from error
        except (lmdb.Error, OSError) as error:
            raise StoreError(f"{self.path}: the tape cannot be opened: {error}") from error

    def _open_databases(self) -> dict[str, Any]:
        if self.readonly:
            return {name: self.env.open_db(name.encode(), create=False) for name in DATABASES}
        # all or none of them: a tape that lacks one is taken for damaged
        with self.env.begin(write=True) as txn:
            return {name: self.env.open_db(name.encode(), txn) for name in (*DATABASES, MIRROR)}

    def check_process(self) -> None:
        """Raise `StoreError` in a forked child, where LMDB handles of the parent must not be used."""
        if self._pid != os.getpid():
            raise _forked(self.path)
        if self.references <= 0:
            raise StoreError(f"{self.path}: the tape is closed")

    @contextmanager
    def reading(self) -> Iterator[lmdb.Transaction]:
        """A short read transaction; values are zero-copy buffers that die with it."""
        self.check_process()
        with self._changed:
            while self._waiting:
                self._changed.wait()
            self._reading += 1
        try:
            with self._begin() as txn:
                yield txn
        except lmdb.CorruptedError as error:
            raise CorruptError(f"{self.path}: damaged index pages ({error}): restore it from a backup") from error
        except lmdb.Error as error:
            raise StoreError(f"{self.path}: the tape cannot be read: {error}") from error
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()

    def _begin(self) -> lmdb.Transaction:
        while True:
            try:
                return self.env.begin(buffers=True)
            except lmdb.MapResizedError:
                self._adopt_map_size()

    def _adopt_map_size(self) -> None:
        """Follow a map that another process has grown, once no other thread reads here."""
        with self._changed:
            self._reading -= 1
            self._waiting += 1
            self._changed.notify_all()
            while self._reading or self._exclusive:
                self._changed.wait()
            try:
                self.env.set_mapsize(0)
            finally:
                self._reading += 1
                self._waiting -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep every read transaction of this process out, as resizing and reopening require."""
        with self._changed:
            self._waiting += 1
            while self._reading or self._exclusive:
                self._changed.wait()
            self._exclusive = True
        try:
            yield
        finally:
            with self._changed:
                self._exclusive = False
                self._waiting -= 1
                self._changed.notify_all()

    def grow(self, max_bytes: int) -> bool:
        """Double the map up to `max_bytes`; False when it is that large already. Writer thread only."""
        size = self.env.info()["map_size"]
        if size >= max_bytes:
            return False
        began = time.monotonic()
        with self.exclusive():
            self.env.set_mapsize(min(size * 2, max_bytes))
        # commits stood still meanwhile, waiting for readers of this process to end
        log.info("the map grew to %d bytes in %.1f ms", min(size * 2, max_bytes), (time.monotonic() - began) * 1e3)
        return True

    def make_writable(self, map_size: int) -> None:
        """Reopen for writing what this process had opened for reading."""
        with self.exclusive():
            self.env.close()
            self.readonly, self.map_size = False, map_size
            self._open()


def _forked(path: Path) -> StoreError:
    return StoreError(
        f"{path}: opened before this process was forked: open the tape in a process started by spawn or exec"
    )


def acquire(path: Path, *, readonly: bool, map_size: int) -> Environment:
    """The shared environment of `path`; pair each call with `release`."""
    path = path.resolve()
    data = path / "data.mdb"
    if readonly and not data.exists():
        raise StoreError(f"{path}: no tape here yet: start the bus once, or check --data-dir")
    if path in _inherited:
        raise _forked(path)
    with _mutex:
        found = _shared.get(path)
        if found is None:
            try:
                notices = _make_fit(path, map_size) if not readonly else _refuse_damaged(data)
            except OSError as error:
                raise StoreError(f"{path}: the tape cannot be opened: {error}") from error
            found = _shared[path] = Environment(path, readonly=readonly, map_size=map_size)
            found.notices = notices
            if not readonly:
                _sync_names(path)
        elif found.readonly and not readonly:
            mark_open(path)
            found.make_writable(map_size)
        found.references += 1
        return found


def _make_fit(path: Path, map_size: int) -> list[str]:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    notices = admit(path)
    if not (path / "data.mdb").exists():
        _create(path, map_size)
    return notices


def _refuse_damaged(data: Path) -> list[str]:
    """Raise `CorruptError` for a file that could kill this process with SIGBUS once mapped."""
    problems = look(data)
    if problems:
        raise CorruptError(
            f"{data}: damaged ({problems[0]}): start the bus, which saves what is sound, or restore it from a backup"
        )
    return []


def release(environment: Environment) -> None:
    """Give back one reference; the last one closes the environment."""
    with _mutex:
        if environment._pid != os.getpid():
            return
        environment.references -= 1
        if environment.references == 0:
            with environment.exclusive():
                environment.env.close()
            _shared.pop(environment.path, None)


def _create(path: Path, map_size: int) -> None:
    """Make an empty tape in `path` that is there as a whole or not at all, also after a power cut.

    LMDB writes the first pages of a new file without syncing them, and a file that holds only some of
    them cannot be told from a damaged tape.
    """
    new = path / "new.mdb"
    for each in (new, path / "new.mdb-lock"):
        each.unlink(missing_ok=True)
    try:
        with lmdb.open(str(new), map_size=map_size, subdir=False, max_dbs=64, mode=0o600) as env:
            for name in (*DATABASES, MIRROR):
                env.open_db(name.encode())
        (path / "new.mdb-lock").unlink()
        new.rename(path / "data.mdb")
    except (lmdb.Error, OSError) as error:
        raise StoreError(f"{path}: the tape cannot be created: {error}") from error


def _sync_names(path: Path) -> None:
    """Make the names of new files in `path` durable, and those of the directories above it, which may be as new.

    A file system without directory sync, and a directory that must not be read, are left alone.
    """
    for each in (path, *path.parents):
        sync_directory(each)

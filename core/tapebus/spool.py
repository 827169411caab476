"""Spool files: the outbox of a `Publisher` in a file, so that its events survive the death of their process.

A file is one page of facts and marks and then the ring of records of one outbox (docs/decisions/0009). Who holds
its lock owns it: its maker while it lives, afterwards the next `Publisher` of the same source, or the bus.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import random
import stat
import struct
import sys
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from tapebus._blocks import crc32c
from tapebus._outbox import Outbox
from tapebus.private import made_for_others

_log = logging.getLogger("tapebus.publisher")

MODES = ("memory", "crash", "power")
#: Bytes before the records.
RECORDS_AT = 4096
_MAGIC = b"TBSPOOL\1"
_FACTS = struct.Struct("<8sII")  # magic, bytes of the facts, their CRC-32C
_FACTS_ROOM = 2048 - _FACTS.size
_SUFFIX = ".spool"
#: Where a page that was allocated may still be refused later, or a lock or a mapping means less than here.
_UNFIT = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "btrfs", "zfs", "bcachefs", "ceph")


class SpoolError(Exception):
    """No spool can be had; the message says why, in one line."""


class Facts(msgspec.Struct):
    """What never changes in a file. Events go to `endpoint` as those of `producer_id`."""

    source: str
    endpoint: str
    producer_id: bytes
    capacity_events: int
    capacity_bytes: int
    pid: int
    created: float


def default_directory() -> Path:
    """``TAPEBUS_SPOOL_DIR``, else a directory of this user that lasts: the same for producers and bus."""
    if given := os.environ.get("TAPEBUS_SPOOL_DIR"):
        return Path(given).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_state_dir("tapebus", appauthor=False)) / "spool"


def same_endpoint(one: str, other: str) -> bool:
    """Whether two endpoints name the same place on this machine, as far as their spelling tells."""

    def plain(endpoint: str) -> str:
        return endpoint.replace("tcp://localhost:", "tcp://127.0.0.1:")

    return plain(one) == plain(other)


_held: weakref.WeakSet[Spool] = weakref.WeakSet()


class Spool:
    """One locked file and the outbox in it. Not thread-safe but for the outbox."""

    def __init__(self, path: Path, fd: int, facts: Facts, epoch: int = 0, careful: bool = False) -> None:
        self.path, self.facts = path, facts
        self.torn = 0
        self._fd = fd
        self._memory = mmap.mmap(fd, RECORDS_AT + facts.capacity_bytes)
        memory = memoryview(self._memory)
        self.outbox = Outbox(facts.capacity_events, facts.capacity_bytes, 1, memory, epoch, careful)
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether the file is still open here."""
        return self._fd >= 0

    @property
    def identity(self) -> tuple[bytes, int]:
        """The producer whose events these are, ``(producer_id, epoch)``."""
        return self.facts.producer_id, self.outbox.epoch

    def touch(self) -> None:
        """Take the faults of the first write to each page now and not in publish(). For a new file."""
        for page in range(RECORDS_AT, len(self._memory), mmap.PAGESIZE):
            self._memory[page] = 0

    def sync(self) -> None:
        """Bring all that is in the file to the disk. Takes as long as the disk does; raises `OSError`."""
        os.fdatasync(self._fd)

    def release(self) -> None:
        """Close the file, and remove it when nothing in it is left to send; does nothing the second time."""
        if self._fd < 0:
            return
        if self.outbox.first_pending >= self.outbox.next_seq:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.let_go()

    def let_go(self) -> None:
        """Close the file as it is. In a forked child this leaves the lock with the parent."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        self.outbox.detach()
        self._memory.close()
        os.close(fd)


class Syncer:
    """Brings a spool to the disk `sync_s` seconds after it changed; 0 never does. For the sender thread only."""

    def __init__(self, spool: Spool | None, sync_s: float) -> None:
        self._spool = spool
        self.sync_s = sync_s if spool is not None else 0.0
        self._synced, self._dirty_at = (-1, -1), 0.0

    def due_in(self) -> float:
        """Seconds until the disk must hear of the spool; while it knows all, the next event wakes the sender."""
        if self._spool is None or not self.sync_s:
            return float("inf")
        outbox = self._spool.outbox
        if outbox.point == self._synced:
            outbox.wake_at = min(outbox.wake_at, outbox.next_seq)
            return float("inf")
        self._dirty_at = self._dirty_at or time.monotonic()
        return max(0.0, self._dirty_at + self.sync_s - time.monotonic())

    def tend(self) -> None:
        """Sync when it is due; takes as long as the disk does."""
        if self._spool is None or not self.sync_s or self.due_in() > 0:
            return
        outbox, point = self._spool.outbox, self._spool.outbox.point
        try:
            self._spool.sync()
        except OSError as error:
            # A failed sync cannot be made good by a later one.
            _log.error("%s: %s; from now on the spool survives this process, but no power cut", self._spool.path, error)
            self.sync_s = 0.0
            outbox.synced(point[1], careful=False)
            return
        outbox.synced(point[1])
        self._synced, self._dirty_at = point, 0.0


def create(
    directory: Path,
    source: str,
    endpoint: str,
    capacity_events: int,
    capacity_bytes: int,
    epoch: int,
    careful: bool,
) -> Spool:
    """A new spool, allocated and mapped as a whole, so that no later write can fail; raises `SpoolError`."""
    if not hasattr(os, "posix_fallocate"):
        raise SpoolError("this system cannot allocate the room of a file beforehand")
    facts = Facts(source, endpoint, uuid.uuid4().bytes, capacity_events, capacity_bytes, os.getpid(), time.time())
    packed = msgspec.msgpack.encode(facts)
    if len(packed) > _FACTS_ROOM:
        raise SpoolError(f"the endpoint {endpoint!r} is too long")
    name = f"{''.join(c if c.isalnum() and c.isascii() else '-' for c in source)[:60]}-{facts.producer_id.hex()}"
    # Hidden until it is locked and complete.
    hidden, path = directory / f".{name}", directory / f"{name}{_SUFFIX}"
    fd = -1
    try:
        _prepare(directory)
        fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(fd, 0, RECORDS_AT + capacity_bytes)
        os.pwrite(fd, _FACTS.pack(_MAGIC, len(packed), crc32c(packed)) + packed, 0)
        spool = Spool(path, fd, facts, epoch, careful)
        spool.touch()
        if careful:
            os.fsync(fd)
        os.rename(hidden, path)
        if careful:
            _sync_directory(directory)
        _sweep(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            hidden.unlink()
        if fd >= 0:
            os.close(fd)
        raise SpoolError(f"{directory}: {error.strerror}") from None
    return spool


def _prepare(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise SpoolError(f"{directory}: not a directory")
    if found.st_uid != os.getuid():
        raise SpoolError(f"{directory}: belongs to another user (uid {found.st_uid})")
    if reason := made_for_others(directory, found.st_mode, (f"*{_SUFFIX}",)):
        raise SpoolError(f"{directory}: {reason}")
    if stat.S_IMODE(found.st_mode) & 0o077:
        directory.chmod(0o700)
    kind = _file_system(directory)
    if kind.startswith("fuse") or kind in _UNFIT:
        raise SpoolError(f"{directory}: {kind} does not keep its promise of allocated room; choose a local ext4 or xfs")


def _sweep(directory: Path) -> None:
    """Remove what was killed while it was being made: an hour is more than that ever takes."""
    for hidden in directory.glob(".*-*"):
        with contextlib.suppress(OSError):
            if hidden.lstat().st_mtime < time.time() - 3600:
                hidden.unlink()


def _file_system(directory: Path) -> str:
    """The type of the file system that `directory` is on; empty where the system does not say."""
    place, best, found = str(directory.resolve()), "", ""
    if sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/self/mountinfo", errors="surrogateescape") as lines:
            for line in lines:
                head, _, tail = line.partition(" - ")
                point = head.split()[4].replace("\\040", " ").rstrip("/") + "/"
                # The last mount on a point is the one that is seen.
                if f"{place}/".startswith(point) and len(point) >= len(best):
                    best, found = point, tail.split()[0]
    return found


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def orphans(
    directory: Path, wanted: Callable[[Facts], bool], seen: Callable[[Path], bool] | None = None
) -> Iterator[Spool]:
    """The `wanted` spools whose owner is gone, oldest first, now owned by the caller.

    A file is left alone unless `seen`, where given, says yes to it. Links and files of other users stay alone.
    """
    found = []
    with contextlib.suppress(OSError):
        if directory.lstat().st_uid == os.getuid():
            found = sorted((path.stat().st_mtime, path) for path in directory.glob(f"*{_SUFFIX}"))
    taken = [spool for _, path in found if (spool := _adopt(path, wanted, seen)) is not None]
    return iter(sorted(taken, key=lambda spool: spool.facts.created))


def _adopt(path: Path, wanted: Callable[[Facts], bool], seen: Callable[[Path], bool] | None) -> Spool | None:
    fd = -1
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        facts = _facts(path, fd, wanted, seen)
        if facts is None:
            os.close(fd)
            return None
        spool = Spool(path, fd, facts)
        spool.torn = spool.outbox.recover()
    except (OSError, ValueError, MemoryError) as error:
        if fd >= 0:
            os.close(fd)
        if not isinstance(error, OSError) or error.errno not in (errno.ENOENT, errno.ELOOP):
            _log.warning("the spool %s is left alone: %s", path, error)
        return None
    return spool


def _facts(path: Path, fd: int, wanted: Callable[[Facts], bool], seen: Callable[[Path], bool] | None) -> Facts | None:
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid():
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    # Whoever held the lock before may have removed the file meanwhile.
    if not os.fstat(fd).st_nlink or (seen is not None and not seen(path)):
        return None
    page = os.pread(fd, RECORDS_AT, 0)
    magic, size, crc = _FACTS.unpack_from(page.ljust(_FACTS.size, b"\0"))
    packed = page[_FACTS.size : _FACTS.size + size]
    if magic != _MAGIC or crc32c(packed) != crc:
        raise ValueError("not a spool of this version, or damaged")
    facts = msgspec.msgpack.decode(packed, type=Facts)
    if about.st_size < RECORDS_AT + facts.capacity_bytes:
        raise ValueError("it is shorter than it was made")
    return facts if wanted(facts) else None


def _let_go_of_all() -> None:
    for spool in list(_held):
        spool.let_go()


def new_epoch() -> int:
    """A random epoch; never 0, which marks the bus's own accounts."""
    return random.SystemRandom().getrandbits(64) or 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_of_all)

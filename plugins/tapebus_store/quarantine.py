"""What happens between the lock and the map: is the tape fit to be opened, and if not, what is saved of it.

``mark`` in the directory of the tape tells how its last bus ended. It is written before the first commit
and again after the last one, so whatever ends a bus in between leaves it at ``open``.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from tapebus.errors import CorruptError, StoreError
from tapebus.failpoints import failpoint
from tapebus_store import preflight
from tapebus_store.room import FULL
from tapebus_store.salvage import Report

log = logging.getLogger("tapebus.store")

OPEN, CLOSED, FAILED, DAMAGED = "open", "closed", "failed", "damaged"
#: After so many runs in a row that ended early and uncleanly, the tape itself is looked at as the cause.
SHORT_RUNS = 3
SHORT_RUN_S = 10.0
#: Seconds after which a child that should need less than one is taken for hanging.
CHILD_TIMEOUT_S = 30.0


class Mark(msgspec.Struct):
    """How the last bus on this tape ended: ``state`` is `OPEN` while it runs, then one of the others."""

    state: str = CLOSED
    reason: str = ""
    last_seq: int = 0
    short_runs: int = 0
    at: float = 0.0


_decode = msgspec.json.Decoder(Mark).decode


def read_mark(path: Path) -> Mark | None:
    """The mark of a tape; None where there is none. One that cannot be read speaks for no clean end."""
    try:
        return _decode((path / "mark").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError):
        return Mark(FAILED, "the mark cannot be read")


def write_mark(path: Path, mark: Mark) -> None:
    """Replace the mark in one durable step. Raises `OSError`."""
    mark.at = time.time()
    fresh = path / "mark.new"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(fd, msgspec.json.encode(mark))
        os.fsync(fd)
    finally:
        os.close(fd)
    fresh.rename(path / "mark")
    sync_directory(path)


def spoil_mark(path: Path, state: str, reason: str) -> None:
    """Note in place, as well as a failing disk allows, that the next start must look closely."""
    mark = read_mark(path) or Mark()
    mark.state, mark.reason = state, reason[:500]
    with suppress(OSError):
        fd = os.open(path / "mark", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            text = msgspec.json.encode(mark)
            # what is there already says as much as must be known, so it is cut only after the new text is written
            os.pwrite(fd, text, 0)
            os.ftruncate(fd, len(text))
            os.fsync(fd)
        finally:
            os.close(fd)


def sync_directory(path: Path) -> None:
    """Make the names of new files durable; a file system without directory sync is left alone."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def admit(path: Path) -> list[str]:
    """Make the tape in `path` fit to be opened for writing; sentences about what had to be done for it.

    A damaged file is kept under another name and a tape of its sound records takes its place. The caller holds
    the lock on the data directory and has the tape not mapped. Raises `StoreError` when nothing can be saved.
    """
    data = path / "data.mdb"
    _finish_replacing(path)
    mark = read_mark(path)
    unclean = mark is not None and mark.state != CLOSED
    notices: list[str] = []
    if data.exists() and (data.stat().st_size or (mark is not None and mark.last_seq)):
        problems = preflight.look(data)
        if unclean and not problems:
            assert mark is not None
            problems = _ask_child(path, _depth(mark))
        if problems:
            notices.append(_replace(path, problems, mark.last_seq if mark is not None else 0))
        with _named(path):
            preflight.lengthen(data)
    mark_open(path)
    return notices


def mark_open(path: Path) -> None:
    """Note durably that a bus writes to the tape from now on. Raises `StoreError`."""
    mark = read_mark(path) or Mark()
    mark.short_runs = mark.short_runs + 1 if mark.state != CLOSED else 1
    mark.state, mark.reason = OPEN, "a bus runs or was killed"
    with _named(path):
        try:
            write_mark(path, mark)
        except OSError as error:
            if error.errno not in FULL or not (path / "mark").exists():
                raise
            # a full disk has no room for a second file, but the bytes of the first one can be replaced
            spoil_mark(path, mark.state, mark.reason)


class _named:
    """Turns an `OSError` inside into a `StoreError` that names the directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise StoreError(f"{self._path}: the tape cannot be opened for writing: {error.strerror}") from error


def _depth(mark: Mark) -> str:
    if mark.state == DAMAGED or mark.short_runs >= SHORT_RUNS:
        return "whole"
    return "recent" if mark.state == FAILED else "newest"


def _ask_child(path: Path, depth: str) -> list[str]:
    """Let a child look at the tape as deep as `depth`; the file may kill it, which is an answer."""
    # looking at everything takes as long as it takes; a hanging child is one that makes no use of that
    timeout = CHILD_TIMEOUT_S + ((path / "data.mdb").stat().st_size / (10 << 20) if depth == "whole" else 0.0)
    try:
        done = _run("tapebus_store.preflight", str(path), depth, timeout=timeout)
    except subprocess.TimeoutExpired:
        return [f"looking at it did not end within {timeout:.0f} s"]
    if done.returncode < 0:
        return [f"looking at it ended with signal {-done.returncode}"]
    if done.returncode == preflight.DAMAGED:
        return done.stdout.decode("utf-8", "replace").splitlines() or ["damaged"]
    if done.returncode:
        # no verdict about the file: no memory, no descriptors, a full disk; the bus finds out by itself
        log.warning("the tape could not be looked at: %s", _last_line(done.stderr))
    return []


def _run(module: str, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[bytes]:
    search = os.pathsep.join(each for each in sys.path if each)
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": search},
    )


def _last_line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "it gave no reason"


# -- replacing ----------------------------------------------------------------------------------


def _replace(path: Path, problems: list[str], floor: int) -> str:
    """Put a tape of the sound records in the place of a damaged one, which is kept; a sentence about it."""
    log.error("%s: damaged (%s): saving what is sound", path / "data.mdb", problems[0])
    fresh = path / "salvage"
    shutil.rmtree(fresh, ignore_errors=True)
    with _named(path):
        fresh.mkdir(mode=0o700)
    done = _run("tapebus_store.salvage", str(path), str(fresh), str(floor))
    if done.returncode:
        reason = f"signal {-done.returncode}" if done.returncode < 0 else _last_line(done.stderr)
        shutil.rmtree(fresh, ignore_errors=True)
        raise StoreError(
            f"{path / 'data.mdb'}: damaged ({problems[0]}), and its sound records cannot be saved ({reason}): "
            "make room, or restore it from a backup"
        )
    report = msgspec.json.decode(done.stdout, type=Report)
    if not report.recognised and read_mark(path) is None:
        # nothing says that this was ever a tape, so it is not for a bus to move it away
        shutil.rmtree(fresh, ignore_errors=True)
        raise CorruptError(f"{path / 'data.mdb'}: this is not a usable tape ({problems[0]}): restore it from a backup")
    name = f"data.mdb.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    while (path / name).exists():
        name += "-again"
    failpoint("store.salvaged")
    with _named(path):
        (path / "data.mdb").rename(path / name)
        failpoint("store.set_aside")
        _finish_replacing(path)
    sentence = f"the tape was damaged ({problems[0]}): {report.summary()}; the damaged file is kept as {path / name}"
    log.error("%s", sentence)
    return sentence


def _finish_replacing(path: Path) -> None:
    """Move a finished salvage into its place; one that was interrupted earlier is thrown away."""
    fresh, data = path / "salvage" / "data.mdb", path / "data.mdb"
    if fresh.exists() and not data.exists():
        # only after the damaged file was moved away, which is after the salvage was on disk
        (path / "lock.mdb").unlink(missing_ok=True)
        fresh.rename(data)
        sync_directory(path)
    if (path / "salvage").exists():
        shutil.rmtree(path / "salvage", ignore_errors=True)
        sync_directory(path)

"""A simulated disk: from a recorded trace of file operations to the states a power cut may leave behind.

The trace comes from ``record.c``. A write is durable once its file was synced (or at its return, through a
descriptor with O_DSYNC); a new, renamed or removed name once its directory was. Of everything else any part may be on
the disk: nothing, a prefix, any subset in any order, and of one write any of its 512-byte sectors.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

SECTOR = 512
DIRECTORY = -1
#: Kind, durable on return, lengths of path and data, offset or size: ``struct record`` of ``record.c``.
RECORD = struct.Struct("<cBHIQ")
#: The lock table of LMDB is a map it writes to without any call; it holds nothing that outlives the machine.
MAPPED = ("lock.mdb", ".mdb-lock")


class Call(NamedTuple):
    """One recorded call, or a mark of the program (kind ``m``)."""

    kind: str
    synced: bool
    path: str
    offset: int
    data: bytes


def mark(data: bytes) -> bytes:
    """The record of a mark, to be appended to the trace by the traced program."""
    return RECORD.pack(b"m", 0, 0, len(data), 0) + data


def read_trace(file: Path, below: str = "data") -> list[Call]:
    """The calls on the directory `below` and what is in it, and the marks."""
    raw, place, calls = file.read_bytes(), 0, []
    while place < len(raw):
        kind, synced, path, data, offset = RECORD.unpack_from(raw, place)
        place += RECORD.size
        name = raw[place : place + path].decode()
        place += path + data
        call = Call(kind.decode(), bool(synced), name, offset, raw[place - data : place])
        assert call.kind != "U", f"{name}: changed by a call that the simulated disk does not know"
        assert call.kind != "M" or name.endswith(MAPPED), f"{name}: written through a map, which cannot be recorded"
        if call.kind == "m" or (call.kind != "M" and name.split("/")[0] in ("", below)):
            calls.append(call)
    return calls


class Change(NamedTuple):
    """A change that is not on the disk for certain. ``names`` are (path, file or None) in the order they happen."""

    file: int = 0
    offset: int = 0
    data: bytes | None = None  # None: the file is cut or extended to `offset`
    names: tuple[tuple[str, int | None], ...] = ()


#: Content by path; a number stands for so many zeros, None for a directory.
Image = dict[str, bytes | int | None]


class Disk:
    """What is on the disk for certain, and what may be, while the calls of a trace are taken one by one."""

    def __init__(self, directories: Sequence[str] = ()) -> None:
        self.files: dict[int, bytearray] = {}
        self.names = dict.fromkeys(directories, DIRECTORY)
        self.pending: list[Change] = []
        self._live: dict[str, int] = {}
        self._written: set[int] = set()

    def change(self, call: Call) -> Change | None:
        """What `call` changes, once it is under way."""
        path = call.path
        if call.kind == "c":
            file = len(self.files) + 1
            self.files[file] = bytearray()
            return Change(names=((path, file),))
        if call.kind == "d":
            return Change(names=((path, DIRECTORY),))
        if call.kind == "u":
            return Change(names=((path, None),))
        if call.kind == "r":
            moved = [name for name in self._live if name == path or name.startswith(path + "/")]
            to = call.data.decode()
            return Change(
                names=tuple(
                    each for name in moved for each in ((to + name[len(path) :], self._live[name]), (name, None))
                )
            )
        if path not in self._live:
            return None  # removed, and still open
        if call.kind == "w":
            self._written.add(self._live[path])
            return Change(self._live[path], call.offset, call.data)
        return Change(self._live[path], call.offset) if call.kind == "t" else None

    def take(self, call: Call, change: Change | None) -> None:
        """`call` has returned."""
        if call.kind == "s":
            self._sync(call.path)
        elif change is not None:
            for path, file in change.names:
                if file is None:
                    self._live.pop(path, None)
                else:
                    self._live[path] = file
            if call.synced:
                put(self.files, change)
            else:
                self.pending.append(change)

    def _sync(self, path: str) -> None:
        file = self._live.get(path, DIRECTORY)
        kept = []
        for each in self.pending:
            if file == DIRECTORY:
                done = bool(each.names) and str(PurePosixPath(each.names[0][0]).parent) == (path or ".")
            else:
                done = not each.names and each.file == file
            if not done:
                kept.append(each)
            elif each.names:
                put_names(self.names, each)
            else:
                put(self.files, each)
        self.pending = kept

    def grows(self, change: Change) -> bool:
        """Whether this is a write wholly behind what is certain of its file."""
        return change.data is not None and change.offset >= len(self.files[change.file])

    def image(self, chosen: list[Change]) -> Image:
        """The files of a crash state: what is certain, with `chosen` on top."""
        names = dict(self.names)
        touched = {each.file for each in chosen if not each.names}
        files = {file: bytearray(self.files[file]) for file in touched}
        for each in chosen:
            if each.names:
                put_names(names, each)
            else:
                put(files, each)
        found: Image = {}
        for path in sorted(names):
            parent = str(PurePosixPath(path).parent)
            if parent == "." or parent in found:
                file = names[path]
                if file == DIRECTORY:
                    found[path] = None
                else:
                    content = files.get(file, self.files[file])
                    found[path] = bytes(content) if file in self._written else len(content)
        return found


def put(files: dict[int, bytearray], change: Change) -> None:
    content = files[change.file]
    if change.data is None:
        del content[change.offset :]
        content.extend(bytes(change.offset - len(content)))
        return
    end = change.offset + len(change.data)
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    content[change.offset : end] = change.data


def put_names(names: dict[str, int], change: Change) -> None:
    for path, file in change.names:
        if file is None:
            names.pop(path, None)
        else:
            names[path] = file


def survivors(disk: Disk, pending: list[Change], chance: random.Random) -> list[Change]:
    """One choice of what reached the disk before the power went."""
    match chance.randrange(7):
        case 0:
            chosen = list(pending)
        case 1:
            chosen = pending[: chance.randrange(len(pending))]
        case 2:
            chosen = [each for each in pending if chance.random() < 0.5]
        case 3:
            left_out = chance.randrange(len(pending))
            chosen = pending[:left_out] + pending[left_out + 1 :]
        case 4:
            chosen = [chance.choice(pending)]
        case 5:
            # the new size of a file may be there before its data
            chosen = [
                each._replace(data=bytes(len(each.data))) if chance.random() < 0.5 and disk.grows(each) else each
                for each in pending
                if each.names or chance.random() < 0.7
            ]
        case _:
            chosen = []
    torn = [place for place, each in enumerate(chosen) if each.data is not None and len(each.data) > SECTOR]
    if torn and chance.random() < 0.5:
        place = chance.choice(torn)
        chosen[place : place + 1] = _tear(chosen[place], chance)
    return chosen


def _tear(change: Change, chance: random.Random) -> list[Change]:
    """Some sectors of one write."""
    assert change.data is not None
    cut = SECTOR - change.offset % SECTOR
    edges = [0, *range(cut, len(change.data), SECTOR), len(change.data)]
    pieces = [Change(change.file, change.offset + first, change.data[first:last]) for first, last in pairwise(edges)]
    if chance.random() < 0.5:
        return pieces[: chance.randrange(len(pieces))]
    return [each for each in pieces if chance.random() < 0.5]


def crash_states(
    calls: list[Call], count: int, chance: random.Random, directories: Sequence[str] = ()
) -> Iterator[tuple[int, Image]]:
    """About `count` states as (number of calls that had returned, files), in the order of the trace.

    Every call is a moment at which the power may go while it is under way. Moments with nothing in doubt have one
    state each and are visited now and then; the others share what is left. `directories` were there before.
    """
    doubtful = _doubtful(calls)
    share = count / max(1, len(doubtful))
    disk = Disk(directories)
    for number, call in enumerate(calls):
        change = disk.change(call)
        pending = disk.pending + ([change] if change is not None else [])
        if number in doubtful:
            wanted = int(share) + (chance.random() < share % 1)
            for _ in range(wanted):
                yield number, disk.image(survivors(disk, pending, chance))
        elif not pending and chance.random() < 0.02:
            yield number, disk.image([])
        disk.take(call, change)
    yield len(calls), disk.image(list(disk.pending))


def _doubtful(calls: list[Call]) -> set[int]:
    disk, found = Disk(), set()
    for number, call in enumerate(calls):
        change = disk.change(call)
        if (disk.pending or change is not None) and call.kind != "m":
            found.add(number)
        disk.take(call, change)
    return found

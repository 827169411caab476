"""Looking at a tape before it is mapped: a cheap look always, a thorough one in a child where there is doubt.

``python -m tapebus_store.preflight DIRECTORY newest|recent|whole`` is the child. It ends with 0 for a sound file
and with `DAMAGED` and one line for a broken one; a file that kills it is broken as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tapebus.errors import CorruptError, StoreError
from tapebus_store import books, layout, runs
from tapebus_store.pages import NO_PAGE, Budget, Meta, PageFile, Tree

DAMAGED = 3
NAMES = ("blocks", "corr", "producers", "cursors", "state", "dead", "meta")
#: What the quick look may cost at most, in pages and seconds, whatever the length of the tape.
QUICK = 4000, 0.2
#: How often a file is looked at that changes while it is read.
LOOKS = 20
#: Pages and seconds for each database: after the end of a process nothing should be broken, after an
#: I/O error the last commits are in doubt, and what was seen to be damaged has to be found.
DEPTHS = {"newest": (32, 0.1), "recent": (2000, 3.0), "whole": (1 << 60, 1e9)}
#: What LMDB says of a file that is broken; its other errors are about the machine.
VERDICTS = ("CorruptedError", "PageNotFoundError", "PanicError", "InvalidError", "BadTxnError", "IncompatibleError")
#: So many of the newest records of each database are read through LMDB itself.
NEWEST = 16


def look(data: Path) -> list[str]:
    """What is wrong with a file as far as a few reads show it; maps nothing, runs in any process.

    Raises `StoreError` for a tape of a newer major version, whose layout this one does not know.
    """
    problems: list[str] = []
    for _ in range(LOOKS):
        with PageFile(data) as file:
            problems = _look(file)
            if not problems:
                return []
            # a bus may commit meanwhile and use pages again that were read here
            with PageFile(data) as again:
                if again.metas == file.metas:
                    return problems
    return []


def _look(file: PageFile) -> list[str]:
    if file.size == 0:
        return ["the file is empty"]
    try:
        meta = sound_meta(file)
    except CorruptError as error:
        return [str(error)]
    if file.cut_short(meta):
        return [f"the file is cut short ({file.size} bytes)"]
    trees = file.databases(meta)
    _check_version(file, trees)
    missing = [name for name in NAMES if name not in trees]
    if missing and trees:
        return [f"the database {missing[0]!r} is missing", *_said(file)]
    # LMDB aborts the process at a page of the wrong kind; there is about one page for a hundred blocks
    budget = Budget(*QUICK)
    for tree in trees.values():
        for _ in file.walk(tree.root, budget, backwards=True, quick=True):
            pass
    return _said(file)


def lengthen(data: Path) -> None:
    """Give a file the length its newest transaction names, so that no page of its map lies behind its end."""
    with PageFile(data) as file:
        size = (file.newest.last_page + 1) * file.page_size if file.newest is not None else 0
    if 0 < os.stat(data).st_size < size:
        os.truncate(data, size)


def _check_version(file: PageFile, trees: dict[str, Tree]) -> None:
    before = bytes(file.seen)
    for node in file.walk(trees["meta"].root if "meta" in trees else NO_PAGE):
        if node.key == books.VERSION_KEY and node.value is not None:
            with suppress(CorruptError):
                books.check_version(layout.unguard("meta", node.key, node.value), file.path.parent)
    file.seen[:] = before


def _said(file: PageFile) -> list[str]:
    return [f"page {page}: {reason}" for page, reason in file.damage]


def sound_meta(file: PageFile) -> Meta:
    """The newest transaction of a file whose two meta pages agree. Raises `CorruptError` where they do not.

    Nothing in a meta page is checksummed, so each is compared with the tape's record it leads to.
    """
    first, second = file.metas
    newest = file.newest
    for number, each in enumerate(file.metas):
        if each is None and (newest is None or not file.left_over(number, newest)):
            raise CorruptError(f"meta page {number} is broken")
    assert newest is not None
    if newest.txn < 2:
        return newest
    if first is not None and second is not None and abs(first.txn - second.txn) != 1:
        raise CorruptError(f"the meta pages name transactions {first.txn} and {second.txn}")
    # the record is small and its tree is one page deep or two, so this is a handful of reads
    record = tape_record(file, newest)
    if record is not None and record.txn not in (0, newest.txn):
        raise CorruptError(f"the newest meta page names transaction {newest.txn}, its records {record.txn}")
    return newest


def tape_record(file: PageFile, meta: Meta) -> books.TapeRecord | None:
    """The tape's own record in one transaction; None on a tape nothing was written to. Raises `CorruptError`."""
    before = bytes(file.seen)
    found = None
    try:
        tree = file.databases(meta).get("meta")
        for node in file.walk(tree.root if tree is not None else NO_PAGE):
            if node.key == books.TAPE_KEY and node.value is not None:
                found = books.decode_tape(layout.unguard("meta", node.key, node.value))
    finally:
        file.seen[:] = before
    return found


def _checked(file: PageFile, name: str, tree: Tree, budget: Budget) -> Iterator[bytes]:
    """The keys of a database, newest pages first; values that do not match their checksum are noted."""
    for node in file.walk(tree.root, budget, backwards=True):
        try:
            if node.value is not None:
                verify(name, node.key, node.value)
        except CorruptError as error:
            file.damage.append((tree.root, str(error)))
        yield node.key


def verify(name: str, key: bytes, value: bytes) -> None:
    """Compare one record with its checksum. Raises `CorruptError`."""
    if name == "blocks":
        header = layout.decode_header(key, value)
        layout.check_payload(header, value)
    elif name == "corr":
        runs.entries_of(key, value)
    else:
        layout.unguard(name, key, value)


def inspect(data: Path, depth: str) -> list[str]:
    """What is wrong with a file, newest pages first and as deep as `DEPTHS` says. Maps nothing."""
    with PageFile(data) as file:
        if depth != "newest" and hasattr(os, "posix_fadvise"):
            # after a failed write the kernel may hold pages that never reached the disk
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            meta = sound_meta(file)
        except CorruptError as error:
            return [str(error)]
        trees = file.databases(meta)
        for name, tree in trees.items():
            for _ in _checked(file, name, tree, Budget(*DEPTHS[depth])):
                pass
        if depth != "newest":
            free = file.free_pages(meta)
            if any(file.seen[page] for page in free if page < len(file.seen)):
                file.damage.append((meta.free.root, "a page is in use and listed as free"))
        return _said(file)


def read_through_lmdb(path: Path) -> None:
    """Do with the file what the bus will do with it, and change nothing. A broken file may kill the process."""
    import lmdb

    size = (path / "data.mdb").stat().st_size
    env = lmdb.open(str(path), map_size=max(size * 2, 1 << 26), max_dbs=64, readahead=False, mode=0o600)
    with env, env.begin(write=True) as txn:
        names = [bytes(key) for key, _ in txn.cursor()]
        dbs = [env.open_db(name, txn, create=False) for name in names]
        for db in dbs:
            with txn.cursor(db) as cursor:
                more = cursor.last()
                for _ in range(NEWEST):
                    if not more:
                        break
                    bytes(cursor.value())
                    more = cursor.prev()
        for db in dbs:
            txn.put(b"\xff" * 8, bytes(20_000), db=db)
        txn.abort()


def main(arguments: list[str]) -> int:
    path, depth = Path(arguments[0]), arguments[1]
    try:
        problems = inspect(path / "data.mdb", depth)
        if not problems:
            read_through_lmdb(path)
    except StoreError as error:
        problems = [str(error)]
    except Exception as error:
        if type(error).__name__ not in VERDICTS:
            raise
        problems = [str(error)]
    if problems:
        sys.stdout.write(problems[0] + (f" and {len(problems) - 1} more" if len(problems) > 1 else ""))
    return DAMAGED if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

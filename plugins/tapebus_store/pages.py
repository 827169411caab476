"""The pages of an LMDB file, read with `os.pread` and checked: nothing is mapped, so no damage can kill the process.

Understands the files of LMDB 0.9 on 64-bit machines, which is what the tape is kept in.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from itertools import pairwise
from operator import lt
from pathlib import Path
from typing import NamedTuple

from tapebus.errors import CorruptError

MAGIC, VERSION = 0xBEEFC0DE, 1
HEAD = 16
BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8
BIGDATA, SUBDATA = 1, 2
NO_PAGE = (1 << 64) - 1
MAX_DEPTH = 32
#: A value beyond this is no record of a tape.
MAX_VALUE = 1 << 30

_HEAD = struct.Struct("<QHHHH")
_PAGES = struct.Struct("<I")
_NODE = struct.Struct("<HHHH")
_DB = struct.Struct("<IHHQQQQQ")
_META = struct.Struct("<II16x")
_TAIL = struct.Struct("<QQ")
#: What a meta page holds, page header included.
META_BYTES = 152


class Tree(NamedTuple):
    """The record of one B-tree: flags, depth, its numbers of pages by kind and of entries, its root page."""

    pad: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflows: int
    entries: int
    root: int


class Meta(NamedTuple):
    """One of the two meta pages: the tree of free pages, the tree of databases, last page, transaction."""

    free: Tree
    main: Tree
    last_page: int
    txn: int


class Node(NamedTuple):
    """One entry of a leaf. `value` is None where it lies on overflow pages (from `page` on) that are damaged."""

    key: bytes
    value: bytes | None
    flags: int
    page: int = 0


class Budget:
    """How much may still be looked at: pages, and seconds."""

    def __init__(self, pages: int, seconds: float) -> None:
        self.pages = pages
        self.until = time.monotonic() + seconds

    def spend(self) -> bool:
        """Take one page; False when the budget is used up."""
        self.pages -= 1
        return self.pages >= 0 and time.monotonic() < self.until


class PageFile:
    """A ``data.mdb``. ``damage`` collects what was found broken, as ``(page, reason)``; one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.fd).st_size
        self.damage: list[tuple[int, str]] = []
        self.page_size = 4096
        self.metas = self._read_metas()
        self.seen = bytearray(self.size // self.page_size + 1)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> PageFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- meta pages -----------------------------------------------------------------------------

    def _read_metas(self) -> list[Meta | None]:
        sizes = [size for base in (0, 4096) if (size := self._page_size_at(base))]
        self.page_size = sizes[0] if sizes else 4096
        return [self._meta(0, 0), self._meta(1, 1)]

    def _page_size_at(self, base: int) -> int:
        raw = os.pread(self.fd, 4, base + 40)
        size = int.from_bytes(raw, "little")
        return size if 512 <= size <= 65536 and size & (size - 1) == 0 else 0

    def misplaced_metas(self) -> list[Meta]:
        """The meta pages as far as they are sound wherever they stand."""
        found = [self._meta(place, number) for place in (0, 1) for number in (0, 1)]
        return [each for each in found if each is not None]

    def _meta(self, place: int, number: int) -> Meta | None:
        raw = os.pread(self.fd, META_BYTES, place * self.page_size)
        if len(raw) < META_BYTES:
            return None
        page, _, flags, _, _ = _HEAD.unpack_from(raw)
        magic, version = _META.unpack_from(raw, HEAD)
        if page != number or flags != META or magic != MAGIC or version != VERSION:
            return None
        meta = Meta(Tree(*_DB.unpack_from(raw, 40)), Tree(*_DB.unpack_from(raw, 88)), *_TAIL.unpack_from(raw, 136))
        sound = (
            meta.free.pad == self.page_size
            and meta.txn % 2 == number
            and all(tree.depth <= MAX_DEPTH and self._plausible(tree.root, meta) for tree in meta[:2])
            and meta.main.flags == 0
        )
        return meta if sound else None

    def left_over(self, number: int, newest: Meta) -> bool:
        """Whether a broken meta page is what LMDB leaves of a commit whose very last write has failed.

        It puts the transaction number of the page back, one below the newest, but not the trees. The page is not in
        use, and the next commit replaces it.
        """
        raw = os.pread(self.fd, META_BYTES, number * self.page_size)
        if len(raw) < META_BYTES:
            return False
        page, _, flags, _, _ = _HEAD.unpack_from(raw)
        named = (page, flags, *_META.unpack_from(raw, HEAD)) == (number, META, MAGIC, VERSION)
        return named and _TAIL.unpack_from(raw, 136)[1] == newest.txn - 1

    @staticmethod
    def _plausible(root: int, meta: Meta) -> bool:
        return root == NO_PAGE or 2 <= root <= meta.last_page

    @property
    def newest(self) -> Meta | None:
        """The meta page of the last transaction, as far as the two are sound."""
        return max((each for each in self.metas if each is not None), key=lambda each: each.txn, default=None)

    def cut_short(self, meta: Meta) -> bool:
        """Whether the file ends before a page that is in use.

        Pages that were allocated at the end and freed in the same transaction are never written; what lies
        behind the last page, whole or cut, belongs to a commit that never happened.
        """
        have = self.size // self.page_size
        if have > meta.last_page:
            return False
        before = bytes(self.seen)
        free = self.free_pages(meta)
        self.seen[:] = before
        return not free.issuperset(range(have, meta.last_page + 1))

    # -- pages ----------------------------------------------------------------------------------

    def page(self, number: int) -> bytes:
        """One page, its header compared with its place. Raises `CorruptError`."""
        raw = os.pread(self.fd, self.page_size, number * self.page_size) if number < len(self.seen) else b""
        if len(raw) < self.page_size:
            raise CorruptError(f"page {number} lies beyond the end of the file")
        if _HEAD.unpack_from(raw)[0] != number:
            raise CorruptError(f"page {number} is not the page of this number")
        return raw

    def overflow(self, number: int, size: int) -> bytes:
        """The value of `size` bytes that begins on overflow page `number`. Raises `CorruptError`."""
        head = os.pread(self.fd, HEAD, number * self.page_size) if number < len(self.seen) else b""
        if len(head) < HEAD:
            raise CorruptError(f"overflow page {number} lies beyond the end of the file")
        count = _PAGES.unpack_from(head, 12)[0]
        page, _, flags, _, _ = _HEAD.unpack(head)
        if page != number or flags != OVERFLOW or size > MAX_VALUE or count * self.page_size < HEAD + size:
            raise CorruptError(f"overflow page {number} has a broken header")
        value = os.pread(self.fd, size, number * self.page_size + HEAD)
        if len(value) < size:
            raise CorruptError(f"the value on overflow page {number} ends with the file")
        return value

    def _mark(self, first: int, count: int = 1) -> bool:
        """Note pages as in use; False when one of them was already."""
        last = first + count
        if last > len(self.seen) or any(self.seen[first:last]):
            return False
        self.seen[first:last] = b"\1" * count
        return True

    def nodes(self, page: bytes) -> list[tuple[int, int, int, int, bytes]]:
        """``(low, high, flags, offset of the data, key)`` of each node. Raises `CorruptError`."""
        number, _, flags, lower, upper = _HEAD.unpack_from(page)
        if flags not in (BRANCH, LEAF) or not HEAD <= lower <= upper <= self.page_size or lower % 2:
            raise CorruptError(f"page {number} is no branch and no leaf")
        out = []
        for at in struct.unpack_from(f"<{(lower - HEAD) // 2}H", page, HEAD):
            if not upper <= at <= self.page_size - _NODE.size:
                raise CorruptError(f"page {number} has a node outside of it")
            low, high, node_flags, key_size = _NODE.unpack_from(page, at)
            data = at + _NODE.size + key_size
            if data > self.page_size:
                raise CorruptError(f"page {number} has a key that ends outside of it")
            out.append((low, high, node_flags, data, page[at + _NODE.size : data]))
        return out

    def leaf(self, page: bytes, values: bool = True) -> Iterator[Node]:
        """The entries of a leaf. Damage inside is noted and skipped, a broken leaf raises `CorruptError`.

        Without `values` those on overflow pages are not read.
        """
        number = _HEAD.unpack_from(page)[0]
        for low, high, flags, at, key in self.nodes(page):
            size = low | high << 16
            if flags & ~(BIGDATA | SUBDATA):
                self.damage.append((number, f"a node has unknown flags {flags}"))
            elif not flags & BIGDATA:
                if at + size > self.page_size:
                    self.damage.append((number, "a value ends outside of its page"))
                else:
                    yield Node(key, page[at : at + size], flags)
            else:
                first = int.from_bytes(page[at : at + 8], "little")
                yield Node(key, self._big(number, first, size) if values else None, flags, first)

    def _big(self, leaf: int, first: int, size: int) -> bytes | None:
        try:
            value = self.overflow(first, size)
        except CorruptError as error:
            self.damage.append((leaf, str(error)))
            return None
        if not self._mark(first, -(-(HEAD + size) // self.page_size)):
            self.damage.append((first, "is in use twice"))
        return value

    # -- trees ----------------------------------------------------------------------------------

    def walk(
        self, root: int, budget: Budget | None = None, *, backwards: bool = False, quick: bool = False
    ) -> Iterator[Node]:
        """The entries of a tree as far as pages are sound; what is not is noted in ``damage``.

        `backwards` begins with the newest pages, entries within a leaf stay in order. With `quick` values on overflow
        pages are not read, and the entries of sound leaves are left out.
        """
        if root == NO_PAGE:
            return
        waiting: list[tuple[int, int, bytes | None, bytes | None]] = [(root, 0, None, None)]
        while waiting:
            number, depth, low, high = waiting.pop()
            if budget is not None and not budget.spend():
                return
            try:
                if depth > MAX_DEPTH or not self._mark(number):
                    raise CorruptError(f"page {number} is in use twice")
                page = self.page(number)
                if _HEAD.unpack_from(page)[2] == LEAF:
                    if not (quick and self._is_sound_leaf(page, low, high)):
                        yield from self._in_order(number, self.leaf(page, not quick), low, high)
                    continue
                children = self._children(number, page, depth, low, high)
            except CorruptError as error:
                self.damage.append((number, str(error)))
                continue
            waiting += children if backwards else reversed(children)

    def _is_sound_leaf(self, page: bytes, low: bytes | None, high: bytes | None) -> bool:
        """Whether `leaf` and `_in_order` would find nothing wrong with a leaf, in a fraction of their time."""
        _, _, _, lower, upper = _HEAD.unpack_from(page)
        if not HEAD <= lower <= upper <= self.page_size or lower % 2:
            return False
        places = struct.unpack_from(f"<{(lower - HEAD) // 2}H", page, HEAD)
        if not places or min(places) < upper or max(places) > self.page_size - _NODE.size:
            return False
        keys = []
        for at in places:
            size, high_size, flags, key_size = _NODE.unpack_from(page, at)
            data = at + _NODE.size + key_size
            end = data + 8 if flags & BIGDATA else data + (size | high_size << 16)
            if flags & ~(BIGDATA | SUBDATA) or end > self.page_size:
                return False
            keys.append(page[at + _NODE.size : data])
        ordered = all(map(lt, keys, keys[1:]))
        return ordered and (low is None or keys[0] >= low) and (high is None or keys[-1] < high)

    def _in_order(self, number: int, nodes: Iterator[Node], low: bytes | None, high: bytes | None) -> Iterator[Node]:
        before: bytes | None = None
        for node in nodes:
            outside = (low is not None and node.key < low) or (high is not None and node.key >= high)
            if outside or (before is not None and node.key <= before):
                self.damage.append((number, "keys are out of order"))
            before = node.key
            yield node

    def _children(
        self, number: int, page: bytes, depth: int, low: bytes | None, high: bytes | None
    ) -> list[tuple[int, int, bytes | None, bytes | None]]:
        nodes = self.nodes(page)
        keys = [low, *(node[4] for node in nodes[1:]), high]
        if any(a is not None and b is not None and a >= b for a, b in pairwise(keys)):
            self.damage.append((number, "keys are out of order"))
            keys = [None] * len(keys)
        found = [node[0] | node[1] << 16 | node[2] << 32 for node in nodes]
        return [(child, depth + 1, keys[i], keys[i + 1]) for i, child in enumerate(found)]

    def roots(self) -> Iterator[Meta]:
        """Every page that may once have been the root of all databases, newer and older ones, as a `Meta`.

        For a file that has lost its meta pages; which pages are free is then unknown.
        """
        for number in range(2, len(self.seen) - 1):
            try:
                page = self.page(number)
                nodes = self.nodes(page)
            except CorruptError:
                continue
            if _HEAD.unpack_from(page)[2] == LEAF and nodes and all(node[2] == SUBDATA for node in nodes):
                none = Tree(self.page_size, 0, 0, 0, 0, 0, 0, NO_PAGE)
                yield Meta(none, none._replace(depth=1, root=number), len(self.seen) - 1, 0)

    def databases(self, meta: Meta) -> dict[str, Tree]:
        """The named databases of a transaction; broken records are noted in ``damage``."""
        found: dict[str, Tree] = {}
        for node in self.walk(meta.main.root):
            name = node.key.decode("ascii", "replace")
            if node.flags != SUBDATA or node.value is None or len(node.value) != _DB.size:
                self.damage.append((meta.main.root, f"{name!r} is no database"))
                continue
            tree = Tree(*_DB.unpack(node.value))
            if tree.flags or tree.depth > MAX_DEPTH or not self._plausible(tree.root, meta):
                self.damage.append((meta.main.root, f"the record of database {name!r} is broken"))
                continue
            found[name] = tree
        return found

    def free_pages(self, meta: Meta) -> set[int]:
        """The pages no tree uses. What is broken is noted in ``damage``; then the set is not complete."""
        found: set[int] = set()
        for node in self._walk_free(meta.free.root):
            numbers = memoryview(node.value or b"")
            if len(numbers) % 8 or len(numbers) < 8:
                self.damage.append((meta.free.root, "a list of free pages is broken"))
                continue
            pages = numbers.cast("Q")
            count = pages[0]
            listed = pages[1 : count + 1]
            if count > len(pages) - 1 or any(not 2 <= each <= meta.last_page for each in listed):
                self.damage.append((meta.free.root, "a list of free pages names impossible ones"))
                continue
            before = len(found)
            found.update(listed)
            if len(found) != before + count:
                self.damage.append((meta.free.root, "a page is listed as free twice"))
        return found

    def _walk_free(self, root: int) -> Iterator[Node]:
        """The tree of free pages, whose keys are numbers and so in another order."""
        waiting = [] if root == NO_PAGE else [root]
        while waiting:
            number = waiting.pop()
            try:
                if not self._mark(number):
                    raise CorruptError(f"page {number} is in use twice")
                page = self.page(number)
                if _HEAD.unpack_from(page)[2] == LEAF:
                    yield from self.leaf(page)
                else:
                    waiting += [low | high << 16 | flags << 32 for low, high, flags, _, _ in self.nodes(page)]
            except CorruptError as error:
                self.damage.append((number, str(error)))

    def strays(self, free: set[int], last_page: int) -> Iterator[tuple[int, bytes]]:
        """Leaves and values on overflow pages that are neither free nor reachable: they hang below a damaged page.

        Yields the page's flags, `LEAF` or `OVERFLOW`, and the page or all bytes that the value can have.
        """
        number = 2
        while number <= min(last_page, len(self.seen) - 1):
            step = 1
            if not self.seen[number] and number not in free:
                try:
                    page = self.page(number)
                except CorruptError:
                    number += 1
                    continue
                flags = _HEAD.unpack_from(page)[2]
                if flags == LEAF:
                    yield flags, page
                elif flags == OVERFLOW:
                    step = max(1, _PAGES.unpack_from(page, 12)[0])
                    yield flags, os.pread(self.fd, step * self.page_size - HEAD, number * self.page_size + HEAD)
            number += step

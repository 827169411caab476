"""Copying what is sound in a damaged tape into a new one, and saying what is not there any more.

``python -m tapebus_store.salvage DIRECTORY NEW FLOOR`` reads ``DIRECTORY/data.mdb`` without mapping it, writes
the tape ``NEW``, and prints a `Report` as JSON. ``FLOOR`` is a ``bus_seq`` known to have been given.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lmdb
import msgspec

from tapebus.blocks import BlockView, corr_hash, sort_run
from tapebus.errors import CorruptError
from tapebus.events import DeadLetter
from tapebus_store import books, layout, runs
from tapebus_store.pages import LEAF, OVERFLOW, Meta, Node, PageFile, Tree
from tapebus_store.preflight import NAMES, tape_record, verify

#: Databases of checksummed records, small ones; blocks and their index are treated apart.
SMALL = ("producers", "cursors", "state", "meta")
COMMIT_BYTES = 32 << 20


class Report(msgspec.Struct):
    """What a salvage kept and what it lost; ``lost`` are inclusive ranges of ``bus_seq``."""

    kept: int = 0
    lost: list[tuple[int, int]] = []
    last_seq: int = 0
    dead_lost: int = 0
    books_lost: bool = False
    #: Whether anything in the file was a record of a tape.
    recognised: bool = False
    index_rebuilt: bool = False
    problems: list[str] = []

    @property
    def lost_events(self) -> int:
        return sum(last - first + 1 for first, last in self.lost)

    def summary(self) -> str:
        ranges = ", ".join(f"{first}..{last}" if last > first else str(first) for first, last in self.lost[:10])
        more = f" and {len(self.lost) - 10} more ranges" if len(self.lost) > 10 else ""
        out = f"{self.kept} events recovered, "
        out += f"{self.lost_events} lost (bus_seq {ranges}{more})" if self.lost else "none lost"
        if self.dead_lost:
            out += f", {self.dead_lost} dead letters lost"
        if self.books_lost:
            out += ", some accounts, cursors or state may be lost"
        return out


class Kept(NamedTuple):
    """A sound block: its bytes, or where they lie in the damaged file when they are many."""

    header: layout.Header
    value: bytes | None
    page: int
    size: int


class Salvage:
    """What can be read of one damaged file. Records are believed by their checksum, never by their place."""

    def __init__(self, file: PageFile) -> None:
        self.file = file
        self.report = Report()
        self.blocks: dict[int, Kept] = {}
        self.runs: dict[bytes, bytes] = {}
        self.dead: dict[bytes, bytes] = {}
        self.small: dict[str, dict[bytes, bytes]] = {name: {} for name in SMALL}
        self.record: books.TapeRecord | None = None
        self._doubtful: set[int] = set()
        self._index_sound = False
        self._free_known = True

    # -- reading --------------------------------------------------------------------------------

    def read(self) -> None:
        """Take everything sound from the best transaction, then what hangs below damaged pages."""
        meta = self._best_meta()
        trees = self.file.databases(meta) if meta is not None else {}
        for name, tree in trees.items():
            self._read_tree(name, tree)
        if self.file.damage or meta is None or any(name not in trees for name in NAMES):
            self._read_strays(meta)
        self.report.problems = [f"page {page}: {reason}" for page, reason in self.file.damage[:100]]
        found = self.small["meta"]
        if books.VERSION_KEY in found:
            books.check_version(found[books.VERSION_KEY], self.file.path.parent)
        if books.TAPE_KEY in found:
            self.record = books.decode_tape(found[books.TAPE_KEY])
        self._close_ranks(found)

    @staticmethod
    def _close_ranks(found: dict[bytes, bytes]) -> None:
        """Give lost topic names a stand-in: the numbers must have no hole."""
        skip = len(books.TOPIC_PREFIX)
        known = {int(key[skip:]) for key in found if key.startswith(books.TOPIC_PREFIX)}
        for number in range(1, max(known, default=0)):
            if number not in known:
                found[books.TOPIC_PREFIX + str(number).encode()] = f"lost.topic.{number}".encode()

    def _best_meta(self) -> Meta | None:
        """The newest transaction whose own record says it is that one; else the newest there is."""
        found = sorted(self.file.misplaced_metas(), key=lambda each: -each.txn)
        if found != sorted((each for each in self.file.metas if each is not None), key=lambda each: -each.txn):
            self.file.damage.append((0, "the meta pages have changed places"))
        for meta in found:
            record = self._record_of(meta)
            if record is not None and record.txn in (0, meta.txn) and self._leads_to_all(meta):
                return meta
        if found:
            return found[0]
        self.file.damage.append((0, "both meta pages are broken"))
        self._free_known = False
        roots = [(record.txn, root) for root in self.file.roots() if (record := self._record_of(root)) is not None]
        return max(roots, key=lambda each: each[0])[1] if roots else None

    def _leads_to_all(self, meta: Meta) -> bool:
        """Whether the records of all databases are sound, and so what the meta page says of their pages."""
        damage, seen = len(self.file.damage), bytes(self.file.seen)
        names = self.file.databases(meta)
        sound = len(self.file.damage) == damage and all(name in names for name in NAMES)
        del self.file.damage[damage:]
        self.file.seen[:] = seen
        return sound

    def _record_of(self, meta: Meta) -> books.TapeRecord | None:
        damage = len(self.file.damage)
        try:
            return tape_record(self.file, meta)
        except CorruptError:
            return None
        finally:
            del self.file.damage[damage:]

    def _read_tree(self, name: str, tree: Tree) -> None:
        damage = len(self.file.damage)
        for node in self.file.walk(tree.root):
            try:
                self._keep(name, node)
            except CorruptError as error:
                self.file.damage.append((tree.root, str(error)))
        if name == "corr":
            self._index_sound = len(self.file.damage) == damage

    def _keep(self, name: str, node: Node) -> None:
        """Take one record of a known database. Raises `CorruptError`."""
        if node.value is None:
            return
        verify(name, node.key, node.value)
        if name == "blocks":
            header = layout.decode_header(node.key, node.value)
            kept = Kept(header, None if node.page else node.value, node.page, len(node.value))
            if self.blocks.setdefault(header.first_seq, kept).header != header:
                self._doubtful.add(header.first_seq)
        elif name == "corr":
            self.runs[node.key] = node.value
        elif name == "dead":
            self.dead[node.key] = node.value
        elif name == books.MIRROR:
            database, _, key = node.key.partition(b"\0")
            self.small[database.decode()].setdefault(key, node.value[4:])
        elif name in self.small:
            self.small[name][node.key] = node.value[4:]

    def _read_strays(self, meta: Meta | None) -> None:
        """Leaves no tree leads to any more. They are believed only where free pages are known apart from them."""
        before = len(self.file.damage)
        if meta is None or not self._free_known:
            return
        free = self.file.free_pages(meta)
        if len(self.file.damage) > before:
            return
        damage = list(self.file.damage)
        # values on overflow pages that a stray leaf names come with it; what is then left, by itself
        for wanted in (LEAF, OVERFLOW):
            for kind, found in self.file.strays(free, meta.last_page):
                if kind == wanted == LEAF:
                    self._keep_stray_leaf(found)
                elif kind == wanted and (value := layout.trim_block(found)) is not None:
                    self._keep("blocks", Node(layout.seq_key(layout.first_seq(value)), value, 0))
        # what strays look like says nothing more about the damage
        self.file.damage = damage
        for seq in self._doubtful:
            del self.blocks[seq]

    def _keep_stray_leaf(self, page: bytes) -> None:
        try:
            for node in self.file.leaf(page):
                self._keep_stray(node)
        except CorruptError:
            return

    def _keep_stray(self, node: Node) -> None:
        """Take a record whose database is not known: one that its bytes or its key name beyond doubt."""
        if node.value is None or node.flags & 2:
            return
        name = node.key.partition(b"\0")[0].decode("ascii", "replace")
        if node.value[:4] == layout.MAGIC:
            name = "blocks"
        elif name in SMALL:
            name = books.MIRROR
        elif len(node.key) == 8:
            name = "dead"
        else:
            return
        try:
            if name == "dead" and not isinstance(_dead(layout.unguard("dead", node.key, node.value)), DeadLetter):
                return
            self._keep(name, node)
        except (CorruptError, msgspec.MsgspecError, UnicodeDecodeError):
            return

    # -- judging --------------------------------------------------------------------------------

    def judge(self, floor: int) -> books.TapeRecord:
        """The record of the new tape; fills in what was lost."""
        report, old = self.report, self.record or books.TapeRecord()
        report.books_lost = self.record is None
        report.recognised = bool(self.blocks or self.dead or any(self.small.values()))
        new = books.TapeRecord(
            last_dead=max([old.last_dead, *(layout.key_seq(key) for key in self.dead)]),
            dead=len(self.dead),
            newest=old.newest,
            lost=old.lost,
            merged_to=old.merged_to,
        )
        report.dead_lost = max(0, old.dead - len(self.dead))
        expected = 0
        for first in sorted(self.blocks):
            header = self.blocks[first].header
            if expected and first < expected:
                # an overlap: neither a block nor its merged successor can be told to be the right one
                del self.blocks[first]
                continue
            if expected and first > expected:
                report.lost.append((expected, first - 1))
            expected = header.last_seq + 1
            _count(new, header, self.blocks[first].size)
        ends = [old.last_seq, expected - 1, floor, *self._places()]
        new.last_seq = report.last_seq = max(0, *ends)
        if new.last_seq >= max(expected, 1):
            report.lost.append((max(expected, 1), new.last_seq))
        report.kept = new.events
        self._name_losses(old, new)
        return new

    def _places(self) -> list[int]:
        """Sequence numbers that cursors and dead letters show to have been given."""
        found = []
        for key, value in self.small["cursors"].items():
            found.append(books.decode_cursor(key.decode(), value).cursor)
        found += [_dead(value[4:]).bus_seq for value in self.dead.values()]
        return found

    def _name_losses(self, old: books.TapeRecord, new: books.TapeRecord) -> None:
        """Take out of the ranges what was lost or removed before, and add what is missing in front."""
        known = [books.decode_hole(v) for k, v in self.small["meta"].items() if k.startswith(books.HOLE_PREFIX)]
        lost = [piece for span in self.report.lost for piece in _without(span, known)]
        first = min(self.blocks, default=new.last_seq + 1)
        missing = old.events - new.events - sum(b - a + 1 for a, b in lost)
        if missing > 0 and self.blocks:
            lost.insert(0, (max(1, first - missing), first - 1))
        elif not self.blocks and old.events:
            lost = [(max(1, new.last_seq - old.events + 1), new.last_seq)]
        self.report.lost = lost
        new.lost += self.report.lost_events

    # -- writing --------------------------------------------------------------------------------

    def write(self, path: Path, record: books.TapeRecord) -> None:
        """Write the new tape and make it durable."""
        size = sum(each.size for each in self.blocks.values())
        with lmdb.open(str(path), map_size=max(1 << 28, size * 3), max_dbs=64, mode=0o600, readahead=False) as env:
            self._dbs = {name: env.open_db(name.encode()) for name in (*NAMES, books.MIRROR)}
            self._write_blocks(env, record)
            with env.begin(write=True) as txn:
                for key, value in self.dead.items():
                    txn.put(key, value, db=self._dbs["dead"])
                self._move_cursors()
                self._write_small(txn)
                at = time.time()
                for first, last in self.report.lost:
                    hole = books.Hole(first, last, at)
                    self._put(txn, "meta", books.hole_key(hole), books.encode(hole))
                record.txn = txn.id()
                self._put(txn, "meta", books.VERSION_KEY, books.encode_version())
                self._put(txn, "meta", books.TAPE_KEY, books.encode(record))

    def _write_blocks(self, env: lmdb.Environment, record: books.TapeRecord) -> None:
        rebuilt = self._index() if not self._index_sound else iter(())
        self.report.index_rebuilt = not self._index_sound
        if self._index_sound:
            self._write_all(env, "corr", iter(sorted(self.runs.items())), record)
        else:
            record.merged_to = 0
            self._write_all(env, "corr", rebuilt, record)
        record.runs = sum(1 for key, level in self._levels if level == 1 and key > record.merged_to)
        found = ((layout.seq_key(seq), self._value(self.blocks[seq])) for seq in sorted(self.blocks))
        self._write_all(env, "blocks", found, record)

    def _write_all(
        self, env: lmdb.Environment, name: str, items: Iterator[tuple[bytes, bytes]], record: books.TapeRecord
    ) -> None:
        self._levels: list[tuple[int, int]] = getattr(self, "_levels", [])
        more = True
        while more:
            more, size = False, 0
            with env.begin(write=True) as txn:
                for key, value in items:
                    txn.put(key, value, db=self._dbs[name], append=True)
                    size += len(value)
                    if name == "corr":
                        record.corr_bytes += len(value)
                        self._levels.append((layout.key_seq(key), runs.level_of(value)))
                    if size >= COMMIT_BYTES:
                        more = True
                        break

    def _value(self, kept: Kept) -> bytes:
        return kept.value if kept.value is not None else self.file.overflow(kept.page, kept.size)

    def _index(self) -> Iterator[tuple[bytes, bytes]]:
        """The correlation index made anew from the events, one run a block."""
        import zstandard

        unpack = zstandard.ZstdDecompressor()
        for seq in sorted(self.blocks):
            header = self.blocks[seq].header
            block = layout.decode_block(header, layout.excerpt(header, self._value(self.blocks[seq])), unpack)
            view = BlockView(block.payload, seq)
            entries = []
            for place in range(view.count):
                correlation = _correlation(view.raw(seq + place))
                if correlation:
                    hashed = corr_hash(correlation)
                    entries.append(hashed.to_bytes(4, "little") + place.to_bytes(4, "little"))
            key, run = layout.seq_key(seq), sort_run(b"".join(entries))
            if header.flags & layout.SEALED:
                yield key, runs.encode(key, run, 1, runs.span_of_block(header))
            elif entries:
                yield key, runs.encode(key, run, 0)

    def _move_cursors(self) -> None:
        """Let no cursor stand inside a hole: behind it there is nothing left to handle."""
        for key, value in self.small["cursors"].items():
            unit = books.decode_cursor(key.decode(), value)
            for first, last in self.report.lost:
                if first - 1 <= unit.cursor < last:
                    unit.cursor = last
            self.small["cursors"][key] = books.encode_cursor(unit)

    def _write_small(self, txn: lmdb.Transaction) -> None:
        for name, found in self.small.items():
            for key, value in found.items():
                self._put(txn, name, key, value)

    def _put(self, txn: lmdb.Transaction, name: str, key: bytes, value: bytes) -> None:
        txn.put(key, layout.guard(key, value), db=self._dbs[name])
        again = books.mirror_key(name, key)
        if again:
            txn.put(again, layout.guard(again, value), db=self._dbs[books.MIRROR])


_dead = msgspec.msgpack.Decoder(DeadLetter).decode


class _Envelope(msgspec.Struct, gc=False):
    correlation_id: str | None = None


_packed = msgspec.msgpack.Decoder(_Envelope).decode
_json = msgspec.json.Decoder(_Envelope).decode


def _correlation(raw: bytes) -> str | None:
    """The correlation id of one event as published; None where it has none or cannot be read."""
    try:
        return (_json if raw.lstrip()[:1] == b"{" else _packed)(raw).correlation_id
    except Exception:
        return None


def _count(record: books.TapeRecord, header: layout.Header, size: int) -> None:
    record.events += header.events
    record.block_bytes += size
    record.raw_bytes += header.raw_length
    record.newest = max(record.newest, header.max_received)
    if header.flags & layout.SEALED:
        # blocks that were left unsealed because of damage are behind, so they count as sealed
        record.sealed_blocks += record.hot_blocks + 1
        record.hot_blocks = record.hot_events = record.hot_raw = 0
        record.sealed_to = header.last_seq
    else:
        record.hot_blocks += 1
        record.hot_events += header.events
        record.hot_raw += header.raw_length


def _without(span: tuple[int, int], holes: list[books.Hole]) -> list[tuple[int, int]]:
    """`span` without what lies in `holes`."""
    pieces = [span]
    for hole in holes:
        left = [(a, min(b, hole.first - 1)) for a, b in pieces]
        right = [(max(a, hole.last + 1), b) for a, b in pieces]
        pieces = [piece for piece in left + right if piece[0] <= piece[1]]
    return sorted(set(pieces))


def main(arguments: list[str]) -> int:
    source, target, floor = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    with PageFile(source / "data.mdb") as file:
        salvage = Salvage(file)
        salvage.read()
        salvage.write(target, salvage.judge(floor))
    sys.stdout.write(msgspec.json.encode(salvage.report).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

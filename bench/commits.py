"""What one durable commit costs: the least LMDB transaction there can be, the same records put bare, and the store's.

Each holds one small event. ``commit-least`` is one put into one database; ``commit-bare`` puts the records a commit of
the bus consists of (the block, an account and the tape's record, the last two twice) into databases like those of the
tape, made beforehand; ``commit-store`` is the store's own call. They differ by the pages touched and by Python; the two
syncs of a transaction are in each.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lmdb
from bench.harness import Wrong
from bench.plan import Bench, Figures, Size

from tapebus.store import Block, Commit, ProducerBook
from tapebus_store.environment import DATABASES, MiB
from tapebus_store.writer import LmdbStore, StoreConfig

#: Bytes of one event in a block: columns and a small MessagePack map.
PAYLOAD = os.urandom(180)
PRODUCER = b"p" * 16
#: Transactions before the clock starts: the trees have their depth, pages to use again are there.
WARM = 200


def _block(seq: int) -> Block:
    return Block(seq, 1, 1.0, 1.0, 1.0, 1.0, 1, PAYLOAD)


def _timed(once: Callable[[int], None], count: int) -> Figures:
    """CPU and time of a call of `once`, with 1, 2, 3 … beginning after `WARM`."""
    for seq in range(1, WARM + 1):
        once(seq)
    spent = []
    cpu = time.process_time()
    for seq in range(WARM + 1, WARM + count + 1):
        begun = time.perf_counter()
        once(seq)
        spent.append(time.perf_counter() - begun)
    cpu = time.process_time() - cpu
    spent.sort()
    return {"cpu_us": cpu / count * 1e6, "p50_ms": spent[count // 2] * 1e3, "p99_ms": spent[count * 99 // 100] * 1e3}


def bare(twins: bool, size: Size) -> Figures:
    """Without the store: one put, or with `twins` those of a commit."""
    record = b"\1" * 150
    with (
        tempfile.TemporaryDirectory(prefix="tb-") as directory,
        lmdb.open(directory, map_size=256 * MiB, max_dbs=16, readahead=False) as env,
    ):
        dbs = {name: env.open_db(name.encode()) for name in (*DATABASES, "mirror")}

        def once(seq: int) -> None:
            with env.begin(write=True) as txn:
                txn.put(seq.to_bytes(8, "big"), PAYLOAD, db=dbs["blocks"], append=True)
                if twins:
                    for name, key in (("producers", PRODUCER), ("meta", b"tape")):
                        txn.put(key, record, db=dbs[name])
                        txn.put(name.encode() + key, record, db=dbs["mirror"])

        figures = _timed(once, size.paced_events)
        with env.begin() as txn:
            if txn.stat(dbs["blocks"])["entries"] != WARM + size.paced_events:
                raise Wrong("not every transaction left its record")
        return figures


def store(size: Size) -> Figures:
    """The store's own commit of one event of one producer."""
    with tempfile.TemporaryDirectory(prefix="tb-") as directory:
        tape = LmdbStore(Path(directory), StoreConfig())
        book = ProducerBook(PRODUCER, 1, "bench")

        def once(seq: int) -> None:
            book.watermark = book.stored = book.highest_seq = seq
            tape.commit(Commit(blocks=[_block(seq)], producers=[book]))

        try:
            figures = _timed(once, size.paced_events)
            if tape.stats()["events"] != WARM + size.paced_events:
                raise Wrong("not every commit left its event")
            return figures
        finally:
            tape.close()


BENCHES = [
    Bench("commit-least", "one durable LMDB transaction with one put", partial(bare, False)),
    Bench("commit-bare", "one with the records of a commit, without the store", partial(bare, True)),
    Bench("commit-store", "one commit of the store", store),
]

"""The real bus, with marks in the recorded trace that say what it promised, and when.

``traced_bus.py CONFIG [SABOTAGE]`` runs ``tapebus run`` under the recorder of ``record.c``. Around every transaction
of the store it appends a mark with its content, and one before each acknowledgement. `SABOTAGE` breaks the bus in a
way that the checks of the simulated disk must notice: ``ack-first``, ``nosync`` or ``nometasync``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lmdb
import msgspec
from simdisk import mark

import tapebus.runtime
import tapebus.tapewriter
import tapebus_store
from tapebus import hookimpl
from tapebus.cli import main
from tapebus.store import Commit
from tapebus.tapewriter import TapeWriter

encode = msgspec.msgpack.Encoder().encode
open_store = tapebus_store.tapebus_open_store
TRACE = os.open(os.environ["RECORD_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def note(kind: str, **content: Any) -> None:
    os.write(TRACE, mark(encode({"kind": kind, **content})))


class Marked:
    """Passes everything on to what it stands for, with marks around some calls."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class MarkedStore(Marked):
    def __init__(self, real: Any) -> None:
        super().__init__(real)
        note("opened", first_seq=real.first_seq(), last_seq=real.last_seq(), cursors=list(real.cursors().values()))

    def commit(self, commit: Commit) -> None:
        note("begin", commit=commit)
        self._run(self._real.commit, commit)

    def maintain(self, now: float) -> float:
        note("begin", commit=Commit())
        return float(self._run(self._real.maintain, now))

    def _run(self, call: Any, argument: Any) -> Any:
        try:
            result = call(argument)
        except BaseException:
            note("failed")
            raise
        note("end", first_seq=self._real.first_seq())
        return result


class MarkedRing(Marked):
    def acknowledge(self, changed: list[int]) -> None:
        note("ack", producers=[self._real.account(index) for index in changed])
        self._real.acknowledge(changed)


class Traced(TapeWriter):
    def __init__(self, ring: Any, ingest: Any, store: Any, *rest: Any) -> None:
        super().__init__(MarkedRing(ring), ingest, store, *rest)  # type: ignore[arg-type]


class AckFirst(Traced):
    def _commit(self, block: Any, units: Any, changed: list[int]) -> None:
        self.ring.acknowledge(changed)
        super()._commit(block, units, changed)


@hookimpl
def tapebus_open_store(data_dir: Path, config: dict[str, Any], readonly: bool) -> Any:
    store = open_store(data_dir, config, readonly)
    return store if readonly else MarkedStore(store)


def sabotage(name: str) -> type[TapeWriter]:
    if name in ("nosync", "nometasync"):
        opened = lmdb.open
        lmdb.open = lambda *a, **options: opened(*a, **options, **{name.removeprefix("no"): False})
    return AckFirst if name == "ack-first" else Traced


if __name__ == "__main__":
    config, *how = sys.argv[1:]
    # sealing and retention all the time instead of every ten seconds
    tapebus.tapewriter.UPKEEP_BUSY_S = tapebus.tapewriter.UPKEEP_IDLE_S = 0.03
    tapebus_store.tapebus_open_store = tapebus_open_store
    tapebus.runtime.TapeWriter = sabotage(how[0] if how else "")  # type: ignore[misc]
    sys.exit(main(["run", "--config", config]))

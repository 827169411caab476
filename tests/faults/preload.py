"""Builds the small C libraries that stand between a bus and its files."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

#: Kinds of calls that `Faults` knows: a META write goes through a descriptor with O_DSYNC.
DATA, META, SYNC = 1, 2, 4
HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build" / "faults"


def has_compiler() -> bool:
    """Whether `built` can build anything here."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc"))


def built(name: str) -> Path:
    """The library of ``<name>.c``, to be named in LD_PRELOAD; skips the test where there is no compiler."""
    source, library = HERE / f"{name}.c", BUILT / f"{name}.so"
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return library
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not Path("/proc/self/fd").exists():
        pytest.skip("no C compiler, or not Linux: calls to the disk cannot be watched")
    BUILT.mkdir(parents=True, exist_ok=True)
    fresh = library.with_suffix(f".{os.getpid()}")
    subprocess.run(
        [compiler, "-O1", "-Wall", "-Wno-format-truncation", "-shared", "-fPIC", "-o", fresh, source, "-ldl"],
        check=True,
    )
    # two workers may build at once: each finds a whole file
    fresh.rename(library)
    return library


class Faults:
    """What is to fail, in memory shared with the bus; see ``fail.c``."""

    FIELDS = struct.Struct("=6q")

    def __init__(self, directory: Path, root: Path) -> None:
        file = directory / "orders"
        file.write_bytes(bytes(self.FIELDS.size))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), self.FIELDS.size)
        self.variables = {
            "LD_PRELOAD": str(built("fail")),
            "FAIL_ROOT": str(root),
            "FAIL_ORDERS": str(file),
        }

    def order(self, which: int, error: int, nth: int, times: int = 1) -> None:
        """Let calls number `nth` to ``nth + times - 1`` from now on fail with `error`."""
        self.FIELDS.pack_into(self._map, 0, 0, error, nth, times, 0, 0)
        self._map[0:8] = which.to_bytes(8, "little")

    def none(self) -> None:
        self._map[0:8] = bytes(8)

    @property
    def failed(self) -> int:
        return int(self.FIELDS.unpack_from(self._map)[5])

    def close(self) -> None:
        self._map.close()

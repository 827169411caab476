"""Builds the small C libraries that stand between a bus and its files."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

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

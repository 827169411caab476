"""Limits of the process: private files, no core dump, bounded memory, enough descriptors."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import os, resource, sys
from tapebus import limits
from tapebus.errors import ConfigError
try:
    limits.apply(int(sys.argv[1]))
except ConfigError as error:
    sys.exit(error.exit_code)
print(oct(os.umask(0)), resource.getrlimit(resource.RLIMIT_CORE)[0], resource.getrlimit(resource.RLIMIT_NOFILE)[0])
try:
    bytearray(600 << 20)
    print("allocated")
except MemoryError:
    print("MemoryError")
"""


def apply(memory_mb: int, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + CODE, str(memory_mb)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(("memory_mb", "expected"), [(0, "allocated"), (300, "MemoryError")])
def test_files_are_private_no_core_is_left_and_memory_is_bounded_when_asked(memory_mb, expected):
    umask, core, files, allocated = apply(memory_mb).stdout.split()
    assert (umask, core, allocated) == ("0o77", "0", expected)
    assert int(files) >= 128


def test_too_few_descriptors_are_a_configuration_error():
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
    assert apply(0, few).returncode == 78

"""What the process as a whole may use: descriptors, memory, core dumps. For a process of the bus's own."""

from __future__ import annotations

import logging
import os
import resource
import sys

from tapebus.errors import ConfigError

log = logging.getLogger("tapebus")
#: Descriptors a bus wants; below the floor it could not even open its own files and sockets with a margin.
WANTED_FILES, MIN_FILES = 65536, 128
MIN_MEMORY_MB = 256
#: Seconds that a thread with Python to run waits for one that is running it. Dispatch may be busy all the time, and the
#: tape thread needs the interpreter a few times for each commit.
SWITCH_S = 0.001


def apply(memory_limit_mb: int) -> None:
    """Keep others out of new files, raise the number of descriptors, bound memory, no core dump, share the GIL."""
    os.umask(0o077)
    sys.setswitchinterval(SWITCH_S)
    # a core dump would hold every secret this process has read
    _set(resource.RLIMIT_CORE, 0)
    files = _set(resource.RLIMIT_NOFILE, WANTED_FILES)
    if files < MIN_FILES:
        raise ConfigError(f"only {files} files may be open at once, {MIN_FILES} are needed: raise `ulimit -n`")
    if memory_limit_mb:
        # not the address space: the map of the tape is in it and grows with the tape, which is no use of memory
        _set(resource.RLIMIT_DATA, memory_limit_mb << 20)
    if os.getuid() == 0:
        log.warning("running as root: a fault in any plugin has all rights; run the bus as a user of its own")


def _set(kind: int, wanted: int) -> int:
    """Set the soft limit to `wanted` as far as the hard one allows; what it is now."""
    soft, hard = resource.getrlimit(kind)
    new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if kind == resource.RLIMIT_NOFILE and soft != resource.RLIM_INFINITY:
        new = max(new, soft)
    resource.setrlimit(kind, (new, hard))
    return new

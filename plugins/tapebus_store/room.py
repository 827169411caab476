"""The reserve: disk space set aside while there is some, so that a full disk can still be told about on the tape."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

RESERVE_BYTES = 4 << 20
#: More than the reserve must be free before it is taken back, or the next commit would need it again.
MARGIN_BYTES = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Reserve:
    """A file of `RESERVE_BYTES` next to the tape; used by the writer's thread only."""

    def __init__(self, path: Path) -> None:
        self._file = path / "reserve"
        self.held = False

    def take(self, margin: int = 0) -> bool:
        """Set the space aside, if `margin` bytes are left beside it; whether it is set aside now."""
        if self.held:
            return True
        try:
            fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return False
        try:
            missing = RESERVE_BYTES - os.fstat(fd).st_blocks * 512
            space = os.fstatvfs(fd)
            if space.f_bavail * space.f_frsize < missing + margin:
                return False
            os.posix_fallocate(fd, 0, RESERVE_BYTES)
            os.fsync(fd)
            self.held = True
        except OSError:
            with suppress(OSError):
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)
        return self.held

    def release(self) -> bool:
        """Give the space back to the file system; whether there was any."""
        if not self.held:
            return False
        self.held = False
        with suppress(OSError):
            os.truncate(self._file, 0)
            return True
        return False

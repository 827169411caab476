"""Directories that are for one user alone, and those that must never be made so."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path


def made_for_others(directory: Path, mode: int, own: Sequence[str]) -> str:
    """Why `directory`, of this `mode`, must not be closed to other users; empty where it may be, or is closed.

    Closing ``/tmp`` or ``/srv`` would take it away from everybody. A directory may be closed when it is empty, or
    holds something whose name matches one of the patterns `own`, and others may not write there. Raises `OSError`.
    """
    if not stat.S_IMODE(mode) & 0o077:
        return ""
    if mode & (stat.S_IWOTH | stat.S_ISVTX):
        return "other users may write there, so it cannot be made private"
    names = [each.name for each in directory.iterdir()]
    if names and not any(fnmatch(name, pattern) for name in names for pattern in own):
        return f"open to other users and holds other things; run `chmod 700 {directory}` if it may be made private"
    return ""

"""On what a run was measured: machine, versions, commit. A figure without them is worth nothing."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import zmq

ROOT = Path(__file__).parents[1]
PACKAGES = ("tapebus", "pyzmq", "msgspec", "lmdb", "pluggy", "zstandard")


def described() -> dict[str, Any]:
    """Everything a reader must know of a run before he compares it; take it before the run, for the load."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_before": [round(each, 2) for each in os.getloadavg()],
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "kernel": f"{platform.system()} {platform.release()}",
            "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "not readable",
            "data_filesystem": filesystem(Path(tempfile.gettempdir())),
        },
        "versions": {
            "python": platform.python_version(),
            "libzmq": zmq.zmq_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "commit": commit(),
    }


def _cpu() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def filesystem(path: Path) -> str:
    """The type of the filesystem that holds `path`, as /proc/mounts tells; the longest mount point wins."""
    found = ("", "unknown")
    place = str(path.resolve())
    for line in _read("/proc/mounts").splitlines():
        _, mount, kind = line.split()[:3]
        inside = mount == "/" or place == mount or place.startswith(mount + "/")
        if inside and len(mount) >= len(found[0]):
            found = mount, kind
    return found[1]


def commit() -> dict[str, Any]:
    """The commit of the tree and whether files differ from it."""
    found = _git("rev-parse", "HEAD")
    return {"id": found[:12] or "unknown", "dirty": bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str:
    try:
        ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ran.stdout.strip()

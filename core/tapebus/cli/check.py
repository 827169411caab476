"""``tapebus check``."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from tapebus.cli.common import json_option, open_tape, with_config
from tapebus.config import OWN_NAMES, Config
from tapebus.errors import BusNotRunning, StoreError, TapebusError, UsageError
from tapebus.ports import in_use
from tapebus.private import made_for_others


class Finding(NamedTuple):
    """One thing looked at; ``exit_code`` is what a failure of it means for the command."""

    name: str
    status: str
    message: str
    exit_code: int = 0


_ROOM = 1 << 30


@click.command()
@click.option("--books", is_flag=True, help="Account for every event instead: stored, rejected, dropped or in flight.")
@click.option("--deep", is_flag=True, help="With --books: also count the whole tape, event by event.")
@json_option
@with_config
def check(config: Config, books: bool, deep: bool, as_json: bool) -> int:
    """Check configuration, ports, permissions, the store and the versions; the bus may run or not.

    Exits 78 for the configuration, 74 for the store, 1 for anything else that would stop the bus, and with
    --books 1 when events are unexplained.

    \b
    tapebus check --config tapebus.toml
    tapebus check --books --deep
    """
    if deep and not books:
        raise UsageError("--deep belongs to --books: tapebus check --books --deep")
    if books:
        from tapebus.cli.books import show

        return show(config, as_json, deep)
    running = _running(config)
    findings = [Finding("configuration", "ok", f"data in {config.data_dir}")]
    parts = (_security(config), _plugins(config), _directories(config), _ports(config, running))
    for part in (*parts, _store(config, running), _versions()):
        findings += part
    if as_json:
        shown = [{"name": f.name, "status": f.status, "message": f.message} for f in findings]
        click.echo(msgspec.json.encode(shown))
    else:
        for each in findings:
            click.echo(f"{each.status:<6}{each.name:<16}{each.message}")
    return max((each.exit_code for each in findings), default=0)


def _running(config: Config) -> bool:
    from tapebus.control import request

    try:
        request(config, {"cmd": "stats"}, timeout=1.0)
    except BusNotRunning:
        return False
    except TapebusError:
        pass
    return True


def _security(config: Config) -> Iterator[Finding]:
    from tapebus.curve import server_keys

    if config.security.key:
        try:
            server_keys(config.security.key)
            names = ", ".join(each.name for each in config.security.identities) or "nobody"
            yield Finding("security", "ok", f"CURVE beyond this machine; known: {names}")
        except TapebusError as error:
            yield Finding("security", "error", str(error), error.exit_code)
    else:
        yield Finding("security", "ok", "reachable from this machine only")
    if os.getuid() == 0:
        yield Finding("user", "warn", "runs as root: a fault in any plugin has all rights; use a user of its own")


def _plugins(config: Config) -> Iterator[Finding]:
    from tapebus.plugins import installed, load

    broken = 0
    for name in config.plugins.enabled:
        try:
            load([name])
        except TapebusError as error:
            broken += 1
            yield Finding("plugins", "error", str(error), error.exit_code)
    if not broken and (problem := _rehearsed(config)) is not None:
        yield problem
    elif not broken:
        yield Finding("plugins", "ok", ", ".join(config.plugins.enabled) or "none enabled")
    for name in config.plugins.tables:
        if name not in config.plugins.enabled and name not in installed():
            yield Finding("plugins", "warn", f"[plugins.{name}]: no plugin of this name is installed")


def _rehearsed(config: Config) -> Finding | None:
    """What a start would say about the plugins' own tables."""
    from tapebus.plugins import call_one, load
    from tapebus.wiring import rehearse

    try:
        rehearse(config)
        for name in config.plugins.enabled:
            arguments = {"data_dir": config.data_dir, "config": config.plugin(name), "readonly": True}
            reader = call_one(load([name]), "tapebus_open_store", name, **arguments)
            if reader is not None:
                reader.close()
    except StoreError:
        return None  # for the line about the store
    except TapebusError as error:
        return Finding("plugins", "error", str(error), error.exit_code)
    except Exception as error:
        return Finding("plugins", "error", f"a plugin cannot be started: {type(error).__name__}: {error}", 1)
    return None


def _directories(config: Config) -> Iterator[Finding]:
    for name, directory in (("data directory", config.data_dir), ("runtime dir", config.runtime_dir)):
        try:
            found = directory.lstat()
        except FileNotFoundError:
            yield from _creatable(name, directory)
            continue
        except OSError as error:
            yield Finding(name, "error", f"{directory}: {error.strerror}", 78)
            continue
        if stat.S_ISLNK(found.st_mode):
            yield Finding(name, "error", f"{directory} is a symbolic link; give its target {directory.resolve()}", 78)
        elif not stat.S_ISDIR(found.st_mode):
            yield Finding(name, "error", f"{directory} is not a directory; choose another with --data-dir", 78)
        elif found.st_uid != os.getuid():
            yield Finding(name, "error", f"{directory} belongs to uid {found.st_uid}", 78)
        elif reason := made_for_others(directory, found.st_mode, OWN_NAMES):
            yield Finding(name, "error", f"{directory}: {reason}; choose another with --data-dir", 78)
        elif stat.S_IMODE(found.st_mode) & 0o077:
            yield Finding(name, "warn", f"{directory} is open to others; run `chmod 700 {directory}`")
        else:
            yield Finding(name, "ok", f"{directory} (0700)")
    free = shutil.disk_usage(next(p for p in (config.data_dir, *config.data_dir.parents) if p.exists())).free
    yield Finding("disk", "ok" if free > _ROOM else "warn", f"{free / 1e9:,.1f} GB free")


def _creatable(name: str, directory: Path) -> Iterator[Finding]:
    parent = next(each for each in directory.parents if each.exists())
    try:
        # permission bits do not tell of a read-only disk, nor of a directory the kernel makes up
        os.rmdir(tempfile.mkdtemp(prefix=".tapebus-check-", dir=parent))
    except OSError as error:
        yield Finding(name, "error", f"{directory} cannot be created in {parent}: {error.strerror}", 78)
    else:
        yield Finding(name, "ok", f"{directory} (will be created)")


def _ports(config: Config, running: bool) -> Iterator[Finding]:
    endpoints = [config.listen.feed, config.listen.ingest, *config.acked_endpoints]
    for endpoint in [each for each in endpoints if each.startswith("tcp://")]:
        if endpoint.endswith((":*", ":0")):
            continue
        if not in_use(endpoint):
            yield Finding("port", "ok", f"{endpoint} is free")
        elif running:
            yield Finding("port", "ok", f"{endpoint} is in use; a bus runs on this data directory")
        else:
            message = f"{endpoint} is in use by another program; choose another under [listen]"
            yield Finding("port", "error", message, 1)


def _store(config: Config, running: bool) -> Iterator[Finding]:
    if not (config.data_dir / "tape").exists():
        yield Finding("store", "ok", "no tape yet")
        return
    try:
        with open_tape(config) as tape:
            # a bus that writes changes the pages under the eyes of who reads all of them
            problems = [] if running else tape.verify()
            if problems:
                yield Finding("store", "error", f"{problems[0]}: start the bus, which saves what is sound", 74)
            else:
                yield Finding("store", "ok", f"last bus_seq {tape.last_seq:,}")
            for first, last in tape.holes:
                yield Finding("store", "warn", f"bus_seq {first}..{last} was lost to damage")
            for name in tape.stats().get("damaged_files", ()):
                yield Finding("store", "warn", f"a damaged tape is kept as {config.data_dir / 'tape' / name}")
    except TapebusError as error:
        yield Finding("store", "error", str(error), error.exit_code)


def _versions() -> Iterator[Finding]:
    from tapebus.versions import found

    yield Finding("python", "ok", sys.version.split()[0])
    for each in found():
        if each.problem:
            yield Finding(each.name, "error", each.problem, 78)
        elif each.name != "libzmq":
            yield Finding(each.name, "ok", each.version)
    yield from _libzmq()


def _libzmq() -> Iterator[Finding]:
    import ctypes

    import zmq

    if not zmq.has("ipc"):
        yield Finding("libzmq", "error", "built without ipc; install pyzmq from a wheel", 1)
        return
    symbols = ("zmq_msg_recv", "zmq_msg_init", "zmq_msg_data", "zmq_msg_size", "zmq_msg_close")
    missing = list(symbols)
    try:
        from zmq.backend.cython import _zmq

        library = ctypes.CDLL(_zmq.__file__)
        missing = [each for each in symbols if not hasattr(library, each)]
    except (ImportError, OSError):
        pass
    receive = "direct receive" if not missing else "receiving through pyzmq, slower"
    yield Finding("libzmq", "ok" if not missing else "warn", f"{zmq.zmq_version()}, {receive}")

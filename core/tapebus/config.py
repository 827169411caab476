"""Configuration: defaults, then a TOML file, then ``TAPEBUS_*`` variables; anything unknown is refused.

Every mistake raises `ConfigError` naming the key, the value found and the nearest valid one.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from tapebus.errors import ConfigError
from tapebus.limits import MIN_MEMORY_MB
from tapebus.private import made_for_others
from tapebus.redaction import register
from tapebus.security import Identity, Security, check_security, is_loopback
from tapebus.trust import Trusted

#: Room for a socket's name below the 108 bytes of ``sun_path`` (104 on macOS).
IPC_PATH_LIMIT = 100
#: Names by which a directory of a bus is known.
OWN_NAMES = ("tape", "run", "keys", "logs", "*.lock", "*.sock", "*.key")

_Positive = Annotated[float, Meta(gt=0)]
_NotNegative = Annotated[float, Meta(ge=0)]


class Bus(Struct, frozen=True, forbid_unknown_fields=True):
    """``[bus]``: durations are seconds, ``ring_bytes`` is bytes, ``max_batch`` events per unit of work.

    A commit begins no sooner than ``commit_interval_ms`` after the one before; 0 commits whatever has arrived as soon
    as the last commit is done. ``memory_limit_mb`` bounds the memory of the whole process as a last resort, 0 does not.
    ``unknown_types`` says what becomes of an event type nobody registered; ``stats_s`` 0 turns the
    periodic log line off. ``start_s`` bounds each step of a plugin's start. A bus whose inline consumer stands
    still for ``hang_exit_s`` ends, to be started again without it; 0 never.
    ``spool_reap_s`` 0 turns off the search for what dead producers left in ``spool_dir``.
    """

    data_dir: str = ""
    ring_entries: Annotated[int, Meta(ge=1024, le=1 << 24)] = 65536
    ring_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 36)] = 64 * 1024 * 1024
    max_batch: Annotated[int, Meta(ge=1, le=65536)] = 1024
    commit_interval_ms: Annotated[float, Meta(ge=0, le=100)] = 0.0
    heartbeat_s: _Positive = 30.0
    stats_s: _NotNegative = 60.0
    drain_s: Annotated[float, Meta(ge=0, le=3600)] = 5.0
    unknown_types: Literal["keep", "reject"] = "keep"
    publish_heartbeat: bool = True
    start_s: _Positive = 20.0
    hang_exit_s: _NotNegative = 60.0
    spool_dir: str = ""
    spool_reap_s: _NotNegative = 10.0
    memory_limit_mb: Annotated[int, Meta(ge=0)] = 0


class Listen(Struct, frozen=True, forbid_unknown_fields=True):
    """``[listen]``: endpoints to bind, ``tcp://`` or ``ipc://``; an empty one means its default.

    What listens beyond this machine needs keys, see `Security`.
    A port that another program uses is waited for at a start, at most ``wait_s`` seconds.
    """

    feed: str = "tcp://127.0.0.1:5570"
    ingest: str = "tcp://127.0.0.1:5571"
    acked: str | list[str] = ""
    control: str = ""
    wait_s: _NotNegative = 30.0


class Feed(Struct, frozen=True, forbid_unknown_fields=True):
    """``[feed]``: the live feed; ``hwm`` is the number of messages kept for one slow subscriber."""

    topic_prefix: str = "bitten"
    hwm: Annotated[int, Meta(ge=1)] = 10000


class Plugins(Struct, frozen=True, forbid_unknown_fields=True):
    """``[plugins]``: the enabled ones in loading order, and the table of each ``[plugins.<name>]``.

    With ``[plugins.trusted]`` only what it lists is imported, see `tapebus.trust`.
    """

    enabled: list[str] = msgspec.field(
        default_factory=lambda: ["schema", "store", "outcomes", "slots", "analytics", "alerts", "telegram"]
    )
    tables: dict[str, dict[str, Any]] = {}
    trusted: dict[str, Trusted] | None = None


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """One ``[[sources]]``: an existing socket to listen to without touching the program behind it.

    ``topic`` is the event type to assume for messages that are no envelope, ``source`` the name they
    get (default: ``name``) and ``fields`` maps a key found in the message to the one to store.
    """

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    type: Literal["sub", "pull"] = "sub"
    connect: str = ""
    bind: str = ""
    subscribe: list[str] = msgspec.field(default_factory=lambda: [""])
    topic: str = ""
    source: str = ""
    fields: dict[str, str] = {}


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole configuration; immutable, safe to share between threads.

    ``shared`` holds tables that any plugin may read; the bus itself reads nothing in them.
    """

    bus: Bus = Bus()
    listen: Listen = Listen()
    feed: Feed = Feed()
    plugins: Plugins = msgspec.field(default_factory=Plugins)
    sources: list[Source] = []
    security: Security = Security()
    shared: dict[str, dict[str, Any]] = {}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        data_dir: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] = os.environ,
        complete: bool = True,
    ) -> Config:
        """Read `path` (TOML), apply `environ`, check everything; `data_dir` wins over both.

        Relative paths count from the directory of the file. Without `complete`, ``[security]`` is
        not judged: its keys are still to be made. Raises `ConfigError`.
        """
        raw: dict[str, Any] = {}
        if path is not None:
            raw = _read_toml(Path(path))
            _anchor(raw, Path(path).absolute().parent)
        _apply_environ(raw, environ)
        if data_dir is not None:
            raw.setdefault("bus", {})["data_dir"] = os.fspath(data_dir)
        config = _convert(raw)
        _check_endpoints(config)
        _check_sources(config)
        if 0 < config.bus.memory_limit_mb < MIN_MEMORY_MB:
            raise ConfigError(
                f"bus.memory_limit_mb = {config.bus.memory_limit_mb}: the bus needs {MIN_MEMORY_MB}; 0 sets no limit"
            )
        if complete:
            check_security(config.security, _exposed(config))
        return config

    @classmethod
    def defaults(cls, data_dir: str | os.PathLike[str] | None = None) -> Config:
        """The configuration without any file or variable."""
        return cls.load(data_dir=data_dir, environ={})

    @property
    def data_dir(self) -> Path:
        """Absolute directory of the tape; not created by asking for it, see `prepare`."""
        if self.bus.data_dir:
            return Path(self.bus.data_dir).expanduser().absolute()
        if from_environ := os.environ.get("TAPEBUS_DATA_DIR"):
            return Path(from_environ).expanduser().absolute()
        import platformdirs

        return Path(platformdirs.user_data_dir("tapebus", appauthor=False))

    @property
    def runtime_dir(self) -> Path:
        """Where the bus puts its ipc sockets: in the data directory while the socket names stay short enough."""
        run = self.data_dir / "run"
        if len(os.fsencode(run / "control.sock")) < IPC_PATH_LIMIT:
            return run
        digest = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"tapebus-{os.getuid()}-{digest}"

    @property
    def acked_endpoints(self) -> list[str]:
        """Endpoints of the acknowledged ingest."""
        own = f"ipc://{self.runtime_dir / 'ingest.sock'}"
        given = [self.listen.acked] if isinstance(self.listen.acked, str) else self.listen.acked
        found = [each for each in given if each] or ["tcp://127.0.0.1:5572", own]
        # what runs beside the bus must reach it without a key
        return found if any(is_loopback(each) for each in found) else [*found, own]

    @property
    def own_endpoint(self) -> str:
        """The acknowledged ingest for this user's own programs: an ipc socket where there is one."""
        local = [each for each in self.acked_endpoints if is_loopback(each)]
        return next((each for each in local if each.startswith("ipc:")), local[0])

    @property
    def control_endpoint(self) -> str:
        return self.listen.control or f"ipc://{self.runtime_dir / 'control.sock'}"

    def plugin(self, name: str) -> dict[str, Any]:
        """The table ``[plugins.<name>]``, empty where there is none; without what is the bus's own business."""
        return {key: value for key, value in self.plugins.tables.get(name, {}).items() if key != "faults"}

    def faults(self, name: str) -> dict[str, Any]:
        """The table ``[plugins.<name>.faults]``: fields of `tapebus.consumer.FaultPolicy`."""
        return dict(self.plugins.tables.get(name, {}).get("faults", {}))

    def prepare(self) -> None:
        """Create the data and runtime directories, 0700; `ConfigError` where they are not this user's."""
        make_private(self.data_dir)
        make_private(self.runtime_dir)


def make_private(directory: Path) -> None:
    """Make `directory` exist with mode 0700, owned by this user and no symbolic link; see `made_for_others`."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = directory.lstat()
    except OSError as error:
        raise ConfigError(
            f"bus.data_dir = {str(directory)!r}: cannot create it: {error.strerror}; choose another with --data-dir"
        ) from None
    if stat.S_ISLNK(found.st_mode):
        raise ConfigError(
            f"bus.data_dir: {directory} is a symbolic link, which may be turned: give its target {directory.resolve()}"
        )
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"bus.data_dir = {str(directory)!r}: not a directory; choose another with --data-dir")
    if found.st_uid != os.getuid():
        raise ConfigError(f"{directory}: belongs to another user (uid {found.st_uid}); choose another with --data-dir")
    if reason := made_for_others(directory, found.st_mode, OWN_NAMES):
        raise ConfigError(f"bus.data_dir = {str(directory)!r}: {reason}; choose another with --data-dir")
    if stat.S_IMODE(found.st_mode) & 0o077:
        directory.chmod(0o700)


def read_secret(value: Any, key: str = "secret") -> str:
    """The secret behind ``{ file = "…" }`` (mode 0600 or stricter) or ``{ env = "…" }``.

    `key` is the full configuration key, for messages; the secret itself is never part of one.
    """
    if not isinstance(value, Mapping) or len(value) != 1 or not {"file", "env"} & set(value):
        raise ConfigError(f'{key}: a secret is given as {{ file = "…" }} or {{ env = "…" }}, never in the file itself')
    if "env" in value:
        secret = os.environ.get(str(value["env"]), "").strip()
        if not secret:
            raise ConfigError(f"{key}.env: the variable {value['env']!r} is not set")
    else:
        secret = read_private(Path(str(value["file"])).expanduser(), f"{key}.file").strip()
    register(secret)
    return secret


def read_private(path: Path, key: str) -> str:
    """The text of a small file that belongs to this user (or root) and that nobody else can read.

    `key` names it in messages, which never repeat its content. Raises `ConfigError`.
    """
    try:
        # O_NONBLOCK: a named pipe put there by mistake must not hang the start
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{key}: {path} is not a regular file")
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise ConfigError(f"{key}: {path} is readable by others; run `chmod 600 {path}`")
        if found.st_uid not in (os.getuid(), 0):
            raise ConfigError(f"{key}: {path} belongs to another user (uid {found.st_uid}); make a copy of your own")
        return os.read(descriptor, 65536).decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{key}: {path} is not text") from None
    finally:
        os.close(descriptor)


# -- reading ------------------------------------------------------------------------------------


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read it: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _anchor(raw: dict[str, Any], base: Path) -> None:
    """Let the relative paths in `raw` count from `base`: a service manager starts the bus in any directory."""

    def absolute(table: dict[str, Any], key: str) -> None:
        if isinstance(table.get(key), str) and table[key]:
            table[key] = str(base / Path(table[key]).expanduser())

    if isinstance(bus := raw.get("bus"), dict):
        absolute(bus, "data_dir")
        absolute(bus, "spool_dir")
    pending = [raw.get("security"), raw.get("plugins")]
    while pending:
        if isinstance(table := pending.pop(), dict):
            if len(table) == 1:  # { file = "…" }, a secret
                absolute(table, "file")
            pending += table.values()


_SECTIONS: dict[str, type[Struct]] = {"bus": Bus, "listen": Listen, "feed": Feed}


def _apply_environ(raw: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Write ``TAPEBUS_<SECTION>_<KEY>`` over `raw`; `_convert` then judges it like any other value."""
    if environ.get("TAPEBUS_DATA_DIR"):
        _table(raw, "bus")["data_dir"] = environ["TAPEBUS_DATA_DIR"]
    for variable in sorted(environ):
        section, _, key = variable.removeprefix("TAPEBUS_").lower().partition("_")
        if not variable.startswith("TAPEBUS_") or not key:
            continue
        value = environ[variable]
        if section in _SECTIONS:
            hints = get_type_hints(_SECTIONS[section], include_extras=True)
            if key not in hints:
                near = difflib.get_close_matches(key, hints, 1)
                hint = f"TAPEBUS_{section}_{near[0] if near else next(iter(hints))}".upper()
                raise ConfigError(f"{variable}: no such key; did you mean {hint}?")
            _table(raw, section)[key] = _from_text(variable, value, hints[key])
        elif section == "plugins" and key == "enabled":
            _table(raw, "plugins")["enabled"] = _words(value)
        elif section == "plugins":
            name, option = _plugin_key(variable, key, raw)
            _table(_table(raw, "plugins"), name)[option] = _toml_value(value)


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    table = raw.setdefault(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{name} = {table!r}: must be a table, written [{name}]")
    return table


def _from_text(variable: str, value: str, kind: Any) -> Any:
    if kind == str | list[str]:
        return _words(value)
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{variable} = {value!r}: {_lower(str(error))}") from None


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _plugin_key(variable: str, key: str, raw: dict[str, Any]) -> tuple[str, str]:
    """Split ``<plugin>_<option>``, where plugin names may hold an underscore themselves."""
    known = {*Plugins().enabled, *_table(raw, "plugins"), *(_table(raw, "plugins").get("enabled") or [])}
    for name in sorted(known, key=len, reverse=True):
        if key.startswith(name + "_"):
            return name, key[len(name) + 1 :]
    name, _, option = key.partition("_")
    if not option:
        raise ConfigError(f"{variable}: expected TAPEBUS_PLUGINS_<NAME>_<KEY> or TAPEBUS_PLUGINS_ENABLED")
    return name, option


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# -- judging ------------------------------------------------------------------------------------


def _convert(raw: dict[str, Any]) -> Config:
    plugins = raw.get("plugins")
    _refuse_unknown(raw, Config, "")
    shaped = dict(raw)
    if isinstance(plugins, dict):
        reserved = {name: plugins[name] for name in ("enabled", "trusted") if name in plugins}
        tables = {name: table for name, table in plugins.items() if name not in reserved}
        for name, table in tables.items():
            if not isinstance(table, dict):
                near = "plugins.enabled" if difflib.get_close_matches(name, ["enabled"], 1) else f"[plugins.{name}]"
                raise ConfigError(f"plugins.{name} = {table!r}: no such key; did you mean {near}?")
        shaped["plugins"] = {"tables": tables, **reserved}
    try:
        return msgspec.convert(shaped, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), shaped)) from None


def _refuse_unknown(value: Any, kind: type[Struct], path: str) -> None:
    hints = get_type_hints(kind)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1) or difflib.get_close_matches(key, hints, 1, 0.0)
            elsewhere = [found for found in _all_keys() if found.rpartition(".")[2] == key]
            best = elsewhere[0] if elsewhere else f"{path}{near[0]}"
            raise ConfigError(f"{path}{key} = {item!r}: no such key; did you mean {best}?")
        if key in _SECTIONS and not path:
            _refuse_unknown(item, _SECTIONS[key], f"{key}.")
        elif key == "sources" and not path and isinstance(item, list):
            for index, source in enumerate(item):
                _refuse_unknown(source, Source, f"sources[{index}].")
        elif key == "security" and not path:
            _refuse_unknown(item, Security, "security.")
        elif key == "identities" and path == "security." and isinstance(item, list):
            for index, identity in enumerate(item):
                _refuse_unknown(identity, Identity, f"security.identities[{index}].")


def _all_keys() -> Iterator[str]:
    for section, kind in _SECTIONS.items():
        yield from (f"{section}.{key}" for key in kind.__struct_fields__)
    yield "plugins.enabled"


def _explain(message: str, shaped: dict[str, Any]) -> str:
    """Turn msgspec's ``Expected `int`, got `str` - at `$.bus.max_batch``` into a line about the key."""
    problem, _, place = message.partition(" - at ")
    path = place.strip("`").removeprefix("$").lstrip(".")
    value: Any = shaped
    for step in re.findall(r"[^.\[\]]+", path):
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (KeyError, IndexError, ValueError, TypeError):
            break
    key = path.replace("plugins.tables.", "plugins.") or "the file"
    if isinstance(value, dict | list):
        return f"{key}: {_lower(problem)}"
    hint = ""
    if problem.startswith("Invalid enum value"):
        allowed = {"unknown_types": Bus, "type": Source}[key.rpartition(".")[2]]
        choices = [str(each) for each in get_args(get_type_hints(allowed)[key.rpartition(".")[2]])]
        near = difflib.get_close_matches(str(value), choices, 1) or choices
        return f"{key} = {value!r}: must be one of {', '.join(choices)}; did you mean {near[0]!r}?"
    if bound := re.search(r"([<>]=?) (-?[\d.]+)$", problem):
        nearest = bound[2] if "=" in bound[1] else "a little " + ("more" if ">" in bound[1] else "less")
        hint = f"; nearest valid: {nearest}"
    return f"{key} = {value!r}: {_lower(problem)}{hint}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _check_endpoints(config: Config) -> None:
    named = [("listen.feed", config.listen.feed), ("listen.ingest", config.listen.ingest)]
    acked = config.listen.acked
    named += [("listen.acked", each) for each in ([acked] if isinstance(acked, str) else acked)]
    named.append(("listen.control", config.listen.control))
    taken: dict[str, str] = {}
    for key, endpoint in named:
        if not endpoint and key in ("listen.acked", "listen.control"):
            continue
        _check_form(key, endpoint)
        if endpoint in taken and not endpoint.endswith((":0", ":*")):
            raise ConfigError(f"{key} = {endpoint!r}: already used by {taken[endpoint]}; choose another port")
        taken[endpoint] = key
    control = config.listen.control
    if control and not control.startswith("ipc:///"):
        raise ConfigError(
            f"listen.control = {control!r}: must be ipc:// and an absolute path, which only its owner can reach"
        )


def _exposed(config: Config) -> Iterator[tuple[str, str]]:
    """Every (key, endpoint) that would listen beyond this machine."""
    bound = [("listen.feed", config.listen.feed), ("listen.ingest", config.listen.ingest)]
    bound += [("listen.acked", each) for each in config.acked_endpoints]
    bound += [(f"sources[{index}].bind", source.bind) for index, source in enumerate(config.sources)]
    yield from ((key, endpoint) for key, endpoint in bound if endpoint and not is_loopback(endpoint))


def _check_form(key: str, endpoint: str) -> None:
    scheme, separator, rest = endpoint.partition("://")
    if scheme not in ("tcp", "ipc") or not separator or not rest:
        raise ConfigError(f"{key} = {endpoint!r}: not an endpoint; write 'tcp://127.0.0.1:PORT' or 'ipc:///PATH'")
    port = rest.rpartition(":")[2]
    if scheme == "tcp" and not (port == "*" or (port.isdigit() and int(port) < 65536 and ":" in rest)):
        raise ConfigError(f"{key} = {endpoint!r}: the port must be 0 to 65535, as in 'tcp://127.0.0.1:5570'")
    if scheme == "ipc" and len(os.fsencode(rest)) > IPC_PATH_LIMIT + 3:
        raise ConfigError(f"{key} = {endpoint!r}: longer than {IPC_PATH_LIMIT + 3} bytes; use a shorter path")


def _check_sources(config: Config) -> None:
    names: set[str] = set()
    for index, source in enumerate(config.sources):
        place = f"sources[{index}]"
        if source.name in names:
            raise ConfigError(f"{place}.name = {source.name!r}: already used by another source; choose another name")
        names.add(source.name)
        if bool(source.connect) == bool(source.bind):
            raise ConfigError(f"{place} ({source.name}): give either connect or bind")
        if source.bind:
            _check_form(f"{place}.bind", source.bind)
        else:
            _check_form(f"{place}.connect", source.connect)

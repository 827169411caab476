"""What the commands share: options, configuration, time expressions, tables and events as text."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tapebus import trust
from tapebus.config import Config
from tapebus.errors import ConfigError, TapebusError, UsageError

if TYPE_CHECKING:
    from tapebus.publisher import Publisher
    from tapebus.tape import Tape

_F = TypeVar("_F", bound=Callable[..., Any])
WIDTH = 100
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def load_config(config: str | None = None, data_dir: str | None = None, complete: bool = True) -> Config:
    loaded = Config.load(config or None, data_dir=data_dir or None, complete=complete)
    trust.enforce(loaded.plugins.trusted)
    return loaded


def with_config(function: _F, complete: bool = True) -> _F:
    """Add ``--config`` and ``--data-dir`` and pass the loaded `Config` as ``config``."""

    @click.option("--config", "config_file", type=click.Path(), help="TOML file with the configuration.")
    @click.option("--data-dir", "data_dir", type=click.Path(), help="Directory of the tape.")
    @functools.wraps(function)
    def wrapped(*args: Any, config_file: str | None, data_dir: str | None, **arguments: Any) -> Any:
        ctx = click.get_current_context()
        given = ctx.find_root().obj or {}
        path = config_file or given.get("config")
        ctx.meta["tapebus.config_file"] = path
        config = load_config(path, data_dir or given.get("data_dir"), complete)
        return function(*args, config=config, **arguments)

    return wrapped  # type: ignore[return-value]


def json_option(function: _F) -> _F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


if TYPE_CHECKING:
    _ParamType = click.ParamType[float]
else:
    _ParamType = click.ParamType


class When(_ParamType):
    """A moment: Unix seconds, ISO 8601 (UTC unless it says otherwise) or an age such as 6h or 30d."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        if age := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text):
            return time.time() - float(age[1]) * _UNITS[age[2]]
        try:
            seconds = float(text)
        except ValueError:
            pass
        else:
            if math.isfinite(seconds):
                return seconds
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            self.fail(f"{text!r} is no time; write Unix seconds, ISO 8601 or an age such as 6h or 30d", param, ctx)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _topics(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    from tapebus.consumer import is_pattern

    for each in value:
        if not is_pattern(each):
            raise click.BadParameter(f"{each!r} matches nothing; write an event type, prefix.* or *")
    return value


def topics_option(function: _F) -> _F:
    """``--topic``, checked, as ``topics``."""
    words = "Event type, exact or prefix.*; repeatable."
    return click.option("--topic", "topics", multiple=True, callback=_topics, help=words)(function)


def filters(function: _F) -> _F:
    """The options that choose events on the tape."""
    for option in (
        click.option("--correlation-id", help="Only the chain of one signal or fire command."),
        click.option("--until", type=When(), help="Event time before this."),
        click.option("--since", type=When(), help="Event time from here: Unix seconds, ISO 8601, 6h, 30d."),
        topics_option,
    ):
        function = option(function)
    return function


def open_tape(config: Config) -> Tape:
    from tapebus.tape import Tape

    chosen = [each for each in config.plugins.enabled if each in ("schema", "store")]
    others = [each for each in config.plugins.enabled if each not in ("schema", "store")]
    # Plugins besides the built-in two may define event types, or be the store.
    return Tape.open(config.data_dir, plugins=[*chosen, *others])


def need_bus(config: Config) -> None:
    """Raise `BusNotRunning` where no bus runs on the configured data directory."""
    from tapebus.control import request

    request(config, {"cmd": "stats"})


def publisher(config: Config, source: str, endpoint: str | None, key: str | None = None, **options: Any) -> Publisher:
    """A publisher for the bus of `config`, found at `endpoint` where one is given; `key` is a secret key file."""
    import os

    from tapebus.publisher import Publisher

    if endpoint:
        _check_endpoint("--endpoint", endpoint, UsageError)
    if found := os.environ.get("TAPEBUS_ENDPOINT"):
        _check_endpoint("TAPEBUS_ENDPOINT", found, ConfigError)
    if not 0 < len(source) <= 100:
        raise UsageError("--source: a name of 1 to 100 characters is needed")
    # where rights are restricted, the owner is known by the ipc socket only
    own = config.own_endpoint if config.security.identities else config.acked_endpoints[0]
    return Publisher(source, endpoint=endpoint or found or own, key=key, **options)


def _check_endpoint(name: str, endpoint: str, error: type[TapebusError]) -> None:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if endpoint.startswith("tcp://") and host and port.isdigit() and 0 < int(port) < 65536:
        return
    if not endpoint.startswith("ipc://") or endpoint == "ipc://":
        raise error(f"{name} {endpoint!r}: not an endpoint; write tcp://HOST:PORT or ipc:///PATH")


def event_json(event: Any) -> str:
    """One line: the canonical envelope plus ``bus_seq``."""
    import msgspec

    from tapebus.events import to_dict

    return msgspec.json.encode(to_dict(event)).decode()


def event_line(event: Any) -> str:
    """One line of at most 100 columns for people."""
    from tapebus.events import to_dict

    found = to_dict(event)
    data = " ".join(f"{key}={_short(value)}" for key, value in found["data"].items())
    head = f"{event.bus_seq:>9} {clock(event.timestamp)} {found['event_type']:<18} {found['source'][:14]:<14} "
    return cut(head + visible(data), WIDTH)


def clock(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return f"{at:<19.6g}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e-3 else str(value)


def visible(text: str) -> str:
    """`text` without what would steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    empty: str = "none",
    colours: Sequence[str | None] | None = None,
) -> None:
    """Print aligned columns within 100; numbers to the right, the last text column gives way.

    On a terminal each row has its colour in `colours`.
    """
    found = [["" if cell is None else cell for cell in row] for row in rows]
    if not found:
        click.echo(empty)
        return
    texts = [[visible(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row] for row in found]
    right = [all(isinstance(row[i], int | float) for row in found) for i in range(len(columns))]
    widths = [max(len(columns[i]), *(len(row[i]) for row in texts)) for i in range(len(columns))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widest = max(range(len(widths)), key=lambda i: (widths[i], i))
        widths[widest] -= 1
    for row, colour in zip([list(columns), *texts], [None, *(colours or [None] * len(texts))], strict=True):
        cells = [cut(row[i], widths[i]) for i in range(len(columns))]
        pads = [cells[i].rjust(widths[i]) if right[i] else cells[i].ljust(widths[i]) for i in range(len(columns))]
        line = "  ".join(pads).rstrip()
        click.echo(click.style(line, fg=colour) if colour else line)


def amount(counts: Any) -> int:
    """The sum of a ``{reason: n}`` map, or the number itself."""
    return sum(counts.values()) if isinstance(counts, dict) else int(counts or 0)


@contextlib.contextmanager
def progress_bar(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """Yields what is told how much of `total` is done; shown on a terminal's standard error, nowhere in a pipe."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)

"""``tapebus replay``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from tapebus.cli.common import json_option, publisher, topics_option, with_config
from tapebus.config import Config
from tapebus.consumer import covers
from tapebus.errors import TapebusError, UsageError
from tapebus.replay import Recorded, Recording
from tapebus.replay import replay as publish_all

if TYPE_CHECKING:
    _ParamType = click.ParamType[float | None]
else:
    _ParamType = click.ParamType


class Speed(_ParamType):
    """How many times faster than recorded; None means as fast as it goes."""

    name = "N|max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if value == "max":
            return None
        with contextlib.suppress(ValueError):
            speed = float(value)
            if 0 < speed < 1e9:
                return speed
        self.fail(f"{value!r} is no speed; write a number above 0, such as 10, or max", param, ctx)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--speed", type=Speed(), default="1", show_default=True, help="Times the original pace, or max.")
@topics_option
@click.option("--symbol", default="", help="Only this symbol; in a file of ticks of one symbol, its name.")
@click.option("--utc-offset", type=float, default=0.0, help="Hours the broker's clock is ahead of UTC (MT5 exports).")
@click.option("--endpoint", help="Acknowledged ingest of the bus; default: from the configuration.")
@json_option
@with_config
def replay(
    config: Config,
    file: Path,
    speed: float | None,
    topics: tuple[str, ...],
    symbol: str,
    utc_offset: float,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Publish FILE again: LEAN ticks (zip, CSV), an MT5 tick export, or JSON lines of events.

    Event time is the recorded time. Every event is published once; nothing is dropped.

    \b
    tapebus replay 20140508_quote.zip --speed 60
    tapebus replay EURUSD_ticks.csv --utc-offset 3 --speed max
    tapebus replay recorded.jsonl --topic market_data
    """
    recording = Recording(file, symbol=symbol.upper(), utc_offset_h=utc_offset)
    wanted = (each for each in recording if _wants(each, topics, symbol.upper()))
    with publisher(config, "replay", endpoint) as pub, _progress(recording, file.name) as progress:
        summary = publish_all(wanted, pub, speed=speed, progress=progress)
    if not summary.events and recording.skipped:
        raise UsageError(f"{file}: no event in it; {recording.problem}")
    if as_json:
        shown = {"file": str(file), **msgspec.structs.asdict(summary), "skipped": recording.skipped}
        click.echo(msgspec.json.encode(shown))
    else:
        events = f"{summary.events:,} event{'s' * (summary.events != 1)}"
        pace = f"{events} in {summary.seconds:.2f} s, {summary.rate:,.0f} events/s"
        click.echo(f"{pace}, {summary.acked:,} acked")
    if recording.skipped:
        lines = "line" if recording.skipped == 1 else "lines"
        click.echo(
            f"tapebus: {recording.skipped} unreadable {lines} left out, the first: {recording.problem}", err=True
        )
    if summary.acked < summary.events:
        raise TapebusError(
            f"{summary.rejected} events refused by the bus, {summary.unsendable} too large; see `tapebus dlq list`"
        )


def _wants(record: Recorded, topics: tuple[str, ...], symbol: str) -> bool:
    if topics and not covers(topics, record.event_type):
        return False
    return not symbol or str(record.data.get("symbol", "")).upper() == symbol


@contextlib.contextmanager
def _progress(recording: Recording, name: str) -> Iterator[Callable[[int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=1.0)
        yield lambda events: bar.update(task, completed=recording.fraction, description=f"{name}  {events:,}")

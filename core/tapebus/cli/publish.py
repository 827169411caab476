"""``tapebus publish``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from tapebus.cli.common import publisher, with_config
from tapebus.config import Config
from tapebus.errors import BusNotRunning, TapebusError, UsageError
from tapebus.replay import Recorded, from_envelope, replay


@click.command()
@click.argument("event_type", metavar="[TYPE]", required=False)
@click.argument("data", nargs=-1, metavar="[KEY=VALUE... | JSON | -]")
@click.option("--source", default="cli", show_default=True, help="Component name in the envelope.")
@click.option("--correlation-id", help="Signal or fire id of the chain.")
@click.option("--user-id")
@click.option("--priority", type=click.Choice(["low", "normal", "high", "critical"]))
@click.option("--endpoint", help="Acknowledged ingest of the bus; default: from the configuration.")
@click.option("--timeout", type=click.FloatRange(min=0.05), default=5.0, show_default=True, help="Seconds to wait.")
@with_config
def publish(
    config: Config,
    event_type: str | None,
    data: tuple[str, ...],
    source: str,
    endpoint: str | None,
    timeout: float,
    **envelope: str | None,
) -> None:
    """Publish an event of TYPE and wait until it is on disk.

    Values are JSON where they parse as JSON, else text. With - as data every line of standard input
    is the data of one event; without TYPE every line is a whole envelope.
    """
    extra = {key: value for key, value in envelope.items() if value is not None}
    records: Iterator[Recorded]
    if event_type is None or event_type == "-":
        records = (_line(number, text, None, source, extra) for number, text in _stdin())
    elif data == ("-",):
        records = (_line(number, text, event_type, source, extra) for number, text in _stdin())
    else:
        records = iter([Recorded(event_type, time.time(), _payload(data), source, extra)])
    with publisher(config, source, endpoint) as pub:
        try:
            summary = replay(records, pub, patience_s=timeout)
        except BusNotRunning:
            raise BusNotRunning(f"no bus answers at {pub.endpoint}: start one with `tapebus run`") from None
        acks_mean = "on disk" if pub.stats()["durable"] else "dispatched, there is no store"
    if summary.acked < summary.events:
        refused = f"{summary.rejected} refused by the bus, {summary.unsendable} too large or not encodable"
        raise TapebusError(f"{summary.acked} of {summary.events} events published; {refused}")
    click.echo(f"{summary.acked} event{'s' * (summary.acked != 1)} published ({acks_mean})")


def _stdin() -> Iterator[tuple[int, str]]:
    return ((number, text) for number, text in enumerate(sys.stdin, 1) if text.strip())


def _line(number: int, text: str, event_type: str | None, source: str, extra: dict[str, Any]) -> Recorded:
    try:
        found = msgspec.json.decode(text)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        if event_type is not None:
            return Recorded(event_type, time.time(), found, source, extra)
        record = from_envelope({"timestamp": time.time(), "source": source, **found})
    except ValueError as error:
        raise UsageError(f"standard input, line {number}: {error}") from None
    return record._replace(extra={**record.extra, **extra})


def _payload(words: tuple[str, ...]) -> dict[str, Any]:
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        found = _value(words[0])
        if not isinstance(found, dict):
            raise UsageError(f"{words[0]!r} is not valid JSON")
        return found
    out = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not KEY=VALUE; a whole payload is given as one JSON object")
        out[key] = _value(value)
    return out


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except ValueError:
        return text

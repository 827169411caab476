"""``tapebus publish``."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from tapebus.cli.common import open_tape, publisher, with_config
from tapebus.config import Config
from tapebus.errors import BusNotRunning, TapebusError, UsageError
from tapebus.events import DeadLetter
from tapebus.replay import Recorded, from_envelope, replay

if TYPE_CHECKING:
    from tapebus.tape import Tape


@click.command()
@click.argument("event_type", metavar="[TYPE]", required=False)
@click.argument("data", nargs=-1, metavar="[KEY=VALUE... | JSON | -]")
@click.option("--source", default="cli", show_default=True, help="Component name in the envelope.")
@click.option("--correlation-id", help="Signal or fire id of the chain.")
@click.option("--user-id", help="The user it is about.")
@click.option("--priority", type=click.Choice(["low", "normal", "high", "critical"]))
@click.option("--endpoint", help="Acknowledged ingest of the bus; default: from the configuration.")
@click.option("--key", type=click.Path(), help="Secret key file for a bus elsewhere; default: TAPEBUS_KEY.")
@click.option("--timeout", type=click.FloatRange(min=0.05), default=5.0, show_default=True, help="Seconds to wait.")
@with_config
def publish(
    config: Config,
    event_type: str | None,
    data: tuple[str, ...],
    source: str,
    endpoint: str | None,
    key: str | None,
    timeout: float,
    **envelope: str | None,
) -> None:
    """Publish an event of TYPE, wait until it is on disk, and say when it was found wrong.

    Values are JSON where they parse as JSON, else text. With - as data every line of standard input
    is the data of one event; with - instead of TYPE, or without it, every line is a whole envelope.

    \b
    tapebus publish user_action action=kill_switch_on --user-id 7176191872
    tapebus publish market_data '{"symbol": "EURUSD", "bid": 1.08501, "ask": 1.08513}'
    tapebus publish market_data - < quotes.jsonl
    """
    extra = {key: value for key, value in envelope.items() if value is not None}
    records: Iterator[Recorded]
    if event_type is None or event_type == "-":
        if data:
            raise UsageError("TYPE comes first: tapebus publish TYPE KEY=VALUE...")
        records = (_line(number, text, None, source, extra) for number, text in _stdin("one envelope"))
    elif data == ("-",):
        words = f"the data of one {event_type}"
        records = (_line(number, text, event_type, source, extra) for number, text in _stdin(words))
    else:
        records = iter([Recorded(event_type, time.time(), _payload(data), source, extra)])
    verdict = Verdict(config)
    with publisher(config, source, endpoint, key) as pub:
        try:
            summary = replay(verdict.noting(records), pub, patience_s=timeout)
        except BusNotRunning:
            hint = "start one with `tapebus run`" if pub.local else "start it, or check that it knows your key"
            raise BusNotRunning(f"no bus answers at {pub.endpoint}: {hint}") from None
        books = pub.stats()
        acks_mean = "on disk" if books["durable"] else "dispatched, there is no store"
    if not summary.events:
        click.echo("0 events published: there was nothing on standard input")
        return
    if summary.acked < summary.events:
        reasons = ", ".join(f"{reason} {count}" for reason, count in books["rejected"].items())
        refused = f"{summary.rejected} refused by the bus{f' ({reasons})' if reasons else ''}"
        if summary.unsendable:
            refused += f", {summary.unsendable} too large or not encodable"
        raise TapebusError(f"{summary.acked} of {summary.events} events published; {refused}")
    click.echo(f"{summary.acked} event{'s' * (summary.acked != 1)} published ({acks_mean})")
    letters = verdict.wait(timeout)
    if letters:
        first = letters[0]
        raise TapebusError(
            f"{len(letters)} of {summary.events} became dead letters, the first (number {first.id}): {first.detail}; "
            "see `tapebus dlq list`"
        )


class Verdict:
    """What the bus on this data directory thinks of the events of this process; it judges them after the disk.

    Where no such bus answers, nothing is known and nothing is waited for.
    """

    #: Events remembered to find their dead letters; of more, those beyond are not looked for.
    REMEMBERED = 10_000

    def __init__(self, config: Config) -> None:
        self._config = config
        self._sent: set[tuple[str, float]] = set()
        self._before = self._bus()

    def _bus(self) -> dict[str, Any] | None:
        from tapebus.control import request

        try:
            found = request(self._config, {"cmd": "stats"})["bus"]
        except (TapebusError, KeyError):
            return None
        return {**found, "dead": sum(found["dead_letters"].values())}

    def noting(self, records: Iterator[Recorded]) -> Iterator[Recorded]:
        """`records`, each remembered."""
        for each in records:
            if len(self._sent) < self.REMEMBERED:
                self._sent.add((each.event_type, each.timestamp))
            yield each

    def wait(self, timeout: float) -> list[DeadLetter]:
        """The dead letters among what was sent, after at most `timeout` seconds."""
        now = self._bus()
        if self._before is None or now is None:
            return []
        stored, deadline, pause = now["last_seq"], time.monotonic() + timeout, threading.Event()
        while now is not None and now["judged_seq"] < stored:
            if time.monotonic() > deadline:
                click.echo("tapebus: not judged yet; see `tapebus dlq list` later", err=True)
                return []
            pause.wait(0.02)
            now = self._bus()
        if now is None or now["dead"] == self._before["dead"]:
            return []
        return self._buried(now["dead"] - self._before["dead"], deadline)

    def _buried(self, expected: int, deadline: float) -> list[DeadLetter]:
        """Ours among the `expected` new dead letters, which are written a moment after they are counted."""
        pause, first_seq = threading.Event(), (self._before or {})["last_seq"] + 1
        with open_tape(self._config) as tape:
            while True:
                found = [each for each in tape.dead_letters() if each.bus_seq >= first_seq]
                if len(found) >= expected or time.monotonic() > deadline:
                    return [each for each in found if self._is_ours(tape, each)]
                pause.wait(0.02)

    def _is_ours(self, tape: Tape, letter: DeadLetter) -> bool:
        raw = tape.raw(letter.bus_seq)
        try:
            sent = (msgspec.msgpack if raw[:1] >= b"\x80" else msgspec.json).decode(raw)
            return (letter.event_type, sent["timestamp"]) in self._sent
        except (ValueError, KeyError, TypeError):
            return False


def _stdin(what: str) -> Iterator[tuple[int, str]]:
    if sys.stdin.isatty():
        click.echo(f"tapebus: reading standard input, {what} a line; Ctrl-D ends it", err=True)
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
        before = "; the lines before it were sent" if number > 1 else ""
        raise UsageError(f"standard input, line {number}: {error}{before}") from None
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

"""``tapebus dlq``: dead letters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click
import msgspec

from tapebus.cli.common import (
    When,
    clock,
    event_json,
    json_option,
    open_tape,
    publisher,
    table,
    with_config,
)
from tapebus.config import Config
from tapebus.errors import TapebusError, UsageError
from tapebus.events import DeadLetter
from tapebus.replay import Recorded, from_envelope
from tapebus.replay import replay as publish_all


@click.group()
def dlq() -> None:
    """Dead letters: events that could not be decoded, validated or handled."""


def _chosen(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--until", type=When(), help="Buried before this."),
        click.option("--since", type=When(), help="Buried from here on: Unix seconds, ISO 8601, 6h, 30d."),
        click.option("--reason", help="Reason code."),
        click.option("--place", help="Where: schema, ingest or plugin.<name>."),
        click.option("--topic", help="Event type."),
        click.option("--id", "ids", type=int, multiple=True, help="Number of a dead letter; repeatable."),
    ):
        function = option(function)
    return function


def _select(
    letters: Iterable[DeadLetter],
    ids: tuple[int, ...],
    topic: str | None,
    place: str | None,
    reason: str | None,
    since: float | None,
    until: float | None,
) -> list[DeadLetter]:
    return [
        each
        for each in letters
        if (not ids or each.id in ids)
        and topic in (None, each.event_type)
        and place in (None, each.place)
        and reason in (None, each.reason)
        and (since is None or each.at >= since)
        and (until is None or each.at < until)
    ]


def _as_dict(letter: DeadLetter) -> dict[str, Any]:
    fields = {name: getattr(letter, name) for name in letter.__struct_fields__ if name != "raw"}
    return {**fields, "raw": letter.raw.decode("utf-8", "backslashreplace")}


@dlq.command("list")
@_chosen
@click.option("--limit", type=click.IntRange(min=1), help="The newest this many.")
@json_option
@with_config
def list_(config: Config, as_json: bool, limit: int | None, **choice: Any) -> None:
    """List dead letters, oldest first."""
    with open_tape(config) as tape:
        found = _select(tape.dead_letters(), **choice)
    found = found[-limit:] if limit else found
    if as_json:
        for each in found:
            click.echo(msgspec.json.encode(_as_dict(each)))
        return
    rows = [[d.id, clock(d.at), d.event_type, d.place, d.reason, d.bus_seq or "", d.detail] for d in found]
    table(["id", "buried", "type", "place", "reason", "bus_seq", "detail"], rows, empty="no dead letters")


@dlq.command()
@click.argument("letter_id", type=int, metavar="ID")
@json_option
@with_config
def show(config: Config, letter_id: int, as_json: bool) -> None:
    """Show one dead letter with its bytes."""
    with open_tape(config) as tape:
        letter = next(iter(tape.dead_letters(after=letter_id - 1, limit=1)), None)
        if letter is None or letter.id != letter_id:
            raise UsageError(f"no dead letter {letter_id}; see `tapebus dlq list`")
        event = _on_tape(tape, letter)
        shown = _as_dict(letter)
        if event is not None:
            shown["raw"] = event.raw.decode("utf-8", "backslashreplace") or event_json(event)
    if as_json:
        click.echo(msgspec.json.encode(shown))
        return
    for key, value in shown.items():
        click.echo(f"{key:<12}{clock(value) if key == 'at' else ascii(value) if key == 'raw' else value}")


@dlq.command()
@_chosen
@click.option("--all", "everything", is_flag=True, help="Every dead letter.")
@click.option("--keep", is_flag=True, help="Do not purge what was published again.")
@click.option("--endpoint", help="Acknowledged ingest of the bus; default: from the configuration.")
@with_config
def replay(config: Config, everything: bool, keep: bool, endpoint: str | None, **choice: Any) -> None:
    """Publish the chosen dead letters again, then purge them."""
    _need_choice(everything, choice)
    ready, unreadable = [], 0
    with open_tape(config) as tape:
        for letter in _select(tape.dead_letters(), **choice):
            record = _record(tape, letter)
            if record is None:
                unreadable += 1
            else:
                ready.append((letter.id, record))
    with publisher(config, "dlq", endpoint) as pub:
        summary = publish_all((record for _, record in ready), pub)
    if summary.acked < summary.events:
        raise TapebusError(f"{summary.acked} of {summary.events} dead letters published again; none was purged")
    if ready and not keep:
        from tapebus.control import request

        request(config, {"cmd": "dlq_purge", "ids": [number for number, _ in ready]})
    kept = f", {unreadable} kept because their bytes are no event" if unreadable else ""
    click.echo(f"{summary.acked} published again{' and purged' if ready and not keep else ''}{kept}")


@dlq.command()
@_chosen
@click.option("--all", "everything", is_flag=True, help="Every dead letter.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_config
def purge(config: Config, everything: bool, yes: bool, **choice: Any) -> None:
    """Delete the chosen dead letters for good."""
    from tapebus.control import request

    _need_choice(everything, choice)
    with open_tape(config) as tape:
        ids = [each.id for each in _select(tape.dead_letters(), **choice)]
    if ids and not yes:
        click.confirm(f"Delete {len(ids)} dead letters for good?", abort=True, err=True)
    if ids:
        request(config, {"cmd": "dlq_purge", "ids": ids})
    click.echo(f"{len(ids)} purged")


def _need_choice(everything: bool, choice: dict[str, Any]) -> None:
    if not everything and not any(value not in (None, ()) for value in choice.values()):
        raise UsageError("choose dead letters with --id, --topic, --place, --reason, --since or --until, or say --all")


def _on_tape(tape: Any, letter: DeadLetter) -> Any:
    if not letter.bus_seq:
        return None
    event = next(iter(tape.read(after=letter.bus_seq - 1, limit=1)), None)
    return event if event is not None and event.bus_seq == letter.bus_seq else None


def _record(tape: Any, letter: DeadLetter) -> Recorded | None:
    """What `letter` would be published as; None where its bytes are no envelope."""
    event = _on_tape(tape, letter)
    raw = letter.raw if event is None else event.raw
    if not raw:
        return None
    try:
        decode = msgspec.json.decode if raw[:1] in b"{ \n\t\r" else msgspec.msgpack.decode
        found = decode(raw)
        return from_envelope(found) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None

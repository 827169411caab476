"""``tapebus dlq``: dead letters."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click
import msgspec

from tapebus.cli.common import When, clock, json_option, open_tape, publisher, table, with_config
from tapebus.config import Config
from tapebus.errors import TapebusError, UsageError
from tapebus.events import DeadLetter
from tapebus.replay import Recorded, from_envelope
from tapebus.replay import replay as publish_all

if TYPE_CHECKING:
    from tapebus.tape import Tape

#: Ids in one request: the control socket takes 64 KiB.
CHUNK = 1000
#: Seconds to wait for consumers to handle what they were given again.
PATIENCE_S = 10.0


@click.group()
def dlq() -> None:
    """Dead letters: events that could not be decoded, validated or handled."""


if TYPE_CHECKING:
    _ParamType = click.ParamType[tuple[int, int]]
else:
    _ParamType = click.ParamType


class Range(_ParamType):
    """Places on the tape: ``7``, ``7..12``, ``7..`` or ``..12``."""

    name = "range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        first, dots, last = str(value).partition("..")
        try:
            low = int(first) if first else 1
            return low, (int(last) if last else 1 << 63) if dots else low
        except ValueError:
            self.fail(f"{value!r} is no range of bus_seq; write 7, 7..12, 7.. or ..12", param, ctx)


def _chosen(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--until", type=When(), help="Buried before this."),
        click.option("--since", type=When(), help="Buried from here on: Unix seconds, ISO 8601, 6h, 30d."),
        click.option("--seq", type=Range(), help="Place on the tape: 7, 7..12, 7.. or ..12."),
        click.option("--reason", help="Reason code: schema, error, timeout, crashed, malformed …"),
        click.option("--place", help="Where: schema, ingest or plugin.<name>."),
        click.option("--plugin", help="The plugin that failed; short for --place plugin.<name>."),
        click.option("--topic", help="Event type."),
        click.option("--id", "ids", type=int, multiple=True, help="Number of a dead letter; repeatable."),
    ):
        function = option(function)
    return function


def _select(
    letters: Iterable[DeadLetter],
    ids: tuple[int, ...],
    topic: str | None,
    plugin: str | None,
    place: str | None,
    reason: str | None,
    seq: tuple[int, int] | None,
    since: float | None,
    until: float | None,
) -> list[DeadLetter]:
    return [
        each
        for each in letters
        if (not ids or each.id in ids)
        and topic in (None, each.event_type)
        and (plugin is None or each.place == f"plugin.{plugin}")
        and place in (None, each.place)
        and reason in (None, each.reason)
        and (seq is None or seq[0] <= each.bus_seq <= seq[1])
        and (since is None or each.at >= since)
        and (until is None or each.at < until)
    ]


# -- the bytes -------------------------------------------------------------------------------------


def _bytes_of(tape: Tape, letters: list[DeadLetter]) -> dict[int, bytes]:
    """The bytes of each dead letter by its id: its own, or those on the tape."""
    events = tape.events_at(each.bus_seq for each in letters if each.bus_seq)
    return {each.id: events[each.bus_seq].raw if each.bus_seq in events else each.raw for each in letters}


def _decoded(raw: bytes) -> Any:
    """The value in `raw`, JSON or MessagePack; None where it is neither."""
    try:
        if raw[:1] in (b"{", b"[", b" ", b"\n", b"\t", b"\r"):
            return msgspec.json.decode(raw)
        # a MessagePack map or array: everything else that decodes is text that happens to
        return msgspec.msgpack.decode(raw) if raw and raw[0] >= 0x80 else None
    except (ValueError, RecursionError):
        return None


def _as_dict(letter: DeadLetter, raw: bytes) -> dict[str, Any]:
    """One line of ``--json``: ``raw`` is the bytes as text, or in hexadecimal where they are none."""
    fields = {name: getattr(letter, name) for name in letter.__struct_fields__ if name != "raw"}
    text = _text(raw)
    fields["raw"] = raw.hex() if text is None else text
    fields["raw_encoding"] = "hex" if text is None else "utf-8"
    fields["event"] = _decoded(raw)
    return fields


def _text(raw: bytes) -> str | None:
    try:
        found = raw.decode()
    except UnicodeDecodeError:
        return None
    return found if all(c.isprintable() or c in "\n\t\r" for c in found) else None


def _show(letter: DeadLetter, raw: bytes) -> None:
    for key in ("id", "at", "place", "reason", "detail", "consumer", "event_type", "bus_seq"):
        value = getattr(letter, key)
        if value:
            click.echo(f"{key:<12}{clock(value) if key == 'at' else ascii(value).strip(chr(39))}")
    kind = "JSON" if raw[:1] in (b"{", b"[") else "MessagePack" if _decoded(raw) is not None else "bytes"
    click.echo(f"{'raw':<12}{len(raw):,} bytes, {kind}")
    value = _decoded(raw)
    if value is not None:
        # ASCII, so that text of an event cannot steer the terminal
        import json

        click.echo(json.dumps(value, indent=2, default=repr))
        return
    text = _text(raw)
    click.echo(ascii(text) if text is not None else "\n".join(_dump(raw)))


def _dump(raw: bytes) -> Iterable[str]:
    for start in range(0, len(raw), 16):
        row = raw[start : start + 16]
        shown = "".join(chr(c) if 32 <= c < 127 else "." for c in row)
        yield f"{start:06x}  {row.hex(' '):<47}  {shown}"


# -- commands --------------------------------------------------------------------------------------


@dlq.command("list")
@_chosen
@click.option("--limit", type=click.IntRange(min=1), help="The newest this many.")
@json_option
@with_config
def list_(config: Config, as_json: bool, limit: int | None, **choice: Any) -> None:
    """List dead letters, oldest first; with --json one object a line.

    \b
    tapebus dlq list --plugin telegram
    tapebus dlq list --topic market_data --since 1d
    """
    with open_tape(config) as tape:
        found = _select(tape.dead_letters(), **choice)
        found = found[-limit:] if limit else found
        raw = _bytes_of(tape, found) if as_json else {}
    if as_json:
        for each in found:
            click.echo(msgspec.json.encode(_as_dict(each, raw[each.id]), enc_hook=repr))
        return
    rows = [[d.id, clock(d.at), d.event_type, d.place, d.reason, d.bus_seq or "", d.detail] for d in found]
    table(["id", "buried", "type", "place", "reason", "bus_seq", "detail"], rows, empty="no dead letters")


@dlq.command()
@click.argument("letter_ids", type=int, metavar="[ID]...", nargs=-1)
@_chosen
@json_option
@with_config
def show(config: Config, letter_ids: tuple[int, ...], as_json: bool, **choice: Any) -> None:
    """Show dead letters with their bytes.

    \b
    tapebus dlq show 7
    tapebus dlq show --plugin outcomes --json
    """
    choice["ids"] = (*choice["ids"], *letter_ids)
    _need_choice(False, choice)
    with open_tape(config) as tape:
        found = _select(tape.dead_letters(), **choice)
        raw = _bytes_of(tape, found)
    missing = sorted(set(choice["ids"]) - {each.id for each in found})
    if missing:
        raise UsageError(f"no dead letter {', '.join(map(str, missing))}; see `tapebus dlq list`")
    for place, each in enumerate(found):
        if as_json:
            click.echo(msgspec.json.encode(_as_dict(each, raw[each.id]), enc_hook=repr))
        else:
            click.echo("\n" * bool(place), nl=False)
            _show(each, raw[each.id])


@dlq.command()
@_chosen
@click.option("--all", "everything", is_flag=True, help="Every dead letter.")
@click.option("--everybody", is_flag=True, help="Publish as new events for all consumers, also what one plugin failed.")
@click.option("--keep", is_flag=True, help="Do not purge what was published again.")
@click.option("--endpoint", help="Acknowledged ingest of the bus; default: from the configuration.")
@json_option
@with_config
def replay(
    config: Config, everything: bool, everybody: bool, keep: bool, endpoint: str | None, as_json: bool, **choice: Any
) -> None:
    """Try the chosen dead letters again.

    What a plugin failed on is handed to that consumer alone: nobody else sees it twice, and the dead letter goes with
    the unit of work that handled it. What no consumer has ever seen (place schema or ingest) is published again.

    \b
    tapebus dlq replay --plugin outcomes
    tapebus dlq replay --id 7 --id 8 --keep
    """
    _need_choice(everything, choice)
    with open_tape(config) as tape:
        found = _select(tape.dead_letters(), **choice)
        own = [] if everybody else [each for each in found if each.place.startswith("plugin.") and each.bus_seq]
        outcome = _redeliver(config, tape, own)
        chosen = {each.id for each in own}
        outcome.update(_publish(config, tape, [each for each in found if each.id not in chosen], endpoint, keep))
    if as_json:
        click.echo(msgspec.json.encode(outcome))
    else:
        for key, words in _OUTCOMES.items():
            if outcome.get(key):
                click.echo(f"{len(outcome[key])} {words}{_which(outcome[key]) if key in _TROUBLE else ''}")
        if not found:
            click.echo("0 published again")
    if any(outcome.get(key) for key in _TROUBLE):
        raise TapebusError("not every dead letter could be replayed; see `tapebus dlq list`")


_OUTCOMES = {
    "handled": "handled by the consumer that had failed",
    "failed": "failed again and stay dead letters",
    "waiting": "wait for their consumer, which is not ready",
    "refused": "have no consumer any more",
    "published": "published again and purged",
    "kept": "published again and kept",
    "unreadable": "kept because their bytes are no event",
}
_TROUBLE = ("failed", "waiting", "refused")


def _which(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:10]))
    return f": {shown}{' …' if len(ids) > 10 else ''}"


def _ask(config: Config, command: str, ids: list[int]) -> list[dict[str, Any]]:
    from tapebus.control import request

    chunks = [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]
    return [request(config, {"cmd": command, "ids": chunk}) for chunk in chunks]


def _redeliver(config: Config, tape: Tape, letters: list[DeadLetter]) -> dict[str, list[int]]:
    """Hand `letters` to the consumers that failed on them and wait for what becomes of them."""
    if not letters:
        return {}
    before = max(each.id for each in tape.dead_letters())
    refused = {
        number for answer in _ask(config, "dlq_replay", [each.id for each in letters]) for number in answer["refused"]
    }
    waiting = {each.id: each for each in letters if each.id not in refused}
    asked = {(each.bus_seq, each.place) for each in waiting.values()}
    deadline = time.monotonic() + PATIENCE_S
    with tape.watch() as watch:
        while waiting and time.monotonic() < deadline:
            there = {each.id for each in tape.dead_letters(min(waiting) - 1)}
            waiting = {number: each for number, each in waiting.items() if number in there}
            if waiting:
                watch.wait(0.5)
    again = [each for each in tape.dead_letters(before) if (each.bus_seq, each.place) in asked]
    failed = {(each.bus_seq, each.place) for each in again}
    handled = [
        each.id
        for each in letters
        if each.id not in refused and each.id not in waiting and (each.bus_seq, each.place) not in failed
    ]
    return {
        "handled": handled,
        "failed": [each.id for each in again],
        "waiting": sorted(waiting),
        "refused": sorted(refused),
    }


def _publish(
    config: Config, tape: Tape, letters: list[DeadLetter], endpoint: str | None, keep: bool
) -> dict[str, list[int]]:
    """Publish `letters` as new events, then purge them."""
    raw = _bytes_of(tape, letters)
    ready: list[tuple[int, Recorded]] = []
    for letter in letters:
        value = _decoded(raw[letter.id])
        if isinstance(value, dict):
            with contextlib.suppress(ValueError):
                ready.append((letter.id, from_envelope(value)))
    ids = [number for number, _ in ready]
    if ready:
        with publisher(config, "dlq", endpoint) as pub:
            summary = publish_all((record for _, record in ready), pub)
        if summary.acked < summary.events:
            raise TapebusError(f"{summary.acked} of {summary.events} dead letters published again; none was purged")
        if not keep:
            _ask(config, "dlq_purge", ids)
    return {
        "kept" if keep else "published": ids,
        "unreadable": [each.id for each in letters if each.id not in set(ids)],
    }


@dlq.command()
@_chosen
@click.option("--all", "everything", is_flag=True, help="Every dead letter.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@with_config
def purge(config: Config, everything: bool, yes: bool, as_json: bool, **choice: Any) -> None:
    """Delete the chosen dead letters for good.

    \b
    tapebus dlq purge --plugin telegram --until 7d
    """
    _need_choice(everything, choice)
    with open_tape(config) as tape:
        ids = [each.id for each in _select(tape.dead_letters(), **choice)]
    if ids and not yes:
        click.confirm(f"Delete {len(ids)} dead letters for good?", abort=True, err=True)
    _ask(config, "dlq_purge", ids)
    click.echo(msgspec.json.encode({"purged": ids}) if as_json else f"{len(ids)} purged")


def _need_choice(everything: bool, choice: dict[str, Any]) -> None:
    if not everything and not any(value not in (None, ()) for value in choice.values()):
        options = ", ".join(f"--{'id' if name == 'ids' else name}" for name in choice)
        raise UsageError(f"choose dead letters with one of {options}, or say --all")

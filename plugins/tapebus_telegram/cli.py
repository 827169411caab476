"""The command ``tapebus telegram``."""

from __future__ import annotations

import json
from typing import Any

import click

from tapebus.cli.common import WIDTH, clock, cut, json_option, open_tape, visible, with_config
from tapebus.config import Config
from tapebus_telegram.outbox import rendered

_COLOURS = {"sent": "green", "queued": "cyan", "dropped": "red", "dry_run": "yellow"}


@click.command("telegram", short_help="Show the newest messages: sent, queued, or what a dry run would send.")
@click.option("--chat", help="Only this chat.")
@click.option("--topic", help="Only messages about this event type.")
@click.option("--last", type=click.IntRange(1), default=10, show_default=True, help="The newest so many, in order.")
@json_option
@with_config
def telegram(config: Config, chat: str | None, topic: str | None, last: int, as_json: bool) -> None:
    """Show the newest messages, with what became of each: sent, queued, dropped, or dry_run.

    Without a token all are dry_run: shown here and nowhere else. What quiet hours hold is not a message yet. Reads what
    the bus has on disk; it need not run.

    \b
    tapebus telegram
    tapebus telegram --chat 987654321 --last 30
    tapebus telegram --topic signal_outcome --json
    """
    with open_tape(config) as tape:
        found = rendered(tape.state("telegram"))
    chosen = [each for each in found if chat in (None, str(each["chat"])) and topic in (None, each["topic"])][-last:]
    if as_json:
        click.echo(json.dumps(chosen))
        return
    if not chosen:
        click.echo("no messages")
    for each in chosen:
        _show(each)


def _show(message: dict[str, Any]) -> None:
    state = click.style(f"{message['status']:<8}", fg=_COLOURS.get(message["status"]))
    note = f" ({message['note']})" if message["note"] else ""
    where = str(message["chat"]) + (f" topic {message['thread_id']}" if message["thread_id"] else "")
    place = f" @{message['bus_seq']}" if message["bus_seq"] else ""  # answers and digests come from no event
    head = f"{clock(message['at'])}  {where}  {message['topic']}{place}{note}"
    click.echo(f"{state} {cut(visible(head), WIDTH - 9)}")
    for line in message["text"].splitlines():
        click.echo(cut(visible(f"  {line}"), WIDTH))

"""The command ``tapebus alerts``."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from typing import Any

import click

from tapebus.cli.common import When, clock, json_option, open_tape, table, with_config
from tapebus.config import Config
from tapebus_alerts.watch import field, span

_COLOURS = {"critical": "red", "error": "red", "warning": "yellow", "cleared": "green"}


@click.command(short_help="Show which alerts are raised.")
@click.option("--all", "everything", is_flag=True, help="Also those that are over.")
@click.option("--since", type=When(), help="Of those that are over, only from here: Unix seconds, ISO 8601, 6h, 30d.")
@json_option
@with_config
def alerts(config: Config, everything: bool, since: float | None, as_json: bool) -> int:
    """Show which alerts are raised, since when, and the value that was told last.

    Read from the tape, so it works whether the bus runs or not. Exits 1 while an alert is raised, 0 while none is.
    What is raised is always shown, however old.

    \b
    tapebus alerts
    tapebus alerts --all --since 24h
    tapebus alerts --json | jq '.[] | select(.severity == "critical")'
    """
    with open_tape(config) as tape:
        found = standing(tape.read(topics=["alert"]))
    raised = sorted((each for each in found if each["state"] == "raised"), key=lambda each: -each["since"])
    over = sorted((each for each in found if each["state"] == "cleared"), key=lambda each: -each["at"])
    over = [each for each in over if since is None or each["at"] >= since]
    shown = [*raised, *over] if everything else raised
    if as_json:
        click.echo(json.dumps(shown))
    else:
        _print(shown, time.time(), everything)
    return 1 if raised else 0


def standing(events: Iterable[Any]) -> list[dict[str, Any]]:
    """How each alert stands after `events`, which are all ``alert``; one for each source and name."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        data = event.data
        key = event.source, field(data, "name")
        before = found.get(key)
        cleared = field(data, "state") == "cleared"
        goes_on = before is not None and before["state"] == "raised"
        row: dict[str, Any] = {
            "name": key[1],
            "source": event.source,
            "state": "cleared" if cleared else "raised",
            # a clear is told as mere information: what counts is how bad it was
            "severity": before["severity"] if cleared and before is not None else field(data, "severity"),
            "since": before["since"] if goes_on and before is not None else field(data, "since") or event.timestamp,
            "at": event.timestamp,
            "value": field(data, "value"),
            "threshold": field(data, "threshold"),
            "unit": field(data, "unit"),
            "message": field(data, "message"),
            "bus_seq": event.bus_seq,
        }
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def _print(rows: list[dict[str, Any]], now: float, everything: bool) -> None:
    states = ["cleared" if each["state"] == "cleared" else each["severity"] for each in rows]
    cells = []
    for each, state in zip(rows, states, strict=True):
        end = each["at"] if state == "cleared" else now
        since, lasted = _short(each["since"], now), span(max(0.0, end - each["since"]))
        cells.append((state, each["name"], since, lasted, _figure(each["value"], each["unit"]), _message(each)))
    empty = "no alerts" if everything else "no alert is raised"
    columns = ("state", "alert", "since (UTC)", "for", "value", "message")
    table(columns, cells, empty=empty, colours=[_COLOURS.get(each) for each in states])


def _short(at: float, now: float) -> str:
    """The time of day within the last day, else the day and the time."""
    text = clock(at)
    return text[11:] if 0 <= now - at < 86400 else text[5:16]


def _message(row: dict[str, Any]) -> str:
    """What was told, without the limit at its end: the columns are narrow, and --json has it."""
    return re.sub(r" \(limit [^()]*\)$", "", row["message"] or "")


def _figure(value: float | None, unit: str | None) -> str:
    return "" if value is None else f"{value:,.4g} {unit or ''}".strip()

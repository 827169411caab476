"""The command ``tapebus alerts``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import click

from tapebus.cli.common import When, clock, json_option, open_tape, table, with_config
from tapebus.config import Config
from tapebus_alerts.watch import field, span


@click.command(short_help="Show which alerts are raised.")
@click.option("--all", "everything", is_flag=True, help="Also those that are over.")
@click.option("--since", type=When(), help="Only alerts told since this: Unix seconds, ISO 8601, 6h, 30d.")
@json_option
@with_config
def alerts(config: Config, everything: bool, since: float | None, as_json: bool) -> int:
    """Show which alerts are raised, since when, and the last value told against its threshold.

    Read from the tape, so it works whether the bus runs or not. Exits 1 while an alert is raised, 0 while none is.

    \b
    tapebus alerts
    tapebus alerts --all --since 24h
    tapebus alerts --json | jq '.[] | select(.severity == "critical")'
    """
    with open_tape(config) as tape:
        found = standing(tape.read(topics=["alert"], since=since))
    raised = sorted((each for each in found if each["state"] == "raised"), key=lambda each: -each["since"])
    over = sorted((each for each in found if each["state"] == "cleared"), key=lambda each: -each["at"])
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
    columns = ["severity", "alert", "since", "for", "value", "limit", "message"]
    cells = []
    for each in rows:
        end = each["at"] if each["state"] == "cleared" else now
        cells.append(
            (
                "cleared" if each["state"] == "cleared" else each["severity"],
                each["name"],
                clock(each["since"]),
                span(max(0.0, end - each["since"])),
                _figure(each["value"]),
                _figure(each["threshold"], each["unit"]),
                each["message"],
            )
        )
    table(columns, cells, empty="no alerts" if everything else "no alert is raised")


def _figure(value: float | None, unit: str | None = None) -> str:
    if value is None:
        return ""
    return f"{value:,.10g} {unit}" if unit else f"{value:,.4g}"

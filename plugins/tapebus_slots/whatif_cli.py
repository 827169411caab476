"""The command ``tapebus whatif``."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import click

from tapebus.cli.common import When, cut, json_option, open_tape, progress_bar, table, with_config
from tapebus.config import Config
from tapebus.errors import UsageError
from tapebus_slots.recorded import Recording
from tapebus_slots.whatif import Change, Simulation, compare


def _band(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*", value)
    band = (float(found[1]), float(found[2])) if found else None
    if band is None or not band[0] <= band[1] <= 100:
        raise click.BadParameter(f"{value!r} is no band; write two percentages such as 75-92, the lower one first")
    return band


_percent = click.FloatRange(0, 100)


@click.command("whatif", short_help="Judge recorded signals again by another gate.")
@click.option(
    "--band", metavar="LOW-HIGH", callback=_band, help="Another band of confidence, both ends included, such as 75-92."
)
@click.option("--slots", type=click.IntRange(0, 10_000), help="Another number of slots.")
@click.option("--risk", type=_percent, help="Another risk per trade, in percent.")
@click.option("--total-risk", type=_percent, help="Another total open risk, in percent.")
@click.option("--confidence", type=click.Choice(["raw", "calibrated"]), help="Judge by this confidence.")
@click.option("--since", type=When(), help="Signals from here: Unix seconds, ISO 8601, 6h, 30d.")
@click.option("--until", type=When(), help="Signals before this.")
@click.option("--user", help="For this user; the default one otherwise.")
@click.option("--balance", type=click.FloatRange(min=0, min_open=True), help="Where the tape has no account figures.")
@json_option
@with_config
def whatif(
    config: Config,
    band: tuple[float, float] | None,
    slots: int | None,
    risk: float | None,
    total_risk: float | None,
    confidence: str | None,
    since: float | None,
    until: float | None,
    user: str | None,
    balance: float | None,
    as_json: bool,
) -> None:
    """Run the gate over recorded signals again, as configured and with other limits, and compare.

    Uses the outcomes on the tape. Fills are assumed: a signal the gate lets through counts as filled at its entry
    and holds a slot until its outcome. Auto-fire is taken as on and the kill switch as off. A pattern with a band of
    its own keeps it. Only reads the tape; the bus may run.

    \b
    tapebus whatif --band 75-92 --slots 8 --since 30d
    tapebus whatif --risk 2 --total-risk 20 --json
    tapebus whatif --band 60-100 --balance 10000
    """
    change = Change(band, slots, risk, total_risk, confidence)
    if change == Change():
        raise UsageError("nothing to compare: give --band, --slots, --risk, --total-risk or --confidence")
    now, then = Simulation(Change()), Simulation(change)
    counted: Counter[str] = Counter()
    with open_tape(config) as tape, progress_bar("reading signals", 1.0) as progress:
        recording = Recording(
            tape,
            config.plugin("slots"),
            config.shared,
            user,
            since=since,
            until=until,
            balance=balance,
            progress=progress,
        )
        for case in recording.cases():
            counted.update(
                signals=1,
                no_outcome=case.result is None,
                assumed_quotes=case.assumed,
                no_account=case.account is None,
            )
            for each in (now, then):
                each.judge(case.signal, case.result, case.account, case.quotes, case.config, case.known)
    keys = ("signals", "no_outcome", "assumed_quotes", "no_account")
    found = {
        "user_id": recording.user,
        **{key: counted[key] for key in keys},
        "repeated": recording.repeated,
        "fills": "assumed",
        **compare(now, then),
    }
    if as_json:
        click.echo(json.dumps(found))
    else:
        _show(found)


_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
    ("fires", lambda each: each["fires"]),
    ("won of decided", lambda each: f"{each['wins']} of {each['wins'] + each['losses']}"),
    ("win rate, 95 %", lambda each: _rate(each)),
    ("other ends", lambda each: each["others"]),
    ("no outcome yet", lambda each: each["no_outcome"]),
    ("expectancy R", lambda each: _figure(each["expectancy_r"], "+.3f")),
    ("sum of R", lambda each: _figure(each["sum_r"], "+.2f")),
    ("pips", lambda each: _figure(each["pips"], "+.1f")),
    ("money", lambda each: _figure(each["money"], "+,.2f")),
    ("refused when full", lambda each: each.get("refused_because_full", "")),
    ("  only for that", lambda each: each.get("refused_only_because_full", "")),
    ("most slots at once", lambda each: each.get("peak_slots", "")),
)


def _show(found: dict[str, Any]) -> None:
    click.echo(f"{found['signals']:,} signals judged for user {found['user_id']}; fills are assumed")
    notes = {
        "no_outcome": "have no outcome yet",
        "assumed_quotes": "were imported: their quotes are assumed",
        "no_account": "came before any account figures: give --balance",
    }
    for key, text in notes.items():
        if found[key]:
            click.echo(f"{found[key]:,} {text}")
    click.echo()
    names = ("configured", "changed", "gained", "given_up")
    rows = [[title, *(str(cell(found[name])) for name in names)] for title, cell in _ROWS]
    table(["", "configured", "changed", "gained", "given up"], rows)
    now, then = found["configured"]["refused"], found["changed"]["refused"]
    if now or then:
        click.echo()
        codes = sorted(now | then, key=lambda code: (-now.get(code, 0), code))
        table(["refused for", "configured", "changed"], [[each, now.get(each, 0), then.get(each, 0)] for each in codes])
    small = [name for name in ("configured", "changed") if found[name]["wins"] + found[name]["losses"] < 30]
    if small:
        click.echo(cut(f"\nfewer than 30 decided trades ({', '.join(small)}): the interval counts, not the rate", 100))


def _rate(each: dict[str, Any]) -> str:
    if each["interval"] is None:
        return "-"
    low, high = (100 * end for end in each["interval"])
    return f"{100 * each['win_rate']:.1f}% [{low:.1f}-{high:.1f}]"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

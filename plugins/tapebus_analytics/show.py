"""A report as people read it: a table of at most 100 columns, intervals drawn to scale."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tapebus.cli.common import clock, visible
from tapebus_analytics.report import SPEAK_FROM, UNDECIDED, plural

WIDTH = 100
#: Characters of a drawn interval; one is so many points.
BAR = 19
_COLOURS = {"above breakeven": "green", "below breakeven": "red"}
_FIELDS = {"brier": "Brier score", "reference": "saying the base rate", "skill": "skill", "ece": "calibration error"}


def report(found: dict[str, Any]) -> None:
    """Print what `tapebus_analytics.cli.result` made."""
    console = Console(highlight=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    with console.capture() as shown:
        _report(console, found)
    click.echo("\n".join(line.rstrip() for line in shown.get().splitlines()))  # tables are padded


def _report(console: Console, found: dict[str, Any]) -> None:
    if found["by"] == "calibration":
        _calibration(console, found["calibration"])
        return
    rows: dict[str, dict[str, Any]] = found[plural(found["by"])]
    if rows:
        console.print(_table(console, found["by"], rows, found["overall"]))
        _notes(console, found, rows)
    else:
        console.print("no signals in this time and of this source")
    for name, each in found.get("disabled", {}).items():
        since = f" since {clock(each['since'])}" if each["since"] else ""
        console.print(f"[red]{_safe(name)} is disabled[/] by {_safe(each['by'] or 'the rule')}{since}")
    if found["recommendation"]:
        console.print(f"[yellow]{_safe(found['recommendation'])}[/]")


def _table(console: Console, by: str, rows: dict[str, dict[str, Any]], overall: dict[str, Any]) -> Table:
    """The rows, and their intervals drawn where the names leave room for that."""
    for drawn in (True, False):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(by.replace("-", " "), overflow="fold")
        for name in ("won", "rate", "95 %"):
            table.add_column(name, justify="right", no_wrap=True)
        if drawn:
            table.add_column("0" + "50".center(BAR - 4) + "100", no_wrap=True)
        for name in ("even", "R", "PF", "other"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, row in rows.items():
            table.add_row(*_cells(name, row, drawn))
        if len(rows) > 1:
            table.add_row(*_cells("all", overall, drawn), style="bold")
        if console.measure(table, options=console.options.update(max_width=1000)).maximum <= console.width:
            break
    return table


def _cells(name: str, row: dict[str, Any], drawn: bool) -> list[str]:
    colour = _COLOURS.get(row.get("verdict") or "", "")
    bar = draw(row["low"], row["high"], row["wr"], row["breakeven"])
    undecided = sum(row[key] for key in UNDECIDED.values())
    return [
        _safe(name or "(none)"),
        f"{row['wins']} of {row['n']}",
        f"{row['wr']:.1f}" if row["n"] >= SPEAK_FROM else "",
        f"{row['low']:.0f}-{row['high']:.0f}" if row["n"] else "",
        *([f"[{colour}]{bar}[/]" if colour else bar] if drawn else []),
        "" if row["breakeven"] is None else f"{row['breakeven']:.0f}",
        "" if row["expectancy_r"] is None else f"{row['expectancy_r']:+.2f}",
        "" if row["profit_factor"] is None else f"{row['profit_factor']:.2f}",
        f"{undecided}" if undecided else "",
    ]


def _safe(text: str) -> str:
    """A name from the tape, without what would steer the terminal or `rich`."""
    return escape(visible(text))


def draw(low: float, high: float, rate: float | None, mark: float | None = None) -> str:
    """An interval of percentages as a line, its rate a dot, `mark` (breakeven) a bar; empty where nothing is known."""
    if rate is None:
        return ""

    def place(percent: float) -> int:
        return round(percent / 100 * (BAR - 1))

    line = [" "] * BAR
    line[place(low) : place(high) + 1] = "─" * (place(high) - place(low) + 1)
    if mark is not None:
        line[place(mark)] = "│"
    line[place(rate)] = "●"
    return "".join(line).rstrip()


def _notes(console: Console, found: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    overall = found["overall"]
    console.print("\n".join(_lines(overall, console.width)))
    counts = [f"{overall[key]} {key}" for key in UNDECIDED.values() if overall[key]]
    if counts:
        console.print(f"neither won nor lost: {', '.join(counts)}")
    if overall["repeats"]:
        minutes = found["cluster_s"] / 60
        console.print(f"{overall['repeats']} repeats of a signal within {minutes:g} minutes are not counted")
    for name, row in rows.items():
        if row["verdict"]:
            key = "p_value_adjusted" if row["verdict"].startswith("above") else "p_worse_adjusted"
            colour = _COLOURS[row["verdict"]]
            console.print(f"[{colour}]{_safe(name)} is {row['verdict']}[/], adjusted p = {row[key]:.2g}")
    if not any(row["verdict"] for row in rows.values()):
        console.print("no rate here is proven to differ from breakeven")


def _lines(overall: dict[str, Any], width: int) -> list[str]:
    """The whole report in a line, or in two where that is too long: as much of it as is known."""
    parts = [f"{overall['signals']} signal{'s' * (overall['signals'] != 1)}, {overall['resolved']:g} % resolved"]
    if overall["pips"] is not None:
        parts.append(f"{overall['pips']:+.1f} pips")
    if overall["mean_duration_s"]:
        parts.append(f"{overall['mean_duration_s'] / 60:.1f} minutes on average")
    if overall["expectancy_r"] is not None:
        parts.append(f"worst drawdown {overall['max_drawdown_r']:.1f} R")
    low, high = overall["confidence"]
    parts.append(f"confidence {low:.1f}-{high:.1f}")
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) < width:
            lines[-1] += f", {part}"
        else:
            lines[-1] += ","
            lines.append(part)
    return lines


def _calibration(console: Console, found: dict[str, Any]) -> None:
    stated = found["stated"]
    if stated is None:
        console.print("nothing is decided in this time and of this source")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("confidence", "stated", "won", "observed", "95 %"):
        table.add_column(name, justify="left" if name == "confidence" else "right", no_wrap=True)
    table.add_column("0" + "50".center(BAR - 4) + "100", no_wrap=True)
    for each in stated["bins"]:
        low, high = (100 * end for end in each["interval"])
        off = not low <= each["stated"] <= high
        bar = draw(low, high, 100 * each["observed"], each["stated"])
        table.add_row(
            f"{each['low']} to {each['high']}",
            f"{each['stated']:.1f}",
            f"{each['wins']} of {each['n']}",
            f"{100 * each['observed']:.1f}" if each["n"] >= SPEAK_FROM else "",
            f"{low:.0f}-{high:.0f}",
            f"[red]{bar}[/]" if off else bar,
        )
    console.print(table)
    console.print("● observed, │ stated; red: what was stated lies outside the interval\n")
    _scores(console, found)


def _scores(console: Console, found: dict[str, Any]) -> None:
    later = found["later"]
    columns = [("as stated", found["stated"])]
    if later["stated"] is not None:
        columns += [("later", later["stated"]), ("later, calibrated", later["calibrated"])]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("trades", *(str(score["n"]) for _, score in columns))
    for key, label in _FIELDS.items():
        table.add_row(label, *("" if score[key] is None else f"{score[key]:.4f}" for _, score in columns))
    console.print(table)
    console.print(
        f"calibrated: by a curve ({later['method']}) of the {later['fitted_on']} trades before the later ones"
    )
    force = found["in_force"]
    text = "none" if force is None else f"version {force['version']}, {force['method']} over {force['n']} trades"
    console.print(f"calibration in force: {text}")

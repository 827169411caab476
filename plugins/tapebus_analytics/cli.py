"""The command ``tapebus analytics``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from tapebus.cli.common import When, json_option, open_tape, progress_bar, with_config

if TYPE_CHECKING:
    from tapebus.config import Config
    from tapebus_analytics.report import Report

KINDS = ("pattern", "symbol", "session", "pattern-symbol", "confidence", "hour", "day", "calibration")
_SIGNALS = ["signal_generated", "signal_imported", "signal_outcome"]


@click.command(short_help="Win rates with what they prove, and what confidence is worth.")
@click.option("--by", type=click.Choice(KINDS), default="pattern", show_default=True, help="What to group by.")
@click.option("--since", metavar="TIME", help="Event time from here: Unix seconds, ISO 8601, 6h, 30d.")
@click.option("--until", metavar="TIME", help="Event time before this.")
@click.option("--source", type=click.Choice(("live", "imported", "all")), default="all", show_default=True)
@click.option("--clusters/--no-clusters", default=True, help="Count repeats of a signal once (as configured), or all.")
@json_option
@with_config
def analytics(
    config: Config, by: str, since: str | None, until: str | None, source: str, clusters: bool, as_json: bool
) -> None:
    """Win rates of what is on the tape, with interval and breakeven; the bus need not run.

    A rate is WIN / (WIN + LOSS). Sessions and hours are those in which a signal was opened, hours in UTC.

    \b
    tapebus analytics --since 6h
    tapebus analytics --by pattern-symbol --source imported
    tapebus analytics --by calibration --no-clusters
    tapebus analytics --since 2025-09-01 --json
    """
    from tapebus_analytics import show
    from tapebus_analytics.config import load
    from tapebus_analytics.report import Report
    from tapebus_trading.sessions import hours

    own = load(config.plugin("analytics"))
    when = {name: When().convert(text, None, None) for name, text in (("since", since), ("until", until)) if text}
    report = Report(by, own, own.cluster_s if clusters else 0.0, source, hours(config.shared))
    with open_tape(config) as tape:
        with progress_bar("reading the tape", tape.last_seq) as progress:
            for event in tape.read(topics=_SIGNALS, **when):  # type: ignore[arg-type]
                report.add(event)
                progress(event.bus_seq)
        report.finish()
        status = {event.data.pattern_type: event.data for event in tape.read(topics=["pattern_status"])}
        fitted = next(tape.read(topics=["calibration"], last=1), None)
    found = result(report, since, until, status, fitted.data if fitted is not None else None)
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        show.report(found)


def result(report: Report, since: str | None, until: str | None, status: dict[str, Any], fitted: Any) -> dict[str, Any]:
    """The report as plain values, in the shape that ``--json`` prints."""
    from tapebus_analytics.report import plural

    overall = report.overall.row()
    found: dict[str, Any] = {
        "timeframe": f"{since or ''}..{until}" if until else since or "all",
        "total_signals": report.overall.signals,
        "by": report.by,
        "source": report.source,
        "cluster_s": report.clusters.width,
    }
    if report.by == "calibration":
        from tapebus_analytics.calibrated import calibration

        return {**found, "overall": overall, "calibration": calibration(report, fitted)}
    rows = report.rows()
    if report.by == "pattern":
        for name, row in rows.items():
            row["status"] = status[name].status if name in status else "active"
        found["disabled"] = {
            name: {"by": each.by, "since": each.since, "reason": each.reason}
            for name, each in status.items()
            if each.status == "disabled"
        }
    found[plural(report.by)] = rows
    found["recommendation"] = "; ".join(report.recommendations())
    return {**found, "overall": overall}

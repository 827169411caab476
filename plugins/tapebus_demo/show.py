"""How the demo looks: a live table on a terminal, plain lines in a pipe, and the summary at the end."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from tapebus_demo.session import Options

WIDTH = 100
#: Seconds between two lines in a pipe.
LINE_S = 3.0


def _console() -> Console:
    console = Console(highlight=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    return console


class Progress:
    """Shows live counts; a context manager, so that a terminal is always left as it was found."""

    def __init__(self, options: Options, quiet: bool) -> None:
        self._console = _console()
        self._quiet = quiet
        self._options = options
        self._live: Live | None = None
        self._began = time.monotonic()
        self._line_at = 0.0
        self._last = (self._began, 0)

    def __enter__(self) -> Progress:
        if self._quiet:
            return self
        options = self._options
        prices = (
            f"recorded prices ({os.path.basename(options.ticks)})"
            if options.ticks
            else f"SIMULATED prices, seed {options.seed}"
        )
        trades = "the trades are simulated, nothing leaves this machine"
        self._console.print(f"[bold]tapebus demo[/]: {escape(prices)}; {trades}")
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, phase: str, stats: dict[str, Any]) -> None:
        """Take the newest statistics."""
        if self._quiet:
            return
        now = time.monotonic()
        stored = stats["bus"]["stored"]
        rate = (stored - self._last[1]) / max(1e-9, now - self._last[0])
        if self._live is not None:
            self._last = (now, stored)
            self._live.update(self._table(phase, stats, rate))
        elif now >= self._line_at:
            self._last = (now, stored)
            self._line_at = now + LINE_S
            shown = ", ".join(f"{name} {value}" for name, value in _figures(stats, rate))
            self._console.print(f"{now - self._began:5.1f} s  {phase}: {shown}", soft_wrap=True)

    def _table(self, phase: str, stats: dict[str, Any], rate: float) -> Table:
        table = Table(title=f"{phase}, {time.monotonic() - self._began:.0f} s", title_justify="left", box=None)
        names, values = zip(*_figures(stats, rate), strict=True)
        for name in names:
            table.add_column(name, justify="right")
        table.add_row(*(str(value) for value in values))
        return table


def _figures(stats: dict[str, Any], rate: float) -> list[tuple[str, Any]]:
    plugins = stats["plugins"]
    outcomes, slots = plugins["outcomes"]["metrics"], plugins["slots"]["metrics"]
    return [
        ("on tape", f"{stats['bus']['stored']:,}"),
        ("events/s", f"{rate:,.0f}"),
        ("signals", outcomes["opened"]),
        ("open", outcomes["open"]),
        ("won", outcomes["wins"]),
        ("lost", outcomes["losses"]),
        ("fired", slots["auto_fires"]),
        ("slots", slots["slots"]),
        ("unexplained", stats["bus"]["unexplained"]),
    ]


def print_summary(summary: dict[str, Any]) -> None:
    """The summary for people; at most 100 columns."""
    console = _console()
    _print_figures(console, summary)
    _print_books(console, summary["books"])
    _print_patterns(console, summary)
    _print_story(console, summary["story"])
    _print_telegram(console, summary["telegram"])
    _print_next(console, summary)


def _head(console: Console, text: str) -> None:
    console.print(f"\n[bold]{escape(text)}[/]")


def _print_figures(console: Console, summary: dict[str, Any]) -> None:
    burst, latency, tape, signals = (summary[key] for key in ("burst", "latency_ms", "tape", "signals"))
    _head(console, "The bus")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_row(
        "throughput",
        f"{burst['events_per_s']:,.0f} events/s to disk, {burst['handled_per_s']:,.0f} events/s through all plugins",
    )
    table.add_row("", f"{burst['events']:,} events flat out from {burst['processes']} processes on this machine")
    if latency["n"]:
        text = f"p50 {latency['p50']:.2f} ms, p99 {latency['p99']:.2f} ms, through the disk ({latency['n']:,} probes)"
        table.add_row("publish to plugin", text)
    table.add_row(
        "on the tape",
        f"{tape['events']:,} events, {tape['bytes_per_event']:.1f} bytes each "
        f"({tape['raw_bytes_per_event']:.0f} as sent)",
    )
    table.add_row(
        "signals",
        f"{signals['generated']} generated, {signals['fired']} fired, {signals['opened']} slots opened, "
        f"{signals['outcomes']} outcomes",
    )
    slots = summary["slots"]
    table.add_row("slots", f"{slots['used']} of {slots['max']} used at the end, {slots['peak']} at most")
    refusals = ", ".join(f"{reason} {n}" for reason, n in list(signals["refusals"].items())[:3])
    refused = signals["verdicts"] - signals["fired"]
    # one refusal may have several reasons, so their numbers add up to more
    why = f", by reason: {refusals}" if refusals else ""
    table.add_row("the gate refused", escape(f"{refused} of {signals['verdicts']} signals{why}"))
    dead = summary["dead_letters"]
    table.add_row("dead letters", f"{dead['count']} (crossed quotes and broken messages, sent on purpose)")
    console.print(table)


def _print_books(console: Console, books: dict[str, Any]) -> None:
    closed = books["agree"] and not books["unexplained"]
    _head(console, f"Books: {'closed' if closed else 'NOT CLOSED'}, unexplained = {books['unexplained']}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("process", "published", "on the tape", "refused or lost"):
        table.add_column(name, justify="left" if name == "process" else "right")
    for row in books["rows"]:
        table.add_row(row["process"], f"{row['published']:,}", f"{row['stored']:,}", str(row["lost"]))
    console.print(table)


def _print_patterns(console: Console, summary: dict[str, Any]) -> None:
    _head(console, "Outcomes by pattern")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("pattern", "signals", "n decided", "wins", "timeouts", "win rate", "95 % interval", "mean R"):
        table.add_column(name, justify="left" if name == "pattern" else "right", no_wrap=True)
    for row in summary["patterns"]:
        rate = "-" if row["win_rate"] is None else f"{row['win_rate']:.0%}"
        mean = "-" if row["mean_r"] is None else f"{row['mean_r']:+.2f}"
        interval = f"{row['low']:.0%} to {row['high']:.0%}"
        figures = (str(row[key]) for key in ("signals", "n", "wins", "timeouts"))
        table.add_row(row["pattern"], *figures, rate, interval, mean)
    console.print(table)
    console.print("Signals are drawn at random: no pattern has an edge here, and the spread costs a little each time.")


def _print_story(console: Console, story: dict[str, Any] | None) -> None:
    if story is None:
        _head(console, "No signal went all the way in so short a session; try more --seconds")
        return
    _head(console, f"The way of one signal: {story['signal_id']} ({story['pattern']})")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for step in story["steps"]:
        table.add_row(f"+{step['ms']:,.2f} ms", step["step"], escape(step["what"]))
    console.print(table)


def _print_telegram(console: Console, telegram: dict[str, Any]) -> None:
    _head(console, f"Telegram would have sent {telegram['count']} messages (dry run); the newest of each kind")
    for example in telegram["examples"]:
        first, *rest = example["text"].splitlines()
        console.print(escape("  | " + first), overflow="ellipsis", no_wrap=True)
        for line in rest:
            console.print(escape("  |   " + line), overflow="ellipsis", no_wrap=True)


def _print_next(console: Console, summary: dict[str, Any]) -> None:
    _head(console, "What to type next")
    story = summary["story"]
    if summary["kept"]:
        where = f"--data-dir {summary['data_dir']}"
        lines = [f"tapebus query {where} --topic signal_outcome --limit 5", f"tapebus dlq list {where}"]
        if story is not None:
            lines.insert(0, f"tapebus explain {where} {story['signal_id']}")
        lines.append(f"tapebus run --config {summary['config']}")
    else:
        lines = ["tapebus demo --keep      # then look at the tape with tapebus query and tapebus dlq"]
        if summary["simulated"]:
            lines.append("tapebus demo --ticks FILE.zip   # the same with recorded prices")
        lines.append("tapebus run              # a bus of your own, on the usual ports")
    for line in lines:
        console.print("  " + escape(line), soft_wrap=True)
    console.print(f"\nDone in {summary['seconds']:.0f} s.")

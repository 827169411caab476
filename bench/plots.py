"""A run as small SVG files that read well on light and dark, the same bytes for the same figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Figures = dict[str, dict[str, Any]]
GREY, BLUE, ORANGE, GREEN = "#808080", "#3987e5", "#d95926", "#199e70"
STYLE = {
    "svg.hashsalt": "tapebus",
    "svg.fonttype": "none",  # text stays text, and the file small
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "figure.figsize": (5.6, 2.8),
    "lines.markersize": 4,
}


def series(figures: Figures, start: str, figure: str) -> list[tuple[float, float]]:
    """(step, median) of the benchmarks called ``<start><step>``, such as ``batch-100`` or ``query-10M``."""
    found = []
    for name, each in figures.items():
        bench, _, rest = name.partition(".")
        if bench.startswith(start) and rest == figure:
            step = bench.removeprefix(start)
            scale = {"M": 1e6, "k": 1e3}.get(step[-1], 1.0)
            found.append((float(step.rstrip("Mk")) * scale, float(each["median"])))
    return sorted(found)


def lines(axes: Any, drawn: dict[str, list[tuple[float, float]]], x: str, y: str) -> bool:
    """Each of `drawn` as a line with its name at its end; False when there is nothing to draw."""
    colours = (BLUE, ORANGE, GREEN, GREY)
    drawn = {name: points for name, points in drawn.items() if points}
    for (name, points), colour in zip(drawn.items(), colours, strict=False):
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if len(drawn) > 1:
        axes.legend(frameon=False)
    return bool(drawn)


def by_batch(axes: Any, figures: Figures) -> bool:
    points = [(x, y / 1e6) for x, y in series(figures, "batch-", "events_per_s")]
    return lines(axes, {"PUSH": points}, "events in a frame", "million events/s")


def percentiles(axes: Any, figures: Figures) -> bool:
    """Latency by percentile; the axis is logarithmic, since the tail is what differs."""
    names = {
        "after the fsync": "latency",
        "early delivery": "latency-early",
        "plain pyzmq, ipc": "pyzmq-ipc",
        "plain pyzmq, tcp": "pyzmq-tcp",
    }
    places = ("p50", "p99", "p999")
    some = False
    for (label, bench), colour in zip(names.items(), (BLUE, ORANGE, GREEN, GREY), strict=True):
        values = [figures.get(f"{bench}.{place}_ms", {}).get("median") for place in places]
        if None not in values:
            some = True
            axes.plot(range(len(places)), values, marker="o", color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(places)), ["50 %", "99 %", "99.9 %"])
    axes.set_xlabel("percentile, at 1,000 events/s")
    axes.set_ylabel("ms from publish to handler")
    if some:
        axes.legend(frameon=False)
    return some


def by_signals(axes: Any, figures: Figures) -> bool:
    return lines(
        axes, {"CPU": series(figures, "signals-", "bus_cpu_us_per_event")}, "open signals", "µs of bus CPU a quote"
    )


def by_length(axes: Any, figures: Figures) -> bool:
    questions = {
        "by correlation id": "correlation_id_first_p50_ms",
        "last 1,000 quotes": "last_1000_market_data_first_p50_ms",
        "last 1,000 signals": "last_1000_signal_generated_first_p50_ms",
    }
    drawn = {label: series(figures, "query-", figure) for label, figure in questions.items()}
    return lines(axes, drawn, "events on the tape", "ms, reader just opened")


PLOTS = {
    "throughput-by-batch": ("Throughput by the size of a frame", by_batch),
    "latency": ("Latency by percentile", percentiles),
    "cost-by-signals": ("Cost of a quote by open signals", by_signals),
    "query-by-length": ("Questions by the length of the tape", by_length),
}


def draw(results: dict[str, Any], directory: Path) -> list[tuple[str, Path]]:
    """Write the plots that the run has figures for; (title, file) of each."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    made = []
    with matplotlib.rc_context(STYLE):
        for name, (title, plot) in PLOTS.items():
            figure, axes = pyplot.subplots(layout="constrained")
            axes.set_title(title, loc="left")
            if plot(axes, results["figures"]):
                file = directory / f"{name}.svg"
                metadata = {"Date": None, "Creator": None, "Title": title}
                figure.savefig(file, transparent=True, metadata=metadata)
                made.append((title, file))
            pyplot.close(figure)
    return made

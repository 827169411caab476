"""``python -m bench``: throughput, latency and cost of a real bus with all plugins and the tape on."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from bench import commits, latency, machine, plan, query, relay, report, throughput, topologies
from rich.console import Console

BUILD = machine.ROOT / "build" / "bench"
PAGE = machine.ROOT / "docs" / "performance.md"
README = machine.ROOT / "README.md"
#: Columns of what goes into a pipe or a file.
COLUMNS = 100


def console() -> Console:
    found = Console()
    return found if found.is_terminal else Console(width=COLUMNS)


class Progress:
    """One line for each benchmark that is done; on a terminal also what runs now."""

    def __init__(self, console: Console, width: int) -> None:
        self._console = console
        self._width = width
        self._status = console.status("") if console.is_terminal else None

    def __call__(self, place: str, bench: str, found: plan.Figures | str) -> None:
        if found == "":
            if self._status is not None:
                self._status.start()
                self._status.update(f"round {place}  {bench}")
            return
        if self._status is not None:
            self._status.stop()
        said = found if isinstance(found, str) else self._said(found)
        line = f"{place}  {bench:<{self._width}}  {said}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=isinstance(found, str))

    def _said(self, figures: plan.Figures) -> str:
        """As many of the figures as fit into the line."""
        out, room = "", COLUMNS - self._width - 8
        for name, value in figures.items():
            more = f"{name} {report.number(value)}  "
            if len(out) + len(more) > room:
                break
            out += more
        return out.rstrip()


def everything(size: plan.Size, results: plan.Results, ticks: list[str]) -> list[plan.Bench]:
    """In the order in which they take their turns: what is compared runs side by side."""
    return [
        *throughput.BENCHES,
        *throughput.others(results),
        *latency.BENCHES,
        *relay.BENCHES,
        *commits.BENCHES,
        *topologies.benches(size),
        *query.benches(size, ticks),
    ]


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", "size", flag_value="quick", help="About a minute, for a first look.")
@click.option("--full", "size", flag_value="full", help="More rounds and events, a tape of 50 million.")
@click.option("--tiny", "size", flag_value="tiny", hidden=True)
@click.option("--rounds", type=click.IntRange(1), help="How often each is repeated, in turn with the others.")
@click.option("--events", type=click.IntRange(1000), help="Events of each throughput line.")
@click.option("--only", multiple=True, metavar="NAME", help="Only those that begin with NAME or fit it; repeatable.")
@click.option(
    "--ticks",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Also measure the bytes at rest of these recorded quotes (as `tapebus replay` reads them); repeatable.",
)
@click.option("--list", "listing", is_flag=True, help="Name all benchmarks and end.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Where the figures go.")
@click.pass_context
def main(
    context: click.Context,
    size: str | None,
    rounds: int | None,
    events: int | None,
    only: tuple[str, ...],
    ticks: tuple[Path, ...],
    listing: bool,
    file: Path | None,
) -> None:
    """Measure, print the tables, write the figures to build/bench/latest.json (with --only: part.json).

    Ends with 1 when a benchmark's answer was wrong. Ctrl-C keeps the figures so far.

    \b
    python -m bench --quick --only publisher --only latency
    python -m bench --only "peer:redis*" --rounds 5 --json before.json
    python -m bench show before.json
    """
    if context.invoked_subcommand is not None:
        return
    chosen = plan.SIZES[size or "default"]
    chosen = replace(chosen, rounds=rounds or chosen.rounds, events=events or chosen.events)
    results = plan.Results()
    benches = plan.chosen(everything(chosen, results, [str(each.resolve()) for each in ticks]), only)
    width = max((len(each.name) for each in benches), default=0)
    if listing:
        for each in benches:
            click.echo(listed(each, width))
        return
    if not benches:
        raise click.UsageError(f"no benchmark is called {', '.join(only)}: --list names them")
    out = console()
    described = machine.described()
    interrupted = False
    try:
        plan.run(benches, chosen, Progress(out, width), results)
    except KeyboardInterrupt:
        if not results.repetitions:
            raise
        interrupted = True
    whole = {**described, "size": chosen.name, "rounds": chosen.rounds, **results.as_json()}
    # what a part of the benchmarks found must not take the place of a whole run
    file = file or BUILD / ("part.json" if only else "latest.json")
    save(whole, file)
    out.print()
    report.show(whole, out)
    out.print(f"figures in {os.path.relpath(file)}", highlight=False, markup=False)
    if interrupted:
        out.print("interrupted: these are the figures so far", highlight=False)
        sys.exit(130)
    sys.exit(1 if results.wrong else 0)


def listed(bench: plan.Bench, width: int) -> str:
    """Name and meaning in two columns, the second folded."""
    return textwrap.fill(
        f"{bench.name:{width}}  {bench.what}", COLUMNS, subsequent_indent=" " * (width + 2), break_on_hyphens=False
    )


def save(results: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def load(file: Path) -> dict[str, Any]:
    """A run from its file; `click.BadParameter` when it is none."""
    try:
        results: dict[str, Any] = json.loads(file.read_text())
        if not results.keys() >= plan.Results().as_json().keys():
            raise ValueError("figures are missing")
    except (ValueError, AttributeError) as error:
        raise click.BadParameter(
            f"{file} is no run ({error}): name a file that python -m bench wrote", param_hint="FILE"
        ) from None
    return results


FILE = click.argument(
    "file", default=BUILD / "latest.json", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)


@main.command()
@FILE
def show(file: Path) -> None:
    """Print the tables of an earlier run, by default the latest."""
    report.show(load(file), console())


@main.command()
@FILE
@click.option("--to", type=click.Path(file_okay=False, path_type=Path), default=BUILD, help="Directory for the SVGs.")
def plots(file: Path, to: Path) -> None:
    """Draw a run, by default the latest, as SVG files."""
    from bench.plots import draw

    for _, made in draw(load(file), to):
        click.echo(os.path.relpath(made))


@main.command()
@FILE
@click.option("--page", type=click.Path(exists=True, path_type=Path), default=PAGE, help="The page to write into.")
@click.option(
    "--readme", type=click.Path(exists=True, path_type=Path), default=README, help="The page for the short one."
)
def render(file: Path, page: Path, readme: Path) -> None:
    """Write a run's tables and plots into docs/performance.md, and a short table into README.md.

    They go between the markers; FILE is by default the latest run.
    """
    from bench.plots import draw

    results = load(file)
    for each, option in ((page, "--page"), (readme, "--readme")):
        if not report.fillable(each.read_text(), report.BEGIN, report.END):
            raise click.BadParameter(
                f"{each} has no lines {report.BEGIN!r} and {report.END!r} to write between", param_hint=option
            )
    made = draw(results, page.parent / "plots")
    report.render(results, page, [(title, path.relative_to(page.parent).as_posix()) for title, path in made])
    report.fill(readme, report.BEGIN, report.END, report.in_short(results))
    click.echo(f"{os.path.relpath(page)}\n{os.path.relpath(readme)}")


if __name__ == "__main__":
    main(prog_name="python -m bench")

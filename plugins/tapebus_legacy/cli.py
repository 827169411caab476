"""The command ``tapebus import``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence

import click

from tapebus.cli.common import WIDTH, json_option, table, visible, with_config
from tapebus.config import Config
from tapebus.errors import TapebusError, UsageError
from tapebus_legacy.account import FATES, Account
from tapebus_legacy.facts import REPAIRS
from tapebus_legacy.importing import Import, Progress
from tapebus_legacy.records import STDIN


@click.command("import", short_help="Import signals and outcomes from old logs.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--dry-run", is_flag=True, help="Say what would be imported; needs no bus.")
@click.option("--endpoint", help="Acknowledged ingest of the bus; default: from the configuration.")
@json_option
@with_config
def import_command(config: Config, files: tuple[str, ...], dry_run: bool, endpoint: str | None, as_json: bool) -> None:
    """Import signals and outcomes from old JSON-lines logs (plain, gzip, zstandard, or - for standard input).

    A signal with a known end becomes one signal_outcome, one without a signal_imported, each at its original time and
    with the source import:LOG. Importing again, or a log that overlaps, adds only what is new. What became of
    every line is listed.

    \b
      tapebus import truth_log.jsonl --dry-run
      tapebus import optimized_tracking.jsonl comprehensive_tracking.jsonl.gz
      zcat old/*.gz | tapebus import - --json

    Exit codes: 0 imported, 1 nothing recognised or no bus, 2 wrong usage or an unreadable file.
    """
    for path in files:
        if path != STDIN and not os.path.isfile(path):
            raise UsageError(f"{path}: {'is a directory' if os.path.isdir(path) else 'no such file'}")
    if len(set(files)) < len(files):
        raise UsageError("the same FILE is given twice")
    with _progress(quiet=as_json) as progress:
        run = Import(config, files, progress)
        run.read()
        if dry_run:
            run.plan()
        else:
            run.run(endpoint)
    if as_json:
        click.echo(json.dumps(as_dict(run, dry_run), indent=2))
    else:
        show(run, dry_run)
    lost = [each.name for each in run.accounts if not each.balanced]
    if lost:
        raise TapebusError(f"{lost[0]}: the sums do not add up, which is a fault of this program")
    strange = [
        each.name
        for each in run.accounts
        if each.lines > each.blank and each.totals["refused"] == each.lines - each.blank
    ]
    if strange:
        raise TapebusError(f"{strange[0]}: nothing in it could be imported")


def as_dict(run: Import, dry_run: bool) -> dict[str, object]:
    """The report as plain values."""
    return {
        "dry_run": dry_run,
        "files": [each.as_dict() for each in run.accounts],
        "events": len(run.made),
        "stored": run.stored,
    }


def show(run: Import, dry_run: bool) -> None:
    """The report for people, at most 100 columns."""
    rows = []
    for account in run.accounts:
        every = account.totals
        rows.append([os.path.basename(account.name), every.total(), *(every[fate] for fate in FATES)])
        for shape, found in account.shapes.items():
            rows.append([f"  {shape}", found.total(), *(found[fate] for fate in FATES)])
    table(["file, shape", "lines", *FATES], rows, empty="no lines")
    for account in run.accounts:
        _show_one(account)
    count = len(run.made)
    events = f"{count:,} event{'s' * (count != 1)}"
    click.echo()
    click.echo(f"{events} would be imported" if dry_run else f"{events} imported, {run.stored:,} found on the tape")


def _show_one(account: Account) -> None:
    click.echo()
    outcomes = ", ".join(f"{count:,} {name}" for name, count in account.outcomes.most_common())
    _wrapped(f"{account.name}: {outcomes or 'nothing new'}", 2)
    for name, lines in sorted(account.repairs.items(), key=lambda each: -len(each[1])):
        _line("repaired", len(lines), name, lines, REPAIRS[name])
    for fate in ("refused", "conflict", "remark"):
        for reason, found in sorted(account.reasons.get(fate, {}).items(), key=lambda each: -len(each[1])):
            _line(fate, len(found), reason, [line for line, _ in found], min(found)[1])
    if account.left_out:
        names = ", ".join(f"{name} {count:,}" for name, count in account.left_out.most_common())
        _wrapped(f"  fields left out: {names}", 4)
    if account.blank:
        click.echo(f"  blank     {account.blank:>6,}")


def _line(kind: str, count: int, name: str, lines: Sequence[int], words: str) -> None:
    first = ", ".join(str(line) for line in sorted(lines)[:3]) + (", …" if len(lines) > 3 else "")
    where = f"line{'s' * (len(lines) != 1)} {first}"
    _wrapped(f"  {kind:<9} {count:>6,}  {name} ({where})", 20)
    if words and words != name:
        _wrapped(f"{'':<20}{words}", 20)


def _wrapped(text: str, indent: int) -> None:
    click.echo(textwrap.fill(visible(text), WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False))


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    if quiet or not sys.stderr.isatty():
        yield lambda what, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=1.0)
        yield lambda what, fraction: bar.update(task, completed=fraction, description=what)

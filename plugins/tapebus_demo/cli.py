"""The command ``tapebus demo``."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from tapebus.errors import TapebusError


@click.command(short_help="Run a bus of its own with simulated traders around it.")
@click.option("--seconds", type=click.FloatRange(2, 40), default=12.0, show_default=True, help="Length of the session.")
@click.option("--seed", type=int, default=7, show_default=True, help="Seed of prices and signals.")
@click.option("--ticks", type=click.Path(exists=True, dir_okay=False), help="Play this recording instead.")
@click.option("--keep", is_flag=True, help="Keep the data directory and say where it is.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object and nothing else.")
def demo(seconds: float, seed: int, ticks: str | None, keep: bool, as_json: bool) -> None:
    """Run a bus of its own with simulated traders around it, and sum up what happened.

    Starts a bus on a temporary directory and free ports, plays a market of 16 symbols through real
    sockets from separate processes, then publishes flat out. Needs nothing and leaves nothing behind.

    \b
    tapebus demo
    tapebus demo --seconds 30 --seed 11 --keep
    """
    from tapebus_demo.session import Options, Session
    from tapebus_demo.show import Progress, print_summary

    options = Options(seconds, seed, ticks or "", keep)
    progress = Progress(options, quiet=as_json)
    try:
        with progress, Session(options, progress.show) as session:
            summary: dict[str, Any] = session.run()
    except TapebusError as error:
        click.echo(f"tapebus demo: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("tapebus demo: stopped; everything it had started is gone", err=True)
        sys.exit(130)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        print_summary(summary)

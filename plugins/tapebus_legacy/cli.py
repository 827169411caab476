"""The command ``tapebus import``."""

from __future__ import annotations

import click


@click.command("import", short_help="Import signals and outcomes from old logs.")
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
def import_command(files: tuple[str, ...]) -> None:
    """Import signals and outcomes from old logs."""
    raise click.UsageError("nothing can be imported yet")

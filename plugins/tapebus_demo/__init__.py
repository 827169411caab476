"""The demo: a bus of its own, real producer processes, and a summary of what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapebus.hookspecs import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def tapebus_register_commands(cli: click.Group) -> None:
    """Add ``tapebus demo``."""
    from tapebus_demo.cli import demo

    cli.add_command(demo)

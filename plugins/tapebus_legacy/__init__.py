"""Old JSON-lines logs of signals become events of the tape; the plugin is one command, ``tapebus import``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapebus.hookspecs import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def tapebus_register_commands(cli: click.Group) -> None:
    """Add ``tapebus import``."""
    from tapebus_legacy.cli import import_command

    cli.add_command(import_command)

"""``tapebus keygen``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from tapebus.cli.common import with_config
from tapebus.config import Config, make_private


@click.command()
@click.argument("name")
@click.option("--dir", "directory", type=click.Path(), help="Where to write; default: keys in the data directory.")
@click.option("--server", default="", help="For a client: the public key of its bus, or the file with it.")
@partial(with_config, complete=False)
def keygen(config: Config, name: str, directory: str | None, server: str) -> None:
    """Write a CURVE key pair: NAME.key to give away, NAME.key_secret (0600) to keep. Overwrites nothing.

    \b
    tapebus keygen bus
    tapebus keygen feeder --server bus.key
    """
    from tapebus.curve import generate

    place = Path(directory) if directory else config.data_dir / "keys"
    if directory is None:
        make_private(config.data_dir)
        make_private(place)
    public, secret = generate(place, name, server)
    click.echo(f"{public}\n{secret}")

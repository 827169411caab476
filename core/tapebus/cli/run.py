"""``tapebus run`` and ``tapebus pm2``."""

from __future__ import annotations

import logging
import re
import signal
import sys
from typing import Any

import click

from tapebus.cli.common import with_config
from tapebus.cli.logs import PatientHandler
from tapebus.config import Config


class Memory(click.ParamType):  # type: ignore[type-arg]
    """An amount of memory as PM2 reads it; anything else it would silently take for no limit."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"[1-9]\d*[KMG]?", str(value)):
            self.fail(f"{value!r} is no amount of memory; write a number with K, M or G, such as 500M", param, ctx)
        return str(value)


@click.command()
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least important line to log.",
)
@with_config
def run(config: Config, log_level: str) -> int:
    """Run the bus in the foreground until SIGINT or SIGTERM; a second signal forces the end.

    \b
    tapebus run
    tapebus run --config tapebus.toml --log-level warning
    """
    from tapebus import limits
    from tapebus.redaction import protect
    from tapebus.runtime import Runtime

    handler = PatientHandler()
    logging.basicConfig(level=log_level.upper(), handlers=[handler])
    protect()
    # Its INFO lines hold the URL, and with it the token of the bot.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    limits.apply(config.bus.memory_limit_mb)
    try:
        return Runtime(config).run()
    finally:
        # all is done: a signal that comes now must not turn a clean end into a killed process
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        handler.close()


@click.command()
@click.option("--name", default="tapebus", show_default=True, help="Name of the process in PM2.")
@click.option("--memory", type=Memory(), default="500M", show_default=True, help="PM2 restarts the bus above this.")
@click.pass_context
@with_config
def pm2(ctx: click.Context, config: Config, name: str, memory: str) -> None:
    """Print an ecosystem.config.js that runs this bus.

    \b
    tapebus pm2 --config tapebus.toml > ecosystem.config.js
    """
    from tapebus.pm2 import ecosystem

    text = ecosystem(
        ctx.meta.get("tapebus.config_file"),
        sys.executable,
        data_dir=config.data_dir,
        name=name,
        drain_s=config.bus.drain_s,
        memory=memory,
    )
    click.echo(text, nl=False)

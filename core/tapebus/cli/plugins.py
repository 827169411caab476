"""``tapebus plugins``."""

from __future__ import annotations

import textwrap
from typing import Any

import click
import msgspec

from tapebus.cli.common import WIDTH, clock, json_option, table, visible, with_config
from tapebus.config import Config
from tapebus.errors import BusNotRunning, TapebusError, UsageError


@click.group(invoke_without_command=True)
@click.option("--hashes", is_flag=True, help="Print [plugins.trusted] for what is installed now; imports nothing.")
@json_option
@click.pass_context
@with_config
def plugins(ctx: click.Context, config: Config, hashes: bool, as_json: bool) -> None:
    """List installed plugins with their hooks and, while the bus runs, what their consumers do.

    \b
    tapebus plugins
    tapebus plugins pause telegram
    tapebus plugins schema fire_command
    """
    ctx.meta["tapebus.loaded"] = config
    if ctx.invoked_subcommand is not None:
        return
    if hashes:
        _print_hashes()
        return
    rows = [_describe(name, config) for name in _names(config)]
    _add_state(config, rows)
    if as_json:
        click.echo(msgspec.json.encode(rows))
        return
    table(
        ["name", "enabled", "mode", "state", "hooks"],
        [
            (
                row["name"],
                "yes" if row["enabled"] else "no",
                ",".join(row["modes"]),
                row["state"],
                row["error"] or ", ".join(hook.removeprefix("register_") for hook in row["hooks"]),
            )
            for row in rows
        ],
        empty="no plugins installed",
    )
    _tell_breakers([each for row in rows for each in row["consumers"]])


def _tell_breakers(consumers: list[dict[str, Any]]) -> None:
    """What happened to the breakers, newest last; nothing where nothing did."""
    for each in consumers:
        if not each["history"]:
            continue
        again = f", tries again in {each['breaker']['retry_in_s']:.0f} s" if each["breaker"]["retry_in_s"] else ""
        restarts = f", {each['restarts']} restarts" if each["restarts"] else ""
        click.echo(f"\n{each['name']}: {each['state']}{again}{restarts}")
        for at, state, reason in each["history"][-5:]:
            first = f"  {clock(at)}  {state:<10}  "
            lines = textwrap.wrap(visible(reason), WIDTH, initial_indent=first, subsequent_indent=" " * len(first))
            click.echo("\n".join(lines or [first.rstrip()]))


def _print_hashes() -> None:
    from tapebus.plugins import installed
    from tapebus.trust import fingerprint, is_own, line

    click.echo("[plugins.trusted]")
    for points in installed().values():
        for point in points:
            if not is_own(point) and point.dist is not None:
                note = "" if fingerprint(point) else "  # an editable installation: its files can change unseen"
                click.echo(line(point) + note)


def _names(config: Config) -> list[str]:
    from tapebus.plugins import installed

    return list(dict.fromkeys([*config.plugins.enabled, *sorted(installed())]))


def _describe(name: str, config: Config) -> dict[str, Any]:
    from tapebus.plugins import installed, load
    from tapebus.trust import SWITCH, is_own

    points = installed().get(name, [])
    point = points[0] if points else None
    row: dict[str, Any] = {
        "name": name,
        "enabled": name in config.plugins.enabled,
        "module": point.value if point else "",
        "version": point.dist.version if point and point.dist else "",
        "hooks": [],
        "modes": [],
        "consumers": [],
        "state": "",
        "error": "",
    }
    if point is not None and not row["enabled"] and not is_own(point):
        row["error"] = "not enabled, so not imported"
        return row
    try:
        manager = load([name])
    except TapebusError as error:
        row["error"] = str(error)
        return row
    if manager.get_plugin(name) is None:
        row["error"] = f"left out: {SWITCH} is set"
        return row
    callers = manager.get_hookcallers(manager.get_plugin(name)) or []
    row["hooks"] = sorted(caller.name.removeprefix("tapebus_") for caller in callers)
    return row


def _add_state(config: Config, rows: list[dict[str, Any]]) -> None:
    from tapebus.control import request

    try:
        consumers = request(config, {"cmd": "stats"})["consumers"]
    except BusNotRunning:
        return
    for row in rows:
        mine = [each for each in consumers if each["plugin"] == row["name"]]
        row["consumers"] = mine
        row["modes"] = sorted({each["mode"] for each in mine})
        row["state"] = ",".join(sorted({each["state"] for each in mine})) or ("loaded" if row["enabled"] else "")


def _steer(verb: str, done: str, text: str) -> None:
    @plugins.command(verb, help=text)
    @click.argument("consumer")
    @click.pass_context
    def command(ctx: click.Context, consumer: str) -> None:
        from tapebus.control import request

        request(ctx.meta["tapebus.loaded"], {"cmd": verb, "consumer": consumer})
        click.echo(f"{consumer}: {done}")


_steer("pause", "paused", "Stop giving events to CONSUMER; its cursor stands still.")
_steer("resume", "resumed", "Let a paused CONSUMER continue from the tape.")
_steer("reset", "reset", "Close the breaker of CONSUMER now; start its process anew where it has one.")


@plugins.command()
@click.argument("event_type", metavar="TYPE")
@click.pass_context
def schema(ctx: click.Context, event_type: str) -> None:
    """Print the JSON Schema of the event type TYPE."""
    from tapebus.plugins import call_one, load

    name = "schema"
    if name not in ctx.meta["tapebus.loaded"].plugins.enabled:
        raise UsageError("plugins.enabled: the plugin 'schema' is not enabled, so there are no schemas")
    offered = click.Group()
    call_one(load([name]), "tapebus_register_commands", name, cli=offered)
    command = offered.commands.get("schema")
    if command is None:
        raise UsageError("the plugin 'schema' offers no command that prints schemas")
    command.main(args=[event_type], prog_name="tapebus plugins schema", standalone_mode=False)

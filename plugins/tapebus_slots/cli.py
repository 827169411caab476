"""The command ``tapebus slots``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import click

from tapebus.cli.common import WIDTH, cut, json_option, open_tape, visible, with_config
from tapebus.config import Config
from tapebus_slots import config as configuration
from tapebus_slots.report import report
from tapebus_slots.witnesses import NAMES, span

_COLOURS = {"held": "green", "gone": "red", "unsure": "yellow"}
_STATES = {"OPEN": "green", "RESERVED": "cyan", "RELEASING": "yellow", "UNKNOWN": "red"}


@click.command("slots")
@click.option("--user", help="Only this user.")
@click.option("--released", is_flag=True, help="Also the slots released last, and what proved it.")
@json_option
@with_config
def slots(config: Config, user: str | None, released: bool, as_json: bool) -> None:
    """Show the held slots and what their witnesses believe.

    Each slot says why it is not released. Reads what the bus has on disk; it need not run.

    \b
    tapebus slots
    tapebus slots --user 7176191872 --released
    tapebus slots --json | jq '.users[].slots'
    """
    table = config.plugin("slots")
    settings = configuration.load(table)

    def maxima(users: Iterable[str]) -> dict[str, int]:
        return {each: configuration.for_user(table, settings, each).max_slots for each in users}

    with open_tape(config) as tape:
        state, now = tape.state("slots"), time.time()
    wanted = settings.users if user is None else [user]
    found = report(state, now, settings.heartbeat_max_age_s, maxima(wanted))
    if not found["users"]:
        found = report(state, now, settings.heartbeat_max_age_s, maxima([settings.user_id]))
    found["users"] = [each for each in found["users"] if user is None or each["user_id"] == user]
    if as_json:
        click.echo(json.dumps(found))
        return
    if found["kill_switch"]:
        click.secho("kill switch is on: nothing fires", fg="red", bold=True)
    else:
        click.echo("kill switch is off")
    for each in found["users"]:
        _show_user(each, released)


def _show_user(user: dict[str, Any], released: bool) -> None:
    over = user["over_limit"]
    head = click.style(
        f"{user['slots']} slots{' OVER THE LIMIT' if over else ''}", fg="red" if over else None, bold=True
    )
    click.echo(f"\nuser {visible(user['user_id'])}: {head}")
    for account in user["accounts"]:
        _show_account(account)
    if user["reconcile"]:
        _line(f"  waits for a complete heartbeat: {', '.join(user['reconcile'])}", "yellow")
    for slot in user["held"]:
        _show_slot(slot)
    if released:
        click.echo("\n  released last" if user["released"] else "\n  nothing released yet")
        for each in user["released"]:
            ticket = f" ticket {each['ticket']}" if each["ticket"] is not None else ""
            _line(f"  {each['slot']}{ticket}, {_ago(each['age_s'])}: {each['method'].replace('_', ' ')}")
            for proof in each["evidence"]:
                _line(f"    {_proof(proof)}")


def _proof(text: str) -> str:
    """One line of evidence as it is shown of slots that are held; what a witness did not say stays as it is."""
    name, _, rest = text.partition(":")
    belief, _, said = rest.partition(":")
    words, at, places = said.partition("@")
    if name not in NAMES or not words:
        return text.replace(":", ": ").replace("@", " @")
    return f"{NAMES[name]:<12} {belief:<7} {words}{f' @{places}' if at else ''}"


def _show_account(account: dict[str, Any]) -> None:
    words = []
    if account["heartbeat_age_s"] is None:
        words.append("no heartbeat yet")
    else:
        words.append(f"heartbeat {_ago(account['heartbeat_age_s'])}{' (stale)' if account['stale'] else ''}")
        words.append(f"counts {account['broker_count']}")
        if not account["complete"]:
            words.append(f"lists {account['listed']} (incomplete)")
    if account["balance"] is not None:
        words.append(f"balance {account['balance']:,.2f}")
    name = account["account"] or "account without a name"
    _line(f"  {name}: {', '.join(words)}", "yellow" if account["stale"] or not account["complete"] else None)


def _show_slot(slot: dict[str, Any]) -> None:
    lots = "" if slot["lots"] is None else f"{slot['lots']:g} lot{'s' * (slot['lots'] != 1)}"
    ticket = "" if slot["ticket"] is None else f"ticket {slot['ticket']}"
    parts = (slot["slot"], slot["symbol"], slot["direction"], lots, span(slot["age_s"]), ticket)
    state = click.style(f"{slot['state']:<9}", fg=_STATES[slot["state"]], bold=True)
    click.echo(f"\n  {state} " + cut(visible("  ".join(each for each in parts if each)), WIDTH - 12))
    for name, witness in slot["witnesses"].items():
        belief = click.style(f"{witness['believes']:<7}", fg=_COLOURS[witness["believes"]])
        places = "".join(f" @{seq}" for seq in witness["evidence"][-2:])
        when = "" if name == "age" else f", {_ago(witness['age_s'])}"
        text = f"{witness['weight']:<9}{witness['says']}{when}{places}"
        click.echo(f"    {NAMES[name]:<12} {belief} " + cut(visible(text), WIDTH - 25))
    _line(f"    {'disagree' if slot['dispute'] else 'held'}: {slot['why']}", "red" if slot["dispute"] else None)


def _line(text: str, colour: str | None = None) -> None:
    click.secho(cut(visible(text), WIDTH), fg=colour)


def _ago(seconds: float) -> str:
    return f"{span(seconds)} ago"

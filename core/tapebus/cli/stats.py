"""``tapebus stats``."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from tapebus.cli.common import amount, json_option, table, with_config
from tapebus.config import Config


@click.command()
@json_option
@with_config
def stats(config: Config, as_json: bool) -> None:
    """Show what the running bus counts; exits 1 when none runs on this data directory."""
    from tapebus.control import request

    found = request(config, {"cmd": "stats"})
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    _bus(found["bus"])
    click.echo("\nproducers")
    table(
        ["source", "highest_seq", "stored", "rejected", "dropped", "in_flight"],
        [
            (
                p["source"] or p["producer_id"],
                p["highest_seq"],
                p["stored"],
                amount(p["rejected"]),
                amount(p["dropped"]),
                p["in_flight"],
            )
            for p in found["producers"]
        ],
    )
    click.echo("\nconsumers")
    table(
        ["name", "plugin", "mode", "cursor", "lag", "lag_ms", "handled", "errors", "state"],
        [
            (
                c["name"],
                c["plugin"],
                c["mode"],
                c["cursor"],
                c["lag_events"],
                round(c["lag_ms"]),
                c["handled"],
                c["errors"],
                c["state"],
            )
            for c in found["consumers"]
        ],
    )
    for name, plugin in sorted(found.get("plugins", {}).items()):
        health = plugin.get("health", {})
        if health.get("status") not in (None, "ok"):
            click.echo(f"\n{name}: {health['status']}: {health.get('message', '')}")


def _bus(bus: dict[str, Any]) -> None:
    rows = [
        ("uptime", f"{bus['uptime_s']:,.0f} s"),
        ("last bus_seq", f"{bus['last_seq']:,}"),
        ("received", f"{bus['received']:,}"),
        ("stored", f"{bus['stored']:,}"),
        ("rejected", _reasons(bus["rejected"])),
        ("dropped", _reasons(bus["dropped"])),
        ("memory", f"{bus['rss_bytes'] / 1e6:,.0f} MB"),
    ]
    for name, value in rows:
        click.echo(f"{name:<14}{value}")


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items())) or "0"

"""``tapebus stats``."""

from __future__ import annotations

import textwrap
from typing import Any

import click
import msgspec

from tapebus.cli.common import WIDTH, json_option, table, visible, with_config
from tapebus.config import Config


@click.command()
@click.option("--all", "everything", is_flag=True, help="Every producer, finished ones too.")
@json_option
@with_config
def stats(config: Config, everything: bool, as_json: bool) -> None:
    """Show what the running bus counts; exits 1 when none runs on this data directory.

    \b
    tapebus stats
    tapebus stats --json | jq .plugins.slots
    """
    from tapebus.control import request

    found = request(config, {"cmd": "stats"})
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    _bus(found["bus"], found["store"].get("dead_letters", 0))
    _producers(found["producers"], everything)
    click.echo(found["books"]["line"])
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
    _plugins(found.get("plugins", {}))


def _producers(producers: list[dict[str, Any]], everything: bool) -> None:
    shown = [p for p in producers if everything or p["connected"] or not p["sequenced"]]
    click.echo("\nproducers")
    table(
        ["source", "highest_seq", "stored", "rejected", "dropped", "in_flight"],
        [
            (
                p["source"] or p["producer_id"],
                p["highest_seq"],
                p["stored"],
                p["rejected"],
                p["dropped"],
                p["in_flight"],
            )
            for p in shown
        ],
    )
    gone = [p for p in producers if p not in shown]
    if gone:
        sums = {key: sum(p[key] for p in gone) for key in ("stored", "rejected", "dropped", "in_flight")}
        figures = ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in sums.items())
        click.echo(f"and {len(gone):,} finished or away: {figures} (--all shows each)")


def _plugins(plugins: dict[str, Any]) -> None:
    shown = {name: plugin["metrics"] for name, plugin in sorted(plugins.items()) if plugin.get("metrics")}
    if shown:
        click.echo("\nplugins")
    for name, metrics in shown.items():
        words = ", ".join(f"{key} {_figure(value)}" for key, value in metrics.items())
        text = textwrap.wrap(visible(words), WIDTH, initial_indent=f"{name:<14}", subsequent_indent=" " * 14)
        click.echo("\n".join(text))
    for name, plugin in sorted(plugins.items()):
        health = plugin.get("health", {})
        if health.get("status") not in (None, "ok"):
            click.echo(f"\n{name}: {health['status']}: {health.get('message', '')}")


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _bus(bus: dict[str, Any], dead_letters: int) -> None:
    rows = [
        ("uptime", f"{bus['uptime_s']:,.0f} s"),
        ("last bus_seq", f"{bus['last_seq']:,}"),
        ("received", f"{bus['received']:,}"),
        ("stored", f"{bus['stored']:,}"),
        ("rejected", _reasons(bus["rejected"])),
        ("dropped", _reasons(bus["dropped"])),
        ("dead letters", f"{dead_letters:,}"),
        ("memory", f"{bus['rss_bytes'] / 1e6:,.0f} MB"),
    ]
    for name, value in rows:
        click.echo(f"{name:<14}{value}")


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items())) or "0"

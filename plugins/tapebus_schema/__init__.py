"""Event types of trading programs: typed payloads, the spellings they accept, and the rules they obey."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tapebus.events import EventType
from tapebus.hookspecs import hookimpl
from tapebus_schema.catalog import apply_policies, event_types
from tapebus_schema.listing import json_schema, json_schemas

if TYPE_CHECKING:
    import click

__all__ = [
    "apply_policies",
    "event_types",
    "json_schema",
    "json_schemas",
    "tapebus_register_commands",
    "tapebus_register_event_types",
]


@hookimpl
def tapebus_register_event_types(config: dict[str, Any]) -> list[EventType]:
    """Every event type, with the policies of ``[plugins.schema]`` applied."""
    return event_types(config)


@hookimpl
def tapebus_register_commands(cli: click.Group) -> None:
    """Add ``tapebus schema [EVENT_TYPE]``."""
    import click

    from tapebus.cli.common import WIDTH, cut
    from tapebus.errors import UsageError

    @cli.command("schema")
    @click.argument("event_type", required=False)
    @click.option("--json", "as_json", is_flag=True, help="Print JSON Schema for every event type.")
    def schema(event_type: str | None, as_json: bool) -> None:
        """List the event types, or print the JSON Schema of EVENT_TYPE.

        \b
        tapebus schema
        tapebus schema fire_command
        """
        if event_type is not None:
            try:
                found = json_schema(event_type)
            except UsageError as error:
                raise click.UsageError(str(error)) from None
            click.echo(json.dumps(found, indent=2))
        elif as_json:
            click.echo(json.dumps(json_schemas(), indent=2))
        else:
            for each in event_types({}):
                click.echo(cut(f"{each.name:26} {each.policy:10} {each.doc.replace('``', '')}", WIDTH))

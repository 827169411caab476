"""The ``tapebus`` command. Subcommands load when used, plugins only for commands that are not built in."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from tapebus.errors import TapebusError

_COMMANDS = {
    "run": ("tapebus.cli.run", "Run the bus in the foreground until SIGINT or SIGTERM."),
    "publish": ("tapebus.cli.publish", "Publish one event, or JSON lines from standard input."),
    "tail": ("tapebus.cli.read", "Print the newest events, then follow the tape."),
    "query": ("tapebus.cli.read", "Print events from the tape."),
    "stats": ("tapebus.cli.stats", "Show what the running bus counts."),
    "plugins": ("tapebus.cli.plugins", "List plugins; pause, resume or reset their consumers."),
    "dlq": ("tapebus.cli.dlq", "List, show, replay or purge dead letters."),
    "replay": ("tapebus.cli.replay", "Publish a recorded file."),
    "check": ("tapebus.cli.check", "Check configuration, ports, permissions and the store."),
    "keygen": ("tapebus.cli.keygen", "Write a CURVE key pair for a bus or a client on another machine."),
    "pm2": ("tapebus.cli.run", "Print an ecosystem.config.js for PM2."),
}
#: Built-in plugins that add a command and nothing to the bus, so they need not be enabled.
_COMMANDS_ONLY = ("demo", "legacy")


class Commands(click.Group):
    """Built-in commands by name, then what the enabled plugins register."""

    #: The configuration whose plugins have added their commands; a program may call `main` for several.
    _loaded_for: dict[str, Any] | None = None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # The reader has seen enough; the interpreter must not complain while flushing at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0

    def list_commands(self, ctx: click.Context) -> list[str]:
        for problem in self._load_plugins(ctx, []):
            click.echo(f"tapebus: {problem}", err=True)
        return sorted({*_COMMANDS, *self.commands})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _COMMANDS:
            command = getattr(import_module(_COMMANDS[name][0]), name)
            return command if isinstance(command, click.Command) else None
        return self.commands.get(name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            problems = self._load_plugins(ctx, args)
            if args[0] not in self.commands:
                for problem in problems:
                    click.echo(f"tapebus: {problem}", err=True)
                self._refuse(args[0], ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # The summaries of the built-in commands stand above, so help imports none of them.
        rows = []
        for name in self.list_commands(ctx):
            command = self.commands.get(name)
            rows.append((name, _COMMANDS[name][1] if command is None else command.get_short_help_str(70)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _refuse(self, name: str, ctx: click.Context) -> None:
        import difflib

        near = difflib.get_close_matches(name, [*_COMMANDS, *self.commands], 1)
        hint = f"did you mean {near[0]!r}?" if near else "see `tapebus --help`"
        raise click.UsageError(f"no command {name!r}; {hint}", ctx)

    def _load_plugins(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Let each enabled plugin add its commands; what went wrong, as lines for people."""
        # before the group itself has run, and for help before a variable was looked at
        given: dict[str, Any] = {"config": ctx.params.get("config") or os.environ.get("TAPEBUS_CONFIG")}
        given["data_dir"] = ctx.params.get("data_dir")
        for flag, key in (("--config", "config"), ("--data-dir", "data_dir")):
            if flag in args[:-1]:
                given[key] = args[args.index(flag) + 1]
        if given == self._loaded_for:
            return []
        self._loaded_for = given
        from tapebus.cli.common import load_config
        from tapebus.plugins import call_one, installed, load
        from tapebus.trust import is_own

        problems = []
        try:
            names = dict.fromkeys(load_config(**given).plugins.enabled)
            # nothing else is imported without being enabled
            found = installed()
            names |= dict.fromkeys(each for each in _COMMANDS_ONLY if any(map(is_own, found.get(each, ()))))
        except TapebusError as error:
            return [str(error)]
        for name in names:
            try:
                call_one(load([name]), "tapebus_register_commands", name, cli=self)
            except TapebusError as error:
                problems.append(str(error))
            except Exception as error:
                problems.append(f"plugin {name!r} cannot add its commands: {type(error).__name__}: {error}")
        return problems


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config",
    type=click.Path(),
    envvar="TAPEBUS_CONFIG",
    is_eager=True,
    help="TOML file with the configuration.",
)
@click.option("--data-dir", "data_dir", type=click.Path(), is_eager=True, help="Directory of the tape.")
@click.version_option(package_name="tapebus", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, config: str | None, data_dir: str | None) -> None:
    """An event bus that keeps every event on a tape and lets plugins work through it.

    Exit codes: 0 fine, 1 failure, 2 wrong usage, 74 input/output error on the store, 78 wrong configuration.
    """
    ctx.obj = {"config": config, "data_dir": data_dir}


def _have_standard_streams() -> None:
    """Open what the caller has closed of standard input, output and error.

    Else the next file to be opened, of the tape perhaps, takes that number, and what is printed goes into it.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for as long as the process lives


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected error is one line on standard error."""
    from tapebus.redaction import protect, redact

    if args is None:
        _have_standard_streams()
        protect()
    try:
        result = cli.main(args=list(args) if args is not None else None, prog_name="tapebus", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        if error.message.startswith("Usage:"):
            # A group without a command: the help is the message.
            click.echo(error.message, err=True)
            return error.exit_code
        click.echo(redact(f"tapebus: {error.format_message()}"), err=True)
        return error.exit_code
    except TapebusError as error:
        click.echo(redact(f"tapebus: {error}"), err=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        if not (error.name or "").startswith("tapebus._"):
            raise
        click.echo("tapebus: tapebus is not compiled: run `pip install -e .` at the repository root", err=True)
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        click.echo(redact(f"tapebus: {place}{error.strerror or error}"), err=True)
        return 1

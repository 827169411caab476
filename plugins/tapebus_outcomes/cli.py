"""The command ``tapebus explain``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

import click
import msgspec

from tapebus.cli.common import WIDTH, clock, cut, json_option, open_tape, visible, with_config
from tapebus.config import Config
from tapebus.errors import TapebusError
from tapebus_outcomes import words
from tapebus_outcomes.chain import follow, nearest
from tapebus_outcomes.explain import Step, Story, Way, tell

_AT = 59  # the column where words begin


@click.command(short_help="Tell the whole way of one signal, with the step that is missing.")
@click.argument("signal_id")
@json_option
@with_config
def explain(config: Config, signal_id: str, as_json: bool) -> None:
    """Tell the whole way of SIGNAL_ID (or of a fire id) from the tape: verdicts, orders, answers, slots and outcome.

    Times are event times in UTC; "after" is the time since the step before, "to the bus" how long an event took to get
    there. A step that did not come is named, with the time waited until the newest event of the tape, counted by
    arrival: in a replay that is how long it was played. Reads only.

    \b
      tapebus explain ELITE_RAPID_USDJPY_1758502680
      tapebus explain a-6m2k4q7zr1x0w9yt --json

    Exit codes: 0 found, 1 no such signal on the tape.
    """
    with open_tape(config) as tape:
        chain = follow(tape, signal_id)
        if not chain.found:
            near = nearest(tape, signal_id)
            hint = f"did you mean {', '.join(near)}?" if near else "see `tapebus query --topic signal_generated`"
            raise TapebusError(visible(f"no signal or fire {signal_id!r} on this tape; {hint}"))
        newest = next(tape.read(reverse=True, limit=1))
        story = tell(chain.signal_id, chain.events, newest.received_at or newest.timestamp)
    if as_json:
        click.echo(msgspec.json.encode(story))
        return
    for line in lines(story):
        click.echo(line)


def lines(story: Story) -> Iterator[str]:
    """The story for people, at most 100 columns; styled, which click takes off in a pipe."""
    named = [story.symbol, story.direction, story.pattern_type]
    if story.confidence is not None:
        named.append(f"{words.figure(story.confidence)} %")
    yield click.style(cut(visible("  ".join(filter(None, [story.signal_id, *named]))), WIDTH), bold=True)
    levels = {"entry": story.entry, "stop": story.sl, "target": story.tp}
    if any(levels.values()):
        yield "  ".join(f"{name} {words.figure(value)}" for name, value in levels.items() if value)
    yield ""
    yield click.style(f"{'bus_seq':>9}  {'event time (UTC)':<23} {'after':>11} {'to the bus':>11}", dim=True)
    yield from _section(story.birth)
    for number, way in enumerate(story.ways):
        if number or story.birth:
            yield ""
        yield click.style(cut(visible(_heading(way)), WIDTH), fg="cyan")
        yield from _section(way.steps)
    if story.end and (story.birth or story.ways):
        yield ""
    yield from _section(story.end)
    yield ""
    for each in story.missing:
        yield from _wrapped("missing: ", each, "yellow")
    if not story.missing:
        yield click.style("nothing is missing", fg="green")


def _heading(way: Way) -> str:
    parts = [f"user {way.user_id}" if way.user_id else "", f"fire {way.fire_id}" if way.fire_id else ""]
    parts += [f"ticket {way.ticket}" if way.ticket else "", way.state]
    return ", ".join(filter(None, parts))


def _section(steps: Sequence[Step]) -> Iterator[str]:
    for step in steps:
        time = f"{clock(step.at)}.{int(step.at % 1 * 1000):03d}"
        after = "" if step.after_s is None else _signed(step.after_s)
        late = _signed(step.received_at - step.at) if step.received_at else ""
        head = f"{step.bus_seq:>9}  {time:<23} {after:>11} {late:>11}"
        colour = _COLOURS.get(step.text.split(":")[0].split(" for ")[0])
        for number, part in enumerate(textwrap.wrap(visible(step.text), WIDTH - _AT, break_long_words=True)):
            yield (head if number == 0 else "").ljust(_AT) + click.style(part, fg=colour)
        for each in step.details:
            yield from _wrapped("", each, None, indent=_AT - 24)


_COLOURS = {
    "gate refuses it": "yellow",
    "the terminal refused the order": "red",
    "outcome WIN": "green",
    "outcome LOSS": "red",
}


def _signed(seconds: float) -> str:
    return ("" if seconds < 0 else "+") + words.span(seconds)


def _wrapped(label: str, text: str, colour: str | None, indent: int = 0) -> Iterator[str]:
    parts = textwrap.wrap(visible(text), WIDTH - indent - max(len(label), 2), break_long_words=True)
    for number, part in enumerate(parts):
        lead = (label or "- ") if number == 0 else " " * len(label or "- ")
        yield " " * indent + click.style(lead, fg=colour) + part

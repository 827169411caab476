"""``tapebus query`` and ``tapebus tail``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import click

from tapebus.cli.common import event_json, event_line, filters, json_option, open_tape, topics_option, with_config
from tapebus.config import Config
from tapebus.errors import UsageError


@click.command()
@filters
@click.option("--after", type=click.IntRange(min=0), default=0, help="Only events with a greater bus_seq.")
@click.option("--last", type=click.IntRange(min=0), help="Only the newest so many of them, in order.")
@click.option("--limit", type=click.IntRange(min=0), help="At most this many events.")
@click.option("--reverse", is_flag=True, help="Newest first.")
@json_option
@with_config
def query(
    config: Config,
    topics: tuple[str, ...],
    since: float | None,
    until: float | None,
    correlation_id: str | None,
    after: int,
    last: int | None,
    limit: int | None,
    reverse: bool,
    as_json: bool,
) -> None:
    """Print events from the tape; the bus need not run. With --json, one object per line.

    \b
    tapebus query --last 20
    tapebus query --topic signal_outcome --since 6h
    tapebus query --correlation-id EG_1 --json
    """
    show = event_json if as_json else event_line
    with open_tape(config) as tape:
        found = tape.read(
            after=after,
            topics=list(topics) or None,
            since=since,
            until=until,
            correlation_id=correlation_id,
            limit=limit,
            reverse=reverse,
            last=last,
        )
        for event in found:
            sys.stdout.write(show(event) + "\n")


def _feed_lines(endpoint: str, prefix: str, topics: Sequence[str], key: str | None) -> Iterator[str]:
    import zmq

    from tapebus.curve import as_client, client_keys
    from tapebus.security import matches

    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        if key is not None:
            as_client(socket, client_keys(key))
        for topic in topics or ("*",):
            socket.subscribe(prefix + topic.removesuffix("*"))
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise UsageError(f"--feed {endpoint!r}: {error.strerror}; write tcp://HOST:PORT") from None
        while True:
            sent, body = socket.recv_multipart()
            if matches(sent.decode("utf-8", "replace").removeprefix(prefix), topics or ("*",)):
                yield body.decode("utf-8", "replace")


@click.command()
@topics_option
@click.option("-n", "--lines", type=click.IntRange(min=0), default=10, show_default=True, help="Old events first.")
@click.option("--after", type=click.IntRange(min=0), help="Begin after this bus_seq instead.")
@click.option("--feed", help="Follow the live feed at this endpoint, of a bus elsewhere, instead of a tape.")
@click.option("--key", type=click.Path(), envvar="TAPEBUS_KEY", help="Secret key file for --feed, see keygen.")
@json_option
@with_config
def tail(
    config: Config,
    topics: tuple[str, ...],
    lines: int,
    after: int | None,
    feed: str | None,
    key: str | None,
    as_json: bool,
) -> None:
    """Print the newest events, then every new one as it reaches the disk, until interrupted.

    With --feed new events only, one JSON object a line, as they were published.

    \b
    tapebus tail --topic "trade.*"
    tapebus tail -n 0 --json
    """
    if feed:
        for line in _feed_lines(feed, f"{config.feed.topic_prefix}.".lstrip("."), topics, key):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        return
    show = event_json if as_json else event_line
    chosen = list(topics) or None
    with open_tape(config) as tape:
        if after is None:
            last = tape.last_seq
            for event in tape.read(topics=chosen, last=lines):
                if event.bus_seq <= last:
                    sys.stdout.write(show(event) + "\n")
            after = last
        sys.stdout.flush()
        for event in tape.follow(after=after, topics=chosen):
            sys.stdout.write(show(event) + "\n")
            sys.stdout.flush()

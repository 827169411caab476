"""``tapebus check --books``: whether every event that was given a number is accounted for."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from tapebus import books
from tapebus.cli.common import amount, clock, open_tape, progress_bar, table
from tapebus.config import Config
from tapebus.errors import BusNotRunning, StoreError, TapebusError

#: Accounts, and ranges of lost numbers, shown to people; JSON has all that are kept.
SHOWN_ACCOUNTS, SHOWN_GAPS = 30, 20


def show(config: Config, as_json: bool, deep: bool) -> int:
    """Print the books of the tape, and of the bus where one runs; 1 when they do not close."""
    live = _live(config)
    with open_tape(config) as tape:
        accounts, last_seq = tape.accounts()
        total = books.summary(accounts, last_seq)
        counted, absent = _count(tape, last_seq) if deep else (None, [])
        # after the count: what was counted a moment ago, retention may have removed by now
        removed, damaged = _explain(absent, tape.holes, tape.first_seq)
    missing = last_seq - removed - damaged - sum(counted.values()) if counted is not None else 0
    report = {
        "bus": live,
        "tape": {**msgspec.structs.asdict(total), "last_seq": last_seq, "closed": total.closed},
        "producers": [msgspec.to_builtins(each) | {"gaps": _gaps(each)} for each in accounts],
    }
    if counted is not None:
        report["counted"] = {
            "removed": removed,
            "damaged": damaged,
            "missing": missing,
            "by_source": _by_source(accounts, counted),
        }
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        _print(report, accounts, total)
    return 0 if total.closed and not missing and not (live and live["unexplained"]) else 1


def _live(config: Config) -> dict[str, Any] | None:
    from tapebus.control import request

    try:
        found: dict[str, Any] = request(config, {"cmd": "stats"})["books"]
        return found
    except BusNotRunning:
        return None
    except (TapebusError, KeyError) as error:
        raise StoreError(f"a bus runs on {config.data_dir} but does not tell its books: {error}") from None


def _explain(absent: list[range], holes: list[tuple[int, int]], kept_from: int) -> tuple[int, int]:
    """How many of the `absent` numbers retention has removed, and how many damage, which is known by its numbers."""

    def within(first: int, stop: int) -> int:
        return sum(max(0, min(each.stop, stop) - max(each.start, first)) for each in absent)

    damaged = sum(within(first, last + 1) for first, last in holes)
    old_damage = sum(within(first, min(last + 1, kept_from)) for first, last in holes)
    return within(1, kept_from) - old_damage, damaged


def _count(tape: Any, last_seq: int) -> tuple[dict[str, int], list[range]]:
    with progress_bar("counting the tape", last_seq) as progress:
        found: tuple[dict[str, int], list[range]] = tape.count_by_source(last_seq, progress)
        return found


def _by_source(accounts: list[books.Account], counted: dict[str, int]) -> dict[str, dict[str, int]]:
    """What the events say against what the accounts say; an account is named by its publisher, an event by itself."""
    found = {source: {"counted": n, "accounts": 0} for source, n in counted.items()}
    for each in accounts:
        if each.stored:
            found.setdefault(each.source, {"counted": 0, "accounts": 0})["accounts"] += each.stored
    return dict(sorted(found.items()))


def _gaps(account: books.Account) -> list[dict[str, Any]]:
    return [
        {"first": gap.first, "last": gap.last, "events": len(gap), "place": gap.place, "at": gap.at}
        for gap in account.gaps
    ]


def _print(report: dict[str, Any], accounts: list[books.Account], total: books.Summary) -> None:
    live = report["bus"]
    if live is None:
        click.echo("no bus is running; this is the tape as of its last commit")
    else:
        click.echo(f"live {live['line']}")
        click.echo("tape as of its last commit, which the bus may be ahead of by now:")
    table(
        ["source", "producer", "highest_seq", "stored", "rejected", "dropped", "in_flight", "unexplained"],
        [
            (
                each.source,
                each.producer_id if each.producer_id != each.source else "",
                each.highest_seq,
                each.stored,
                amount(each.rejected),
                amount(each.dropped),
                each.in_flight,
                each.unexplained,
            )
            for each in _foremost(accounts)
        ],
    )
    used = sum(each.highest_seq > 0 for each in accounts)
    if used > SHOWN_ACCOUNTS:
        click.echo(f"and {used - SHOWN_ACCOUNTS:,} accounts more; --json prints all")
    for name, counts in (("rejected", _sum(accounts, "rejected")), ("dropped", _sum(accounts, "dropped"))):
        for place, count in sorted(counts.items()):
            click.echo(f"{name:<10}{count:>12,}  {place}")
    _print_gaps(accounts)
    if (counted := report.get("counted")) is not None:
        _print_counted(counted)
    click.echo(total.line())


def _foremost(accounts: list[books.Account]) -> list[books.Account]:
    """Those worth a line: where something is missing first, then who was seen last."""

    def rank(each: books.Account) -> tuple[bool, bool, float]:
        lost = bool(each.rejected or each.dropped or each.in_flight)
        return not each.unexplained, not lost and each.sequenced, -each.seen_at

    return sorted((each for each in accounts if each.highest_seq), key=rank)[:SHOWN_ACCOUNTS]


def _sum(accounts: list[books.Account], kind: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in accounts:
        for place, count in getattr(each, kind).items():
            found[place] = found.get(place, 0) + count
    return found


def _print_gaps(accounts: list[books.Account]) -> None:
    rows = [
        (each.source, each.producer_id, gap.first, gap.last, len(gap), gap.place, clock(gap.at))
        for each in accounts
        for gap in each.gaps
    ]
    if not rows:
        return
    click.echo("\nnumbers that are not on the tape")
    table(["source", "producer", "from", "to", "events", "place", "told"], rows[-SHOWN_GAPS:])
    if len(rows) > SHOWN_GAPS:
        click.echo(f"and {len(rows) - SHOWN_GAPS} ranges more; --json prints all that are kept")
    lost = sum(amount(each.rejected) + amount(each.dropped) for each in accounts if each.sequenced)
    if (unnamed := lost - sum(row[4] for row in rows)) > 0:
        click.echo(f"{unnamed:,} events more were lost in ranges that are counted but no longer named")
    click.echo("")


def _print_counted(counted: dict[str, Any]) -> None:
    click.echo("counted on the tape, event by event")
    rows = [(source or "(none)", n["counted"], n["accounts"]) for source, n in counted["by_source"].items()]
    table(["source in the event", "counted", "stored by accounts of that name"], rows)
    if counted["removed"]:
        click.echo(f"{counted['removed']:,} older events were removed by retention")
    if counted["damaged"]:
        click.echo(f"{counted['damaged']:,} events were lost to damage; `tapebus check` names them")
    if counted["missing"]:
        click.echo(f"{counted['missing']:,} events are missing on the tape; run `tapebus check`")

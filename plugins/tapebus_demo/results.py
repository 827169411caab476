"""What a session amounted to, read back from the tape, the bus and the accounts of the producers."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapebus import Tape
from tapebus.events import to_dict
from tapebus.plugins import load
from tapebus_trading.proportions import wilson

if TYPE_CHECKING:
    from tapebus_demo.session import Session

#: What the steps of a signal's way are called, in the order they are shown when they share a moment.
STEPS = {
    "signal_generated": "generated",
    "gate_verdict": "verdict",
    "fire_command": "fired",
    "slot_reserved": "slot reserved",
    "trade_executed": "filled",
    "slot_opened": "slot opened",
    "signal_outcome": "outcome",
    "position_closed": "position closed",
    "slot_released": "slot released",
}
SEQUENCED = ("market", "signals", "terminal", "burst")


def by_pattern(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per pattern; the win rate is over wins and losses only, everything else is counted beside it."""
    rows = []
    for pattern in sorted({each["pattern_type"] for each in outcomes}):
        mine = [each for each in outcomes if each["pattern_type"] == pattern]
        counts = {kind: sum(each["outcome"] == kind for each in mine) for kind in ("WIN", "LOSS", "TIMEOUT")}
        decided = counts["WIN"] + counts["LOSS"]
        low, high = wilson(counts["WIN"], decided)
        results = [each["r"] for each in mine if each["outcome"] in ("WIN", "LOSS") and each.get("r") is not None]
        rows.append(
            {
                "pattern": pattern,
                "signals": len(mine),
                "n": decided,
                "wins": counts["WIN"],
                "timeouts": counts["TIMEOUT"],
                "other": len(mine) - decided - counts["TIMEOUT"],
                "win_rate": counts["WIN"] / decided if decided else None,
                "low": low,
                "high": high,
                "mean_r": sum(results) / len(results) if results else None,
            }
        )
    return rows


def summarise(session: Session, seconds: float) -> dict[str, Any]:
    """The summary as plain values, as ``--json`` prints it; the runtime has stopped."""
    data_dir = session.config.data_dir
    with Tape.open(data_dir, plugins=("schema", "store", "slots")) as tape:
        wanted = [name for name in STEPS if name not in ("fire_command", "position_closed")]
        events = list(tape.read(topics=wanted))
        tape_stats = tape.stats()
        outcomes = [to_dict(each)["data"] for each in events if each.event_type == "signal_outcome"]
        story = _story(tape, events)
        dead = [f"{letter.reason}: {letter.detail}" for letter in tape.dead_letters(limit=3)]
    stats = session.stats
    bus, plugins = stats["bus"], stats["plugins"]
    slots_used, _, slots_max = str(plugins["slots"]["metrics"]["slots"]).partition("/")
    return {
        "simulated": not session.options.ticks,
        "recording": session.options.ticks or None,
        "seed": session.options.seed,
        "seconds": round(seconds, 2),
        "burst": _burst(session),
        "latency_ms": {
            "n": len(session.probe.seconds),
            "p50": session.probe.percentile(0.5),
            "p99": session.probe.percentile(0.99),
        },
        "tape": {
            "events": tape_stats["events"],
            "bytes_per_event": tape_stats["bytes_per_event"],
            "raw_bytes_per_event": tape_stats["raw_bytes"] / max(1, tape_stats["events"]),
            "bytes_on_disk": tape_stats["bytes_on_disk"],
        },
        "books": _books(session),
        "dead_letters": {"count": tape_stats["dead_letters"], "reasons": bus["dead_letters"], "examples": dead},
        "signals": _signals(events),
        "patterns": by_pattern(outcomes),
        "slots": {"used": int(slots_used), "max": int(slots_max), "peak": session.slots_peak},
        "story": story,
        "telegram": {"count": plugins["telegram"]["metrics"]["dry_run"], "examples": _telegram(data_dir)},
        "consumers": [{k: each[k] for k in ("name", "handled", "errors", "state")} for each in stats["consumers"]],
        "data_dir": str(data_dir),
        "config": str(session.config_file),
        "kept": session.options.keep,
    }


def _burst(session: Session) -> dict[str, Any]:
    accounts = session.accounts("burst")
    events = sum(each["published"] - 1 for each in accounts)
    began = min(each["began"] for each in accounts)
    on_disk = max(each["ended"] for each in accounts) - began
    handled = session.caught_up_s - began
    return {
        "events": events,
        "processes": len(accounts),
        "on_disk_s": on_disk,
        "events_per_s": events / on_disk,
        "handled_s": handled,
        "handled_per_s": events / handled,
    }


def _books(session: Session) -> dict[str, Any]:
    """The producers' own accounts against those of the bus; `agree` when every number matches."""
    bus = session.stats["bus"]
    known = {each["producer_id"]: each for each in session.stats["producers"]}
    rows, agree = [], True
    for role in SEQUENCED:
        for account in session.accounts(role):
            found = known.get(account["producer_id"], {"stored": 0, "unexplained": 0})
            lost = sum(account["dropped"].values()) + sum(account["rejected"].values()) + account["in_flight"]
            agree &= account["published"] == account["acked"] + lost and account["acked"] == found["stored"]
            rows.append({"process": role, "published": account["published"], "stored": found["stored"], "lost": lost})
    webapp = session.accounts("webapp")[0]
    entered = next((each for each in session.stats["producers"] if each["producer_id"] == "ingest"), {"stored": 0})
    rejected = bus["rejected"].get("ingest.malformed", 0)
    agree &= webapp["published"] == entered["stored"] and webapp["broken"] == rejected
    rows.append({"process": "webapp (plain JSON)", "published": webapp["published"] + webapp["broken"]})
    rows[-1] |= {"stored": entered["stored"], "lost": rejected}
    return {
        "rows": rows,
        "received": bus["received"],
        "stored": bus["stored"],
        "rejected": bus["rejected"],
        "dropped": bus["dropped"],
        "unexplained": bus["unexplained"],
        "agree": agree,
    }


def _signals(events: list[Any]) -> dict[str, Any]:
    verdicts = [each.data for each in events if each.event_type == "gate_verdict"]
    refusals: dict[str, int] = {}
    for verdict in verdicts:
        for reason in verdict.reasons:
            refusals[reason] = refusals.get(reason, 0) + 1

    def count(kind: str) -> int:
        return sum(each.event_type == kind for each in events)

    return {
        "generated": count("signal_generated"),
        "verdicts": len(verdicts),
        "fired": sum(each.fire for each in verdicts),
        "refusals": dict(sorted(refusals.items(), key=lambda item: -item[1])),
        "reserved": count("slot_reserved"),
        "opened": count("slot_opened"),
        "released": count("slot_released"),
        "outcomes": count("signal_outcome"),
    }


def _story(tape: Tape, events: list[Any]) -> dict[str, Any] | None:
    """The way of one signal that was fired, filled and closed; a winning one where there is one."""
    complete = {each.data.signal_id for each in events if each.event_type == "slot_released" and each.data.ticket}
    ended = [each.data for each in events if each.event_type == "signal_outcome" and each.data.signal_id in complete]
    if not ended:
        return None
    chosen = next((each for each in ended if each.outcome == "WIN"), ended[0])
    steps = [each for each in tape.read(correlation_id=chosen.signal_id) if each.event_type in STEPS]
    began = steps[0].received_at
    return {
        "signal_id": chosen.signal_id,
        "symbol": chosen.symbol,
        "direction": chosen.direction,
        "pattern": chosen.pattern_type,
        "steps": [
            {
                "step": STEPS[each.event_type],
                "bus_seq": each.bus_seq,
                "ms": (each.received_at - began) * 1e3,
                "what": _what(each),
            }
            for each in steps
        ],
    }


def _what(event: Any) -> str:
    data = event.data
    if event.event_type == "signal_generated":
        return f"{data.direction} {data.symbol} at {data.entry:g}, stop {data.sl:g}, target {data.tp:g}"
    if event.event_type == "gate_verdict":
        return f"{len(data.rules)} rules passed, {data.lots:g} lots, {data.risk:.2f} USD at risk"
    if event.event_type == "fire_command":
        return f"fire {data.fire_id}"
    if event.event_type == "trade_executed":
        return f"{data.status} at {data.price:g}, ticket {data.ticket}"
    if event.event_type == "signal_outcome":
        return f"{data.outcome} {data.r:+.2f} R after {data.duration_s:.2f} s and {data.quotes_seen} quotes"
    if event.event_type == "position_closed":
        return f"{data.reason}, profit {data.profit:+.2f} USD"
    return f"{data.slots_used} of {data.slots_max} slots used"


def _telegram(data_dir: Path) -> list[dict[str, str]]:
    """What the Telegram plugin would have sent, the newest message of each kind.

    Plugins do not import each other; a demonstration of all of them is no plugin's business but this
    one's, so it asks the installed plugin, by its entry point, to read its own state.
    """
    point = next(iter(entry_points(group="tapebus.plugins", name="telegram")), None)
    if point is None:
        return []
    reader = load(["store"]).hook.tapebus_open_store(data_dir=data_dir, config={}, readonly=True)
    try:
        messages = point.load().rendered(reader.state("telegram"))
    finally:
        reader.close()
    newest = {each["topic"]: each["text"] for each in messages}
    return [{"topic": topic, "text": newest[topic]} for topic in sorted(newest)]

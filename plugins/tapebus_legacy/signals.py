"""From what lines say to events: one per signal, and the fate of every line.

A signal whose end is known becomes one ``signal_outcome`` that carries all of it; one whose end is not becomes a
``signal_imported``. Neither is a ``signal_generated``: nothing may follow or fire what is long over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any, NamedTuple

from tapebus_legacy import facts
from tapebus_legacy.account import CONFLICT, DUPLICATE, MAPPED, MERGED, REFUSED, Account
from tapebus_legacy.facts import Fact, Refused
from tapebus_trading.money import exact
from tapebus_trading.symbols import Registry

OUTCOME, OPEN = "signal_outcome", "signal_imported"
#: What the tape may know of a signal besides its outcome.
ON_TAPE_OPEN, FOLLOWED = "open", "followed"


class Made(NamedTuple):
    """One event to publish."""

    event_type: str
    timestamp: float
    data: dict[str, Any]
    fact: Fact


def settle(found: Sequence[Fact]) -> None:
    """Give the facts of one file that only say ``win`` their outcome.

    Their programs write ``win: false`` when a signal is born. Where a win of the same shape has ``lifespan`` 0 as well,
    the lifespan tells nothing and ``win`` stands; where it does tell, a ``false`` that was never followed is open.
    """
    telling = {each.shape for each in found if each.lived_s is not None} - {
        each.shape for each in found if each.win and each.outcome is None and each.lived_s == 0
    }
    for each in found:
        if each.outcome is not None or each.win is None:
            continue
        if not each.win and each.lived_s == 0 and each.shape in telling:
            each.repairs.add("open_not_lost")
        else:
            each.outcome = "WIN" if each.win else "LOSS"


def plan(
    found: Iterable[Fact],
    known: Mapping[str, str],
    symbols: Registry,
    check: Callable[[Made], str | None],
    accounts: Sequence[Account],
    origin: Callable[[Fact], str],
) -> list[Made]:
    """The events that are new, by event time; what becomes of each line goes to its file's account.

    `known` is what the tape has: an outcome, `ON_TAPE_OPEN` or `FOLLOWED` by signal id. `check` says what is wrong with
    an event, `origin` where a fact comes from.
    """
    by_signal: dict[str, list[Fact]] = {}
    for each in found:
        by_signal.setdefault(each.signal_id, []).append(each)
    made: list[Made] = []
    for group in by_signal.values():
        try:
            chosen, rest = _joined(group)
            event = _event(chosen, symbols, origin(chosen))
            if problem := check(event):
                raise Refused("not a valid event", problem)
        except Refused as refused:
            for each in group:
                accounts[each.file].note(each.shape, REFUSED, each.line, refused.reason, str(refused))
            continue
        fate, detail = _against_tape(event, known.get(chosen.signal_id))
        accounts[chosen.file].note(chosen.shape, fate, chosen.line, detail and "the tape says otherwise", detail)
        for each, theirs, why in rest:
            theirs = fate if theirs == MERGED and fate != MAPPED else theirs
            accounts[each.file].note(each.shape, theirs, each.line, why and "another line says otherwise", why)
        for each in group:
            accounts[each.file].repaired(each.repairs, each.line)
        if fate == MAPPED:
            made.append(event)
            accounts[chosen.file].events[event.event_type] += 1
            accounts[chosen.file].outcomes[event.data.get("outcome", "open")] += 1
    made.sort(key=lambda each: each.timestamp)
    return made


def _joined(group: list[Fact]) -> tuple[Fact, list[tuple[Fact, str, str]]]:
    """The line that knows most of a signal, with its end from another line if need be, and the fates of the others."""
    told = [each for each in group if each.describes]
    if not told:
        raise Refused("ends a signal that no line describes", f"{group[0].signal_id}: no symbol and direction")
    best = max(told, key=_knowledge)
    rest: list[tuple[Fact, str, str]] = []
    for each in group:
        if each is best:
            continue
        if best.outcome is None and each.outcome is not None:
            _take_end(best, each)
            rest.append((each, MERGED, ""))
        elif each.outcome in (None, best.outcome):
            rest.append((each, DUPLICATE if each.outcome == best.outcome else MERGED, ""))
        else:
            rest.append((each, CONFLICT, f"{each.signal_id}: {each.outcome} here, {best.outcome} counts"))
    return best, rest


def _knowledge(found: Fact) -> tuple[bool, bool, int]:
    """An end with its price outranks a bare one, that outranks none, and levels do among equals; else the first."""
    levels = sum(each is not None for each in (found.entry, found.sl, found.tp))
    return found.outcome is not None, found.exit_price is not None, levels


def _take_end(best: Fact, end: Fact) -> None:
    best.outcome, best.exit_price, best.ended_at = end.outcome, end.exit_price, end.ended_at
    best.pips = best.pips | end.pips
    if best.at is not None and end.ended_at is not None and end.lived_s is not None:
        if abs(end.ended_at - best.at - end.lived_s) > facts.CLOCK_TOLERANCE_S:
            end.repairs.add("duration_contradiction")
    elif best.at is not None and end.lived_s:
        best.ended_at = best.at + end.lived_s


def _against_tape(event: Made, known: str | None) -> tuple[str, str]:
    outcome, signal_id = event.data.get("outcome"), event.fact.signal_id
    if known is None or (known == ON_TAPE_OPEN and outcome is not None):
        return MAPPED, ""
    if outcome in (None, known):
        return DUPLICATE, ""
    if known == FOLLOWED:
        return CONFLICT, f"{signal_id}: {outcome} here, but this bus follows the signal itself"
    return CONFLICT, f"{signal_id}: {outcome} here, {known} on the tape"


def _event(found: Fact, symbols: Registry, origin: str) -> Made:
    needed = {"symbol": found.symbol, "pattern": found.pattern, "confidence": found.confidence, "time": found.at}
    for name, value in needed.items():
        if value in (None, ""):
            raise Refused(f"no {name}", f"{found.signal_id}: no {name}")
    _ordered(found)
    _reward(found)
    _compare_pips(found, symbols)
    common = {
        "signal_id": found.signal_id,
        "symbol": found.symbol,
        "direction": found.direction,
        "pattern_type": found.pattern,
        "confidence": found.confidence,
        "entry": found.entry,
        "sl": found.sl,
        "tp": found.tp,
        "risk_reward": found.risk_reward,
        "session": found.session,
        "fired": found.fired,
        "origin": origin[:2000],
    }
    at = found.at or 0.0
    if found.outcome is None:
        pip = symbols[found.symbol].pip
        more = {
            "quality_score": found.quality,
            "signal_class": found.signal_class,
            "stop_pips": _in_pips(found.entry, found.sl, pip),
            "target_pips": _in_pips(found.entry, found.tp, pip),
        }
        return Made(OPEN, at, _known(common | more), found)
    return Made(OUTCOME, max(at, found.ended_at or at), _known(common | _end(found, symbols)), found)


def _end(found: Fact, symbols: Registry) -> dict[str, Any]:
    at = found.at or 0.0
    ended = found.ended_at
    if ended is None:
        found.repairs.add("end_time_unknown")
        ended = at
    elif ended < at:
        raise Refused("ends before it begins", f"{found.signal_id}: begins {at}, ends {ended}")
    price, r, pips = _result(found, symbols)
    return {
        "outcome": found.outcome,
        "exit_price": price,
        "r": r,
        "pips": pips,
        "opened_at": at,
        "closed_at": ended,
        "duration_s": ended - at,
        "quotes_seen": 0,
    }


def _result(found: Fact, symbols: Registry) -> tuple[float | None, float | None, float | None]:
    """Exit price, R and pips. R comes from prices; only where there is no exit price from the plan (domain of R: a
    target reached earns reward:risk, a stop reached costs 1)."""
    price = found.exit_price
    if price is None or found.entry is None:
        if found.outcome not in ("WIN", "LOSS"):
            return price, None, None
        r = found.risk_reward if found.outcome == "WIN" else -1.0
        if r is not None:
            found.repairs.add("r_planned")
        return price, r, None
    up = 1 if found.direction == "BUY" else -1
    if found.outcome == "WIN" and found.tp is not None and (price - found.tp) * up > 0:
        price = found.tp  # a target is a limit: it is filled at its level
    gained = (exact(price) - exact(found.entry)) * up
    if (found.outcome == "WIN" and gained <= 0) or (found.outcome == "LOSS" and gained >= 0):
        raise Refused(
            "outcome and prices contradict",
            f"{found.signal_id}: {found.outcome}, {found.direction} {found.entry}, out at {price}",
        )
    risk = abs(exact(found.entry) - exact(found.sl)) if found.sl is not None else Decimal(0)
    r = float(round(gained / risk, 6)) if risk else None
    return price, r, float(round(gained / symbols[found.symbol].pip, 4))


def _ordered(found: Fact) -> None:
    """Stop, entry and target in the order their direction asks for."""
    levels = [each for each in (found.sl, found.entry, found.tp) if each is not None]
    if found.direction == "SELL":
        levels.reverse()
    if any(a >= b for a, b in pairwise(levels)):
        words = f"stop {found.sl}, entry {found.entry}, target {found.tp}"
        raise Refused("levels on the wrong side", f"{found.signal_id}: {found.direction} with {words}")


def _reward(found: Fact) -> None:
    """Reward:risk from prices where there are any; the recorded one is rounded, and sometimes wrong."""
    if found.risk_reward is not None and found.risk_reward <= 0:
        found.risk_reward = None
    if found.entry is None or found.sl is None or found.tp is None:
        return
    entry = exact(found.entry)
    exactly = float(round(abs(exact(found.tp) - entry) / abs(entry - exact(found.sl)), 4))
    if found.risk_reward is not None and abs(exactly - found.risk_reward) > 0.011:
        found.repairs.add("risk_reward_recomputed")
    found.risk_reward = exactly


def _compare_pips(found: Fact, symbols: Registry) -> None:
    """Note where the file counts pips otherwise than the registry does, or where nothing tells."""
    pip = symbols[found.symbol].pip
    for name, level in (("stop", found.sl), ("target", found.tp), ("result", found.exit_price)):
        stated = found.pips.get(name)
        if stated is None:
            continue
        ours = _in_pips(found.entry, level, pip)
        if ours is None:
            if name != "result" or found.outcome is not None:
                found.repairs.add("pips_dropped")
        elif abs(abs(stated) - ours) > 0.01 * max(ours, 0.1):
            found.repairs.add("pips_recomputed")


def _in_pips(entry: float | None, level: float | None, pip: Decimal) -> float | None:
    if entry is None or level is None:
        return None
    return float(round(abs(exact(level) - exact(entry)) / pip, 4))


def _known(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}

"""All events of one signal, found on the tape through ids: its own, those of its fires, and their tickets.

A fire has an id of its own, and what answers it often carries nothing else; a terminal may name only its ticket. The
correlation index leads from one to the next; what carries no correlation id is looked for by type, after the signal.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from itertools import chain as chain_of
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapebus import Tape

SIGNALS = ("signal_generated", "signal_imported")
#: What leads from a signal to its orders.
_FIRES = ("fire_command", "slot_reserved")
#: What becomes of an order.
_ANSWERS = ("trade_executed", "trade_confirmed", "slot_opened", "position_closed", "slot_released")
TOPICS = (*SIGNALS, "gate_verdict", *_FIRES, *_ANSWERS, "signal_expired", "signal_outcome")
#: Seconds of event time after a signal within which a fire of it, and the end of its position, are looked for by type.
FIRE_WINDOW_S, END_WINDOW_S = 86_400.0, 30 * 86_400.0
#: Events looked through by type, at most.
MOST = 50_000
#: The newest signals compared with an id that is not known.
COMPARED = 5_000


def field(data: Any, name: str) -> Any:
    """A payload field of a struct, or of the plain ``dict`` of a type nobody registered; empty text is None."""
    value = data.get(name) if isinstance(data, dict) else getattr(data, name, None)
    return None if value == "" else value


class Chain:
    """The events of `signal_id`, and the ids that lead to more of them."""

    def __init__(self, signal_id: str) -> None:
        self.signal_id = signal_id
        self.fires: set[str] = set()
        self.tickets: set[int] = set()
        self.symbols: set[str] = set()
        self.found: dict[int, Any] = {}

    @property
    def events(self) -> list[Any]:
        """In bus order."""
        return [self.found[seq] for seq in sorted(self.found)]

    def settle(self, candidates: Iterable[Any]) -> None:
        """Take what belongs, until nothing more does: what is learnt from one event may claim one before it."""
        rest = [each for each in candidates if each.bus_seq not in self.found]
        while taken := [each for each in rest if self._belongs(each)]:
            for each in taken:
                self.found[each.bus_seq] = each
                self._learn(each.data)
            rest = [each for each in rest if each.bus_seq not in self.found]

    def _belongs(self, event: Any) -> bool:
        data = event.data
        named, fire = field(data, "signal_id"), field(data, "fire_id")
        if named is not None:
            return bool(named == self.signal_id)
        if fire is not None:
            return fire in self.fires or event.correlation_id == self.signal_id
        if event.correlation_id is not None and event.correlation_id in self.fires | {self.signal_id}:
            return True
        symbol = field(data, "symbol")
        same = not self.symbols or symbol is None or symbol in self.symbols
        return same and not self.tickets.isdisjoint(_tickets(data))

    def _learn(self, data: Any) -> None:
        if fire := field(data, "fire_id"):
            self.fires.add(fire)
        if symbol := field(data, "symbol"):
            self.symbols.add(symbol)
        self.tickets |= _tickets(data)

    def by_index(self, tape: Tape) -> None:
        """Follow the correlation ids: a few milliseconds on a tape of any length."""
        asked: set[str] = set()
        candidates: list[Any] = []
        while todo := ({self.signal_id} | self.fires | {str(each) for each in self.tickets}) - asked:
            for each in sorted(todo):
                candidates += tape.read(correlation_id=each, topics=TOPICS)
            asked |= todo
            self.settle(candidates)

    def by_type(self, tape: Tape, topics: Sequence[str], window_s: float) -> None:
        """Look through all events of `topics` from the signal on, for what carries no correlation id of it."""
        if not self.found:
            return
        first = self.found[min(self.found)]
        until = first.timestamp + window_s
        self.settle(islice(tape.read(after=first.bus_seq, topics=topics, until=until), MOST))


def _tickets(data: Any) -> set[int]:
    return {each for name in ("ticket", "position_id") if isinstance(each := field(data, name), int) and each}


def follow(tape: Tape, signal_id: str) -> Chain:
    """Everything the tape has of `signal_id`, which may also be the id of one of its fires."""
    chain = Chain(signal_id)
    chain.by_index(tape)
    named = any(field(event.data, "signal_id") == signal_id for event in chain.events)
    if not named and (owner := _owner(tape, signal_id)):
        chain = Chain(owner)
        chain.by_index(tape)
    if not any(event.event_type in SIGNALS for event in chain.events):
        chain.settle(_uncorrelated(tape, chain))
        chain.by_index(tape)
    if any(event.event_type not in ("signal_imported", "signal_outcome") for event in chain.events):
        chain.by_type(tape, _FIRES, FIRE_WINDOW_S)
        chain.by_index(tape)
        if chain.fires:
            chain.by_type(tape, _ANSWERS, END_WINDOW_S)
    return chain


def _uncorrelated(tape: Tape, chain: Chain) -> list[Any]:
    """The signal itself, published without a correlation id: the cause of what follows it, else among the newest."""
    causes = {event.causation_id for event in chain.events if (event.causation_id or "").startswith("bus:")}
    for cause in sorted(causes):
        found = list(tape.read(after=int(cause[4:]) - 1, limit=1))
        if found and found[0].event_type in SIGNALS and field(found[0].data, "signal_id") == chain.signal_id:
            return found
    newest = tape.read(topics=SIGNALS, reverse=True, limit=MOST)
    return list(islice((each for each in newest if field(each.data, "signal_id") == chain.signal_id), 1))


def _owner(tape: Tape, fire_id: str) -> str | None:
    """The signal of a fire, which need not be correlated by its own id."""
    newest = tape.read(topics=_FIRES, reverse=True, limit=MOST)
    for event in chain_of(tape.read(correlation_id=fire_id, topics=TOPICS), newest):
        if field(event.data, "fire_id") == fire_id and (named := field(event.data, "signal_id")):
            return str(named)
    return None


def nearest(tape: Tape, signal_id: str) -> list[str]:
    """Ids on the tape that look like `signal_id`, the best first."""
    newest = tape.read(topics=[*SIGNALS, "signal_outcome"], reverse=True, limit=COMPARED)
    known = dict.fromkeys(str(field(event.data, "signal_id")) for event in newest)
    return difflib.get_close_matches(signal_id, known, 3)

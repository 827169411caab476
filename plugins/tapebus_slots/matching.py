"""Telling which position of a snapshot belongs to which slot, also after its ticket was renewed.

A partial close gives the rest a new ticket, so a missing ticket alone says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

if TYPE_CHECKING:
    from tapebus_slots.slot import Slot

_EPSILON = 1e-9
#: A comment of this many characters may be the begin of a fire id (terminals cut at 26 to 31).
_CUT = 20


class Position(Struct, frozen=True):
    """One position as a heartbeat lists it; ``open_time`` is compared, never computed with (broker time)."""

    ticket: int | None
    symbol: str
    direction: str
    position_id: int | None = None
    fire_id: str | None = None
    open_price: float | None = None
    volume: float | None = None
    magic: int | None = None
    open_time: float | str | None = None
    comment: str = ""


class Match(NamedTuple):
    """A slot and the position a list has for it. ``named``: the list says so; ``likely``: nothing says otherwise."""

    slot: Slot
    position: Position
    named: bool
    likely: bool


def match(slots: Sequence[Slot], positions: Sequence[Position], at: float | None) -> tuple[list[Match], list[Position]]:
    """Pairs of slot and position, at most one each, and the positions no slot claims.

    Tried in the order of trust, each over all that is left: position id, fire id (also in the comment), ticket,
    the opening (magic, symbol, price, time), a comment cut short, and last an unanswered fire of the same symbol
    and direction that was sent before `at`, the time of a complete list (an incomplete one may lack the very one).
    """
    pairs: list[Match] = []
    slots, positions = list(slots), list(positions)
    for same in _TESTS:
        for position in positions[:]:
            able = [each for each in slots if _worth_a_try(same, each, at)]
            slot = next((each for each in able if same(each, position)), None)
            if slot is not None:
                likely = same in (_cut_comment, _answers) or (same is _same_opening and slot.open_time is None)
                pairs.append(Match(slot, position, same is _same_fire, likely))
                slots.remove(slot)
                positions.remove(position)
    return pairs, positions


def _same_position(slot: Slot, position: Position) -> bool:
    return position.position_id is not None and slot.position_id == position.position_id


def _same_fire(slot: Slot, position: Position) -> bool:
    return slot.fire_id is not None and (slot.fire_id == position.fire_id or slot.fire_id in position.comment.split())


def _same_ticket(slot: Slot, position: Position) -> bool:
    if slot.ticket is None or _contradicts(slot, position):
        return False
    # MetaTrader 4 notes in the comment of what a partial close leaves which ticket it was
    return slot.ticket == position.ticket or position.comment == f"from #{slot.ticket}"


def _same_opening(slot: Slot, position: Position) -> bool:
    if slot.open_price is None or position.open_price is None or _contradicts(slot, position):
        return False
    if slot.open_time is not None and position.open_time is not None and slot.open_time != position.open_time:
        return False
    if not _may_be(slot, position):
        return False
    return abs(slot.open_price - position.open_price) <= _EPSILON * max(1.0, abs(slot.open_price))


def _cut_comment(slot: Slot, position: Position) -> bool:
    """Terminals cut comments short, so the begin of a long fire id has to do."""
    begins = len(position.comment) >= _CUT and slot.fire_id is not None and slot.fire_id.startswith(position.comment)
    return begins and slot.ticket is None and not _contradicts(slot, position) and _may_be(slot, position)


def _answers(slot: Slot, position: Position) -> bool:
    """A fire whose confirmation was lost: the position that appeared for it has no name yet."""
    unnamed = slot.ticket is None and slot.state in ("RESERVED", "UNKNOWN")
    return unnamed and not _contradicts(slot, position) and _may_be(slot, position)


def _worth_a_try(same: Callable[[Slot, Position], bool], slot: Slot, at: float | None) -> bool:
    """Likeness proves nothing where the list may lack the very position, nor before the order was sent."""
    if same is _answers or (same is _same_opening and slot.open_time is None):
        return at is not None and (slot.sent_at is None or slot.sent_at < at)
    return True


def _may_be(slot: Slot, position: Position) -> bool:
    """Same symbol and direction, no other magic number, and not more lots than the slot has."""
    if (slot.symbol, slot.direction) != (position.symbol, position.direction):
        return False
    if slot.magic is not None and position.magic is not None and slot.magic != position.magic:
        return False
    return slot.lots is None or position.volume is None or position.volume <= slot.lots + _EPSILON


def _contradicts(slot: Slot, position: Position) -> bool:
    """Both name a fire, or both a permanent position id, and the names differ."""
    fires = slot.fire_id is not None and position.fire_id is not None and slot.fire_id != position.fire_id
    ids = slot.position_id is not None and position.position_id is not None and slot.position_id != position.position_id
    return fires or ids


_TESTS: tuple[Callable[[Slot, Position], bool], ...] = (
    _same_position,
    _same_fire,
    _same_ticket,
    _same_opening,
    _cut_comment,
    _answers,
)

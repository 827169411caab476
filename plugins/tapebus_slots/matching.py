"""Telling which position of a snapshot belongs to which slot, also after its ticket was renewed.

A partial close gives the rest a new ticket, so a missing ticket alone says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from tapebus_slots.table import Slot

_PRICE_EPSILON = 1e-9


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


def match(slots: Sequence[Slot], positions: Sequence[Position]) -> tuple[list[tuple[Slot, Position]], list[Position]]:
    """Pairs of slot and position, at most one each, and the positions no slot claims.

    Tried in the order of trust, each over all that is left: position id, fire id, ticket, the opening
    (magic, symbol, price, time), and last an unanswered fire of the same symbol and direction.
    """
    pairs: list[tuple[Slot, Position]] = []
    slots, positions = list(slots), list(positions)
    for same in _TESTS:
        for position in positions[:]:
            slot = next((each for each in slots if same(each, position)), None)
            if slot is not None:
                pairs.append((slot, position))
                slots.remove(slot)
                positions.remove(position)
    return pairs, positions


def _same_position(slot: Slot, position: Position) -> bool:
    return position.position_id is not None and slot.position_id == position.position_id


def _same_fire(slot: Slot, position: Position) -> bool:
    return position.fire_id is not None and slot.fire_id == position.fire_id


def _same_ticket(slot: Slot, position: Position) -> bool:
    return position.ticket is not None and slot.ticket == position.ticket


def _same_opening(slot: Slot, position: Position) -> bool:
    if slot.open_price is None or position.open_price is None or _contradicts(slot, position):
        return False
    if (slot.symbol, slot.direction) != (position.symbol, position.direction):
        return False
    for mine, theirs in ((slot.magic, position.magic), (slot.open_time, position.open_time)):
        if mine is not None and theirs is not None and mine != theirs:
            return False
    if slot.lots is not None and position.volume is not None and position.volume > slot.lots + _PRICE_EPSILON:
        return False
    return abs(slot.open_price - position.open_price) <= _PRICE_EPSILON * max(1.0, abs(slot.open_price))


def _answers(slot: Slot, position: Position) -> bool:
    """A fire whose confirmation was lost: the position that appeared for it has no name yet."""
    return (
        slot.ticket is None
        and slot.state in ("RESERVED", "UNKNOWN")
        and not _contradicts(slot, position)
        and (slot.symbol, slot.direction) == (position.symbol, position.direction)
    )


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
    _answers,
)

"""A broker and the way to it: what is really open, and messages that come late, twice, out of order or never.

The broker knows nothing of slots; a slot table is judged by it. Messages only say what was true when they were sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

#: An order reaches the broker within so many seconds or not at all: less than a bus waits for the answer.
ORDER_LIFE_S = 25.0
ACCOUNT = "EA"


@dataclass
class Position:
    """One open position. ``identifier`` never changes, the ticket may; ``fire_id`` is empty for one opened by hand."""

    ticket: int
    identifier: int
    fire_id: str
    symbol: str
    direction: str
    lots: Decimal
    price: float
    opened_at: float


@dataclass
class Broker:
    """``names``: how its list tells whose a position is (``fire_id``, ``comment``, ``identifier`` or ``nothing``)."""

    names: str = "fire_id"
    now: float = 1_758_500_000.0
    positions: dict[int, Position] = field(default_factory=dict)
    orders: dict[str, tuple[str, str, float]] = field(default_factory=dict)
    #: Sent and not delivered yet: (event type, time of sending, data).
    wire: list[tuple[str, float, dict[str, Any]]] = field(default_factory=list)
    number: int = 0

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.orders = {fire: order for fire, order in self.orders.items() if self.now - order[2] <= ORDER_LIFE_S}

    def send(self, event_type: str, **data: Any) -> None:
        self.wire.append((event_type, self.now, {key: value for key, value in data.items() if value is not None}))

    def order(self, symbol: str, direction: str) -> tuple[str, float, dict[str, Any]]:
        """A fire on its way; the event that the bus itself publishes."""
        self.number += 1
        fire = f"fire-{self.number}"
        self.orders[fire] = (symbol, direction, self.now)
        data = {"fire_id": fire, "symbol": symbol, "direction": direction, "lot": 0.1, "execution_mode": "AUTO"}
        return "fire_command", self.now, data

    def fill(self, fire: str, how: str) -> None:
        """Carry an order out. `how`: told as ``filled``, without lots (``brief``), as ``timeout``, or in ``part``."""
        symbol, direction, _ = self.orders.pop(fire)
        position = self._open(fire, symbol, direction, Decimal("0.06" if how == "part" else "0.1"))
        told = {"fire_id": fire, "symbol": symbol, "direction": direction}
        if how == "timeout":
            self.send("trade_executed", **told, status="FAILED", retcode=10012)
            return
        lots = None if how == "brief" else float(position.lots)
        self.send("trade_executed", **told, status="FILLED", ticket=position.ticket, volume=lots, price=position.price)

    def refuse(self, fire: str, how: str) -> None:
        """Do not carry an order out. `how`: told as ``rejected``, as ``timeout``, or ``silent``."""
        del self.orders[fire]
        if how == "rejected":
            self.send("trade_executed", fire_id=fire, status="REJECTED", retcode=10019)
        elif how == "timeout":
            self.send("trade_executed", fire_id=fire, status="ERROR", retcode=10012)

    def by_hand(self, symbol: str, direction: str) -> None:
        self._open("", symbol, direction, Decimal("0.1"))

    def _open(self, fire: str, symbol: str, direction: str, lots: Decimal) -> Position:
        self.number += 1
        price = 1.1 + self.number % 7 / 1000
        made = Position(self.number, self.number, fire, symbol, direction, lots, price, self.now)
        self.positions[made.ticket] = made
        return made

    def close(self, ticket: int, part: bool, how: str) -> None:
        """Close a position, or `part` of it. `how`: told by ``report``, by ``status``, by ``both``, or ``silent``."""
        position = self.positions[ticket]
        lots = position.lots / 2 if part and position.lots > Decimal("0.02") else position.lots
        whole = lots == position.lots
        if how in ("report", "both"):
            told = {"ticket": ticket, "symbol": position.symbol, "volume": float(lots), "close_price": 1.2}
            fire = position.fire_id if self.names == "fire_id" else None
            mine = position.identifier if self.names == "identifier" else None
            self.send(
                "position_closed",
                **told,
                profit=float(self.number),
                reason="TP_HIT" if whole else "PARTIAL_CLOSE",
                target_uuid=ACCOUNT,
                fire_id=fire,
                position_id=mine,
                timestamp=self.now,
            )
        if how in ("status", "both") and position.fire_id:
            status = "CLOSED_TP" if whole else "CLOSED_PARTIAL"
            self.send("trade_executed", fire_id=position.fire_id, status=status, ticket=ticket)
        del self.positions[ticket]
        if not whole:
            position.lots -= lots
            self._renew(position)

    def swap(self, ticket: int) -> None:
        """The overnight swap opens a position anew under another ticket."""
        self._renew(self.positions.pop(ticket))

    def _renew(self, position: Position) -> None:
        self.number += 1
        position.ticket = self.number
        self.positions[position.ticket] = position

    def heartbeat(self, listed: int | None = None, counted: int = 0) -> None:
        """The account as it is; an incomplete one lists the first `listed` positions or counts `counted` more."""
        rows = [self._row(each) for each in self.positions.values()]
        self.send(
            "ea_heartbeat",
            target_uuid=ACCOUNT,
            balance=10_000.0 + self.number % 5 * 20,
            equity=10_000.0,
            open_positions=len(rows) + counted,
            positions=rows[: len(rows) if listed is None else listed],
            timestamp=self.now,
        )

    def _row(self, position: Position) -> dict[str, Any]:
        row: dict[str, Any] = {
            "ticket": position.ticket,
            "symbol": position.symbol,
            "direction": position.direction,
            "open_price": position.price,
            "volume": float(position.lots),
            "open_time": position.opened_at,
        }
        if self.names == "fire_id":
            row["fire_id"] = position.fire_id
        elif self.names == "comment":
            row["comment"] = position.fire_id
        elif self.names == "identifier":
            row["position_id"] = position.identifier
        return row

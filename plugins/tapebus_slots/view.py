"""What the gate looks at: a signal, an account, the slots held, and what else the desk knows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from decimal import Decimal

from msgspec import Struct

from tapebus_slots.sizing import Quote
from tapebus_trading.calibration import Curve
from tapebus_trading.sessions import Hours
from tapebus_trading.symbols import Registry, Symbol


class Signal(Struct, frozen=True):
    """What the gate needs of a signal; ``at`` is its event time, ``entry`` None for a market order."""

    signal_id: str
    symbol: str
    direction: str
    confidence: float
    sl: float | None
    tp: float | None
    entry: float | None
    pattern: str | None
    at: float
    expires_at: float | None = None

    @property
    def buy(self) -> bool:
        return self.direction == "BUY"


class Account(Struct, frozen=True):
    """The account's last known figures; ``heartbeat_at`` is None as long as no heartbeat was ever seen.

    ``currency`` is what the broker says they are in; None where it does not.
    """

    balance: float | None = None
    equity: float | None = None
    heartbeat_at: float | None = None
    free_margin: float | None = None
    currency: str | None = None


class Held(Struct, frozen=True):
    """One held slot, also a reserved or doubtful one.

    ``risk`` is what is lost if its stop is hit, None where nobody knows its stop: it is then counted as one full
    trade. ``margin`` is what the account's free margin does not show yet.
    """

    symbol: str
    direction: str
    lots: Decimal | None = None
    risk: Decimal | None = None
    margin: Decimal = Decimal(0)


class SlotView(Struct, frozen=True):
    """The occupancy the gate decides on, and what is held.

    ``used`` is the larger of the local count (RESERVED and UNKNOWN included) and the broker's; ``fired`` the signals
    that were fired already.
    """

    used: int
    maximum: int
    held: Sequence[Held] = ()
    fired: Collection[str] = ()


class Known(Struct, frozen=True):
    """What else the desk knows: facts of symbols at the user's broker, switches, and what statistics found.

    ``lateness`` is how many seconds ago the signal was made when it is decided on; None where the past is judged again.
    """

    symbols: Registry
    broker: str = ""
    kill_switch: bool = False
    disabled: Collection[str] = ()
    calibration: Curve | None = None
    hours: Hours = Hours()
    lateness: float | None = None

    def calibrated(self, confidence: float) -> float | None:
        """The win rate, in percent, that signals of this stated confidence had; None where nobody knows."""
        if self.calibration is None or not math.isfinite(confidence):
            return None
        return self.calibration.apply(confidence)


def suffix(name: str, symbol: Symbol) -> str:
    """What the broker adds to the plain name of a symbol, for example ``.r``; its other pairs have it too."""
    plain = symbol.base + symbol.quote
    return name[len(plain) :] if name.upper().startswith(plain) else ""


def entry_price(signal: Signal, quote: Quote | None) -> float | None:
    """The price a market order would open at now: the ask for BUY, the bid for SELL; else what the signal says."""
    if quote is not None and quote.usable:
        return quote.ask if signal.buy else quote.bid
    return signal.entry


def finite(value: float | Decimal | None) -> bool:
    return value is not None and math.isfinite(value)

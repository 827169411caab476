"""Parts of the tests of the gate: one signal that passes every rule, and ways to change what is around it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec

from tapebus_slots.config import Config
from tapebus_slots.gate import Verdict, evaluate
from tapebus_slots.sizing import Quote
from tapebus_slots.view import Account, Held, Known, Signal, SlotView
from tapebus_trading.symbols import Registry

#: Monday 11 August 2025, 06:05 UTC.
T0 = 1_754_892_347.0
ON = Config(auto_fire=True)
RICH = Account(10_000.0, 10_000.0, T0)
#: The names of all rules, in their order.
RULES = [
    "auto_fire",
    "kill_switch",
    "tier",
    "not_fired_before",
    "expiry",
    "lateness",
    "pattern",
    "confidence",
    "market",
    "trade_mode",
    "specification",
    "geometry",
    "price_on_tick",
    "sl_distance",
    "tp_distance",
    "quote_age",
    "account",
    "heartbeat_age",
    "slots",
    "opposite_position",
    "total_open_risk",
    "currency_risk",
    "margin",
    "sizing",
]
QUOTES = {"EURUSD": Quote(1.16990, 1.17000, T0)}


def configured(**more: Any) -> Config:
    return msgspec.convert({"auto_fire": True, **more}, Config)


def quote(bid: float, ask: float, at: float = T0) -> dict[str, Quote]:
    return {"EURUSD": Quote(bid, ask, at)}


def known(shared: dict[str, Any] | None = None, own: dict[str, Any] | None = None, **more: Any) -> Known:
    return Known(Registry(shared, own), **more)


def view(held: list[Held] | tuple[Held, ...] = (), **more: Any) -> SlotView:
    """Slots as the gate sees them; of those `used` that `held` does not name, it is known that they risk nothing."""
    unnamed = max(0, more.get("used", 0) - len(held))
    held = [*held, *[Held("NZDCAD", "BUY", Decimal(0), Decimal(0))] * unnamed]
    return SlotView(**{"used": len(held), "maximum": 10, "held": held, **more})


KNOWN = known()
FREE = view()


def signal(**more: Any) -> Signal:
    values = {
        "signal_id": "S1",
        "symbol": "EURUSD",
        "direction": "BUY",
        "confidence": 85.0,
        "sl": 1.1685,
        "tp": 1.1720,
        "entry": 1.1700,
        "pattern": "VCB_BREAKOUT",
        "at": T0,
    }
    return Signal(**{**values, **more})


def decide(
    config: Config = ON,
    *,
    account: Account | None = RICH,
    slots: SlotView = FREE,
    quotes: dict[str, Quote] = QUOTES,
    known: Known = KNOWN,
    **more: Any,
) -> Verdict:
    """The verdict on the good signal changed by `more`."""
    return evaluate(signal(**more), account, slots, quotes, config, known)

"""What the answer to an order means: the words terminals use, and the return codes of MetaTrader.

A word and a code may contradict each other. Then the more cautious reading wins: a position that may exist
occupies its slot until a snapshot decides.
"""

from __future__ import annotations

from typing import Literal

#: `retry`: not executed, and whoever sent it may send it again. `already`: what was asked for had happened before.
Answer = Literal["filled", "closed", "partial", "refused", "retry", "unknown", "already", "pending"]

_WORDS: dict[str, Answer] = {
    **dict.fromkeys(
        ("success", "filled", "ok", "done", "executed", "open", "opened", "partially_filled", "placed"), "filled"
    ),
    **dict.fromkeys(("failed", "failure", "rejected", "reject", "insufficient_margin", "invalid_stops"), "refused"),
    **dict.fromkeys(("invalid_volume", "invalid_price", "hedge_blocked", "max_positions", "no_money"), "refused"),
    **dict.fromkeys(("market_closed", "trade_disabled", "cancelled", "canceled", "expired"), "refused"),
    **dict.fromkeys(("requote", "price_changed", "off_quotes", "busy", "locked", "too_many_requests"), "retry"),
    **dict.fromkeys(("timeout", "unknown", "disconnected", "error"), "unknown"),
}

#: MetaTrader 5 (10004 and above, -11 for a connection lost during the trade) and MetaTrader 4 (below 10000).
RETCODES: dict[int, Answer] = {
    **dict.fromkeys((10008, 10009, 10010, 10025), "filled"),
    **dict.fromkeys((10004, 10020, 10021, 136, 138), "retry"),
    **dict.fromkeys((10024, 10028, 10031, 141, 146), "retry"),
    **dict.fromkeys((10011, 10012, -11), "unknown"),
    **dict.fromkeys((10013, 10014, 10015, 10016, 10022, 10030, 10035, 10038, 129, 130, 131), "refused"),
    **dict.fromkeys((10006, 10007, 10017, 10018, 10019, 10026, 10027, 10029, 132, 134, 148, 149), "refused"),
    **dict.fromkeys((10032, 10033, 10034, 10040, *range(10042, 10047)), "refused"),
    **dict.fromkeys((10036, 10039, 10041, 10023), "already"),
}
#: The one code that says the position itself is gone.
POSITION_CLOSED = 10036


def read(status: str | None, retcode: int | None) -> Answer:
    """The meaning of an answer with this status word and return code; either may be missing."""
    word = _word((status or "").strip().lower())
    code = None if not retcode else RETCODES.get(retcode)
    if word in ("closed", "partial"):
        return word
    if word is None:
        return code or ("unknown" if retcode else "pending")
    if code is None:
        return word
    if word == "filled":
        return "unknown" if code == "refused" else "filled"
    if code == "already":
        return code
    if word == "refused":
        return "unknown" if code == "filled" else code
    return code if code in ("refused", "retry") else "unknown"


def _word(status: str) -> Answer | None:
    if status.startswith("closed") or status.endswith("_closed"):
        return "closed" if "partial" not in status and status != "market_closed" else _WORDS.get(status, "partial")
    if "partial" in status and "close" in status:
        return "partial"
    return _WORDS.get(status)

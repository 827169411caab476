"""The rules of outcomes in their plainest form."""

from __future__ import annotations

from typing import Any


class Model:
    """Every open signal looks at every event; nothing is kept but the prices it has seen."""

    def __init__(self, max_age: float) -> None:
        self.max_age = max_age
        self.open: dict[str, dict[str, Any]] = {}
        self.done: dict[str, dict[str, Any]] = {}

    def end(self, s: dict[str, Any], outcome: str, price: float | None, at: float) -> None:
        del self.open[s["id"]]
        sign, entry, seen = s["sign"], s["entry"], s["seen"]
        out = {"outcome": outcome, "exit_price": price, "closed_at": at, "quotes_seen": len(seen)}
        known = entry is not None and seen
        out["mfe"] = max(0.0, *(sign * (each - entry) for each in seen)) if known else None
        out["mae"] = min(0.0, *(sign * (each - entry) for each in seen)) if known else None
        risk = abs(entry - s["sl"]) if known and s["sl"] is not None else 0
        out["r"] = sign * (price - entry) / risk if risk and price is not None else None
        self.done[s["id"]] = out

    def time(self, now: float, *only: dict[str, Any]) -> None:
        for s in only or list(self.open.values()):
            if s["deadline"] <= now:
                self.end(s, *(("TIMEOUT", s["seen"][-1]) if s["seen"] else ("UNKNOWN", None)), s["deadline"])

    def signal(self, now: float, s: dict[str, Any], life: float | None) -> None:
        if s["id"] in self.open or s["id"] in self.done:
            return
        s |= {"seen": [], "deadline": now + (self.max_age if life is None else life)}
        self.open[s["id"]] = s
        if not self.sound(s):
            self.end(s, "UNKNOWN", None, now)

    @staticmethod
    def sound(s: dict[str, Any]) -> bool:
        known = [s["sign"] * each for each in (s["sl"], s["entry"], s["tp"]) if each is not None]
        return known == sorted(known) and (s["sl"] is None or s["sl"] != s["tp"])

    def expired(self, now: float, signal_id: str) -> None:
        s = self.open.get(signal_id)
        if s is not None and s["deadline"] <= now:
            self.time(now, s)
        elif s is not None:
            self.end(s, "CANCELLED", s["seen"][-1] if s["seen"] else None, now)

    def quote(self, now: float, bid: float, ask: float) -> None:
        self.time(now)
        for s in list(self.open.values()) if ask >= bid else ():
            sign, price = s["sign"], bid if s["sign"] > 0 else ask
            s["seen"].append(price)
            if s["entry"] is None:
                s["entry"] = ask if sign > 0 else bid
                if not self.sound(s):
                    self.end(s, "UNKNOWN", None, now)
                    continue
            if s["sl"] is not None and sign * (price - s["sl"]) <= 0:
                self.end(s, "BREAKEVEN" if price == s["entry"] else "LOSS", price, now)
            elif s["tp"] is not None and sign * (price - s["tp"]) >= 0:
                self.end(s, "BREAKEVEN" if s["tp"] == s["entry"] else "WIN", s["tp"], now)

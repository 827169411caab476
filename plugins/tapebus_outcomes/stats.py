"""Figures over finished signals: pure functions of ``signal_outcome`` payloads.

A win rate is WIN / (WIN + LOSS) and is always given with its n and its Wilson interval. Time-outs,
cancellations and open signals are neither wins nor losses; they are counted next to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from tapebus_outcomes.record import BREAKEVEN, CANCELLED, LOSS, TIMEOUT, WIN
from tapebus_trading.proportions import wilson


class Tally(msgspec.Struct):
    """Running sums over the outcomes of one pattern.

    ``r_n`` and ``r_sum`` cover the signals that ended at a level (WIN, LOSS, BREAKEVEN) and have a
    known risk; ``timeout_r_*`` those that were cut off by time.
    """

    open: int = 0
    wins: int = 0
    losses: int = 0
    breakevens: int = 0
    timeouts: int = 0
    cancelled: int = 0
    unknown: int = 0
    fired: int = 0
    r_n: int = 0
    r_sum: float = 0.0
    gain: float = 0.0
    pain: float = 0.0
    timeout_r_n: int = 0
    timeout_r_sum: float = 0.0
    duration_n: int = 0
    duration_sum: float = 0.0

    def add(self, outcome: Mapping[str, Any]) -> None:
        """Count one ``signal_outcome`` payload; an ``outcome`` of None is an open signal."""
        kind, r = outcome.get("outcome"), outcome.get("r")
        self.fired += bool(outcome.get("fired"))
        if kind is None:
            self.open += 1
            return
        at_level = True
        if kind == WIN:
            self.wins += 1
        elif kind == LOSS:
            self.losses += 1
        elif kind == BREAKEVEN:
            self.breakevens += 1
        else:
            at_level = False
            self.timeouts += kind == TIMEOUT
            self.cancelled += kind == CANCELLED
            self.unknown += kind not in (TIMEOUT, CANCELLED)
        if at_level:
            self.duration_n += 1
            self.duration_sum += outcome.get("duration_s") or 0.0
            if r is not None:
                self.r_n += 1
                self.r_sum += r
                self.gain += max(r, 0.0)
                self.pain += max(-r, 0.0)
        elif kind == TIMEOUT and r is not None:
            self.timeout_r_n += 1
            self.timeout_r_sum += r

    def row(self) -> dict[str, Any]:
        """The figures as plain values; a figure that cannot be known is None, never infinity."""
        decided = self.wins + self.losses
        low, high = wilson(self.wins, decided)
        resolved = decided + self.breakevens
        return {
            "n": resolved + self.timeouts + self.cancelled + self.unknown + self.open,
            "resolved": resolved,
            "wins": self.wins,
            "losses": self.losses,
            "breakevens": self.breakevens,
            "timeouts": self.timeouts,
            "cancelled": self.cancelled,
            "unknown": self.unknown,
            "open": self.open,
            "fired": self.fired,
            "decided": decided,
            "win_rate": self.wins / decided if decided else None,
            "win_rate_low": low,
            "win_rate_high": high,
            "expectancy_r": self.r_sum / self.r_n if self.r_n else None,
            "profit_factor": self.gain / self.pain if self.pain else None,
            "timeout_r": self.timeout_r_sum / self.timeout_r_n if self.timeout_r_n else None,
            "mean_duration_s": self.duration_sum / self.duration_n if self.duration_n else None,
        }


def table(tallies: Mapping[str, Tally]) -> list[dict[str, Any]]:
    """One row per pattern: the most decided signals first, then by name."""
    rows = [{"pattern_type": pattern, **tally.row()} for pattern, tally in tallies.items()]
    return sorted(rows, key=lambda row: (-row["decided"], row["pattern_type"]))


def summarise(outcomes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pattern table of `outcomes` (payloads of ``signal_outcome``).

    Each signal must come once: reading one tape from the beginning gives every outcome once.
    """
    tallies: dict[str, Tally] = {}
    for outcome in outcomes:
        pattern = outcome.get("pattern_type") or ""
        tally = tallies.get(pattern)
        if tally is None:
            tally = tallies[pattern] = Tally()
        tally.add(outcome)
    return table(tallies)

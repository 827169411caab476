"""The figures of a report: groups of outcomes, and what their win rates prove against their own breakeven.

A win rate is WIN / (WIN + LOSS) and never without its n and interval; time-outs, cancellations and open signals are
neither, and are counted beside it. Figures that cannot be known are None, never infinity.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct

from tapebus_analytics.clusters import Clusters, kind_of
from tapebus_analytics.config import Config
from tapebus_analytics.elimination import Trial, eliminated, recommendation, watched
from tapebus_trading.calibration import BIN, bin_of
from tapebus_trading.proportions import at_least, at_most, benjamini_hochberg, wilson
from tapebus_trading.sessions import SESSIONS, Hours

#: With fewer decided trades a group gets no word about how good it is, whatever its p-value.
SPEAK_FROM = 30
SIGNIFICANT = 0.05
UNDECIDED = {
    "BREAKEVEN": "breakevens",
    "TIMEOUT": "timeouts",
    "CANCELLED": "cancelled",
    "UNKNOWN": "unknown",
    None: "open",
}


class Trade(Struct, frozen=True):
    """One signal as a report sees it: ``outcome`` is None while it is open, ``r`` its result in stop distances.

    ``duration_s`` is None where an imported log does not tell when the signal ended.
    """

    signal_id: str
    symbol: str
    direction: str
    pattern_type: str
    confidence: float
    opened_at: float
    outcome: str | None = None
    r: float | None = None
    pips: float | None = None
    risk_reward: float | None = None
    duration_s: float | None = None
    fired: bool = False

    @property
    def result(self) -> float | None:
        """``r``, or for a log that kept no prices what a target or a stop that is hit pays."""
        if self.r is not None or self.risk_reward is None:
            return self.r
        return {"WIN": self.risk_reward, "LOSS": -1.0}.get(self.outcome or "")


class Group:
    """Running sums over the trades of one group, in the order in which they ended."""

    def __init__(self) -> None:
        self.wins = self.losses = self.repeats = self.fired = 0
        self.undecided: dict[str, int] = dict.fromkeys(UNDECIDED.values(), 0)
        self.rewards, self.rewards_n = 0.0, 0
        self.results_n = self.gains = self.pains = 0
        self.mean = self.squares = self.gain = self.pain = 0.0
        self.equity = self.peak = self.drawdown = 0.0
        self.duration, self.duration_n = 0.0, 0
        self.pips: float | None = None
        self.confidence: tuple[float, float] | None = None
        self.trial = Trial()

    def add(self, trade: Trade, config: Config) -> None:
        self.fired += trade.fired
        low, high = self.confidence or (trade.confidence, trade.confidence)
        self.confidence = min(low, trade.confidence), max(high, trade.confidence)
        if trade.outcome in ("WIN", "LOSS"):
            win = trade.outcome == "WIN"
            self.wins += win
            self.losses += not win
            self.trial.add(win, trade.risk_reward, config.breakeven)
            if trade.risk_reward:
                self.rewards += trade.risk_reward
                self.rewards_n += 1
        else:
            self.undecided[UNDECIDED.get(trade.outcome, "unknown")] += 1
        if trade.outcome in ("WIN", "LOSS", "BREAKEVEN"):
            if trade.duration_s is not None:
                self.duration += trade.duration_s
                self.duration_n += 1
            if trade.pips is not None:
                self.pips = (self.pips or 0.0) + trade.pips
            if (result := trade.result) is not None:
                self._result(result)

    def _result(self, r: float) -> None:
        self.results_n += 1
        # Welford: the sum of squared differences without the difference of two large sums
        before = r - self.mean
        self.mean += before / self.results_n
        self.squares += before * (r - self.mean)
        self.gain += max(r, 0.0)
        self.pain += max(-r, 0.0)
        self.gains += r > 0
        self.pains += r < 0
        self.equity += r
        self.peak = max(self.peak, self.equity)
        self.drawdown = max(self.drawdown, self.peak - self.equity)

    @property
    def n(self) -> int:
        return self.wins + self.losses

    @property
    def signals(self) -> int:
        return self.n + sum(self.undecided.values())

    @property
    def sqn(self) -> float | None:
        """System quality number: sqrt(n) times mean over standard deviation of R."""
        if self.results_n < 2 or self.squares <= 0:
            return None
        return math.sqrt(self.results_n) * self.mean / math.sqrt(self.squares / (self.results_n - 1))

    @property
    def kelly(self) -> float | None:
        """The share of the money that makes it grow fastest, w - (1 - w) / (mean gain / mean pain); below 0: none."""
        if not self.gains or not self.pains:
            return None
        share = self.gains / (self.gains + self.pains)
        return share - (1 - share) * (self.pain / self.pains) / (self.gain / self.gains)

    def row(self) -> dict[str, Any]:
        """The figures as plain values: rates in percent, results in R, durations in seconds."""
        low, high = wilson(self.wins, self.n)
        even = self.trial.breakeven
        return {
            "signals": self.signals,
            "wins": self.wins,
            "wr": _percent(self.wins / self.n) if self.n else None,
            "losses": self.losses,
            "n": self.n,
            "low": _percent(low),
            "high": _percent(high),
            "breakeven": None if even is None else _percent(even),
            "risk_reward": _rounded(self.rewards / self.rewards_n) if self.rewards_n else None,
            "expectancy_r": _rounded(self.mean) if self.results_n else None,
            "profit_factor": _rounded(self.gain / self.pain) if self.pain else None,
            "sqn": _rounded(self.sqn),
            "kelly": _rounded(self.kelly),
            "max_drawdown_r": _rounded(self.drawdown),
            "mean_duration_s": _rounded(self.duration / self.duration_n) if self.duration_n else None,
            "pips": _rounded(self.pips),
            "confidence": self.confidence,
            "resolved": _percent((self.n + self.undecided["breakevens"]) / self.signals) if self.signals else None,
            **self.undecided,
            "repeats": self.repeats,
            "fired": self.fired,
        }


def prove(groups: Mapping[str, Group]) -> dict[str, dict[str, Any]]:
    """The rows of `groups` with p-values against breakeven, adjusted within this family, and what they allow to say.

    ``p_value`` is the chance of so many wins or more at breakeven, ``p_worse`` of so many or fewer. Both families are
    adjusted (Benjamini and Hochberg); ``verdict`` is None where nothing is proven or a group is too small for a word.
    """
    rows = {name: group.row() for name, group in groups.items()}
    tested = [name for name, group in groups.items() if group.n and group.trial.breakeven is not None]
    for key, tail in (("p_value", at_least), ("p_worse", at_most)):
        raw = [tail(groups[name].wins, groups[name].n, groups[name].trial.breakeven or 0.0) for name in tested]
        for name, p, adjusted in zip(tested, raw, benjamini_hochberg(raw), strict=True):
            rows[name] |= {key: p, f"{key}_adjusted": adjusted}
    for row in rows.values():
        row["verdict"] = None
        for key, word in (("p_value", "above breakeven"), ("p_worse", "below breakeven")):
            row.setdefault(key, None)
            p_value = row.setdefault(f"{key}_adjusted", None)
            if p_value is not None and p_value < SIGNIFICANT and row["n"] >= SPEAK_FROM:
                row["verdict"] = word
    return rows


class Report:
    """Takes the events of a tape in their order and groups them.

    `source` is ``live``, ``imported`` or ``all``; `width` as in `Clusters`. Signals that have not ended are open.
    """

    def __init__(self, by: str, config: Config, width: float, source: str = "all", hours: Hours | None = None) -> None:
        self.by = by
        self.config = config
        self.source = source
        self.clusters = Clusters(width)
        self.groups: defaultdict[str, Group] = defaultdict(Group)
        self.overall = Group()
        self.counts: dict[float, tuple[int, int]] = {}
        #: For a report on calibration: stated confidence and whether it won, of every decided trade in order.
        self.sequence: list[tuple[float, bool]] = []
        self._name = _names(hours or Hours())[by]
        self._open: dict[str, Trade] = {}

    def add(self, event: Any) -> None:
        """Take a ``signal_generated``, ``signal_imported`` or ``signal_outcome``."""
        data, kind = event.data, event.event_type
        imported = kind == "signal_imported" or getattr(data, "origin", None) is not None
        if self.source != "all" and imported != (self.source == "imported"):
            return
        if kind != "signal_outcome":
            self.clusters.signal(data.signal_id, kind_of(data), event.timestamp)
            self._open.setdefault(data.signal_id, _opened(event))
            return
        before = self._open.pop(data.signal_id, None)
        counts = self.clusters.outcome(data.signal_id, kind_of(data), data.opened_at)
        self._count(_ended(data, before), counts)

    def finish(self) -> Report:
        """Count what is still open; call it once, after the last event."""
        for trade in self._open.values():
            self._count(trade, self.clusters.outcome(trade.signal_id, "", trade.opened_at))
        self._open.clear()
        return self

    def _count(self, trade: Trade, counts: bool) -> None:
        for group in (self.overall, self.groups[self._name(trade)]):
            if counts:
                group.add(trade, self.config)
            else:
                group.repeats += 1
        if counts and trade.outcome in ("WIN", "LOSS"):
            win = trade.outcome == "WIN"
            wins, n = self.counts.get(trade.confidence, (0, 0))
            self.counts[trade.confidence] = (wins + win, n + 1)
            if self.by == "calibration":
                self.sequence.append((trade.confidence, win))

    def rows(self) -> dict[str, dict[str, Any]]:
        """The proven rows: patterns and symbols by their number of decided trades, the rest in its natural order."""
        if self.by == "session":
            order = [*SESSIONS, *sorted(set(self.groups) - set(SESSIONS))]
            names = [name for name in order if name in self.groups]
        elif self.by in ("hour", "confidence", "day"):
            names = sorted(self.groups)
        else:
            names = sorted(self.groups, key=lambda name: (-self.groups[name].n, name))
        return prove({name: self.groups[name] for name in names})

    def recommendations(self) -> list[str]:
        """What the rule would say of each pattern's trades in this report; only where the groups are patterns."""
        if self.by != "pattern":
            return []
        found = []
        for name, group in sorted(self.groups.items()):
            trial = group.trial
            if eliminated(trial, self.config):
                found.append(f"Disable {name}")
            elif watched(trial, self.config, already=False):
                found.append(recommendation(name))
        return found


def _names(hours: Hours) -> dict[str, Callable[[Trade], str]]:
    """What a trade's group is called, by kind of report."""

    def session(trade: Trade) -> str:
        return hours.session_of(trade.opened_at, hours.market_of(trade.symbol))

    def confidence(trade: Trade) -> str:
        low = bin_of(trade.confidence)
        return f"{low:02d}-{low + BIN - (low + BIN < 100)}"

    def utc(form: str) -> Callable[[Trade], str]:
        return lambda trade: datetime.fromtimestamp(trade.opened_at, UTC).strftime(form)

    return {
        "pattern": lambda trade: trade.pattern_type,
        "symbol": lambda trade: trade.symbol,
        "session": session,
        "pattern-symbol": lambda trade: f"{trade.pattern_type} {trade.symbol}",
        "confidence": confidence,
        "hour": utc("%H:00"),
        "day": utc("%Y-%m-%d"),
        "calibration": lambda trade: trade.pattern_type,
    }


def plural(by: str) -> str:
    """What the groups of a kind of report are called in its JSON."""
    return {"pattern-symbol": "patterns_by_symbol", "confidence": "confidences"}.get(by, f"{by}s")


def _opened(event: Any) -> Trade:
    data = event.data
    return Trade(
        data.signal_id,
        data.symbol,
        data.direction,
        data.pattern_type,
        data.confidence,
        event.timestamp,
        risk_reward=_planned(data),
        fired=getattr(data, "fired", False),
    )


def _planned(data: Any) -> float | None:
    """The reward:risk of a signal's levels, or what it says of itself."""
    entry, sl, tp = data.entry, data.sl, data.tp
    if entry and sl and tp and entry != sl:
        return float(abs(tp - entry) / abs(entry - sl))
    return data.risk_reward or None


def _ended(data: Any, signal: Trade | None) -> Trade:
    planned = data.risk_reward or (signal.risk_reward if signal is not None else None)
    return Trade(
        data.signal_id,
        data.symbol,
        data.direction,
        data.pattern_type,
        data.confidence,
        data.opened_at,
        data.outcome,
        data.r,
        data.pips,
        planned,
        None if data.origin is not None and data.duration_s == 0 else data.duration_s,
        data.fired,
    )


def _percent(rate: float) -> float:
    return round(100 * rate, 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

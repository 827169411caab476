"""The gate over again on recorded signals with known outcomes: what other limits would have let through.

Fills are assumed: whatever the gate lets through counts as filled at once, at the signal's entry, and held until
the signal's outcome. Nothing here reads a clock or a tape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from msgspec import Struct, structs

from tapebus_slots.config import Config
from tapebus_slots.gate import Verdict, evaluate
from tapebus_slots.payload import get
from tapebus_slots.sizing import ZERO, Quote
from tapebus_slots.view import Account, Held, Known, Signal, SlotView
from tapebus_trading.money import UP, exact
from tapebus_trading.proportions import wilson

FULL = frozenset(("no_free_slot", "over_limit"))


class Result(Struct, frozen=True):
    """What a ``signal_outcome`` event says of a signal; times in Unix seconds, ``r`` in stop distances."""

    outcome: str
    closed_at: float
    r: float | None = None
    pips: float | None = None

    @classmethod
    def of(cls, data: Any) -> Result:
        return cls(data.outcome, data.closed_at, get(data, "r"), get(data, "pips"))


class Change(Struct, frozen=True):
    """What the other gate does differently; None leaves what is configured."""

    confidence_band: tuple[float, float] | None = None
    max_slots: int | None = None
    risk_pct: float | None = None
    max_total_open_risk_pct: float | None = None
    confidence: str | None = None

    def apply(self, config: Config) -> Config:
        """`config` with these changes; a pattern's own band stays, and firing is on."""
        given = {name: value for name, value in structs.asdict(self).items() if value is not None}
        return structs.replace(config, auto_fire=True, **given)


class Fired(Struct, frozen=True):
    """One simulated trade; ``result`` is None while the signal has no outcome yet."""

    signal: Signal
    verdict: Verdict
    result: Result | None

    def holds(self, at: float) -> bool:
        """Whether the trade occupies a slot at `at`."""
        return self.signal.at <= at and (self.result is None or at < self.result.closed_at)

    @property
    def held(self) -> Held:
        plan = self.verdict.plan
        margin = ZERO if plan.margin is None else UP.multiply(plan.margin, self.verdict.lots)
        return Held(self.signal.symbol, self.signal.direction, self.verdict.lots, self.verdict.risk, margin)


class Simulation:
    """One gate over a series of signals. Occupancy is what it fired itself, from the signal to its outcome."""

    def __init__(self, change: Change) -> None:
        self.change = change
        self.fired: dict[str, Fired] = {}
        self.judged = 0
        self.reasons: Counter[str] = Counter()
        #: Signals that only a full table stopped, and the most slots ever held.
        self.only_full = 0
        self.peak = 0
        self._open: list[Fired] = []

    def judge(
        self,
        signal: Signal,
        result: Result | None,
        account: Account | None,
        quotes: Mapping[str, Quote],
        config: Config,
        known: Known,
    ) -> bool:
        """Whether this gate fires `signal`, seeing the account and the quotes as they were."""
        self._open = [each for each in self._open if each.result is None or each.result.closed_at > signal.at]
        held = [each.held for each in self._open if each.holds(signal.at)]
        settings = self.change.apply(config)
        view = SlotView(len(held), settings.max_slots, held)
        verdict = evaluate(signal, _all_free(account), view, quotes, settings, known)
        self.judged += 1
        self.reasons.update(verdict.reasons)
        self.only_full += set(verdict.reasons) <= FULL and not verdict.fire
        if verdict.fire:
            fired = self.fired[signal.signal_id] = Fired(signal, verdict, result)
            self._open.append(fired)
            self.peak = max(self.peak, len(held) + 1)
        return verdict.fire

    def summary(self) -> dict[str, Any]:
        """What came of it, see `tally`, and why signals were refused."""
        return {
            **tally(list(self.fired.values())),
            "judged": self.judged,
            "refused_because_full": sum(self.reasons[each] for each in FULL),
            "refused_only_because_full": self.only_full,
            "peak_slots": self.peak,
            "refused": dict(self.reasons.most_common()),
        }


def tally(trades: list[Fired]) -> dict[str, Any]:
    """Counts, the win rate WIN / (WIN + LOSS) with its Wilson interval (fractions), and sums over `trades`.

    ``expectancy_r`` is the mean of R over all trades that have one; ``money`` the sum of R times the amount risked, in
    account currency. Figures of nothing are None.
    """
    outcomes = Counter(each.result.outcome for each in trades if each.result is not None)
    wins, losses = outcomes["WIN"], outcomes["LOSS"]
    decided = wins + losses
    rs = [each.result.r for each in trades if each.result is not None and each.result.r is not None]
    pips = [each.result.pips for each in trades if each.result is not None and each.result.pips is not None]
    low, high = wilson(wins, decided)
    return {
        "fires": len(trades),
        "wins": wins,
        "losses": losses,
        "others": sum(outcomes.values()) - decided,
        "no_outcome": sum(each.result is None for each in trades),
        "win_rate": wins / decided if decided else None,
        "interval": [low, high] if decided else None,
        "expectancy_r": sum(rs) / len(rs) if rs else None,
        "n_r": len(rs),
        "sum_r": sum(rs) if rs else None,
        "pips": sum(pips) if pips else None,
        "money": float(sum((_money(each) for each in trades), ZERO)) if rs else None,
    }


def compare(now: Simulation, then: Simulation) -> dict[str, Any]:
    """Both gates, and the trades that only one of them would have fired."""
    return {
        "configured": now.summary(),
        "changed": then.summary(),
        "gained": tally([each for key, each in then.fired.items() if key not in now.fired]),
        "given_up": tally([each for key, each in now.fired.items() if key not in then.fired]),
    }


def _money(trade: Fired) -> Decimal:
    if trade.result is None or trade.result.r is None:
        return ZERO
    return exact(trade.result.r) * trade.verdict.risk


def _all_free(account: Account | None) -> Account | None:
    """The account as if it held nothing but what the simulation fired, whose margin is counted with the slots."""
    if account is None:
        return None
    equity = account.equity if account.equity is not None else account.balance
    return structs.replace(account, free_margin=equity)

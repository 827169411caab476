"""When a pattern has shown enough to be disabled, and when to come back: pure functions of what it has shown.

Looking after every trade at a test made for one look disables good patterns: the seed's "less than 40 % over 20" so
loses a third of all fair coins within 200 trades. The e-value may be looked at as often as one likes.
"""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct, field

from tapebus_analytics.config import Config
from tapebus_trading.proportions import at_most, breakeven_win_rate, log_mixture, log_null, wilson

Status = Literal["active", "watch", "disabled"]
#: From so many trades on a bad rate is worth a word.
WATCH_FROM = 2
#: Breakevens beyond this are taken as this.
_LEAST = 0.001
#: A quarter of the normal distribution lies below: what may be chance but is worth watching.
_QUARTILE = -0.6745


class Trial(Struct):
    """What a pattern has shown since its last trial ended; repeats and undecided trades are not in it.

    ``tested`` and ``tested_wins`` count the trades whose own breakeven is known, ``needed`` is the sum of these (the
    wins it takes), ``log_null`` the log probability of their results if each had won just as often as it must.
    """

    n: int = 0
    wins: int = 0
    tested: int = 0
    tested_wins: int = 0
    needed: float = 0.0
    log_null: float = 0.0

    def add(self, win: bool, reward_risk: float | None, fixed: float | None) -> None:
        """Count one decided trade; `fixed` is the configured breakeven, which replaces that of `reward_risk`."""
        self.n += 1
        self.wins += win
        if fixed is None and not reward_risk:
            return
        p = fixed if fixed is not None else breakeven_win_rate(reward_risk or 0.0)
        # a reward nobody trades for must not make one result infinitely unlikely
        p = min(max(p, _LEAST), 1 - _LEAST)
        self.tested += 1
        self.tested_wins += win
        self.needed += p
        self.log_null += log_null(int(win), 1, p)

    @property
    def breakeven(self) -> float | None:
        """The mean of the trades' own breakevens: one absurd reward cannot lower it for all the others."""
        return self.needed / self.tested if self.tested else None

    @property
    def log_e(self) -> float:
        """Log of the evidence that the trades do not win as often as their breakevens say, more or less often."""
        return log_mixture(self.tested_wins, self.tested) - self.log_null

    @property
    def better(self) -> bool:
        """Whether the tested trades won more often than breakeven."""
        even = self.breakeven
        return even is not None and self.tested_wins / self.tested > even


class Pattern(Struct):
    """Where a pattern stands. ``status`` is what the rule says, ``user_status`` what a user says instead."""

    pattern_type: str
    status: Status = "active"
    since: float = 0.0
    trial: Trial = field(default_factory=Trial)
    user_status: Status | None = None
    user: str = ""
    user_since: float = 0.0
    told: tuple[str, str] = ("active", "rule")

    @property
    def effective(self) -> Status:
        return self.user_status or self.status

    @property
    def by(self) -> str:
        return f"user:{self.user}" if self.user_status else "rule"


def judge(pattern: Pattern, config: Config, at: float) -> Status:
    """What the rule makes of a pattern at `at`, event time, after a trade was added to its trial."""
    trial = pattern.trial
    if pattern.status == "disabled":
        rested = at - pattern.since >= config.cooldown_s
        return "active" if rested and recovered(trial, config) else "disabled"
    if eliminated(trial, config):
        return "disabled" if config.auto_disable else "watch"
    return "watch" if watched(trial, config, pattern.status == "watch") else "active"


def eliminated(trial: Trial, config: Config) -> bool:
    """Whether a trial shows that a pattern loses."""
    if config.rule == "literal":
        return trial.n >= config.min_signals and trial.wins / trial.n < config.threshold
    return trial.tested >= config.min_signals and _proven(trial, config) and not trial.better


def recovered(trial: Trial, config: Config) -> bool:
    """Whether the trades in the shadow show that a disabled pattern earns: the same rule, from the other side."""
    if config.rule == "literal":
        return trial.n >= config.min_signals and trial.wins / trial.n >= config.threshold
    return trial.tested >= config.min_signals and _proven(trial, config) and trial.better


def _proven(trial: Trial, config: Config) -> bool:
    return trial.log_e >= -math.log(config.alpha)


def reference(trial: Trial, config: Config) -> float:
    """The win rate below which a pattern is on the bad side."""
    even = trial.breakeven if config.rule == "evidence" else None
    return config.threshold if even is None else even


def watched(trial: Trial, config: Config, already: bool) -> bool:
    """Below the minimum a bad rate is enough for a recommendation, beyond it must be worse than chance often is.

    A pattern on watch leaves it at the reference, not before, so that its status does not flutter.
    """
    if trial.n < WATCH_FROM:
        return False
    p = reference(trial, config)
    rate = trial.wins / trial.n
    if rate >= p:
        return False
    return already or trial.n < config.min_signals or (rate - p) / math.sqrt(p * (1 - p) / trial.n) < _QUARTILE


def recommendation(pattern_type: str) -> str:
    return f"Monitor {pattern_type} for potential disable"


def reason(pattern: Pattern, trial: Trial, config: Config) -> str:
    """One sentence for people: what was decided and the figures behind it."""
    low, high = wilson(trial.wins, trial.n)
    figures = f"{trial.wins} of {trial.n} won"
    if trial.n:
        figures += f" (95 % interval {low:.0%} to {high:.0%})"
    if config.rule == "literal":
        figures += f", threshold {config.threshold:.0%}"
    elif (even := trial.breakeven) is not None:
        figures += f", breakeven {even:.0%}, E = {_shown(trial.log_e)}"
    if pattern.user_status:
        word = "disabled" if pattern.user_status == "disabled" else "kept on"
        rule = "" if pattern.status == pattern.user_status else f"; the rule says {pattern.status}"
        return f"{word} by user {pattern.user}{rule}: {figures}"
    if pattern.status == "disabled":
        return f"disabled: {figures}"
    if pattern.status == "watch":
        few = "; too few to decide" if trial.n < config.min_signals else ""
        return f"{recommendation(pattern.pattern_type)}: {figures}{few}"
    return f"active: {figures}"


def _shown(log_e: float) -> str:
    return f"{math.exp(min(log_e, 700)):.3g}"


def figures(trial: Trial) -> dict[str, float | int | None]:
    """The figures of a ``pattern_status``: rates as fractions, ``p_value`` of "no worse than breakeven"."""
    low, high = wilson(trial.wins, trial.n)
    even = trial.breakeven
    return {
        "n": trial.n,
        "wins": trial.wins,
        "win_rate": trial.wins / trial.n if trial.n else None,
        "low": low,
        "high": high,
        "breakeven": even,
        "e_value": math.exp(min(trial.log_e, 40)) if trial.tested else None,
        "p_value": at_most(trial.tested_wins, trial.tested, even) if even is not None else None,
    }

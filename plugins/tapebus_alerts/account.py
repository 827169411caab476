"""Watches of trading itself: slots, and how far results or an account are below their highest point."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from tapebus_alerts.settings import Drawdown, Slots
from tapebus_alerts.watch import SUBJECTS, Moment, Reading, Watch, field, span, subject_of

#: Outcomes of one window that are kept at most; the oldest go first.
OUTCOMES = 5000
#: Parts of a window in each of which the highest balance is kept.
PARTS = 24


class SlotsWatch(Watch[Slots]):
    topics = ("slot_reserved", "slot_opened", "slot_released")

    def __init__(self, rule: Slots, state: MutableMapping[str, bytes]) -> None:
        super().__init__(rule, state)
        self._users: dict[str, list[int]] = self.kept("slots")

    def see(self, event: Any, at: float) -> None:
        user = subject_of(event.user_id, field(event.data, "user_id"))
        found = [field(event.data, "slots_used"), field(event.data, "slots_max")]
        if found != self._users.get(user) and (user in self._users or len(self._users) < SUBJECTS):
            self._users[user] = found
            self.keep("slots", user, found)

    def check(self, moment: Moment) -> Iterator[Reading]:
        for user, (used, most) in self._users.items():
            if most:
                whose = f" for user {user}" if user else ""
                yield Reading(user, float(most - used), f"{used}/{most} slots in use{whose}")


class DrawdownRWatch(Watch[Drawdown]):
    topics = ("signal_outcome",)

    def __init__(self, rule: Drawdown, state: MutableMapping[str, bytes]) -> None:
        super().__init__(rule, state)
        kept = self.kept("r")
        #: When and how much, by ``bus_seq``, in that order.
        self._results: dict[int, tuple[float, float]] = {int(seq): tuple(kept[seq]) for seq in sorted(kept, key=int)}
        self._below: float | None = None

    def see(self, event: Any, at: float) -> None:
        r = field(event.data, "r")
        imported = field(event.data, "origin") is not None  # it arrives now and was lost long ago
        if r is None or imported or (self.rule.fired_only and not field(event.data, "fired")):
            return
        self._results[event.bus_seq] = (at, r)
        self._below = None
        self.keep("r", str(event.bus_seq), (at, r))

    def check(self, moment: Moment) -> Iterator[Reading]:
        for seq, (at, _) in list(self._results.items()):
            if at > moment.at - self.rule.window_s and len(self._results) <= OUTCOMES:
                break
            del self._results[seq]
            self._below = None
            self.forget("r", str(seq))
        if self._below is None:
            self._below = below_peak(r for _, r in self._results.values())
        count = len(self._results)
        text = f"{self._below:.2f} R below the highest point of {span(self.rule.window_s)} ({count} outcomes)"
        yield Reading("", self._below, text)


def below_peak(results: Iterator[float]) -> float:
    """How far the sum of `results` is below its highest value on the way, which began at 0."""
    total = peak = 0.0
    for each in results:
        total += each
        peak = max(peak, total)
    return peak - total


class DrawdownPercentWatch(Watch[Drawdown]):
    """The highest balance is kept by parts of the window, so that it is forgotten a part at a time."""

    topics = ("ea_heartbeat", "balance_update")

    def __init__(self, rule: Drawdown, state: MutableMapping[str, bytes]) -> None:
        super().__init__(rule, state)
        self._part_s = rule.window_s / PARTS
        self._highs: dict[str, dict[int, float]] = {
            account: {int(part): high for part, high in highs.items()} for account, highs in self.kept("high").items()
        }
        self._equity: dict[str, float] = {}

    def see(self, event: Any, at: float) -> None:
        data = event.data
        balance, equity = field(data, "balance"), field(data, "equity")
        account = subject_of(field(data, "account_number"), field(data, "target_uuid"))
        if balance is None or (account not in self._highs and len(self._highs) >= SUBJECTS):
            return
        self._equity[account] = float(balance if equity is None else equity)
        highs = self._highs.setdefault(account, {})
        part = int(at // self._part_s)
        if balance > highs.get(part, 0.0):
            highs[part] = float(balance)
            for old in [each for each in highs if each < part - PARTS]:
                del highs[old]
            self.keep("high", account, {str(each): high for each, high in highs.items()})

    def check(self, moment: Moment) -> Iterator[Reading]:
        first = int(moment.at // self._part_s) - PARTS
        for account, highs in list(self._highs.items()):
            high = max((balance for part, balance in highs.items() if part >= first), default=0.0)
            if not high:
                # nothing heard for a whole window
                del self._highs[account]
                self._equity.pop(account, None)
                self.forget("high", account)
                continue
            equity = self._equity.get(account)
            below = None if equity is None else 100.0 * (1.0 - equity / high)
            within = span(self.rule.window_s)
            yield Reading(
                account, below, f"equity of {account} {below or 0:.1f} % below the highest balance of {within}"
            )

"""Recorded signals as the gate saw them: with the quotes, the account and the desk of their moment, from the tape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from msgspec import Struct, msgpack

from tapebus import Tape
from tapebus.errors import ConfigError
from tapebus_slots.config import Config
from tapebus_slots.decide import read_signal
from tapebus_slots.desk import Desk
from tapebus_slots.payload import get
from tapebus_slots.sizing import Quote
from tapebus_slots.view import Account, Known, Signal
from tapebus_slots.whatif import Result

#: What tells the desk something, and what tells an account's figures.
_FACTS = ("user_fire_mode", "pattern_status", "calibration", "symbol_specification")
_FIGURES = ("balance_update", "ea_heartbeat", "trade_executed", "trade_confirmed")
#: Reading on over so many events costs about as much as finding another place on the tape.
_WORTH_A_SEEK = 5000


class Case(Struct, frozen=True):
    """One signal with all that is needed to judge it again; ``assumed`` where its quote is made up from its entry."""

    signal: Signal
    result: Result | None
    account: Account | None
    quotes: Mapping[str, Quote]
    config: Config
    known: Known
    assumed: bool = False


class Recording:
    """The signals of one user on a tape from `since` to `until` (event times).

    `values` is ``[plugins.slots]`` and `shared` ``[shared]`` of the configuration of today; fire modes, disabled
    patterns, calibrations and specifications are those of the signal's moment. `balance` stands in where no figures
    of the account are on the tape. `progress` is told the share read, 0 to 1. The kill switch is never on.
    """

    def __init__(
        self,
        tape: Tape,
        values: dict[str, Any],
        shared: Mapping[str, Any],
        user: str | None = None,
        *,
        since: float | None = None,
        until: float | None = None,
        balance: float | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._tape = tape
        self._desk = Desk(values, shared, {})
        self.user = user or self._desk.config.user_id
        self._since, self._until = since, until
        self._account = None if balance is None else Account(balance, balance)
        self._progress = progress
        learnt = tape.state("slots").get("users")
        known = msgpack.decode(learnt, type=dict[str, str]) if learnt else {}
        self._users = known | self._desk.config.accounts
        self._terminals = [uuid for uuid, owner in self._users.items() if owner == self.user]
        #: Signals published again, which the gate judges once.
        self.repeated = 0

    def cases(self) -> Iterator[Case]:
        """The signals in the order of time: imported ones, which are older, and then those the bus has seen."""
        signals, results, imported = self._signals()
        for data in imported:
            signal = _imported(data)
            yield self._case(signal, Result.of(data), self._assumed(signal), True)
        quotes = self._quotes(signals)
        last = max(signals, default=1)
        wanted = ("signal_generated", *_FACTS, *_FIGURES)
        for event in self._tape.read(topics=wanted, until=self._until):
            if event.bus_seq in signals:
                signal = read_signal(event)
                self._progress(0.5 + event.bus_seq / (2 * last))
                yield self._case(signal, results.get(signal.signal_id), quotes.get(event.bus_seq, {}), False)
            elif event.event_type in _FIGURES:
                self._figures(event)
            elif event.event_type != "signal_generated":
                self._fact(event)

    def _signals(self) -> tuple[dict[int, float], dict[str, Result], list[Any]]:
        """The user's signals by ``bus_seq`` with their times, results by signal id, and imported outcomes."""
        signals: dict[int, float] = {}
        seen: set[str] = set()
        results: dict[str, Result] = {}
        imported: dict[str, Any] = {}
        for event in self._tape.read(topics=["signal_generated", "signal_outcome"]):
            data = event.data
            if event.event_type == "signal_outcome":
                if get(data, "origin") is None:
                    results.setdefault(data.signal_id, Result.of(data))
                elif self._within(data.opened_at) and get(data, "sl"):
                    imported.setdefault(data.signal_id, data)
                continue
            owner = event.user_id or get(data, "user_id")
            if owner not in (None, self.user) or not self._within(event.timestamp):
                continue
            if data.signal_id in seen:
                self.repeated += 1
                continue
            seen.add(data.signal_id)
            signals[event.bus_seq] = event.timestamp
        older = [data for key, data in imported.items() if key not in seen]
        return signals, results, sorted(older, key=lambda data: data.opened_at)

    def _within(self, at: float) -> bool:
        return (self._since is None or at >= self._since) and (self._until is None or at < self._until)

    def _quotes(self, signals: Mapping[int, float]) -> dict[int, dict[str, Quote]]:
        """The last quotes before each signal. Only those around signals are read: one that is stale counts as none."""
        config = self._desk.config_of(self.user)
        reach = max(config.max_quote_age_s, config.max_conversion_age_s)
        found: dict[int, dict[str, Quote]] = {}

        def fresh(last: dict[str, Quote], at: float) -> dict[str, Quote]:
            return {name: quote for name, quote in last.items() if quote.at >= at - reach}

        for begin, end, seqs in _windows(signals, reach):
            waiting = sorted(seqs, reverse=True)
            last: dict[str, Quote] = {}
            for event in self._tape.read(topics=["market_data"], since=begin, until=end):
                while waiting and event.bus_seq > waiting[-1]:
                    seq = waiting.pop()
                    found[seq] = fresh(last, signals[seq])
                    self._progress(len(found) / (2 * len(signals)))
                if not waiting:
                    break
                last[event.data.symbol] = Quote(event.data.bid, event.data.ask, event.timestamp)
            found.update({seq: fresh(last, signals[seq]) for seq in waiting})
        return found

    def _case(self, signal: Signal, result: Result | None, quotes: Mapping[str, Quote], assumed: bool) -> Case:
        config = self._desk.config_of(self.user).counted_in(_currency(self._account))
        return Case(signal, result, self._account, quotes, config, self._desk.known(*self._terminals), assumed)

    def _assumed(self, signal: Signal) -> dict[str, Quote]:
        """A quote at the entry with the spread that is typical of the symbol: nobody recorded the real one."""
        symbol = self._desk.symbols.get(signal.symbol)
        if symbol is None or signal.entry is None:
            return {}
        spread = float(symbol.typical_spread)
        bid = signal.entry - spread if signal.buy else signal.entry
        return {signal.symbol: Quote(bid, bid + spread, signal.at)}

    def _figures(self, event: Any) -> None:
        data = event.data
        balance = get(data, "balance", "new_balance")
        owner = event.user_id or get(data, "user_id")
        owner = owner or self._users.get(get(data, "target_uuid") or "", self._desk.config.user_id)
        if owner != self.user or balance is None:
            return
        beat = event.timestamp if event.event_type == "ea_heartbeat" else None
        if beat is None and self._account is not None:
            beat = self._account.heartbeat_at
        currency = get(data, "currency") or _currency(self._account)
        self._account = Account(balance, get(data, "equity"), beat, currency=currency)

    def _fact(self, event: Any) -> None:
        """What the desk refused when it happened is refused again."""
        try:
            if event.event_type == "user_fire_mode":
                owner = event.user_id or get(event.data, "user_id") or self._desk.config.user_id
                self._desk.on_fire_mode(event, owner)
            else:
                self._desk.handlers[event.event_type](event)
        except (ValueError, ConfigError):
            return


def _currency(account: Account | None) -> str | None:
    return None if account is None else account.currency


def _imported(data: Any) -> Signal:
    return Signal(
        signal_id=data.signal_id,
        symbol=data.symbol,
        direction=data.direction,
        confidence=data.confidence,
        sl=get(data, "sl"),
        tp=get(data, "tp"),
        entry=get(data, "entry"),
        pattern=data.pattern_type,
        at=data.opened_at,
    )


def _windows(signals: Mapping[int, float], reach: float) -> list[tuple[float, float, list[int]]]:
    """Spans of event time in which quotes matter to `signals`, with the signals in each; near ones are one."""
    windows: list[tuple[float, float, list[int]]] = []
    busy = (max(signals, default=0) - min(signals, default=0)) or 1
    gap = _WORTH_A_SEEK * (max(signals.values(), default=0.0) - min(signals.values(), default=0.0)) / busy
    for seq, at in sorted(signals.items(), key=lambda each: each[1]):
        if windows and at - reach <= windows[-1][1] + gap:
            begin, _, seqs = windows[-1]
            windows[-1] = (begin, at + reach, [*seqs, seq])
        else:
            windows.append((at - reach, at + reach, [seq]))
    return windows

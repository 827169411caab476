"""Recorded days of quotes with made-up signals in them, and an oracle that scans the quotes for each signal alone."""

from __future__ import annotations

import random
import zipfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

#: What the configuration of the tested plugin says.
MAX_GAP_S = 60.0
MAX_AGE_S = 86_400.0
#: By file: symbol, decimals of its prices, and what is half a point of the symbol.
DAYS = {
    "oanda_eurusd_20140508.zip": ("EURUSD", 5, Fraction(5, 10**6)),
    "oanda_xauusd_20140505.zip": ("XAUUSD", 3, Fraction(5, 10**3)),
}


@dataclass
class Day:
    """Quotes in order; a crossed one (ask below bid) is none for the oracle."""

    symbol: str
    decimals: int
    half_point: Fraction
    times: list[float]
    bids: list[float]
    asks: list[float]

    def __len__(self) -> int:
        return len(self.times)

    def part(self, first: int, last: int) -> Day:
        cut = [each[first:last] for each in (self.times, self.bids, self.asks)]
        return Day(self.symbol, self.decimals, self.half_point, *cut)

    def cross(self, chance: random.Random, count: int) -> None:
        """Turn `count` quotes into crossed ones."""
        for index in chance.sample(range(len(self)), count):
            self.bids[index], self.asks[index] = self.asks[index], round(self.bids[index] - 0.001, self.decimals)


def read_day(file: Path) -> Day:
    """One of `DAYS`: lines of ms since midnight UTC, bid, ask."""
    symbol, decimals, half_point = DAYS[file.name]
    midnight = datetime.strptime(file.stem[-8:], "%Y%m%d").replace(tzinfo=UTC).timestamp()
    with zipfile.ZipFile(file) as archive:
        lines = archive.read(archive.namelist()[0]).decode().split()
    rows = [line.split(",") for line in lines]
    times = [midnight + float(row[0]) / 1000 for row in rows]
    return Day(symbol, decimals, half_point, times, [float(row[1]) for row in rows], [float(row[2]) for row in rows])


@dataclass
class Order:
    """One signal, published just before the quote `place`; and before quote ``cancel[0]`` taken back at ``cancel[1]``.

    ``fired``: an order follows at once. ``noise`` is what float arithmetic of a producer adds to its levels; it means
    nothing.
    """

    signal_id: str
    buy: bool
    entry: float | None
    sl: float | None
    tp: float | None
    place: int
    opened_at: float
    expires_at: float | None = None
    cancel: tuple[int, float] | None = None
    fired: bool = False
    noise: float = 0.0
    kind: str = ""

    def payload(self, symbol: str) -> dict[str, Any]:
        levels = {name: getattr(self, name) for name in ("entry", "sl", "tp") if getattr(self, name) is not None}
        data = {name: level * (1 + self.noise) for name, level in levels.items()}
        if self.expires_at is not None:
            data["expires_at"] = self.expires_at
        direction = "BUY" if self.buy else "SELL"
        fixed = {"signal_id": self.signal_id, "symbol": symbol, "direction": direction, "confidence": 80.0}
        return {**fixed, "pattern_type": self.kind, **data}


#: What is special about a signal. Levels "on" a price lie exactly on one that is quoted later.
KINDS = ("plain", "plain", "on exit side", "on other side", "no entry", "no target", "no stop", "in hole", "noise")


def make_orders(day: Day, chance: random.Random, count: int) -> list[Order]:
    """`count` signals in bus order, of all `KINDS`, some running out, some taken back, some fired."""
    holes = [i for i in range(1, len(day)) if day.times[i] - day.times[i - 1] > MAX_GAP_S]
    spread = sorted(ask - bid for bid, ask in zip(day.bids, day.asks, strict=True))[len(day) // 2]
    orders = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        place = chance.choice(holes) if kind == "in hole" and holes else chance.randrange(1, len(day) - 1)
        buy = chance.random() < 0.5
        opened_at = chance.uniform(day.times[place - 1], day.times[place])
        bid, ask = sorted((day.bids[place - 1], day.asks[place - 1]))
        sign, entry = (1, ask) if buy else (-1, bid)
        risk, reward = (spread * chance.choice((1.5, 2, 3, 5, 8, 20)) for _ in range(2))
        order = Order(
            f"{day.symbol}-{number}",
            buy,
            entry,
            round(entry - sign * risk, day.decimals),
            round(entry + sign * reward, day.decimals),
            place,
            opened_at,
            kind=kind,
        )
        _specialise(order, day, chance, kind)
        _bound(order, day, chance)
        orders.append(order)
    return sorted(orders, key=lambda each: (each.place, each.opened_at))


def _specialise(order: Order, day: Day, chance: random.Random, kind: str) -> None:
    sign = 1 if order.buy else -1
    if kind in ("on exit side", "on other side"):
        closing = (kind == "on exit side") == order.buy
        later = chance.randrange(order.place, min(len(day), order.place + 5000))
        price = (day.bids if closing else day.asks)[later]
        if order.entry is not None and sign * (price - order.entry) > 0:
            order.tp = price
        elif order.entry is not None and sign * (price - order.entry) < 0:
            order.sl = price
    elif kind == "no entry":
        order.entry = None
    elif kind == "no target":
        order.tp = None
    elif kind == "no stop":
        order.sl = None
    elif kind == "noise":
        order.noise = chance.choice((2.3e-16, -1.2e-16))


def _bound(order: Order, day: Day, chance: random.Random) -> None:
    """Let some run out, some be taken back and some be fired."""
    if order.tp is None or order.sl is None or chance.random() < 0.4:
        order.expires_at = order.opened_at + chance.choice((0.5, 20.0, 300.0, 1800.0, 7200.0))
        if chance.random() < 0.3:  # on the very time of a quote
            at = bisect_left(day.times, order.expires_at)
            order.expires_at = day.times[at] if at < len(day) else order.expires_at
    if chance.random() < 0.15:
        place = min(len(day) - 1, order.place + chance.choice((0, 3, 200, 3000)))
        order.cancel = (place, chance.uniform(max(order.opened_at, day.times[place - 1]), day.times[place]))
    order.fired = chance.random() < 0.3


Published = tuple[str, float, dict[str, Any]]


def stream(day: Day, orders: Iterable[Order]) -> Iterator[Published]:
    """Everything in bus order as (event type, timestamp, data)."""
    before: dict[int, list[tuple[float, int, Published]]] = {}
    for order in orders:
        event = ("signal_generated", order.opened_at, order.payload(day.symbol))
        before.setdefault(order.place, []).append((order.opened_at, 0, event))
        if order.cancel is not None:
            place, at = order.cancel
            before.setdefault(place, []).append((at, 2, ("signal_expired", at, {"signal_id": order.signal_id})))
        if order.fired:
            fire = {"fire_id": f"F-{order.signal_id}", "signal_id": order.signal_id, "symbol": day.symbol}
            fire |= {"direction": "BUY" if order.buy else "SELL", "lot": 0.1}
            event = ("fire_command", order.opened_at, fire)
            before.setdefault(order.place, []).append((order.opened_at, 1, event))
    for index, (time, bid, ask) in enumerate(zip(day.times, day.bids, day.asks, strict=True)):
        for _, _, event in sorted(before.get(index, ()), key=lambda each: each[:2]):
            yield event
        yield "market_data", time, {"symbol": day.symbol, "bid": bid, "ask": ask}
    # Time goes on until all have run out.
    yield "market_data", day.times[-1] + 2 * MAX_AGE_S, {"symbol": "USDCHF", "bid": 0.9, "ask": 0.9001}


# -- the oracle ---------------------------------------------------------------------------------


@dataclass
class Expected:
    """How a signal has to end; ``r`` None where it has no risk or no price."""

    outcome: str
    exit_price: float | None
    closed_at: float
    r: Fraction | None
    pips: Fraction | None
    mfe: Fraction | None
    mae: Fraction | None
    quotes_seen: int
    gap_before_exit: bool
    fired: bool

    def differences(self, got: dict[str, Any], opened_at: float) -> dict[str, Any]:
        """What of the payload `got` is not as expected."""
        wrong = {}
        for name in ("outcome", "exit_price", "closed_at", "quotes_seen", "gap_before_exit", "fired"):
            if got.get(name) != getattr(self, name):
                wrong[name] = (getattr(self, name), got.get(name))
        # what is published is rounded to 6, 4 and 10 decimals
        for name, tolerance in (("r", 6e-7), ("pips", 6e-5), ("mfe", 1e-9), ("mae", 1e-9)):
            mine, theirs = getattr(self, name), got.get(name)
            if (mine is None) != (theirs is None) or (mine is not None and abs(float(mine) - theirs) > tolerance):
                wrong[name] = (mine and float(mine), theirs)
        if got["duration_s"] != self.closed_at - opened_at or got["ambiguous"]:
            wrong["duration_s"] = (self.closed_at - opened_at, got["duration_s"])
        return wrong


@dataclass
class Oracle:
    """Scans the quotes of a day for one signal at a time. ``pip`` as a price."""

    day: Day
    pip: Fraction
    #: The first signal of the day: prices from before it are not looked at by anyone.
    first: Order
    times: list[float] = field(init=False)
    bids: list[float] = field(init=False)
    asks: list[float] = field(init=False)
    ranks: list[int] = field(init=False)

    def __post_init__(self) -> None:
        day = self.day
        good = [i for i in range(len(day)) if day.asks[i] >= day.bids[i]]
        self.times, self.bids, self.asks = ([each[i] for i in good] for each in (day.times, day.bids, day.asks))
        #: By quote of the day: how many good ones are before it.
        self.ranks = [0]
        for bid, ask in zip(day.bids, day.asks, strict=True):
            self.ranks.append(self.ranks[-1] + (ask >= bid))

    def judge(self, order: Order) -> Expected:
        prices = self.bids if order.buy else self.asks
        sign = 1 if order.buy else -1
        begin, end, at, outcome = self._life(order)
        entry = order.entry
        if entry is None and begin < end:
            entry = self.asks[begin] if order.buy else self.bids[begin]
            known = [sign * level for level in (order.sl, entry, order.tp) if level is not None]
            if known != sorted(known):
                return self._expected(order, entry, "UNKNOWN", None, begin, begin + 1, self.times[begin])
        stop = sign * order.sl if order.sl is not None else float("-inf")
        target = sign * order.tp if order.tp is not None else float("inf")
        for index in range(begin, end):
            price = sign * prices[index]
            if stop < price < target:
                continue
            if price <= stop:
                return self._level(order, entry, "LOSS", prices[index], begin, index)
            return self._level(order, entry, "WIN", order.tp, begin, index)
        last = prices[end - 1] if end > begin else None
        if last is None and outcome == "TIMEOUT":
            outcome = "UNKNOWN"
        return self._expected(order, entry, outcome, last, begin, end, at)

    def _life(self, order: Order) -> tuple[int, int, float, str]:
        """The first good quote it sees, the first it does not see any more, and how it ends without a level."""
        at = order.expires_at if order.expires_at is not None else order.opened_at + MAX_AGE_S
        begin, end, outcome = self.ranks[order.place], bisect_left(self.times, at), "TIMEOUT"
        if order.cancel is not None and order.cancel[1] < at:
            end, at, outcome = min(end, self.ranks[order.cancel[0]]), order.cancel[1], "CANCELLED"
        return begin, max(begin, end), at, outcome

    def _level(
        self, order: Order, entry: float | None, outcome: str, price: float | None, begin: int, index: int
    ) -> Expected:
        assert price is not None and entry is not None
        risk = abs(_exact(entry) - _exact(order.sl)) if order.sl is not None else Fraction(0)
        if abs(_exact(price) - _exact(entry)) < max(self.day.half_point, risk / 100):
            outcome = "BREAKEVEN"
        return self._expected(order, entry, outcome, price, begin, index + 1, self.times[index])

    def _expected(
        self, order: Order, entry: float | None, outcome: str, price: float | None, begin: int, end: int, at: float
    ) -> Expected:
        sign, prices = (1, self.bids) if order.buy else (-1, self.asks)
        result = r = pips = mfe = mae = None
        if entry is not None and end > begin:
            moves = [sign * (_exact(each) - _exact(entry)) for each in (max(prices[begin:end]), min(prices[begin:end]))]
            mfe, mae = max(*moves, Fraction(0)), min(*moves, Fraction(0))
            if price is not None:
                result = sign * (_exact(price) - _exact(entry))
                pips = result / self.pip
                if order.sl is not None and order.sl != entry:
                    r = result / abs(_exact(entry) - _exact(order.sl))
        # the last price known before the end: where it ends on a quote, the one before that
        on_quote = end > begin and at == self.times[end - 1] and outcome in ("WIN", "LOSS", "BREAKEVEN")
        before = end - 2 if on_quote else end - 1
        known = self.times[before] if before >= self.ranks[self.first.place] else self.first.opened_at
        hole = outcome != "UNKNOWN" or end == begin
        gap = hole and at - known > MAX_GAP_S
        return Expected(outcome, price, at, r, pips, mfe, mae, end - begin, gap, order.fired)


def _exact(price: float) -> Fraction:
    return Fraction(str(price))

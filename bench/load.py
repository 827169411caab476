"""The events of the benchmarks: the mix that every producer sends, ours and those of the peers."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

from tapebus.replay import Recording

#: Price at the start in points, digits after the point, usual spread in points.
MARKET = {
    "EURUSD": (108_500, 5, 8),
    "GBPUSD": (126_900, 5, 11),
    "USDJPY": (149_200, 3, 9),
    "XAUUSD": (241_250, 2, 22),
    "USDCNH": (719_800, 5, 160),
    "AUDUSD": (65_400, 5, 9),
    "NZDUSD": (60_100, 5, 13),
    "USDCAD": (136_700, 5, 13),
    "EURJPY": (161_900, 3, 15),
    "GBPJPY": (189_300, 3, 22),
    "EURAUD": (165_900, 5, 21),
    "XAGUSD": (28_450, 3, 25),
    "USDCHF": (88_200, 5, 12),
    "EURGBP": (85_500, 5, 10),
    "AUDJPY": (97_600, 3, 15),
    "USDMXN": (1_702_000, 5, 320),
}
SYMBOLS = tuple(MARKET)
#: Distinct events a producer holds; from then on its quotes come again, far behind any window of a compressor.
DISTINCT = 250_000
#: Their share of the mix: at full rate more than a thousand a second, each with a verdict, an outcome and two messages.
#: A stack sends a few thousand times fewer, but a bus must not be quick with quotes only.
SIGNALS = 0.002
ACTIONS = ("view_signal", "open_chart", "click", "change_risk", "login", "logout")

Event = tuple[str, dict[str, Any], str | None]


def mix(seed: int, count: int, symbols: tuple[str, ...] = SYMBOLS, signals: float = SIGNALS) -> list[Event]:
    """`count` events as ``(event_type, data, correlation_id)``: 90 % quotes, a share of `signals`, else user actions.

    Each symbol's price walks at random by whole points under a spread that breathes, so that no quote is like the
    one before and the tape compresses as with real prices. Signals have near levels, and end by the walk.
    """
    draw = random.Random(seed)
    chance = draw.random
    market: list[list[Any]] = [[name, *MARKET[name], 10.0 ** MARKET[name][1]] for name in symbols]
    places = len(market)
    out: list[Event] = []
    for i in range(count):
        kind = chance()
        quoted = market[int(chance() * places)]
        if kind < 0.9:
            name, points, digits, spread, scale = quoted
            points = quoted[1] = points + int(chance() * 7) - 3
            ask = points + spread + int(chance() * 5) - 2
            data = {
                "symbol": name,
                "bid": round(points / scale, digits),
                "ask": round(ask / scale, digits),
                "volume": 1 + int(chance() * 50),
            }
            out.append(("market_data", data, None))
        elif kind < 0.9 + signals:
            out.append(signal(f"BENCH_{seed}_{i}", quoted[0], quoted[1], 40 + int(chance() * 60), buy=chance() < 0.5))
        else:
            user = f"user_{int(chance() * 400)}"
            out.append(("user_action", {"user_id": user, "action": ACTIONS[int(chance() * 6)]}, None))
    return out


def recorded(files: list[str], seed: int, count: int) -> list[Event]:
    """The mix with the quotes of recorded ticks, file by file in turn, until the first file ends or `count`.

    Signals and user actions stay those of the mix. The files are what ``tapebus replay`` reads.
    """
    recordings = [iter(Recording(Path(file))) for file in files]
    out: list[Event] = []
    for event in mix(seed, count):
        if event[0] == "market_data":
            tick = next(recordings[len(out) % len(recordings)], None)
            if tick is None:
                break
            quote = {name: tick.data[name] for name in ("symbol", "bid", "ask")}
            event = event[0], {**quote, "volume": event[1]["volume"]}, None
        out.append(event)
    return out


def signal(name: str, symbol: str, points: int, stop: int, *, buy: bool) -> Event:
    """A signal at `points` with its stop `stop` points away and its target half as far again."""
    _, digits, spread = MARKET[symbol]
    side = 1 if buy else -1
    entry = points + spread if buy else points
    levels = [round(at / 10.0**digits, digits) for at in (entry, entry - side * stop, entry + side * stop * 3 // 2)]
    data = {
        "signal_id": name,
        "symbol": symbol,
        "direction": "BUY" if buy else "SELL",
        "confidence": 85.0,
        "pattern_type": "KALMAN_QUICKFIRE",
        "entry": levels[0],
        "sl": levels[1],
        "tp": levels[2],
    }
    return "signal_generated", data, name


def standing_signals(count: int) -> list[Event]:
    """`count` signals whose levels the walk never reaches: they stay open for the whole run."""
    out = []
    for i in range(count):
        symbol = SYMBOLS[i % len(SYMBOLS)]
        points = MARKET[symbol][0]
        # spread over the levels, so that they are as many entries of a book as in life
        out.append(signal(f"OPEN_{i}", symbol, points, points // 4 + i % 5000, buy=i // len(SYMBOLS) % 2 == 0))
    return out


def laps(events: list[Event], count: int) -> Iterator[Event]:
    """`count` events: those of `events` again and again, the signals of each lap under new names."""
    sent = lap = 0
    while sent < count:
        if lap:
            events = [renamed(event, lap) if event[2] is not None else event for event in events]
        part = events if count - sent >= len(events) else events[: count - sent]
        yield from part
        sent += len(part)
        lap += 1


def renamed(event: Event, lap: int) -> Event:
    name = f"{str(event[2]).partition('+')[0]}+{lap}"
    return event[0], {**event[1], "signal_id": name}, name


def envelope(event: Event, source: str = "bench") -> dict[str, Any]:
    """The event as a plain PUSH client sends it."""
    event_type, data, correlation_id = event
    whole: dict[str, Any] = {"event_type": event_type, "timestamp": time.time(), "source": source, "data": data}
    if correlation_id is not None:
        whole["correlation_id"] = correlation_id
    return whole


# -- what proves that nothing was lost, changed or turned around ---------------------------------------------------

MASK = (1 << 61) - 1


def digest_sent(digest: int, event: Event) -> int:
    """`digest` continued by an event as it was sent; the sum of a producer depends on order and values."""
    event_type, data, _ = event
    if event_type == "market_data":
        key = hash((data["bid"], data["ask"], data["volume"]))
    elif event_type == "signal_generated":
        key = hash((data["entry"], data["sl"], data["tp"], crc32(data["signal_id"].encode())))
    else:
        key = crc32(f"{data['user_id']} {data['action']} {data.get('details')}".encode())
    return (digest * 1_000_003 + key) & MASK


def digest_seen(digest: int, event: Any) -> int:
    """`digest` continued by an event as a plugin or a reader of the tape sees it."""
    event_type, data = event.event_type, event.data
    if event_type == "market_data":
        key = hash((data.bid, data.ask, data.volume))
    elif event_type == "signal_generated":
        key = hash((data.entry, data.sl, data.tp, crc32(data.signal_id.encode())))
    else:
        key = crc32(f"{data.user_id} {data.action} {data.details}".encode())
    return (digest * 1_000_003 + key) & MASK

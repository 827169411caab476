"""A seeded market of 16 symbols: simulated prices, for showing and measuring, never for judging a strategy."""

from __future__ import annotations

import random
from typing import NamedTuple


class Instrument(NamedTuple):
    """``spread`` is the usual ask - bid, ``digits`` the decimals of a price."""

    symbol: str
    price: float
    spread: float
    digits: int


INSTRUMENTS = (
    Instrument("EURUSD", 1.16420, 0.00008, 5),
    Instrument("GBPUSD", 1.34850, 0.00012, 5),
    Instrument("USDJPY", 148.215, 0.010, 3),
    Instrument("USDCHF", 0.80730, 0.00013, 5),
    Instrument("AUDUSD", 0.65210, 0.00010, 5),
    Instrument("NZDUSD", 0.59480, 0.00014, 5),
    Instrument("USDCAD", 1.37590, 0.00013, 5),
    Instrument("EURGBP", 0.86330, 0.00012, 5),
    Instrument("EURJPY", 172.550, 0.015, 3),
    Instrument("GBPJPY", 199.870, 0.024, 3),
    Instrument("AUDJPY", 96.650, 0.016, 3),
    Instrument("EURCHF", 0.93990, 0.00015, 5),
    Instrument("XAUUSD", 3374.56, 0.30, 2),
    Instrument("XAGUSD", 38.420, 0.025, 3),
    Instrument("US30", 44175.5, 2.0, 1),
    Instrument("BTCUSD", 118420.00, 12.0, 2),
)
#: Standard deviation of one step, in spreads: lively enough for a stop or a target within seconds.
STEP = 0.35


class Quote(NamedTuple):
    symbol: str
    bid: float
    ask: float


class Market:
    """Independent random walks without drift; the same seed gives the same prices in the same order."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._prices = [each.price for each in INSTRUMENTS]

    def next(self) -> Quote:
        """The next quote, of a symbol drawn at random."""
        draw = self._random
        index = draw.randrange(len(INSTRUMENTS))
        instrument = INSTRUMENTS[index]
        spread = instrument.spread
        # The walk stays within a tenth of where it began, so that no price ever comes near zero.
        middle = self._prices[index] + draw.gauss(0.0, STEP) * spread
        middle = min(max(middle, 0.9 * instrument.price), 1.1 * instrument.price)
        self._prices[index] = middle
        half = spread * draw.choice((0.4, 0.5, 0.5, 0.6))
        digits = instrument.digits
        return Quote(instrument.symbol, round(middle - half, digits), round(middle + half, digits))

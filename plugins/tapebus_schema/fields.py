"""The building blocks of payloads: bounded strings, finite numbers, closed lists.

Every number has both bounds, which is what keeps NaN and infinities out (JSON cannot carry them,
MessagePack can). Bounds are sanity limits, wide enough for every market; risk limits live elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

Symbol = Annotated[str, Meta(min_length=1, max_length=16)]
Name = Annotated[str, Meta(min_length=1, max_length=100)]
Id = Annotated[str, Meta(min_length=1, max_length=200)]
#: An id that may be empty, as terminals write it for positions opened by hand.
LooseId = Annotated[str, Meta(max_length=200)]
#: A state or reason code, upper or lower case as the producer writes it.
Code = Annotated[str, Meta(max_length=100)]
#: A sentence for people.
Text = Annotated[str, Meta(max_length=2000)]

#: A quoted price: above zero.
Price = Annotated[float, Meta(gt=0, le=1e12)]
#: An order level; MetaTrader writes 0 for "at market" (entry) and "none" (stop, target).
Level = Annotated[float, Meta(ge=0, le=1e12)]
#: Lots of a position or order that exists.
Lots = Annotated[float, Meta(ge=0, le=1e6)]
#: Lots of an order to send: brokers trade nothing smaller than 0.01.
OrderLots = Annotated[float, Meta(ge=0.01, le=1e6)]
#: Traded volume in the unit of the feed.
Volume = Annotated[float, Meta(ge=0, le=1e18)]
#: Money in account currency; may be negative.
Money = Annotated[float, Meta(ge=-1e15, le=1e15)]
#: Any finite figure.
Number = Annotated[float, Meta(ge=-1e18, le=1e18)]
Positive = Annotated[float, Meta(ge=0, le=1e18)]
#: Percent, 0 to 100, both ends included.
Percent = Annotated[float, Meta(ge=0, le=100)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
#: Unix seconds. The upper bound tells milliseconds from seconds.
Time = Annotated[float, Meta(ge=0, le=1e11, extra={"kind": "time"})]
#: What the broker's server clock showed, ``YYYY.MM.DD HH:MM:SS``; its UTC offset is not in the string.
BrokerTime = Annotated[str, Meta(max_length=32)]

Direction = Literal["BUY", "SELL"]
Severity = Literal["info", "warning", "error", "critical"]

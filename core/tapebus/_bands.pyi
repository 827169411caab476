from collections.abc import Iterator
from typing import Any

class Band:
    low_first: float
    high_first: float
    low_second: float
    high_second: float
    time: float
    seen: int
    last: Any
    def take(self, first: float, second: float, time: float, last: Any) -> None: ...

class Bands:
    bands: dict[str, Any]
    event: type[Any] | None
    until: float
    def __init__(self, bands: dict[str, Any], key: str, first: str, second: str) -> None: ...
    def learn(self, event: Any) -> bool: ...
    def skip(self, events: Iterator[Any]) -> Any | None: ...

from collections.abc import Iterable
from typing import TypedDict

JSON_FLAG: int
ALIASED_FLAG: int
NONFINITE_FLAG: int
EXTENSION_FLAG: int
UNTIMED_FLAG: int
WIDE_FLAG: int
NOT_UTF8_FLAG: int
MOST_NUMBERED: int
REASONS: dict[int, str]

class Item(TypedDict):
    offset: int
    size: int
    topic: str
    flags: int
    priority: int
    time: float
    corr: int

class Topics:
    def load(self, known: dict[int, str]) -> None: ...
    def add(self, name: str) -> int: ...
    def register(self, name: str, aliases: Iterable[str] = ()) -> int: ...
    def name(self, number: int) -> str: ...
    def after(self, number: int) -> dict[int, str]: ...
    def __len__(self) -> int: ...

def scan(topics: Topics, frame: bytes | bytearray | memoryview, max_items: int = 4096) -> list[Item] | str: ...

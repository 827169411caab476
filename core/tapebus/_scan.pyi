from typing import TypedDict

from tapebus._topics import Topics

JSON_FLAG: int
ALIASED_FLAG: int
NONFINITE_FLAG: int
EXTENSION_FLAG: int
UNTIMED_FLAG: int
WIDE_FLAG: int
NOT_UTF8_FLAG: int
REASONS: dict[int, str]

class Item(TypedDict):
    offset: int
    size: int
    topic: str
    flags: int
    priority: int
    time: float
    corr: int

def scan(topics: Topics, frame: bytes | bytearray | memoryview, max_items: int = 4096) -> list[Item] | str: ...

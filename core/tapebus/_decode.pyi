from collections.abc import Callable, Iterator
from typing import Any

from tapebus._blocks import BlockView
from tapebus._topics import Topics

SINGLE_RUN: int

def gather(topics: Topics, view: BlockView, start: int, stop: int) -> list[tuple[int, int, int, bytes]]: ...
def stamp(events: list[Any], origin: BlockView, first: int) -> None: ...
def run_checks(
    events: list[Any], view: BlockView, first: int, checks: list[Callable[[Any], str | None] | None]
) -> list[tuple[int, str]] | None: ...
def split(
    events: list[Any],
    view: BlockView,
    first: int,
    masks: list[int],
    groups: int,
    mask_of: Callable[[str], int],
) -> list[list[Any]]: ...

class Batch:
    events: list[Any]
    position: int
    exhausted: bool
    def __init__(self, events: list[Any]) -> None: ...
    @property
    def first_seq(self) -> int: ...
    @property
    def last_seq(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...

"""Consumers: what a plugin registers to receive events, and the context it works through."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec

from tapebus.errors import ConfigError
from tapebus.events import Event

Mode = Literal["inline", "thread", "process"]


class Batch(Protocol):
    """The new events a consumer asked for, in bus order; iterating yields `Event` objects.

    The end of the iteration is the end of the batch: flush amortised I/O after the loop.
    """

    first_seq: int
    last_seq: int

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __getitem__(self, index: int) -> Any: ...


class FaultPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the bus does when a consumer fails; ``[plugins.<name>.faults]`` overrides single fields.

    The breaker opens when more than ``error_ratio`` of the last ``window`` events failed, when ``consecutive``
    events in a row failed, or when the handler fails without having looked at an event. It stays
    open ``retry_s`` seconds (doubled each time up to ``retry_max_s``), then one event is tried.
    While it is open the cursor stands still; afterwards the consumer continues from the tape.

    A handler that comes no further for ``deadline_s`` seconds is reported as hanging; in mode ``process`` it is
    killed. ``memory_mb`` bounds the private memory of a process (0: no bound), and an event that ends its process
    ``deaths`` times becomes a dead letter.
    """

    error_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    window: Annotated[int, msgspec.Meta(ge=1)] = 1000
    consecutive: Annotated[int, msgspec.Meta(ge=1)] = 50
    retry_s: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    retry_max_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    deadline_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    memory_mb: Annotated[int, msgspec.Meta(ge=0)] = 512
    deaths: Annotated[int, msgspec.Meta(ge=1)] = 3

    def changed_by(self, table: dict[str, Any], plugin: str) -> FaultPolicy:
        """This policy with the fields of `table`; `ConfigError` naming the key where one is wrong."""
        fields = {**msgspec.structs.asdict(self), **table}
        try:
            return msgspec.convert(fields, FaultPolicy)
        except msgspec.ValidationError as error:
            names = ", ".join(FaultPolicy.__struct_fields__)
            raise ConfigError(f"plugins.{plugin}.faults: {error}; the keys are {names}") from None


class Consumer(msgspec.Struct, kw_only=True):
    """One subscription of one plugin.

    ``topics``: event types, exact or ``prefix.*``; ``("*",)`` takes all. ``handler(batch)`` is called with a
    `Batch`; an exception is charged to the event being iterated over, which becomes a dead letter,
    and the handler is called again with the rest. After the end of the iteration it is charged to the whole batch,
    before the first event to none: then the breaker opens. ``save()`` is called just before the unit of work
    is closed, to let the plugin write what changed in memory into ``context.state``.
    ``tick`` > 0 asks for ``on_tick(now)`` about every ``tick`` seconds on the consumer's own thread.
    ``start`` says where a consumer without a cursor begins: ``now`` or ``first`` (all of the tape).
    ``deliver="early"``, for mode ``thread``, hands over events before they are on disk: a crash may erase what such a
    consumer has seen, so it must not let anything outside know. ``durable`` waits for the disk.
    ``lanes`` lets HIGH and CRITICAL events overtake a backlog. ``capacity`` bounds the events queued
    for a thread; beyond it the consumer continues from the tape.
    A plugin that emits or keeps state registers consumers of one mode only.
    """

    name: str
    topics: Sequence[str]
    handler: Callable[[Any], None]
    mode: Mode = "inline"
    deliver: Literal["durable", "early"] = "durable"
    after: Sequence[str] = ()
    capacity: int = 65536
    start: Literal["now", "first"] = "now"
    lanes: bool = False
    budget_ms: float = 50.0
    faults: FaultPolicy = FaultPolicy()
    save: Callable[[], None] | None = None
    tick: float = 0.0
    on_tick: Callable[[float], None] | None = None


class Context(Protocol):
    """What the bus hands to a plugin; used only on the thread that runs its consumers."""

    name: str
    config: dict[str, Any]
    #: The ``[shared]`` tables of the configuration, the same for every plugin.
    shared: dict[str, Any]
    data_dir: Path
    log: logging.Logger
    #: Durable key-value state; changes commit together with the cursor and with what was emitted.
    state: MutableMapping[str, bytes]

    def emit(
        self,
        event_type: str,
        data: dict[str, Any] | msgspec.Struct,
        *,
        cause: Event | None = None,
        timestamp: float | None = None,
        correlation_id: str | None = None,
        user_id: str | None = None,
        priority: str | None = None,
    ) -> None:
        """Publish a derived event; it takes the same way as every other event.

        ``timestamp`` defaults to that of `cause` (event time), else to the wall clock;
        ``correlation_id`` defaults to that of `cause`; ``causation_id`` is ``"bus:<bus_seq>"`` of `cause`.
        """

    def figures(self) -> dict[str, Any]:
        """The figures of the running bus at this moment, spelled as in ``tapebus stats --json``.

        ``bus``, ``producers`` (those with anything refused, dropped or unexplained), ``consumers`` and ``feed``.
        From memory: asks no plugin, waits for nothing, reads no disk; from any thread. Costs its caller some ten
        microseconds, and events nothing. Empty before the bus runs, and in a process of its own, which sees the
        tape but not the bus.
        """


def covers(topics: Iterable[str], event_type: str) -> bool:
    """Whether one of `topics` (exact, ``prefix.*`` or ``*``) covers `event_type`."""
    return any(
        topic in ("*", event_type) or (topic.endswith(".*") and event_type.startswith(topic[:-1])) for topic in topics
    )


def is_pattern(topic: str) -> bool:
    """Whether `topic` is something `covers` understands: exact, ``prefix.*`` or ``*``."""
    return bool(topic) and (topic == "*" or "*" not in topic.removesuffix(".*"))

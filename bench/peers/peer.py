"""What every peer offers, and how its answer is checked."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal
from zlib import crc32

import msgspec
from bench.harness import Skipped, Wrong

from tapebus.events import Registry
from tapebus_schema import event_types

#: Seconds without an event after which the rest counts as lost.
PATIENCE_S = 20.0

__all__ = [
    "Kind",
    "Ledger",
    "Peer",
    "Skipped",
    "Wrong",
    "check_handlers",
    "decoder",
    "list_decoder",
    "percentiles",
    "union",
]

Kind = Literal["durable", "memory", "in-process"]


class Peer:
    """One other way to move the events. An instance holds settings only; every call starts and ends its own processes.

    ``kind``: *durable* keeps the events in files, *memory* carries them between processes and keeps nothing,
    *in-process* hands objects to handlers without leaving the process. A peer that has a latency to compare
    offers ``latency(count)`` too: p50 and p99 of publish → handler in ms at 1,000 events a second.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[Kind]
    #: What it guarantees about an event when it acknowledges it, in one line.
    promise: ClassVar[str] = ""

    @property
    def version(self) -> str:
        """Of the server and the client; raises `Skipped`."""
        raise NotImplementedError

    def throughput(self, count: int) -> dict[str, Any]:
        """``events_per_s`` of `count` events in all, ``checked``, and the settings; raises `Skipped` and `Wrong`."""
        raise NotImplementedError


def union() -> Any:
    """The typed classes of our schema plugin, into which the bus decodes."""
    return Registry(event_types({})).union()


def decoder() -> Any:
    """Decodes one MessagePack event."""
    return msgspec.msgpack.Decoder(union()).decode


def list_decoder() -> Any:
    """Decodes a MessagePack array of events in one call."""
    return msgspec.msgpack.Decoder(list[union()]).decode  # type: ignore[misc]


class _Envelope(msgspec.Struct):
    source: str


class Ledger:
    """What was handled and the clock of the run. Not thread-safe.

    A run appends the bytes of each event to ``handled`` once it is decoded. What that was is looked at after the
    clock has stopped: a chain of checksums over the events of each producer, in the order in which they were handled,
    which one that is missing, doubled, altered or out of its producer's order changes.
    """

    def __init__(self) -> None:
        self.handled: list[bytes] = []
        self._begun = self._ended = 0.0

    def start(self) -> None:
        """The first events are here, and about to be handled."""
        self._begun = time.perf_counter()

    def stop(self) -> None:
        """The last event was handled."""
        self._ended = time.perf_counter()

    def unpack(self) -> None:
        """What was handled were MessagePack arrays: make it the events in them."""
        split = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
        self.handled = [bytes(raw) for array in self.handled for raw in split(array)]

    def check(self, sent: dict[str, tuple[int, int]], as_json: bool = False) -> None:
        """Compare with what the producers say they sent: source → count and chain. Raises `Wrong`."""
        expected = sum(count for count, _ in sent.values())
        if len(self.handled) != expected:
            raise Wrong(f"{len(self.handled)} events were handled, {expected} were sent")
        source_of = (msgspec.json if as_json else msgspec.msgpack).Decoder(_Envelope).decode
        chains: dict[str, int] = {}
        for raw in self.handled:
            source = source_of(raw).source
            chains[source] = crc32(raw, chains.get(source, 0))
        for source, (_, chain) in sent.items():
            if chains.get(source) != chain:
                raise Wrong(f"the events of {source} are not those it sent, or not in their order")

    def result(self, sent: dict[str, tuple[int, int]], as_json: bool = False, **settings: Any) -> dict[str, Any]:
        """The figures of a run that is right; raises `Wrong`."""
        self.check(sent, as_json)
        checked = "count, checksum and order of each producer"
        rate = round(len(self.handled) / (self._ended - self._begun))
        return {"events_per_s": rate, "checked": checked, "settings": settings}


def check_handlers(handled: list[list[Any]], sent: list[Any]) -> None:
    """Each handler must have had exactly `sent`, in its order; raises `Wrong`."""
    for number, got in enumerate(handled):
        if len(got) != len(sent):
            raise Wrong(f"handler {number} had {len(got)} events, {len(sent)} were sent")
        if any(a is not b for a, b in zip(got, sent, strict=True)):
            raise Wrong(f"handler {number} had other events than those sent, or in another order")


def percentiles(seconds: list[float], count: int) -> dict[str, Any]:
    """p50 and p99 in ms of `count` measured events; raises `Wrong` when there are fewer."""
    if len(seconds) != count:
        raise Wrong(f"{len(seconds)} events were handled, {count} were sent")
    ordered = sorted(seconds)
    return {f"p{q}_ms": round(ordered[int(count * q / 100)] * 1e3, 3) for q in (50, 99)}

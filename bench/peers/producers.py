"""The processes that send the events to a peer: ``python -m bench.peers.producers KIND ENDPOINT COUNT SEED``.

Each holds its events encoded before it says ``ready``, begins when a line comes in, and in the end prints its name,
how many events it sent and their chain (see `bench.peers.peer.Ledger`). Encoding beforehand favours the peers: our
`Publisher` encodes in the call.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from zlib import crc32

import msgspec
from bench.load import DISTINCT, envelope, laps, mix
from bench.peers.processes import BATCH, FLOW, PACKED_PIPELINE, STREAM, WINDOW, die_with_parent

#: Events a second of the paced producers.
RATE = 1000


def _frames(count: int, seed: int, encode: Callable[[Any], bytes]) -> tuple[str, list[bytes]]:
    source = f"bench-{seed}"
    return source, [encode(envelope(event, source)) for event in laps(mix(seed, min(count, DISTINCT)), count)]


def _batches(frames: list[bytes], size: int) -> Iterator[list[bytes]]:
    rest = iter(frames)
    while batch := list(islice(rest, size)):
        yield batch


def _packed(frames: list[bytes]) -> list[bytes]:
    """MessagePack arrays of `BATCH` events."""
    return [b"\xdc" + len(batch).to_bytes(2, "big") + b"".join(batch) for batch in _batches(frames, BATCH)]


def _begin() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def _json(event: Any) -> bytes:
    return json.dumps(event).encode()


def _stamped(encode: Callable[[Any], bytes] = msgspec.msgpack.encode) -> bytes:
    return encode(envelope(("user_action", {"user_id": "u", "action": "paced"}, None)))


def _paced(count: int, encode: Callable[[Any], bytes] = msgspec.msgpack.encode) -> Iterator[bytes]:
    """One event a millisecond, stamped when it is handed out."""
    due = time.perf_counter()
    for _ in range(count):
        due += 1 / RATE
        time.sleep(max(0.0, due - time.perf_counter()))
        yield _stamped(encode)


# -- ZeroMQ -----------------------------------------------------------------------------------------------------------


@contextmanager
def _pushing(endpoint: str) -> Iterator[Any]:
    """A PUSH socket; what it still holds in the end is sent before this returns."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.sndhwm = 10_000
        socket.connect(endpoint)
        yield socket


def push(endpoint: str, frames: list[bytes]) -> None:
    """One event a frame."""
    with _pushing(endpoint) as socket:
        _begin()
        send = socket.send
        for frame in frames:
            send(frame)


def push_batches(endpoint: str, frames: list[bytes]) -> None:
    """MessagePack arrays of `BATCH` events a frame, as our Publisher sends them."""
    push(endpoint, _packed(frames))


def push_paced(endpoint: str, count: int, encode: Callable[[Any], bytes] = msgspec.msgpack.encode) -> None:
    with _pushing(endpoint) as socket:
        _begin()
        for frame in _paced(count, encode):
            socket.send(frame)


def push_json_paced(endpoint: str, count: int) -> None:
    push_paced(endpoint, count, _json)


# -- Redis ------------------------------------------------------------------------------------------------------------


def _redis(endpoint: str) -> Any:
    import redis

    client = redis.Redis(unix_socket_path=endpoint)
    client.ping()
    return client


def redis_streams(endpoint: str, frames: list[bytes], pipeline: int = BATCH) -> None:
    """XADD in pipelines of `pipeline` commands; the next one when all of them are answered."""
    client = _redis(endpoint)
    _begin()
    for batch in _batches(frames, pipeline):
        with client.pipeline(transaction=False) as pipe:
            for frame in batch:
                pipe.xadd(STREAM, {"e": frame})
            pipe.execute()


def redis_packed(endpoint: str, frames: list[bytes]) -> None:
    """`BATCH` events an entry."""
    redis_streams(endpoint, _packed(frames), PACKED_PIPELINE)


def redis_paced(endpoint: str, count: int) -> None:
    client = _redis(endpoint)
    _begin()
    for frame in _paced(count):
        client.xadd(STREAM, {"e": frame})


# -- JetStream --------------------------------------------------------------------------------------------------------


class _Acks:
    """What the server answers on an inbox; any error ends the process."""

    def __init__(self) -> None:
        self.answers = 0
        self.last: dict[str, Any] = {}
        self._news = asyncio.Event()

    async def take(self, message: Any) -> None:
        """The callback of the subscription."""
        answer = json.loads(message.data)
        if "error" in answer or answer.get("type", "ack") != "ack":
            sys.stderr.write(f"{answer}\n")
            # an exception would end in the client's error callback only
            os._exit(1)
        self.answers += 1
        self.last = answer
        self._news.set()

    async def until(self, enough: Callable[[], bool]) -> None:
        while not enough():
            self._news.clear()
            await self._news.wait()


async def _publish_async(client: Any, frames: list[bytes]) -> None:
    """The client's own way, with its own limit of 4,000 unacknowledged messages; every acknowledgement is looked at."""
    js = client.jetstream()
    futures = [await js.publish_async(STREAM, frame) for frame in frames]
    await asyncio.gather(*futures)


async def _fast_ingest(client: Any, frames: list[bytes]) -> None:
    """One fast-ingest batch, the server's quickest way in (2.14 and later): each message is stored as it comes and
    every `FLOW` are acknowledged at once; the reply subject numbers them. nats-py has no call for it."""
    acks = _Acks()
    inbox = f"{client.new_inbox()}.bench{os.getpid()}"
    await client.subscribe(f"{inbox}.>", cb=acks.take)
    for number, frame in enumerate(frames, 1):
        step = 2 if number == len(frames) else 0 if number == 1 else 1
        await client.publish(STREAM, frame, reply=f"{inbox}.{FLOW}.fail.{number}.{step}.$FI")
        if step == 0:
            await acks.until(lambda: acks.answers > 0)
        elif step == 1 and acks.last["seq"] + WINDOW <= number:
            await acks.until(lambda: acks.last["seq"] + WINDOW > number)  # noqa: B023
    await acks.until(lambda: "count" in acks.last)
    if acks.last["count"] != len(frames):
        sys.exit(f"the server stored {acks.last['count']} of {len(frames)}")


async def _fast_packed(client: Any, frames: list[bytes]) -> None:
    """`BATCH` events a message."""
    await _fast_ingest(client, _packed(frames))


async def _atomic(client: Any, frames: list[bytes]) -> None:
    """Atomic batches of `FLOW` messages (2.12 and later), at most `WINDOW` messages of them not acknowledged: under
    ``sync: always`` a batch costs one sync, a message of its own another."""
    acks = _Acks()
    inbox = client.new_inbox()
    await client.subscribe(inbox, cb=acks.take)
    for batch, at in enumerate(range(0, len(frames), FLOW)):
        part = frames[at : at + FLOW]
        headers = {"Nats-Batch-Id": f"bench{os.getpid()}-{batch}"}
        for number, frame in enumerate(part, 1):
            headers["Nats-Batch-Sequence"] = str(number)
            if number < len(part):
                await client.publish(STREAM, frame, headers=headers)
            else:
                await client.publish(STREAM, frame, reply=inbox, headers={**headers, "Nats-Batch-Commit": "1"})
        await acks.until(lambda: (batch + 1 - acks.answers) * FLOW < WINDOW)  # noqa: B023
    await acks.until(lambda: acks.answers == -(-len(frames) // FLOW))


def _jetstream(way: Callable[[Any, list[bytes]], Coroutine[Any, Any, None]]) -> Callable[[str, list[bytes]], None]:
    def run(endpoint: str, frames: list[bytes]) -> None:
        async def connected() -> None:
            import nats

            client = await nats.connect(endpoint)
            _begin()
            await way(client, frames)
            await client.close()

        asyncio.run(connected())

    return run


def jetstream_paced(endpoint: str, count: int) -> None:
    """`publish_async` without waiting for the acknowledgement before the next."""

    async def run() -> None:
        import nats

        client = await nats.connect(endpoint)
        js = client.jetstream()
        _begin()
        due = time.perf_counter()
        futures = []
        for _ in range(count):
            due += 1 / RATE
            # the loop sends and receives meanwhile
            await asyncio.sleep(due - time.perf_counter())
            futures.append(await js.publish_async(STREAM, _stamped()))
        await asyncio.gather(*futures)
        await client.close()

    asyncio.run(run())


KINDS: dict[str, Callable[[str, list[bytes]], None]] = {
    "push": push,
    "push-json": push,
    "push-batches": push_batches,
    "redis": redis_streams,
    "redis-packed": redis_packed,
    "jetstream": _jetstream(_publish_async),
    "jetstream-fast": _jetstream(_fast_ingest),
    "jetstream-packed": _jetstream(_fast_packed),
    "jetstream-atomic": _jetstream(_atomic),
}
PACED: dict[str, Callable[[str, int], None]] = {
    "push-paced": push_paced,
    "push-json-paced": push_json_paced,
    "redis-paced": redis_paced,
    "jetstream-paced": jetstream_paced,
}


def main() -> None:
    die_with_parent()
    kind, endpoint, count, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if kind in PACED:
        PACED[kind](endpoint, count)
        source, chain = "bench", 0
    else:
        encode = _json if kind.endswith("-json") else msgspec.msgpack.encode
        source, frames = _frames(count, seed, encode)
        KINDS[kind](endpoint, frames)
        chain = 0
        for frame in frames:
            chain = crc32(frame, chain)
    print(json.dumps([source, count, chain]), flush=True)


if __name__ == "__main__":
    main()

"""The control socket: one JSON request, one JSON answer, for the owner of the data directory only."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from math import ceil
from typing import Annotated, Any

import msgspec
import zmq

from tapebus.config import Config
from tapebus.errors import BusNotRunning, TapebusError
from tapebus.redaction import redact
from tapebus.threads import show_name

log = logging.getLogger("tapebus.control")
RETRY_S = 5.0


class Request(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What may be asked; anything else is refused."""

    cmd: str
    consumer: str = ""
    ids: list[Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]] = []


_NOT_YOURS = msgspec.json.encode({"error": f"this bus belongs to uid {os.getuid()}: ask as that user"})


def _is_owner(frame: Any) -> bool:
    """Whether the peer runs as this user, as far as the system tells (Linux does)."""
    try:
        peer = str(frame.get("Peer-Address")).split(":")
    except zmq.ZMQError:
        return sys.platform != "linux"
    if len(peer) != 4 or not peer[1].isdigit():
        return sys.platform != "linux"
    if int(peer[1]) != os.getuid():
        log.warning("refused a request of uid %s (pid %s)", peer[1], peer[3])
        return False
    return True


def request(config: Config, message: dict[str, Any], timeout: float = 2.0) -> dict[str, Any]:
    """Ask the bus that runs on `config`'s data directory.

    Raises `BusNotRunning` when none answers within `timeout` seconds, `TapebusError` when it refuses.
    """
    endpoint = config.control_endpoint
    path = endpoint.removeprefix("ipc://")
    missing = BusNotRunning(f"no bus runs on {config.data_dir}: start one with `tapebus run`")
    if endpoint.startswith("ipc://") and not os.path.exists(path):
        raise missing
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        for option, value in ((zmq.LINGER, 0), (zmq.SNDTIMEO, int(timeout * 1e3)), (zmq.RCVTIMEO, int(timeout * 1e3))):
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.connect(endpoint)
        try:
            socket.send(msgspec.json.encode(message))
            answer: dict[str, Any] = msgspec.json.decode(socket.recv())
        except zmq.Again:
            raise missing from None
    finally:
        socket.close(0)
        context.term()
    if "error" in answer:
        raise TapebusError(str(answer["error"]))
    return answer


class Control(threading.Thread):
    """Answers requests and runs what is due on a timer; `handlers` are called on this thread."""

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]],
        on_timer: Callable[[], float],
    ) -> None:
        super().__init__(name="tapebus-control", daemon=True)
        from tapebus.feed import bind

        self._handlers = handlers
        self._on_timer = on_timer
        self._endpoint = endpoint
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 64 << 10)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, 3000)
        bind(self._socket, endpoint, "listen.control")
        self._bell_read, self._bell_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        show_name()
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell_read, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(ceil(self._wait() * 1e3)))
            if self._bell_read in ready:
                break
            if self._socket in ready:
                self._serve()

    def _wait(self) -> float:
        """Run the timer; seconds until it wants to run again. A fault in it must not end the control thread."""
        try:
            return max(0.0, self._on_timer())
        except Exception:
            log.exception("a periodic task failed and will be tried again")
            return RETRY_S

    def _serve(self) -> None:
        identity, *parts = self._socket.recv_multipart(copy=False)
        if len(parts) == 1:
            answer = self._answer(parts[0].bytes) if _is_owner(parts[0]) else _NOT_YOURS
            # a client that is gone, or asks without reading, gets no answer
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send_multipart((identity.bytes, answer), zmq.DONTWAIT)

    def discard(self) -> None:
        """Release the socket and the bell; for a thread that has ended or never started."""
        if not self._socket.closed and self._endpoint.startswith("ipc://"):
            # a name without a listener would make clients wait for their timeout
            with contextlib.suppress(OSError):
                os.unlink(self._endpoint.removeprefix("ipc://"))
        self._socket.close()
        if self._bell_read >= 0:
            os.close(self._bell_read)
            os.close(self._bell_write)
            self._bell_read = self._bell_write = -1

    def _answer(self, frame: bytes) -> bytes:
        try:
            asked = msgspec.json.decode(frame, type=Request)
            handler = self._handlers.get(asked.cmd)
            if handler is None:
                return msgspec.json.encode({"error": f"unknown command; known: {', '.join(sorted(self._handlers))}"})
            answer = msgspec.json.encode(handler(msgspec.to_builtins(asked)))
        except Exception as error:
            answer = msgspec.json.encode({"error": f"{type(error).__name__}: {error}"})
        # figures and last errors come from plugins as well
        return redact(answer.decode()).encode()

    def stop(self) -> None:
        """Let the thread end; the caller joins it."""
        os.write(self._bell_write, b"x")

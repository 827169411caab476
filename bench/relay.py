"""Latency while the Telegram relay is busy: ten thousand messages wait for a server that takes its time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.harness import PATIENCE, STANDING, Bus, Skipped, Wrong
from bench.latency import paced
from bench.plan import Bench, Figures, Size

#: Each standing signal is a message to each of them.
CHATS = 50
ANSWER_S = 0.02
#: Messages that are sent before anything is measured: two seconds at the relay's own pace.
WARM = 50
TOKEN = "1:" + "x" * 35


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    taken = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: the bus is killed while it sends."""


class _Handler(BaseHTTPRequestHandler):
    """Takes every message, after a while."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(ANSWER_S)
        assert isinstance(self.server, _Server)
        self.server.taken += 1
        message = {"message_id": self.server.taken, "date": int(time.time()), "chat": {"id": 1, "type": "private"}}
        body = json.dumps({"ok": True, "result": message}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: standard error is the harness's."""


@contextmanager
def telegram() -> Iterator[tuple[_Server, str]]:
    """A server, and the configuration of a relay that sends to it."""
    with _Server(("127.0.0.1", 0), _Handler) as server, TemporaryDirectory(prefix="tb-") as directory:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        token = Path(directory, "token")
        token.touch(0o600)
        token.write_text(TOKEN)
        chats = ", ".join(f'{{ id = {number}, topics = ["signal_generated"] }}' for number in range(1, CHATS + 1))
        place = f'base_url = "http://127.0.0.1:{server.server_port}"'
        file = f'token = {{ file = "{token}" }}'
        yield server, f"[plugins.telegram]\n{file}\n{place}\nqueue = {CHATS * STANDING}\nchats = [{chats}]\n"
        server.shutdown()


def busy(size: Size) -> Figures:
    """As `bench.latency.through`, beside the messages; these leave at the pace that Telegram allows."""
    if find_spec("telegram") is None:
        raise Skipped("python-telegram-bot is not installed")
    probe = {"kind": "latency", "name": "probe"}
    with telegram() as (server, config), Bus([probe], extra=config) as bus:
        _until(server, WARM)  # after as long as that takes, the queue is on disk as well
        figures, _ = paced(bus, size.paced_events)
        _until(server, server.taken + 1)
        if not bus.ask("stats")["plugins"]["telegram"]["metrics"]["waiting"]:
            raise Wrong("the relay had nothing left to send")
        bus.process.kill()  # it would wait for what is on its way
        return figures


def _until(server: _Server, taken: int) -> None:
    begun = time.monotonic()
    while server.taken < taken:
        if time.monotonic() - begun > PATIENCE:
            raise Wrong(f"the relay has sent {server.taken} messages of {taken}")
        time.sleep(0.1)


BENCHES = [Bench("latency-relay", "the latency beside 10,000 messages that leave for Telegram", busy)]

"""A strict Bot API server on a free local port, with fault injection and a transcript, for tests."""

from __future__ import annotations

import json
from collections import deque
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

_TAGS = {"b", "i", "u", "s", "code", "pre", "a", "blockquote"}


class _Parser(HTMLParser):
    """Visible text of Telegram HTML; raises ValueError where Telegram answers "can't parse entities"."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in _TAGS:
            raise ValueError(f'Unsupported start tag "{tag}"')
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            raise ValueError(f'Unexpected end tag "{tag}"')

    def handle_data(self, data: str) -> None:
        self.text += data


def visible(html: str) -> str:
    parser = _Parser()
    parser.feed(html)
    parser.close()
    if parser.open:
        raise ValueError(f'Can\'t find end tag corresponding to start tag "{parser.open[-1]}"')
    return parser.text


def failure(code: int, description: str, **parameters: int) -> dict[str, Any]:
    body: dict[str, Any] = {"ok": False, "error_code": code, "description": description}
    return {**body, "parameters": parameters} if parameters else body


TOO_MANY = failure(429, "Too Many Requests: retry after 3", retry_after=3)
RESTART = failure(500, "Internal Server Error: restart")
BLOCKED = failure(403, "Forbidden: bot was blocked by the user")
NO_CHAT = failure(400, "Bad Request: chat not found")
BAD_ENTITIES = failure(400, "Bad Request: can't parse entities: Unsupported start tag")
UNAUTHORIZED = failure(401, "Unauthorized")
DROP = "drop"  # close the connection without an answer


class BotApi:
    """``faults`` are answered first, one per call (None lets one through); ``accepted`` is the transcript."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.faults: deque[Any] = deque()
        self.accepted: list[dict[str, Any]] = []
        self.texts: dict[int, str] = {}
        self.calls = 0
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = api.answer(self.path, body)
                if answer == DROP:
                    self.close_connection = True
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                status = 502 if isinstance(answer, bytes) else answer.get("error_code", 200)
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Keep the test output quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> BotApi:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, body: bytes) -> Any:
        self.calls += 1
        fault = self.faults.popleft() if self.faults else None
        if fault is not None:
            return fault
        head, _, method = path[1:].partition("/")
        if head != f"bot{self.token}":
            return UNAUTHORIZED
        if method not in ("sendMessage", "editMessageText"):
            return failure(404, "Not Found")
        return self._message(method, json.loads(body))

    def _message(self, method: str, call: dict[str, Any]) -> dict[str, Any]:
        if not call.get("chat_id"):
            return failure(400, "Bad Request: chat_id is empty")
        text = call.get("text", "")
        if call.get("parse_mode") == "HTML":
            try:
                text = visible(text)
            except ValueError as error:
                return failure(400, f"Bad Request: can't parse entities: {error}")
        if not text.strip():
            return failure(400, "Bad Request: message text is empty")
        if len(text.encode("utf-16-le")) // 2 > 4096:
            return failure(400, "Bad Request: message is too long")
        number = len(self.accepted) + 1
        if method == "editMessageText":
            number = call.get("message_id", 0)
            if number not in self.texts:
                return failure(400, "Bad Request: message to edit not found")
            if self.texts[number] == text:
                return failure(
                    400,
                    "Bad Request: message is not modified: specified new message content and reply "
                    "markup are exactly the same as a current content and reply markup of the message",
                )
        self.texts[number] = text
        self.accepted.append({**call, "method": method, "visible": text})
        return {"ok": True, "result": {"message_id": number}}

"""One call of the Bot API, with every outcome turned into an `Answer` that cannot hold the token."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from tapebus.errors import ConfigError
from tapebus_telegram.secret import Secret
from tapebus_telegram.settings import is_loopback

#: Seconds; together they bound how long one call may hold the consumer's thread.
CONNECT_S, READ_S = 3.0, 10.0


class Answer(msgspec.Struct, frozen=True):
    """``code`` is the HTTP-like Bot API code, 0 when no answer came (then ``description`` says why)."""

    code: int
    description: str = ""
    message_id: int = 0
    retry_after: float = 0.0
    migrate_to: int = 0

    @property
    def ok(self) -> bool:
        return self.code == 200


class Transport(Protocol):
    """Whatever can call the Bot API; `call` never raises for anything the network or the server does."""

    def call(self, method: str, payload: dict[str, Any]) -> Answer: ...
    def close(self) -> None: ...


class _Parameters(msgspec.Struct, frozen=True):
    retry_after: float = 0.0
    migrate_to_chat_id: int = 0


class _Body(msgspec.Struct, frozen=True):
    ok: bool
    error_code: int = 0
    description: str = ""
    parameters: _Parameters = _Parameters()
    result: Any = None


class HttpTransport:
    """Calls over HTTP with httpx; the one place that reveals the token."""

    def __init__(self, base_url: str, secret: Secret) -> None:
        try:
            import httpx
        except ImportError:
            raise ConfigError(
                "plugins.telegram: sending needs httpx; run: pip install 'tapebus[telegram]', or set dry_run = true"
            ) from None
        self._secret = secret
        self._base = base_url.rstrip("/")
        self._client = httpx.Client(
            timeout=httpx.Timeout(READ_S, connect=CONNECT_S),
            follow_redirects=False,
            # A proxy has no business between this process and a server on the same machine.
            trust_env=not is_loopback(base_url),
        )

    def __repr__(self) -> str:
        return f"HttpTransport({self._base!r})"

    def call(self, method: str, payload: dict[str, Any]) -> Answer:
        """POST `payload`; blocks at most about 13 s, longer only while the server keeps sending bytes."""
        try:
            response = self._client.post(f"{self._base}/bot{self._secret.reveal()}/{method}", json=payload)
            status, content = response.status_code, response.content
        except Exception as error:
            # Only the class is kept: message, request and traceback of the client's errors hold the address.
            return Answer(0, f"no answer ({type(error).__name__})")
        return self._answer(status, content)

    def _answer(self, status: int, content: bytes) -> Answer:
        try:
            body = msgspec.json.decode(content, type=_Body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            # A proxy or an overloaded server; whatever it says is worth another try.
            return Answer(status if status >= 300 else 502, f"not a Bot API answer (HTTP {status})")
        if body.ok:
            result = body.result if isinstance(body.result, dict) else {}
            found = result.get("message_id", 0)
            return Answer(200, "", found if isinstance(found, int) else 0)
        return Answer(
            body.error_code or status,
            self._secret.redact(body.description)[:300],
            retry_after=body.parameters.retry_after,
            migrate_to=body.parameters.migrate_to_chat_id,
        )

    def close(self) -> None:
        self._client.close()

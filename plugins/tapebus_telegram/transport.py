"""One call of the Bot API through python-telegram-bot, with every outcome turned into an `Answer` without the token.

Only the library's ``Bot`` is used, none of its framework, and never ``Bot.initialize``: that would put the token into
the text of an error. The library is imported with the first call, on the thread that makes it.
"""

from __future__ import annotations

import datetime
import warnings
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from tapebus.errors import ConfigError
from tapebus_telegram.secret import Secret, quiet_library
from tapebus_telegram.settings import is_loopback

if TYPE_CHECKING:
    import telegram
    from telegram.request import BaseRequest

#: Seconds; together they bound one call. A long poll adds its own ``timeout``.
CONNECT_S, READ_S = 5.0, 15.0
FLOOR = 22

#: Status and body of the answer to the call of this task: None while there is none.
_answered: ContextVar[tuple[int, bytes] | None] = ContextVar("answered", default=None)


class Answer(msgspec.Struct, frozen=True):
    """``code`` is the HTTP-like Bot API code, 0 when no answer came (then ``description`` says why).

    ``result`` is what an accepted call returned, as plain JSON values.
    """

    code: int
    description: str = ""
    retry_after: float = 0.0
    migrate_to: int = 0
    result: Any = None

    @property
    def ok(self) -> bool:
        return self.code == 200

    @property
    def message_id(self) -> int:
        """Telegram's number of the message sent; 0 where the answer names none."""
        found = self.result.get("message_id") if isinstance(self.result, dict) else 0
        return found if isinstance(found, int) else 0


class Transport(Protocol):
    """Whatever can call the Bot API; `call` never raises for anything the network or the server does."""

    async def call(self, method: str, payload: dict[str, Any]) -> Answer: ...
    async def close(self) -> None: ...


class _Body(msgspec.Struct, frozen=True):
    ok: bool
    result: Any = None


def require_library() -> None:
    """Raise `ConfigError` where python-telegram-bot is missing or too old; imports nothing."""
    try:
        found = version("python-telegram-bot")
    except PackageNotFoundError:
        found = ""
    if not found or int(found.partition(".")[0]) < FLOOR:
        raise ConfigError(
            f"plugins.telegram: sending needs python-telegram-bot {FLOOR} or later"
            f"{f', not {found}' if found else ''}; run: pip install 'tapebus[telegram]', or set dry_run = true"
        )


class BotTransport:
    """Calls through ``telegram.Bot``; the one place that reveals the token. Used on one thread, with one loop."""

    def __init__(self, base_url: str, secret: Secret) -> None:
        require_library()
        self._secret = secret
        self._base = base_url.rstrip("/")
        self._bot: telegram.Bot | None = None

    def __repr__(self) -> str:
        return f"BotTransport({self._base!r})"

    def _build(self) -> telegram.Bot:
        import telegram
        from telegram.warnings import PTBDeprecationWarning

        quiet_library()
        # RetryAfter.retry_after changes its type some day; both types are read here.
        warnings.filterwarnings("ignore", category=PTBDeprecationWarning, message=".*retry_after.*")
        request = self._request()
        return telegram.Bot(
            self._secret.reveal(), base_url=f"{self._base}/bot", request=request, get_updates_request=request
        )

    def _request(self) -> BaseRequest:
        from telegram.request import HTTPXRequest

        class Request(HTTPXRequest):
            """Keeps the answer as it came: the library's objects refuse what they do not know."""

            __slots__ = ()

            async def do_request(self, *args: Any, **kwargs: Any) -> tuple[int, bytes]:
                answered = await super().do_request(*args, **kwargs)
                _answered.set(answered)
                return answered

        return Request(
            connection_pool_size=4,
            connect_timeout=CONNECT_S,
            read_timeout=READ_S,
            write_timeout=READ_S,
            pool_timeout=CONNECT_S,
            # A proxy has no business between this process and a server on the same machine.
            httpx_kwargs={"trust_env": not is_loopback(self._base)},
        )

    async def call(self, method: str, payload: dict[str, Any]) -> Answer:
        """Call the Bot API `method` (``sendMessage`` …) with its parameters."""
        _answered.set(None)
        try:
            if self._bot is None:
                self._bot = self._build()
            await getattr(self._bot, method)(**payload)
        except Exception as error:
            failed = self._failure(error)
            if failed is not None:
                return failed
        answered = _answered.get()
        return Answer(200, result=msgspec.json.decode(answered[1], type=_Body).result if answered else None)

    def _failure(self, error: Exception) -> Answer | None:
        """What `error` means; None where the server accepted and the library only could not read its answer."""
        from telegram import error as errors

        status, body = _answered.get() or (0, b"")
        if not status:
            # Only the class is kept: the message, cause and traceback of a client's error may hold the address.
            return Answer(0, f"no answer ({type(error.__cause__ or error).__name__})")
        try:
            accepted = msgspec.json.decode(body, type=_Body).ok
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            # A proxy or an overloaded server; whatever it says is worth another try.
            return Answer(502, f"not a Bot API answer (HTTP {status})")
        if accepted and status < 300:
            return None
        description = self._secret.redact(str(error))[:300]
        match error:
            case errors.RetryAfter():
                return Answer(429, description, retry_after=_seconds(error.retry_after))
            case errors.ChatMigrated():
                return Answer(400, description, migrate_to=error.new_chat_id)
            case errors.InvalidToken() | errors.Forbidden() | errors.BadRequest() | errors.Conflict():
                return Answer(status, description)
            case errors.TelegramError():
                return Answer(status if status >= 300 else 502, description)
        return Answer(502, f"not a Bot API answer ({type(error).__name__})")

    async def close(self) -> None:
        if self._bot is not None:
            await self._bot.request.shutdown()
            self._bot = None


def _seconds(value: float | datetime.timedelta) -> float:
    return value.total_seconds() if isinstance(value, datetime.timedelta) else float(value)

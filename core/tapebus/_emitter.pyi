from typing import Any

from tapebus._outbox import Outbox

def enc_hook(value: Any) -> Any: ...

class Emitter:
    outbox: Outbox
    source: str
    wake_fd: int
    closed: bool
    unopened: bool
    def _setup(self, source: str, outbox: Outbox) -> None: ...
    def _open(self) -> None: ...
    def _start(self) -> None: ...
    def _confirm(self, number: int, timeout: float) -> bool: ...
    def publish(
        self,
        event_type: str,
        data: Any,
        correlation_id: str | None = None,
        priority: str | None = None,
        timestamp: Any = None,
        causation_id: str | None = None,
        user_id: str | int | None = None,
        session_id: str | None = None,
        event_id: str | None = None,
        *,
        source: str | None = None,
        durable: bool = False,
        timeout: float = 5.0,
    ) -> bool: ...

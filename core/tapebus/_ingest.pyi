from collections.abc import Callable
from typing import Any

from tapebus._ring import Ring
from tapebus.security import Peers, Rights

class Ingest:
    malformed: int
    oversize: int
    shed: int
    batches: int
    silent_us: int
    samples: Callable[[bytes, str], None] | None
    keep: list[Any]
    def __init__(
        self,
        ring: Ring,
        instance: int,
        durable: bool = True,
        max_frame: int = ...,
        max_events: int = 4096,
        max_sessions: int = 4096,
    ) -> None: ...
    def restrict(self, policy: Rights) -> None: ...
    def add(
        self,
        socket: Any,
        producer: int = 0,
        router: bool = False,
        event_type: str = "",
        source: str = "",
        fields: dict[str, str] | None = None,
        peers: Peers = "trusted",
    ) -> None: ...
    def set_store_full(self, full: bool) -> None: ...
    def stop_reading_events(self) -> None: ...
    def stop(self) -> None: ...
    @property
    def mail_waiting(self) -> int: ...
    def connected(self) -> set[int]: ...
    @property
    def sessions_count(self) -> int: ...
    def run(self) -> None: ...

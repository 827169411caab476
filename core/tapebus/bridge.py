"""One line of publishing for programs that exist: eight functions that never raise and never block.

Each returns ``True`` when the event is kept for the bus and ``False`` when it is not; the caller may ignore
both. The first call makes the process's publisher of that source; a forked child gets its own connection.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from tapebus.publisher import Publisher

_MAX_SOURCES = 64  # a caller that makes source names up must not make a thread for each
_publishers: dict[str, Publisher] = {}
_making = threading.Lock()
_enabled = True


def disable() -> None:
    """Turn every function of this module into a no-op, at once and in all threads."""
    global _enabled
    _enabled = False


def enable() -> None:
    """Undo `disable`."""
    global _enabled
    _enabled = True


def _publisher(source: str) -> Publisher:
    publisher = _publishers.get(source)
    if publisher is None:
        with _making:
            publisher = _publishers.get(source)
            if publisher is None:
                if len(_publishers) >= _MAX_SOURCES:
                    return next(iter(_publishers.values()))
                publisher = _publishers[source] = Publisher(source)
    return publisher


def _publish(event_type: str, data: Any, source: str, ids: tuple[str, ...] = (), user_id: Any = None) -> bool:
    """Publishes `data` without its ``None`` values, chained by the first of `ids` that it has."""
    if not _enabled:
        return False
    try:
        correlation_id = None
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if value is not None}
            correlation_id = next((data[key] for key in ids if key in data), None)
        else:
            correlation_id = next((value for key in ids if (value := getattr(data, key, None)) is not None), None)
        return _publisher(source).publish(event_type, data, correlation_id, user_id=user_id)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        # The caller is a trading path: not even a wrong source name may disturb it.
        return False


def _with_user(data: Any, user_id: Any) -> Any:
    return {**data, "user_id": str(user_id)} if isinstance(data, dict) and user_id is not None else data


def signal_generated(signal_data: Any, source: str = "elite_guard") -> bool:
    """A signal was made; chained by its ``signal_id``."""
    return _publish("signal_generated", signal_data, source, ("signal_id",))


def fire_command(fire_data: Any, user_id: Any, source: str = "webapp") -> bool:
    """A user's order is on its way to the broker; chained by its ``fire_id``, else ``signal_id``."""
    with contextlib.suppress(Exception):
        return _publish("fire_command", _with_user(fire_data, user_id), source, ("fire_id", "signal_id"), user_id)
    return False


def trade_executed(trade_data: Any, source: str = "mt5_adapter") -> bool:
    """The broker has answered; chained by ``fire_id``, else ``signal_id``."""
    return _publish("trade_executed", trade_data, source, ("fire_id", "signal_id"))


def balance_update(balance_data: Any, user_id: Any, source: str = "mt5_adapter") -> bool:
    """Balance and equity of a user's account, in account currency."""
    with contextlib.suppress(Exception):
        return _publish("balance_update", _with_user(balance_data, user_id), source, (), user_id)
    return False


def system_health(component: str, status: str, details: dict[str, Any] | None = None) -> bool:
    """State of one component, which is the source too; `details` become fields of the payload."""
    with contextlib.suppress(Exception):
        return _publish("system_health", {**(details or {}), "component": component, "status": status}, component)
    return False


def user_action(user_id: Any, action: str, details: dict[str, Any] | None = None, source: str = "webapp") -> bool:
    """Something a user did; `details` stay a map of their own."""
    with contextlib.suppress(Exception):
        data = {"user_id": None if user_id is None else str(user_id), "action": action, "details": details}
        return _publish("user_action", data, source, (), user_id)
    return False


def market_data(symbol: str, bid: float, ask: float, volume: float | None = None, source: str = "mt5_feed") -> bool:
    """One quote, prices in quote currency."""
    return _publish("market_data", {"symbol": symbol, "bid": bid, "ask": ask, "volume": volume}, source)


def pattern_detected(pattern_data: Any, source: str = "elite_guard") -> bool:
    """A chart pattern was found; chained by its ``signal_id`` when it has one."""
    return _publish("pattern_detected", pattern_data, source, ("signal_id",))

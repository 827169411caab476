"""Whether a port is free, and waiting for one: a bus that is started anew may be faster than the old one is gone."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterable

from tapebus.errors import TapebusError

log = logging.getLogger("tapebus")
RETRY_S = 0.1


def in_use(endpoint: str) -> bool:
    """Whether somebody listens where `endpoint` would be bound; never for ``ipc://`` and for a port of 0."""
    scheme, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or port in ("*", "0"):
        return False
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "*" else host, int(port)))
        except socket.gaierror:
            return False  # the name of an interface; binding will tell
        except OSError:
            return True
    return False


def wait_until_free(endpoints: Iterable[str], patience_s: float, stop_asked: Callable[[float], bool]) -> None:
    """Wait at most `patience_s` seconds for all `endpoints`; binding them says what is wrong afterwards.

    ``stop_asked(seconds)`` waits that long and says whether to give up, which raises `TapebusError`.
    """
    deadline = time.monotonic() + patience_s
    said = False
    for endpoint in endpoints:
        while in_use(endpoint) and time.monotonic() < deadline:
            if not said:
                log.warning("%s is in use; waiting at most %g s for it", endpoint, patience_s)
                said = True
            if stop_asked(RETRY_S):
                raise TapebusError(f"told to stop while waiting for {endpoint}, which another program uses")

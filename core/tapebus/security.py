"""Who may publish and subscribe what: identities and their rights, and what may listen beyond this machine.

A peer is known by what its connection proves: the CURVE key it holds, the user id behind an ipc socket,
or, for loopback tcp, only that it runs on this machine. A number stands for each identity where speed
matters: 0 may do everything, `NOBODY` nothing, others count from 1 in the order of the configuration.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from tapebus.errors import ConfigError

EVERYTHING, NOBODY = 0, 255
MAX_IDENTITIES = 200
KEY_SIZE = 40  # a CURVE key in Z85

#: How the peers of a socket are known.
Peers = Literal["trusted", "loopback", "ipc", "curve"]


class Identity(Struct, frozen=True, forbid_unknown_fields=True):
    """One ``[[security.identities]]``: one of `uid`, `key`, `loopback` says who, the rest what it may do.

    `key` is a CURVE public key, or several while keys are being changed. `publish` and `subscribe` hold
    event types, exact or ``prefix*``. `rate` bounds published events per second, 0 does not.
    """

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    uid: Annotated[int, Meta(ge=0)] | None = None
    key: str | list[str] = []
    loopback: bool = False
    publish: list[str] = []
    subscribe: list[str] = []
    rate: Annotated[float, Meta(ge=0)] = 0.0

    @property
    def keys(self) -> list[str]:
        return [self.key] if isinstance(self.key, str) else self.key


class Security(Struct, frozen=True, forbid_unknown_fields=True):
    """``[security]``: `key` is the bus's CURVE secret, as ``{ file = "…" }`` or ``{ env = "…" }``.

    `max_sessions` bounds the producers connected at once.
    """

    key: dict[str, str] = {}
    identities: list[Identity] = []
    max_sessions: Annotated[int, Meta(ge=1, le=65536)] = 4096


class Rights:
    """The identities of a configuration by number; immutable, for any thread."""

    def __init__(self, security: Security, owner: int | None = None) -> None:
        self.identities = security.identities
        self.uids: dict[int, int] = {os.getuid() if owner is None else owner: EVERYTHING}
        self.keys: dict[str, int] = {}
        self.loopback = EVERYTHING
        for number, identity in enumerate(security.identities, 1):
            if identity.uid is not None:
                self.uids[identity.uid] = number
            elif identity.loopback:
                self.loopback = number
            for key in identity.keys:
                self.keys[key] = number

    def name(self, number: int) -> str:
        return self.identities[number - 1].name if 0 < number <= len(self.identities) else "nobody known here"

    def may_publish(self, number: int, event_type: str) -> bool:
        return number == EVERYTHING or matches(event_type, self.publish(number))

    def publish(self, number: int) -> Sequence[str]:
        return self.identities[number - 1].publish if 0 < number <= len(self.identities) else ()

    def subscribe(self, number: int) -> Sequence[str] | None:
        """The event types that `number` may read, None for all."""
        if number == EVERYTHING:
            return None
        return self.identities[number - 1].subscribe if number <= len(self.identities) else ()

    def of_peer(self, peers: Peers, address: str, user_id: str) -> int:
        """The number of a peer, from the metadata of a message of its connection."""
        if peers == "trusted":
            return EVERYTHING
        if peers == "loopback":
            return self.loopback
        if peers == "curve":
            return int(user_id) if user_id.isdigit() else NOBODY
        uid = address.split(":")[1] if address.count(":") == 3 else ""
        return self.uids.get(int(uid), NOBODY) if uid.isdigit() else NOBODY


def matches(event_type: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern is `event_type`, or ends in ``*`` and begins it."""
    return any(event_type == each or (each.endswith("*") and event_type.startswith(each[:-1])) for each in patterns)


def granted(asked: bytes, prefix: str, patterns: Sequence[str] | None) -> list[bytes]:
    """The feed subscriptions that a peer asking for `asked` gets; each is a prefix of topics, as in ZeroMQ."""
    if patterns is None:
        return [asked]
    found: list[bytes] = []
    for each in patterns:
        allowed = (prefix + each.removesuffix("*")).encode()
        if asked.startswith(allowed):
            return [asked]
        if allowed.startswith(asked):
            found.append(allowed)
    return found


def peers_of(endpoint: str) -> Peers:
    """How those who reach a bound `endpoint` are known."""
    if not is_loopback(endpoint):
        return "curve"
    if endpoint.startswith("ipc://"):
        # elsewhere libzmq does not tell who is behind an ipc socket; its mode still keeps others out
        return "ipc" if sys.platform == "linux" else "trusted"
    return "loopback"


def is_loopback(endpoint: str) -> bool:
    """Whether a bind to `endpoint` is reachable from this machine only."""
    scheme, _, rest = endpoint.partition("://")
    if scheme != "tcp":
        return scheme in ("ipc", "inproc")
    host = rest.rpartition(":")[0].strip("[]")
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_security(security: Security, exposed: Iterator[tuple[str, str]]) -> None:
    """Refuse contradictory identities, and each of `exposed` (key, endpoint) that lacks what guards it."""
    seen: dict[Any, str] = {}
    if len(security.identities) > MAX_IDENTITIES:
        raise ConfigError(f"security.identities: more than {MAX_IDENTITIES}")
    for index, identity in enumerate(security.identities):
        place = f"security.identities[{index}] ({identity.name})"
        _check_identity(place, identity)
        claims = [("name", identity.name), *(("key", key) for key in identity.keys)]
        if identity.uid is not None:
            claims.append(("uid", str(identity.uid)))
        if identity.loopback:
            claims.append(("loopback", "true"))
        for claim in claims:
            if claim in seen:
                raise ConfigError(f"{place}: the same {claim[0]} as {seen[claim]}; merge the two or change one")
            seen[claim] = place
    named = any(identity.keys for identity in security.identities)
    for key, endpoint in exposed:
        missing = []
        if not security.key:
            missing.append('[security] key = { file = "bus.key_secret" } (made by `tapebus keygen bus`)')
        if not named:
            missing.append("a [[security.identities]] with name, key and publish or subscribe for each client")
        if missing:
            raise ConfigError(
                f"{key} = {endpoint!r}: refusing to listen beyond this machine without keys: add "
                f"{' and '.join(missing)}; nearest valid without: 'tcp://127.0.0.1:{endpoint.rpartition(':')[2]}'"
            )


def _check_identity(place: str, identity: Identity) -> None:
    ways = (identity.uid is not None) + bool(identity.keys) + identity.loopback
    if ways != 1:
        raise ConfigError(f"{place}: give exactly one of uid, key or loopback = true")
    for key in identity.keys:
        if len(key) != KEY_SIZE:
            raise ConfigError(
                f"{place}.key: a CURVE public key has {KEY_SIZE} characters, got {len(key)}; copy it from NAME.key"
            )
    for field, patterns in (("publish", identity.publish), ("subscribe", identity.subscribe)):
        for each in patterns:
            if not each or "*" in each[:-1]:
                raise ConfigError(f"{place}.{field}: {each!r} is neither an event type nor a prefix followed by *")

"""CURVE keys in files, and the door: which sockets ask for a key, and whose key opens them.

A key file is text, ``NAME.key`` with the public key and ``NAME.key_secret`` (0600) with both; a client's
secret file also names the public key of the bus it talks to, so that one file is all a client needs.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from tapebus.config import read_private
from tapebus.errors import ConfigError, UsageError
from tapebus.redaction import register
from tapebus.security import KEY_SIZE, Peers, Rights

log = logging.getLogger("tapebus.curve")
ZAP = "inproc://zeromq.zap.01"  # where libzmq asks
#: Seconds between two lines about refused connections.
TELL_S = 10.0
_FIELD = re.compile(r'^\s*(public-key|secret-key|server-key)\s*=\s*"?([!-~]+?)"?\s*$', re.MULTILINE)


class Keys(NamedTuple):
    """A key pair in Z85, and the public key of the server for a client (else empty)."""

    public: bytes
    secret: bytes
    server: bytes = b""

    def __repr__(self) -> str:
        return f"Keys(public={self.public.decode()!r})"


def generate(directory: Path, name: str, server: str = "") -> tuple[Path, Path]:
    """Write a new pair ``name.key`` and ``name.key_secret``; `server` is a key or the path of one.

    Nothing is overwritten. Raises `UsageError`, or `ConfigError` for an unusable `server`.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name):
        raise UsageError(f"{name!r}: a key is named with letters, digits, dot, dash and underscore")
    theirs = f'server-key = "{public_key(server)}"\n' if server else ""
    public, secret = (each.decode() for each in zmq.curve_keypair())
    files = [
        (directory / f"{name}.key", 0o644, f'public-key = "{public}"\n'),
        (
            directory / f"{name}.key_secret",
            0o600,
            f'# keep this file to its owner\npublic-key = "{public}"\nsecret-key = "{secret}"\n{theirs}',
        ),
    ]
    for path, _, _ in files:
        if path.exists() or path.is_symlink():
            raise UsageError(f"{path}: exists already and is not overwritten; choose another name or move it away")
    for path, mode, text in reversed(files):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, mode)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
    return files[0][0], files[1][0]


def public_key(text: str) -> str:
    """`text` if it is a public key, else the one in the file of that name. Raises `ConfigError`."""
    if len(text) == KEY_SIZE and not os.path.exists(text):
        return text
    try:
        found = dict(_FIELD.findall(Path(text).expanduser().read_text(encoding="ascii")))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"{text}: neither a public key of {KEY_SIZE} characters nor a readable file: {why}") from None
    if len(found.get("public-key", "")) != KEY_SIZE:
        raise ConfigError(f'{text}: holds no line public-key = "…" with {KEY_SIZE} characters')
    return str(found["public-key"])


def parse_keys(text: str, key: str) -> Keys:
    """The pair in the text of a secret file, or of a bare secret key. Raises `ConfigError`."""
    found = dict(_FIELD.findall(text))
    secret = found.get("secret-key", text.strip())
    register(secret)
    try:
        if len(secret) != KEY_SIZE:
            raise ValueError
        public = zmq.curve_public(secret.encode("ascii"))
    except (ValueError, zmq.ZMQError):
        raise ConfigError(f"{key}: holds no CURVE secret key; make one with `tapebus keygen NAME`") from None
    return Keys(public, secret.encode(), found.get("server-key", "").encode())


def server_keys(where: Mapping[str, str]) -> Keys:
    """The bus's pair from ``[security] key``. Raises `ConfigError`."""
    key = "security.key"
    if set(where) == {"env"}:
        return parse_keys(os.environ.get(where["env"], ""), f"{key}.env")
    if set(where) != {"file"}:
        raise ConfigError(f'{key}: written {{ file = "…" }} or {{ env = "…" }}, never the key itself')
    return parse_keys(read_private(Path(where["file"]).expanduser(), f"{key}.file"), f"{key}.file")


def client_keys(path: str | os.PathLike[str]) -> Keys:
    """A client's pair and its server's key, from its secret file. Raises `ConfigError`."""
    keys = parse_keys(read_private(Path(path).expanduser(), "key"), f"key: {os.fspath(path)}")
    if len(keys.server) != KEY_SIZE:
        raise ConfigError(
            f'key: {os.fspath(path)} names no bus; add a line server-key = "…" with the key in the bus\'s .key file'
        )
    return keys


def as_client(socket: zmq.Socket[Any], keys: Keys) -> None:
    """Let `socket`, not yet connected, prove who it is and insist on the server it knows."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)


class Door:
    """Guards the sockets of one context: CURVE, and a thread that compares keys with the identities.

    While the thread is dead nobody gets in. `open`, `guard`, `mend` and `close` are for one thread at a time.
    """

    def __init__(self, context: zmq.Context[Any], keys: Keys, rights: Rights) -> None:
        self._context = context
        self._keys = keys
        self._rights = rights
        self._authenticator: Any = None
        self._refused, self._tell_at = 0, 0.0

    def open(self) -> None:
        from zmq.auth.thread import ThreadAuthenticator

        numbers = {zmq.utils.z85.decode(key): str(number) for key, number in self._rights.keys.items()}

        class Numbering(ThreadAuthenticator):
            def curve_user_id(self, client_public_key: bytes) -> str:
                return numbers[client_public_key]

        quiet = logging.getLogger("tapebus.curve.zap")
        quiet.setLevel(logging.WARNING)
        authenticator = Numbering(self._context, log=quiet)
        for domain in ("publish", "subscribe"):
            authenticator.configure_curve_callback(domain=domain, credentials_provider=self)
        authenticator.start()
        self._authenticator = authenticator

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the holder of `key` may publish, or subscribe to, anything at all."""
        number = self._rights.keys.get(key.decode())
        allowed = False
        if number is not None:
            allowed = bool(self._rights.publish(number) if domain == "publish" else self._rights.subscribe(number))
        if not allowed:
            self._tell(domain, key.decode())
        return allowed

    def _tell(self, domain: str, key: str) -> None:
        """A line now and then: who is refused tries again many times a second, and must not fill the disk."""
        self._refused += 1
        now = time.monotonic()
        if now < self._tell_at:
            return
        more = f", {self._refused - 1} more since the last such line" if self._refused > 1 else ""
        log.warning("refused a connection to %s with the key %s%s", domain, key, more)
        self._refused, self._tell_at = 0, now + TELL_S

    def guard(self, socket: zmq.Socket[Any], domain: str) -> None:
        """Make `socket`, not yet bound, ask for a key; `domain` is ``publish`` or ``subscribe``."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
        # without a living authenticator the handshake fails instead of letting everybody in
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def mend(self) -> None:
        """Start the authenticator anew if its thread has died."""
        if self._authenticator is not None and not self._authenticator.is_alive():
            log.error("the authenticator had stopped and nobody could connect; starting it again")
            self.close()
            self.open()

    def close(self) -> None:
        authenticator, self._authenticator = self._authenticator, None
        if authenticator is None:
            return
        if not authenticator.is_alive():
            # nobody would take the request to stop, and asking would wait for somebody
            authenticator.pipe.close(0)
            authenticator.pipe = None
            # closing alone gives the name back some time later
            authenticator.zap_socket.unbind(ZAP)
        authenticator.stop()


def peers_rights(frame: Any, peers: Peers, rights: Rights) -> int:
    """The number of the peer that `frame` (a `zmq.Frame`) came from."""

    def about(name: str) -> str:
        try:
            return str(frame.get(name))
        except zmq.ZMQError:
            return ""

    return rights.of_peer(peers, about("Peer-Address"), about("User-Id"))

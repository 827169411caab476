"""Talking to PM2 from Python: the ready signal, metrics, and an ecosystem file that fits this bus.

PM2 starts every child in fork mode with an IPC channel, a stream socket whose number stands in
``NODE_CHANNEL_FD``. A message is one line of JSON.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec


class Channel:
    """The IPC channel to PM2; without one every call does nothing, so callers need not ask.

    Never raises and never blocks: what does not fit the socket is finished by the next call, metrics
    are left out meanwhile. Use it from one thread.
    """

    def __init__(self, sock: socket.socket | None) -> None:
        self._sock = sock
        self._unsent = b""

    @classmethod
    def from_env(cls) -> Channel:
        """Take over the channel this process was started with; children do not inherit it."""
        number = os.environ.pop("NODE_CHANNEL_FD", "")
        if not number.isdigit():
            return cls(None)
        try:
            fd = int(number)
            os.set_inheritable(fd, False)
            return cls(socket.socket(fileno=fd))
        except (OSError, OverflowError):
            return cls(None)

    @property
    def connected(self) -> bool:
        return self._sock is not None

    def ready(self) -> None:
        """Tell PM2 (``wait_ready: true``) that the process does its work from now on."""
        self._send(b'"ready"\n')

    def metrics(self, values: Mapping[str, int | float | str], units: Mapping[str, str] | None = None) -> None:
        """Show `values` in ``pm2 describe``, ``pm2 monit`` and ``pm2 jlist``; `units` by the same names."""
        if self._sock is None:
            return
        self._flush()
        if self._unsent:
            return
        data = {
            name: {
                "value": value,
                "type": "custom",
                "historic": not isinstance(value, str),
                **({"unit": units[name]} if units and name in units else {}),
            }
            for name, value in values.items()
        }
        self._send(msgspec.json.encode({"type": "axm:monitor", "data": data}) + b"\n")

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _send(self, line: bytes) -> None:
        if self._sock is not None:
            self._unsent += line
            self._flush()

    def _flush(self) -> None:
        while self._unsent and self._sock is not None:
            try:
                sent = self._sock.send(self._unsent, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                # The daemon is gone; the bus is worth more than its supervisor.
                self.close()
                return
            self._unsent = self._unsent[sent:]


def ecosystem(
    config_path: str | os.PathLike[str] | None,
    python: str,
    *,
    data_dir: str | os.PathLike[str],
    name: str = "tapebus",
    drain_s: float = 5.0,
    memory: str = "500M",
) -> str:
    """The text of an ``ecosystem.config.js`` that runs the bus under PM2.

    `python` is the interpreter of the environment tapebus is installed in; ``kill_timeout`` leaves
    the bus `drain_s` seconds and a margin to finish what it has received. Secrets have no place in
    it: ``pm2 save`` writes the environment to disk.
    """
    logs = Path(data_dir) / "logs"
    args = ["-m", "tapebus", "run", "--data-dir", str(data_dir)]
    if config_path is not None:
        args += ["--config", str(Path(config_path).absolute())]
    app = {
        "name": name,
        "script": python,
        "args": args,
        "interpreter": "none",
        "cwd": str(data_dir),
        "exec_mode": "fork",
        "instances": 1,
        "wait_ready": True,
        "listen_timeout": 15000,
        "kill_timeout": int((drain_s + 5) * 1000),
        "autorestart": True,
        "min_uptime": "5s",
        "max_restarts": 10,
        "exp_backoff_restart_delay": 200,
        "stop_exit_codes": [0, 78],
        "max_memory_restart": memory,
        "merge_logs": True,
        "out_file": str(logs / f"{name}-out.log"),
        "error_file": str(logs / f"{name}-err.log"),
        "env": {"PYTHONUNBUFFERED": "1"},
        "watch": False,
        "vizion": False,
    }
    body = json.dumps({"apps": [app]}, indent=2)
    return (
        "// Start with `pm2 start ecosystem.config.js`, keep over a reboot with `pm2 save` and `pm2 startup`.\n"
        "// Exit code 78 is a wrong configuration, which a restart does not cure: see `pm2 logs`.\n"
        f"module.exports = {body};\n"
    )

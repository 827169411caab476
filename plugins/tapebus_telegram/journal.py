"""What has left this machine: a small file beside the tape, synced around every message sent.

Plugin state becomes durable a moment later, together with the cursor. A message sent in between would be sent
again after a crash; the journal knows better, so that only the one message in flight may be repeated.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import msgspec

#: Messages remembered: far more than can be sent while one unit of work waits for its commit.
_KEEP = 2000


class Sent(msgspec.Struct, omit_defaults=True):
    key: str
    group: str = ""
    last_seq: int = 0
    message_id: int = 0


class _Line(msgspec.Struct, omit_defaults=True):
    sending: str = ""
    sent: Sent | None = None


class Journal:
    """Append-only, rewritten when it has grown; raises `OSError` when the disk refuses."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sent: OrderedDict[str, Sent] = OrderedDict()
        self._groups: dict[str, Sent] = {}
        self.in_flight = ""  # key of the message a crash left undecided
        self._lines = 0
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._read()
        self._rewrite()

    def _read(self) -> None:
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        for line in lines:
            try:
                record = msgspec.json.decode(line, type=_Line)
            except msgspec.DecodeError:
                continue  # a torn last line: that message counts as in flight
            if record.sent is not None:
                self._note(record.sent)
                self.in_flight = ""
            elif record.sending:
                self.in_flight = record.sending

    def _note(self, sent: Sent) -> None:
        self._sent[sent.key] = sent
        if sent.group:
            self._groups[sent.group] = sent
        if len(self._sent) > _KEEP:
            _, gone = self._sent.popitem(last=False)
            if self._groups.get(gone.group) is gone:
                del self._groups[gone.group]

    def _rewrite(self) -> None:
        fresh = self._path.with_name(self._path.name + ".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for sent in self._sent.values():
                file.write(msgspec.json.encode(_Line(sent=sent)) + b"\n")
            if self.in_flight:
                file.write(msgspec.json.encode(_Line(sending=self.in_flight)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._path)
        # what is appended from now on must not be lost with the new name
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._file = self._path.open("ab", buffering=0)
        self._lines = len(self._sent)

    def sending(self, key: str) -> None:
        """Note that a call for `key` is about to leave."""
        self._append(_Line(sending=key))

    def sent(self, sent: Sent) -> None:
        """Note, durably, that Telegram has accepted the message."""
        self._note(sent)
        self.in_flight = ""
        self._append(_Line(sent=sent))
        os.fsync(self._file.fileno())
        if self._lines > 3 * _KEEP:
            self._file.close()
            self._rewrite()

    def _append(self, line: _Line) -> None:
        # The newline comes first as well: a torn line left by a full disk must not swallow this one.
        data = b"\n" + msgspec.json.encode(line) + b"\n"
        if self._file.write(data) != len(data):
            raise OSError(28, "the disk is full", str(self._path))
        self._lines += 1

    def find(self, key: str) -> Sent | None:
        return self._sent.get(key)

    def group(self, group: str) -> Sent | None:
        """The last message sent for `group`."""
        return self._groups.get(group) if group else None

    def close(self) -> None:
        self._file.close()

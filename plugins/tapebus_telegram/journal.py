"""What has left this machine: a small file beside the tape, synced around every message sent.

Plugin state becomes durable a moment later, together with the cursor. A message sent in between would be sent
again after a crash; the journal knows better, so that only the one message in flight may be repeated. It also
knows when the last calls were made and how long Telegram asked to wait, so that a restart breaks no limit.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from pathlib import Path

import msgspec

from tapebus_telegram.limits import LONGEST_S, OVERALL

#: Messages remembered: far more than can be sent while one unit of work waits for its commit.
_KEEP = 2000


class Sent(msgspec.Struct, omit_defaults=True):
    """A message that Telegram took; ``last_seq`` and ``repeats`` are those it was sent with."""

    key: str
    group: str = ""
    last_seq: int = 0
    message_id: int = 0
    repeats: int = 1


class Call(msgspec.Struct, omit_defaults=True):
    """A call about to leave (``key`` set) or over; ``at`` is wall-clock seconds."""

    chat: int | str
    at: float
    key: str = ""


class _Line(msgspec.Struct, omit_defaults=True):
    begun: Call | None = None
    over: Call | None = None
    sent: Sent | None = None
    halt: float = 0.0


class Journal:
    """Append-only, rewritten when it has grown; raises `OSError` when the disk refuses.

    Written on one thread; `find` and `group` may be called on another one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sent: OrderedDict[str, Sent] = OrderedDict()
        self._groups: dict[str, Sent] = {}
        #: Calls of about the last minute, as they were over, oldest first.
        self.calls: deque[Call] = deque(maxlen=int(OVERALL[0] * LONGEST_S / OVERALL[1]))
        #: The call a crash left undecided.
        self.in_flight: Call | None = None
        #: Wall-clock time until which Telegram asked to wait.
        self.halted_until = 0.0
        self._lines = 0
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._read()
        self._rewrite()

    def _read(self) -> None:
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        for line in lines:
            try:
                self._take(msgspec.json.decode(line, type=_Line))
            except msgspec.DecodeError:
                continue  # a torn last line: that message counts as in flight

    def _take(self, line: _Line) -> None:
        if line.begun is not None:
            if self.in_flight is not None:
                # how that call ended was never noted; it was over before this one
                self.calls.append(Call(self.in_flight.chat, line.begun.at))
            self.in_flight = line.begun
        if line.over is not None:
            self.calls.append(line.over)
            self.in_flight = None
        if line.sent is not None:
            self._note(line.sent)
        self.halted_until = max(self.halted_until, line.halt)

    def _note(self, sent: Sent) -> None:
        self._sent[sent.key] = sent
        if sent.group:
            self._groups[sent.group] = sent
        if len(self._sent) > _KEEP:
            _, gone = self._sent.popitem(last=False)
            if self._groups.get(gone.group) is gone:
                del self._groups[gone.group]

    def _rewrite(self) -> None:
        lines = [_Line(sent=sent) for sent in self._sent.values()]
        lines += [_Line(over=call) for call in self.calls]
        lines += [_Line(begun=self.in_flight, halt=self.halted_until)]
        fresh = self.path.with_name(self.path.name + ".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(msgspec.json.encode(line) + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)
        # what is appended from now on must not be lost with the new name
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._file = self.path.open("ab", buffering=0)
        self._lines = len(lines)

    def begun(self, key: str, chat: int | str, at: float) -> None:
        """Note that a call for `key` is about to leave."""
        self._write(_Line(begun=Call(chat, at, key)))

    def over(self, chat: int | str, at: float, sent: Sent | None = None, halt: float = 0.0) -> None:
        """Note how a call ended; durably where Telegram has `sent` the message or asks to `halt` until then."""
        self._write(_Line(over=Call(chat, at), sent=sent, halt=halt))
        if sent is not None or halt:
            os.fsync(self._file.fileno())
        if self._lines > 5 * _KEEP:
            self._file.close()
            self._rewrite()

    def _write(self, line: _Line) -> None:
        self._take(line)
        # The newline comes first as well: a torn line left by a full disk must not swallow this one.
        data = b"\n" + msgspec.json.encode(line) + b"\n"
        if self._file.write(data) != len(data):
            raise OSError(28, "the disk is full", str(self.path))
        self._lines += 1

    def find(self, key: str) -> Sent | None:
        return self._sent.get(key)

    def group(self, group: str) -> Sent | None:
        """The last message sent for `group`."""
        return self._groups.get(group) if group else None

    def close(self) -> None:
        self._file.close()

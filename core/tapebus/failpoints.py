"""Places where the process can be made to die as if by kill -9: ``TAPEBUS_FAILPOINT=tape.after_commit:7``.

The seventh time the named place is reached the process sends itself SIGKILL. Without the variable a
place costs one comparison; it stands in the path of a block, a commit, a start or a stop, never of an
event. The tests reach every name below; one that nobody reaches fails them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Mapping

from tapebus.errors import ConfigError

VARIABLE = "TAPEBUS_FAILPOINT"

#: Every place by name, with what has and has not happened there.
NAMES: dict[str, str] = {
    "start.prepared": "runtime: directories are there, nothing is loaded",
    "start.store_open": "runtime: the tape is open and locked, nothing was read from it",
    "start.wired": "runtime: consumers and their cursors are known, nothing listens",
    "start.listening": "runtime: all sockets are bound, no thread runs",
    "start.plugins_started": "runtime: every tapebus_start has returned, no thread runs",
    "start.running": "runtime: all threads run",
    "stop.asked": "runtime: asked to stop, still reading events",
    "stop.reading_ended": "runtime: no more events are read, the queues are full of them",
    "stop.drained": "runtime: everything received has gone all the way",
    "stop.consumers_ended": "runtime: consumers have closed their last units of work, not committed yet",
    "stop.written": "runtime: the last units of work are committed, no goodbye was said",
    "stop.ingest_ended": "runtime: producers were told goodbye, the tape thread still runs",
    "stop.tape_ended": "runtime: the tape thread has ended, sockets are open",
    "stop.closed": "runtime: everything is closed, the process has not ended",
    "tape.packed": "tape thread: a block is packed, its commit has not begun",
    "tape.after_commit": "tape thread: the block is on disk, nobody was told",
    "tape.after_ack": "tape thread: the acknowledgement was handed to ingest, dispatch has not got the block",
    "tape.after_deliver": "tape thread: dispatch has the block",
    "tape.before_upkeep": "tape thread: about to seal, merge or remove",
    "tape.after_upkeep": "tape thread: one piece of upkeep is done",
    "store.created": "store: the files of a tape exist, its version is not written",
    "store.salvaged": "store: a tape of the sound records of a damaged one is written, the damaged one in its place",
    "store.set_aside": "store: the damaged tape has its new name, nothing has taken its place",
    "store.in_commit": "store: everything is written inside the transaction, which is not committed",
    "store.before_grow": "store: the map is full, the transaction undone, the map still small",
    "store.after_grow": "store: the map has grown, the commit has not been repeated",
    "store.in_seal": "store: a sealed block has replaced hot ones inside the transaction",
    "store.in_merge": "store: runs of the correlation index are merged inside the transaction",
    "store.in_drop": "store: old blocks are removed inside the transaction",
    "dispatch.before_block": "dispatch thread: a block is taken, no consumer has seen it",
    "dispatch.after_block": "dispatch thread: every inline consumer has seen the block",
    "judge.before_unit": "dispatch thread: dead letters are noted, their unit of work is not sent",
    "judge.after_unit": "dispatch thread: dead letters and their cursor are on their way to the tape",
    "fence.before_unit": "consumer: handled, what it emitted and changed is not sent",
    "fence.after_unit": "consumer: its unit of work is on its way to the tape",
    "outlet.before_slice": "thread consumer: a slice is taken, nothing of it handled",
    "feed.before_send": "feed thread: a slice is taken, nothing of it sent",
    "feed.after_send": "feed thread: a slice is sent",
    "supervisor.before_child": "supervisor: about to start the process of a consumer",
    "supervisor.after_child": "supervisor: the process runs, it has no orders",
    "supervisor.on_report": "supervisor: the process has reported, nothing is noted",
    "worker.started": "worker: store and tape are open, nothing is delivered",
    "worker.before_commit": "worker: handled, nothing is written",
    "worker.after_commit": "worker: state, cursor and emitted events are on disk, nothing is published",
    "worker.published": "worker: emitted events are handed to its publisher",
    "worker.stopping": "worker: told to stop, the last unit of work is not closed",
    "sender.before_hello": "publisher: connected, nothing was said",
    "sender.on_welcome": "publisher: the bus has answered, the answer is not used yet",
    "sender.before_send": "publisher: a batch is built and not sent",
    "sender.after_send": "publisher: a batch is sent and not noted",
    "sender.on_ack": "publisher: an acknowledgement has come and is not used yet",
    "sender.after_ack": "publisher: acknowledged events are forgotten",
    "sender.before_bye": "publisher: everything is acknowledged, no goodbye was said",
}


class _Armed:
    """The one place that is armed in this process, and how many hits it has left."""

    def __init__(self, text: str) -> None:
        self.text = text
        name, colon, count = text.partition(":")
        self.name = name
        self.left = int(count) if count.isdecimal() else int(not colon)
        self.mutex = threading.Lock()

    @property
    def problem(self) -> str:
        """What is wrong with the text of the variable; empty where nothing is."""
        if self.text and self.name not in NAMES:
            import difflib

            near = difflib.get_close_matches(self.name, NAMES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(NAMES)}"
            return f"{VARIABLE} = {self.text!r}: no such place; {hint}"
        if self.text and self.left < 1:
            return f"{VARIABLE} = {self.text!r}: write NAME or NAME:COUNT, with a count of 1 or more"
        return ""

    def hit(self) -> None:
        with self.mutex:
            self.left -= 1
            if not self.left:
                with contextlib.suppress(OSError):
                    os.write(2, f"tapebus: failpoint {self.name} reached, pid {os.getpid()} dies\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)


_armed = _Armed(os.environ.get(VARIABLE, ""))
_name = _armed.name


def failpoint(name: str) -> None:
    """Die here if this place is armed and has been reached often enough; any thread may call it."""
    if name == _name:
        _armed.hit()


def check(environ: Mapping[str, str] = os.environ) -> None:
    """Raise `ConfigError` when the variable names no place or no count."""
    problem = _Armed(environ.get(VARIABLE, "")).problem
    if problem:
        raise ConfigError(problem)

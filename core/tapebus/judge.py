"""Books what did not pass decode and validation, exactly once, also across a crash."""

from __future__ import annotations

import time
from collections.abc import Callable

from tapebus._topics import Topics
from tapebus.blocks import BlockView
from tapebus.codec import Fault
from tapebus.events import DeadLetter
from tapebus.failpoints import failpoint
from tapebus.fence import CURSOR_INTERVAL
from tapebus.store import Unit

#: The name its cursor is kept under; no consumer can have it.
NAME = "tapebus:judge"


class Judge:
    """A dead letter and the cursor that says it was written commit together; used by the dispatcher only."""

    def __init__(self, topics: Topics, cursor: int, send_unit: Callable[[Unit], None]) -> None:
        self._topics = topics
        self._send_unit = send_unit
        self._dead: list[DeadLetter] = []
        self._saved_cursor = cursor
        self._saved_at = time.monotonic()
        self.cursor = cursor
        #: How many events failed, by reason, since the start.
        self.faults: dict[str, int] = {}

    def judge(self, faults: list[Fault], view: BlockView, first_seq: int, last_seq: int) -> None:
        """Take the faults of one slice; what was judged before, a lagging consumer's replay, is left alone."""
        for fault in faults:
            seq = first_seq + fault.index
            if seq <= self.cursor:
                continue
            self.faults[fault.reason] = self.faults.get(fault.reason, 0) + 1
            name = self._topics.name(view.topic(seq))
            self._dead.append(DeadLetter("schema", fault.reason, fault.detail, seq, name, time.time()))
        self.cursor = max(self.cursor, last_seq)

    @property
    def unsaved(self) -> bool:
        return self.cursor != self._saved_cursor

    def close_unit(self, force: bool = False) -> None:
        """Send the cursor with the dead letters it covers, at once when there are any, else now and then."""
        due = force or time.monotonic() - self._saved_at >= CURSOR_INTERVAL
        if self._dead or (self.unsaved and due):
            failpoint("judge.before_unit")
            self._send_unit(Unit(NAME, self.cursor, dead=self._dead))
            failpoint("judge.after_unit")
            self._dead = []
            self._saved_cursor = self.cursor
            self._saved_at = time.monotonic()

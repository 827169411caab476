"""How long blocks have been on the tape, by a clock that cannot be set.

A wall clock may leap by years, so no block is removed because of one. What counts is time that has certainly passed:
the kernel's clock since boot while the machine is the same boot, and after a reboot the time since then. The time a
machine was off cannot be known and is not counted. So nothing is ever removed early; it may be removed late.
"""

from __future__ import annotations

import msgspec

#: There is a mark every so many parts of ``max_age_days``; the oldest events outlive it by at most that much.
PARTS = 256
#: But they are never nearer to each other than this, in seconds: upkeep has more to do than to mark.
NEAR_S = 1.0
#: The distance of marks in seconds while there is no such rule, so that one made later finds them.
APART_S = 6 * 3600.0
#: More marks than this are thinned out, the older half.
MAX_MARKS = 1024


class Ages(msgspec.Struct):
    """``marks`` are pairs (clock, the last sequence number of that moment), oldest first.

    ``clock`` counts seconds that have certainly passed; it stood there when the steady clock of ``boot`` showed
    ``steady``. One record of the tape; used by the writer only.
    """

    clock: float = 0.0
    boot: str = ""
    steady: float = 0.0
    marks: list[tuple[float, int]] = []

    def advance(self, boot: str, steady: float) -> None:
        """Count the time that has passed for certain since the last call, in this process or a former one."""
        if boot == self.boot:
            self.clock += max(0.0, steady - self.steady)
        elif self.boot:
            self.clock += max(0.0, steady)
        self.boot, self.steady = boot, steady

    def due(self, last_seq: int, max_age: float) -> bool:
        """Whether `mark` has something new to say; `max_age` is in seconds, 0 for no rule."""
        if not self.marks:
            return last_seq > 0
        clock, seq = self.marks[-1]
        apart = max(max_age / PARTS, NEAR_S) if max_age else APART_S
        return last_seq > seq and self.clock - clock >= apart

    def mark(self, last_seq: int, max_age: float) -> None:
        """Note that the tape ends at `last_seq` now, and forget marks that no longer matter."""
        self.marks.append((self.clock, last_seq))
        while max_age and len(self.marks) > 1 and self.marks[1][0] <= self.clock - max_age:
            del self.marks[0]
        if len(self.marks) > MAX_MARKS:
            del self.marks[1 : MAX_MARKS // 2 : 2]

    def older(self, max_age: float) -> int:
        """The sequence number up to which everything is older than `max_age` seconds; 0 for nothing."""
        return max((seq for clock, seq in self.marks if clock <= self.clock - max_age), default=0)

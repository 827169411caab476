"""The tape thread: packs what has arrived, commits it with one fsync, acknowledges, hands it to dispatch."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from tapebus._ingest import Ingest
from tapebus._ring import Ring
from tapebus.errors import CorruptError, StoreError, StoreFull
from tapebus.events import DeadLetter
from tapebus.failpoints import failpoint
from tapebus.store import Block, Commit, Store, Unit, steady_clock
from tapebus.threads import show_name

log = logging.getLogger("tapebus.tape")
#: Larger blocks cost less an event, and more to read one event of.
MAX_BLOCK_BYTES = 1 << 20
MAX_BLOCK_EVENTS = 16384
#: With so many bytes of blocks before dispatch, the next commit waits for it, for so many seconds at most: else those
#: who publish and the tape take the processor from it, and it has to read again from the tape what it could not keep.
PACE_BYTES, PACE_S = 4 << 20, 0.01
#: Dead letters waiting for a commit, and the bytes they hold; beyond it they are counted, not kept.
MAX_WAITING_DEAD = 10_000
MAX_WAITING_BYTES = 16 << 20
#: Between two pieces upkeep rests this long, or so many times as long as the last one took, divided by how much the
#: store says it presses; but never less than so many times, so that commits wait a third of the time at most.
UPKEEP_BUSY_S, UPKEEP_REST, UPKEEP_LEAST_REST = 0.2, 9.0, 2.0
#: Between two looks whether anything is due.
UPKEEP_IDLE_S = 2.0
#: How often room is looked for while there is none.
REGAIN_S = 0.5
#: The alert that tells of a full disk or map, and of the end of that.
FULL_ALERT = "store_full"


class EarlyTaker(Protocol):
    """A consumer of blocks that are not on disk yet; see `tapebus.outlets.EarlyConsumer`."""

    def offer_early(self, block: Block) -> bool: ...

    def settle(self, block: Block, taken: bool) -> None: ...


class TapeWriter(threading.Thread):
    """The only writer of the store. Natural group commit: whatever arrived during a commit is the next one.

    With an `interval` (seconds) a commit begins no sooner than that after the one before, unless a whole block has
    arrived: fewer commits for less processor time, each event waiting half of it on average.
    """

    def __init__(
        self,
        ring: Ring,
        ingest: Ingest,
        store: Store | None,
        fail: Callable[[BaseException], None],
        counters: Callable[[], dict[str, int]],
        alarm: Callable[..., None],
        interval: float = 0.0,
    ) -> None:
        super().__init__(name="tapebus-tape", daemon=True)
        self.interval = interval
        self._begun_at = float("-inf")
        self.ring = ring
        self.ingest = ingest
        self.store = store
        #: Takes each block after its commit; set before the thread starts.
        self.deliver: Callable[[Block], None] = lambda block: None
        #: Waits for dispatch where it has so many bytes before it, for so many seconds at most; set before the start.
        self.give_way: Callable[[int, float], None] = lambda weight, seconds: None
        #: Consumers that take each block before its commit; set before the thread starts.
        self.early: Sequence[EarlyTaker] = ()
        self._fail = fail
        self._counters = counters
        self._alarm = alarm
        self._dead: deque[DeadLetter] = deque()
        #: A bound, not an account: counted without a lock, and from 0 again with each commit.
        self._dead_bytes = 0
        self._purge: deque[list[int]] = deque()
        self._topics_done = len(store.topics()) if store is not None else 0
        self._counters_done: dict[str, int] = {}
        self._upkeep_at = time.monotonic() + UPKEEP_BUSY_S
        self.dead_lost = 0
        self.commits = 0
        #: Nobody is granted credit, because room is short or gone.
        self.full = False
        #: Not even what has arrived can be written.
        self.stuck = False
        self._regain_at = 0.0
        #: The last sequence number handed to dispatch, and when.
        self.done_seq = ring.last_seq
        self.done_at = time.time()

    def bury(self, letter: DeadLetter) -> None:
        """Keep a dead letter with the next commit; from any thread."""
        if len(self._dead) >= MAX_WAITING_DEAD or self._dead_bytes + len(letter.raw) > MAX_WAITING_BYTES:
            self.dead_lost += 1
            return
        self._dead_bytes += len(letter.raw)
        self._dead.append(letter)
        self.ring.wake_tape()

    def purge(self, ids: list[int]) -> None:
        """Remove dead letters by id with the next commit; from any thread. What was buried before goes with it."""
        self._purge.append(ids)
        self.ring.wake_tape()

    def run(self) -> None:
        show_name()
        try:
            while not (self.ring.stopped and not self._dead and not self._purge):
                self._gather()
                if not self._step():
                    self._upkeep()
                    self._look_for_room()
                    if not self._dead and not self._purge:
                        due = min(self._upkeep_at, self._regain_at) if self.full else self._upkeep_at
                        self.ring.wait(int(max(1.0, (due - time.monotonic()) * 1e3)))
        except BaseException as error:
            self._fail(error)

    def _gather(self) -> None:
        """Let more arrive until the next commit may begin. Bounded by the interval, so a stop need not wake it."""
        left = self._begun_at + self.interval - time.monotonic() if self.interval else 0.0
        if left <= 0:
            return
        entries, size = self.ring.fill
        if entries < MAX_BLOCK_EVENTS and size < MAX_BLOCK_BYTES and not self.ring.stopped:
            time.sleep(left)

    def _step(self) -> bool:
        self.give_way(PACE_BYTES, PACE_S)
        packed = self.ring.pack(MAX_BLOCK_BYTES, MAX_BLOCK_EVENTS)
        block: Block | None = None
        units: list[Unit] = []
        changed: list[int] = []
        if packed is not None:
            block, units, changed = packed
        elif not self._dead and not self._purge:
            return False
        taken = [each.offer_early(block) for each in self.early] if block is not None else []
        if self.store is not None:
            failpoint("tape.packed")
            self._commit(block, units, changed)
            failpoint("tape.after_commit")
        else:
            self._purge.clear()
            self._dead.clear()
            self._dead_bytes = 0
        self.ring.acknowledge(changed)
        failpoint("tape.after_ack")
        if block is not None:
            self.deliver(block)
            for each, already in zip(self.early, taken, strict=True):
                each.settle(block, already)
            self.done_at = time.time()
            self.done_seq = block.last_seq
            failpoint("tape.after_deliver")
        if time.monotonic() >= self._upkeep_at:
            self._upkeep()
        self._look_for_room()
        return True

    def _commit(self, block: Block | None, units: list[Unit], changed: list[int]) -> None:
        assert self.store is not None
        self._begun_at = time.monotonic()
        # before the letters that take their place: those were buried first, so that they go into the same commit
        settled = [number for _ in range(len(self._purge)) for number in self._purge.popleft()]
        dead = [self._dead.popleft() for _ in range(len(self._dead))]
        self._dead_bytes = 0
        dead += [letter for unit in units for letter in unit.dead]
        counters, topics = self._counters(), self.ring.topics
        commit = Commit(
            [block] if block is not None else [],
            [self.ring.account(index) for index in changed],
            units,
            dead,
            topics.after(self._topics_done) if len(topics) > self._topics_done else {},
            self._changed(counters) if counters is not self._counters_done else {},
            [*settled, *(number for unit in units for number in unit.settled)],
        )
        while True:
            try:
                self.store.commit(commit)
                break
            except StoreFull as error:
                self._pause(error)
        if self.stuck:
            self.stuck = False
            log.warning("the store has room again, acknowledging goes on")
        self._topics_done += len(commit.topics)
        self._counters_done = counters
        self.commits += 1

    def _changed(self, counters: dict[str, int]) -> dict[str, int]:
        return {name: count for name, count in counters.items() if self._counters_done.get(name) != count}

    def _pause(self, error: StoreFull) -> None:
        if not self.stuck:
            self.stuck = True
            log.error("%s; acknowledging stops until there is room", error)
        self._close_credit(str(error))
        if self.ring.stopped:
            raise StoreError(f"{error}; stopping with unwritten events, which their producers keep")
        threading.Event().wait(REGAIN_S)

    # -- room ------------------------------------------------------------------------------------

    def _look_for_room(self) -> None:
        """Close the credit of all producers when room gets short, open it when there is enough again."""
        if self.store is None or not self.store.shortage:
            return
        self._close_credit(self.store.shortage)
        if time.monotonic() < self._regain_at:
            return
        self._regain_at = time.monotonic() + REGAIN_S
        if self.store.regain():
            self.full = False
            self.ingest.set_store_full(False)
            log.warning("the store has room again, continuing")
            self._alarm(FULL_ALERT, "warning", "the store has room again", "cleared")

    def _close_credit(self, reason: str) -> None:
        if self.full:
            return
        self.full = True
        self._regain_at = time.monotonic() + REGAIN_S
        self.ingest.set_store_full(True)
        log.error("%s; producers are asked to wait", reason)
        # goes to the tape like any event, with the room of the reserve
        self._alarm(FULL_ALERT, "critical", f"{reason}: producers are asked to wait", "raised")

    def _upkeep(self) -> None:
        if time.monotonic() < self._upkeep_at:
            return
        pressing, begun = 0.0, time.monotonic()
        failpoint("tape.before_upkeep")
        try:
            pressing = self.store.maintain(steady_clock()) if self.store is not None else 0.0
        except (StoreFull, CorruptError) as error:
            log.error("upkeep of the tape was put off: %s", error)
        failpoint("tape.after_upkeep")
        now = time.monotonic()
        self._upkeep_at = now + (rest_after(now - begun, pressing) if pressing else UPKEEP_IDLE_S)


def rest_after(took: float, pressing: float) -> float:
    """Seconds until the next piece of upkeep, when the last took `took` and the rest presses that much."""
    return max(UPKEEP_LEAST_REST * took, max(UPKEEP_BUSY_S, UPKEEP_REST * took) / pressing)

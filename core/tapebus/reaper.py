"""The bus's thread that sends on what dead producers left in their spools."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from tapebus._sender import Sender, empty
from tapebus.spool import Facts, Spool, orphans, same_endpoint
from tapebus.threads import show_name

log = logging.getLogger("tapebus.reaper")


class Reaper(threading.Thread):
    """Empties orphaned spools that were meant for `endpoints`, through `connect`, each under its producer's name.

    A spool must lie free for one whole interval first: a producer that is started again at once takes its own
    back, and so keeps the order of its two lives. What was on the tape already is recognised by its numbers.
    """

    def __init__(self, directory: Path, endpoints: Sequence[str], connect: str, every_s: float) -> None:
        super().__init__(name="tapebus-reaper", daemon=True)
        self._directory, self._endpoints, self._connect = directory, endpoints, connect
        self._every_s = every_s
        self._stopping = threading.Event()
        self._sender: Sender | None = None
        #: Events taken from spools so far, those included that were on the tape already; torn records.
        self.events = self.torn = 0

    def run(self) -> None:
        show_name()
        before: set[Path] = set()
        while not self._stopping.wait(self._every_s):
            now: set[Path] = set()

            def lay_free(path: Path, before: set[Path] = before, now: set[Path] = now) -> bool:
                now.add(path)
                return path in before

            for spool in orphans(self._directory, self._ours, lay_free):
                self._empty(spool)
            before = now

    def _ours(self, facts: Facts) -> bool:
        return any(same_endpoint(facts.endpoint, each) for each in self._endpoints)

    def _empty(self, spool: Spool) -> None:
        try:
            self._sender = sender = empty(spool, self._connect)
        except OSError as error:
            log.warning("%s: left for later: %s", spool.path, error)
            spool.release()
            return
        if self._stopping.is_set():
            sender.stop()
        else:
            log.info("%s: sending %d events that its producer left", spool.path, spool.outbox.waiting)
        sender.run()
        self.events += spool.outbox.acked
        self.torn += spool.torn

    def stop(self) -> None:
        """Leave what is not acknowledged yet to the next start."""
        self._stopping.set()
        if (sender := self._sender) is not None:
            sender.stop()
        self.join(2.0)

"""The log of ``tapebus run``: no thread of the bus ever waits for whoever reads it."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading

from tapebus.threads import show_name

STDERR = 2
#: Lines that wait for their reader, and how many seconds the end of the process waits for it.
LINES, CLOSE_S = 1000, 1.0


class PatientHandler(logging.Handler):
    """Writes to standard error on a thread of its own.

    A reader that stands still, a hung service manager behind a pipe, costs lines, which are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        self._lines: queue.Queue[str | None] = queue.Queue(LINES)
        self._lost = 0
        self._thread = threading.Thread(target=self._write, name="tapebus-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._lost += 1
        except Exception:
            self.handleError(record)

    def _write(self) -> None:
        show_name()
        while (line := self._lines.get()) is not None:
            if self._lost:
                lost, self._lost = self._lost, 0
                line = f"{lost} lines were lost while nobody read the log\n{line}"
            # past the buffers of sys.stderr: a lock held there would break the end of the interpreter
            data = (line + "\n").encode(errors="backslashreplace")
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(STDERR, data) :]

    def close(self) -> None:
        """Write what is left, as far as somebody reads it."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=CLOSE_S)
            self._thread.join(CLOSE_S)
        super().close()

"""Power cuts on a simulated disk under the journal of the Telegram relay: what was sent stays known as sent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from preload import built
from simcheck import write_image
from simdisk import crash_states, read_trace

from tapebus_telegram import journal

HERE = Path(__file__).parent
KEEP = 20
WRITER = f"""
import os, sys
from pathlib import Path
from simdisk import mark
from tapebus_telegram import journal
journal._KEEP = {KEEP}
trace = os.open(os.environ["RECORD_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
for life in range(3):
    kept = journal.Journal(Path(sys.argv[1]) / "data" / "telegram.journal")
    for n in range(life * 100, life * 100 + 90):
        kept.begun(str(n), n % 3, float(n))
        kept.over(n % 3, n + 0.5, journal.Sent(str(n), group=str(n % 7), last_seq=n))
        os.write(trace, mark(str(n).encode()))
    kept.close()
"""


def test_a_message_that_was_sent_is_still_known_after_a_power_cut(tmp_path, monkeypatch, chance, size, figures):
    root, trace = tmp_path / "root", tmp_path / "trace"
    (root / "data").mkdir(parents=True)
    variables = {"LD_PRELOAD": str(built("record")), "RECORD_ROOT": str(root), "RECORD_TRACE": str(trace)}
    path = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    subprocess.run([sys.executable, "-c", WRITER, root], check=True, env={**os.environ, **path, **variables})
    monkeypatch.setattr(journal, "_KEEP", KEEP)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the real disk has no part in this any more
    calls = read_trace(trace)
    states = repeated = 0
    for place, image in crash_states(calls, size(300, 3000, 3000), chance, ["data"]):
        sent = [int(call.data) for call in calls[:place] if call.kind == "m"]
        write_image(tmp_path / "disk", image)
        found = journal.Journal(tmp_path / "disk" / "data" / "telegram.journal")
        try:
            for number in sent[-KEEP + 1 :]:
                assert found.find(str(number)) == journal.Sent(str(number), str(number % 7), number), (place, number)
            # the limits must hold over the cut: a call that may have left counts, told as over or in flight
            if sent:
                assert max(call.at for call in found.calls) >= sent[-1] + 0.5
            repeated += found.in_flight is not None
        finally:
            found.close()
        states += 1
    figures |= {"states": states, "undecided": repeated}
    assert states >= size(250, 2500, 2500)

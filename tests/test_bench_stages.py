"""The account of `make profile`: what is counted as work, how stacks become stages, how two tools make one table."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import profile, report, stages

BASE = "0x7f (libc.so.6);Thread._bootstrap (threading.py:1002);"
DISPATCH = BASE + "Dispatcher.run (tapebus/dispatcher.py:117);Dispatcher._dispatch (tapebus/dispatcher.py:152)"
HANDLER = DISPATCH + ";Fence.offer (tapebus/fence.py:195);Fence._call (tapebus/fence.py:245)"


@pytest.mark.parametrize(
    ("thread", "stack", "stage"),
    [
        ("tb-dispatch", DISPATCH + ";Codec.decode (tapebus/codec.py:79);mpack_decode (msgspec/_core.so)", "decode"),
        ("tb-dispatch", DISPATCH + ";Codec.decode (tapebus/codec.py:78);gather (tapebus/_decode.pyx:40)", "gather"),
        (
            "tb-dispatch",
            DISPATCH + ";Codec.decode (codec.py:87);run_checks (tapebus/_decode.pyx:1);quote (tapebus_schema/)",
            "rules of types (verdict)",
        ),
        ("tb-dispatch", HANDLER + ";Tracker.handle (tapebus_outcomes/tracker.py:84)", "handler: outcomes"),
        ("tb-telegram", HANDLER + ";Relay.handle (tapebus_telegram/relay.py:89)", "handler: telegram"),
        (
            "tb-telegram",
            BASE + "ThreadConsumer._run (outlets.py:78);Struct_dealloc_nogc (_core.so)",
            "free events",
        ),
        (
            "tb-tape",
            BASE + "TapeWriter._upkeep (tapewriter.py:1);ZSTD_compress2 (z.c)",
            "seal, prune (upkeep)",
        ),
        ("tb-tape", BASE + "encode_block (tapebus_store/layout.py:72);ZSTD_compress2 (zstd.c:1)", "compress"),
        ("tb-tape", "__pyx_f_7tapebus_5_ring_4Ring_pack (tapebus/_ring.pyx)", "pack"),
        ("tb-ingest", "__pyx_f_7tapebus_5_scan_mp_event (tapebus/_scan.pyx)", "scan frames"),
        (
            "tb-sender-x",
            BASE + "Sender._session (_sender.py:1);carry (tapebus/_line.pyx);Outbox_copy (tapebus/_outbox.pyx)",
            "build batches",
        ),
        (
            "python",
            BASE + "publish (tapebus/_emitter.pyx:564);Emitter_encoded (_emitter.pyx)",
            "publish(): encode",
        ),
        ("ZMQbg/IO/0", "0x7f (libzmq-2f02442c.so.5.2.5)", "libzmq"),
        ("tb-dispatch", BASE, stages.REST),
    ],
)
def test_a_stack_belongs_to_the_stage_of_its_thread(thread, stack, stage):
    assert stages.stage_of(stack, stages.rules_of(thread)) == stage


def test_only_busy_threads_are_counted_each_by_itself():
    lines = [
        "thread (7): tapebus-tape;a (x.py:1);fdatasync (libc.so.6) 9\n",
        "thread (7): tapebus-tape;a (x.py:1);pthread_cond_timedwait (libc.so.6);0x7f (libc.so.6) 9\n",
        "thread (7): tapebus-tape;a (x.py:1);pwrite64 (libc.so.6) 2\n",
        "thread (7): tapebus-tape;a b (x.py:1) 3\n",
        "thread (8): MainThread;c (x.py:1) 4\n",
        "\n",
    ]
    assert stages.read_stacks(lines, calls_too=False) == {7: {"a b (x.py:1)": 3}, 8: {"c (x.py:1)": 4}}
    assert stages.read_stacks(lines, calls_too=True)[7] == {"a (x.py:1);pwrite64 (libc.so.6)": 2, "a b (x.py:1)": 3}


SCRIPT = """\
   512
    ffffffff81 copy_folio_from_iter ([kernel.kallsyms])
    ffffffff82 __x64_sys_pwrite64 ([kernel.kallsyms])
          1234 mdb_page_flush (/site/cpython.cpython-311-x86_64-linux-gnu.so)

   512
          1af857 _PyObject_Malloc (/lib/libpython3.11.so.1.0)
               2 [unknown] ([unknown])

   511
          5678 __pyx_f_7tapebus_5_scan_mp_event (/core/tapebus/_scan.cpython-311-x86_64-linux-gnu.so)

   511
    ffffffff83 asm_exc_page_fault ([kernel.kallsyms])

   511
    ffffffff84 finish_task_switch.isra.0 ([kernel.kallsyms])
    ffffffff85 __schedule ([kernel.kallsyms])
    ffffffff86 exit_to_user_mode_loop ([kernel.kallsyms])
"""


def test_samples_of_perf_are_read_with_their_frames_and_the_kernel_is_told_apart():
    samples = list(stages.read_samples(SCRIPT.splitlines()))
    assert [thread for thread, _ in samples] == [512, 512, 511, 511, 511]
    assert samples[2][1] == ["__pyx_f_7tapebus_5_scan_mp_event (tapebus/_scan.pyx)"]
    assert [stages.kernel_stage(frames) for _, frames in samples] == [
        "kernel: write and sync the tape",
        "",
        "",
        "kernel: memory",
        "kernel: switch threads",
    ]


def test_the_interpreters_time_is_divided_by_stacks_and_everything_adds_up():
    stacks = Counter(
        {
            DISPATCH + ";Codec.decode (tapebus/codec.py:79);mpack_decode (msgspec/_core.so)": 30,
            HANDLER + ";Tracker.handle (tapebus_outcomes/tracker.py:84)": 10,
            DISPATCH + ";Codec.decode (tapebus/codec.py:80);stamp (tapebus/_decode.pyx:1)": 60,
        }
    )
    samples = [
        *[["_PyObject_Malloc (libpython3.11.so.1.0)"]] * 4,
        *[["__pyx_pw_7tapebus_7_decode_3stamp (tapebus/_decode.pyx)"]] * 3,
        *[["x ([kernel.kallsyms])", "__x64_sys_futex ([kernel.kallsyms])"]] * 3,
    ]
    shares = stages.divide("tb-dispatch", stacks, samples)
    assert shares == pytest.approx(
        {"decode": 0.3, "handler: outcomes": 0.1, "stamp": 0.3, "kernel: wait for and wake threads": 0.3}
    )
    assert stages.divide("tb-dispatch", stacks, [])["stamp"] == pytest.approx(0.6)
    assert stages.divide("tb-dispatch", Counter(), []) == {"not divided": 1.0}


def test_the_table_shows_each_thread_and_adds_up_what_is_small():
    shown = [{"name": "decode", "ns_per_event": 700.0}, {"name": "gather", "ns_per_event": 4.0}]
    shown.append({"name": "stamp", "ns_per_event": 3.0})
    thread = {"name": "tb-dispatch", "ns_per_event": 707.0, "stages": shown}
    idle = {"name": "tb-control", "ns_per_event": 1.0, "stages": []}
    account = {"processes": [{"name": "bus", "ns_per_event": 708.0, "threads": [thread, idle]}]}
    lines = stages.table(account, smallest=0.007).splitlines()
    assert lines[2:] == [
        "| **bus** | | **708** | **100%** |",
        "| `tb-dispatch` | | 707 | 100% |",
        "| | decode | 700 | 98.9% |",
        "| | others | 7 | 1.0% |",
    ]


def test_the_account_of_a_run_is_put_into_the_page_and_replaces_the_one_before(tmp_path):
    account = {
        "load": "publisher",
        "open_signals": 200,
        "seconds": 10.0,
        "events": 1_000_000,
        "python": "3.11.7",
        "machine": "x86_64",
        "by": ["perf", "py-spy"],
        "processes": [{"name": "bus", "ns_per_event": 708.0, "threads": []}],
    }
    page = tmp_path / "performance.md"
    page.write_text((Path(__file__).resolve().parents[1] / "docs" / "performance.md").read_text())
    for events in (5, 1_000_000):
        report.fill(page, profile.BEGIN, profile.END, profile.render(account | {"events": events}))
    text = page.read_text()
    assert "Load: publisher; 1,000,000 events in 10.0 s, 200 open signals" in text and "; 5 events" not in text
    assert text.count("| **bus** | | **708** | **100%** |") == 1
    assert text.index(profile.BEGIN) < text.index("**708**") < text.index(profile.END)

"""From samples of a running bus to the CPU time that each stage of an event's path takes.

A thread's CPU time is exact, the kernel's own account. `perf` says without disturbing which system calls and which C
functions it went to, `py-spy` which Python functions these worked for. Neither can do both: CPython 3.11 tells perf
nothing of Python functions; py-spy stops the process for each sample, and cannot tell work in the kernel from waiting.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Rules = list[tuple[str, str]]

#: Stages of a thread by the functions on its stack: the first rule that matches any of them names the stage.
#: A frame is ``function (file:line)`` or ``function (library)``; a group of the rule goes into the name.
INGEST: Rules = [
    ("scan frames", r"scan_frame|tapebus/_(?:scan|topics)"),
    ("check CRC", r"crc"),
    ("receive and answer (libzmq)", r"libzmq"),
    ("sessions, ring", r"tapebus/_\w+\.pyx"),
]
TAPE: Rules = [
    ("seal, prune (upkeep)", r"_upkeep|maintain \("),
    ("pack", r"pack[^;]*\(tapebus/_ring|_fill[^;]*\(tapebus/_ring"),
    ("compress", r"(?i)zstd"),
    ("encode block", r"encode_block|encode_run|tapebus_store/layout"),
    ("commit transaction", r"trans_commit|_mdb_txn_commit|mdb_env_sync"),
    ("LMDB put", r"_write_commit|trans_put|mdb_"),
    ("hand to dispatch", r"Dispatcher\.deliver|Backlog\.put"),
    ("acknowledge", r"acknowledge \("),
    ("store, rest", r"\(tapebus_store/"),
]
CONSUME: Rules = [
    ("handler: {}", r"\(tapebus_(?!schema|store)(\w+)/"),
    ("units of work", r"close_unit"),
    ("rules of types (verdict)", r"run_checks|\(tapebus_schema/"),
    ("stamp", r"stamp \(tapebus"),
    ("gather", r"gather \(tapebus"),
    ("decode", r"Codec\.decode|mpack_decode|json_decode"),
    ("judge", r"Judge\."),
    ("hand to threads and feed", r"\.offer \(tapebus/(?:outlets|feed)|Backlog\.put"),
    ("fan out", r"FanOut\.|split \(tapebus/_decode"),
    ("free events", r"_dealloc"),
    ("fence", r"Fence\.|Breaker\.|Doing\."),
    ("take blocks", r"Backlog\."),
    ("feed: encode and send", r"Feed\."),
]
SENDER: Rules = [
    ("build batches", r"Outbox_(?:copy|measure|find)"),
    ("CRC", r"crc"),
    ("acknowledgements", r"Line_acknowledged|Outbox_ack|_acknowledge"),
    ("poll and send (libzmq)", r"libzmq|zmq/"),
    ("sender loop", r"Sender\.|Line_|carry \(tapebus/"),
]
PRODUCER: Rules = [
    ("publish(): encode", r"Emitter_encoded|Encoder_encode"),
    ("publish(): into the outbox", r"Emitter_keep|Outbox_"),
    ("publish()", r"publish \(tapebus/"),
    ("flush()", r"Publisher\.(?:flush|stats)"),
    ("the load itself", r"bench|load\.py|producers\.py"),
]
LIBZMQ: Rules = [("libzmq", "")]
BY_THREAD = (
    ("tb-ingest", INGEST),
    ("tb-tape", TAPE),
    ("tb-sender", SENDER),
    ("tb-", CONSUME),
    ("ZMQbg", LIBZMQ),
    ("", PRODUCER),
)
REST = "rest"

#: System calls by what they are for; what is not named here is "kernel: other".
CALLS = {
    "kernel: write and sync the tape": r"fdatasync|fsync|writev|pwrite|msync|ftruncate|fallocate",
    "kernel: sockets": r"send|recv|connect|accept",
    "kernel: wait for sockets": r"poll|select",
    "kernel: wait for and wake threads": r"futex|sched_yield",
    "kernel: doorbells and pipes": r"sys_write|sys_read",
    "kernel: memory": r"mmap|munmap|madvise|brk|mprotect|page_fault|exc_page",
    "kernel: switch threads": r"__schedule ",
    "kernel: interrupts": r"softirq|_irq|irq_|interrupt",
}
#: Kinds of innermost functions that perf and py-spy tell alike. All else is one kind, the interpreter and what it
#: calls: py-spy leaves the interpreter's own functions out of its stacks.
KINDS: Rules = [
    ("compiled", r"\.pyx"),
    ("zstd", r"ZSTD|Zstd|^HUF_|^FSE_|^HIST_|^XXH|backend_c"),
    ("lmdb", r"^_?mdb|^trans_|^env_|mdb\.c"),
    ("zmq", r"zmq"),
]
#: Where a thread waits, or is in the kernel on behalf of such a function of libc.
_WAITING = re.compile(
    r"^(poll|ppoll|select|epoll_wait|fdatasync|fsync|pthread_cond_(timed)?wait|PyThread_acquire_lock_timed|take_gil) \("
)
_CALLING = re.compile(
    r"^(write|writev|pwrite64|pwritev|read|sendto|sendmsg|send|recv|recvfrom|recvmsg|sem_post|pthread_cond_signal"
    r"|mmap|munmap|madvise|clock_nanosleep) \("
)
#: So many frames from the innermost one may be inside the libc, nameless.
_INNER = 4


def rules_of(thread: str) -> Rules:
    """The stages of a thread by its name as the system shows it."""
    return next(rules for prefix, rules in BY_THREAD if thread.startswith(prefix))


def stage_of(stack: str, rules: Rules) -> str:
    """The stage that a `stack`, outermost function first and joined by ``;``, belongs to."""
    for name, pattern in rules:
        found = re.search(pattern, stack)
        if found:
            return name.format(*found.groups())
    return REST


def is_busy(stack: str, calls_too: bool) -> bool:
    """Whether the thread computes; with `calls_too` also where it is inside a system call that works for it."""
    inner = stack.split(";")[-_INNER:]
    if any(_WAITING.match(frame) for frame in inner):
        return False
    return calls_too or not _CALLING.match(inner[-1])


def read_stacks(lines: Iterable[str], calls_too: bool) -> dict[int, Counter[str]]:
    """Samples of busy threads by thread id and stack, from the ``raw`` format of ``py-spy record --threads``."""
    found: dict[int, Counter[str]] = {}
    for line in lines:
        stack, _, count = line.rstrip("\n").rpartition(" ")
        thread = re.match(r"thread \((\d+)\)[^;]*;", stack)
        if thread is None:
            continue
        stack = stack[thread.end() :]
        if is_busy(stack, calls_too):
            found.setdefault(int(thread[1]), Counter())[stack] += int(count)
    return found


def read_samples(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """(thread id, frames innermost first) of each sample of ``perf script -F tid,ip,sym,dso``."""
    thread, frames = 0, list[str]()
    for line in lines:
        words = line.split()
        if not words:
            if thread and frames:
                yield thread, frames
            thread, frames = 0, []
        elif line[0].isspace() and thread:
            library = words[-1].strip("()").rpartition("/")[2]
            if words[1].startswith("__pyx_"):
                library = f"tapebus/{library.partition('.')[0]}.pyx"
            frames.append(f"{words[1]} ({library})")
        else:
            thread = int(words[-1])
    if thread and frames:
        yield thread, frames


def kernel_stage(frames: list[str]) -> str:
    """What the kernel did for a sample; empty for one outside of it."""
    call = next((frame for frame in frames if re.match(r"__(x64|arm64|se)_sys_", frame)), "")
    if not call and not frames[0].endswith("(kernel.kallsyms])") and "[kernel" not in frames[0]:
        return ""
    # page faults and interrupts have no system call
    text = call or " ".join(frames)
    return next((name for name, pattern in CALLS.items() if re.search(pattern, text)), "kernel: other")


def kind_of(frame: str) -> str:
    """The kind of work of an innermost frame, told alike from perf and from py-spy."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, frame)), "python")


def divide(name: str, stacks: Counter[str], samples: list[list[str]]) -> dict[str, float]:
    """The shares of a thread's CPU time by stage, largest first; they add up to 1.

    `samples` of perf count, as it does not disturb: what lies in the kernel or in our own C functions is told by
    itself, the rest is divided as the `stacks` of py-spy with the same kind of innermost function are.
    """
    rules = rules_of(name)
    by_kind: dict[str, Counter[str]] = {}
    for stack, count in stacks.items():
        stage = stage_of(stack, rules)
        for kind in (kind_of(_inner_frame(stack)), ""):
            by_kind.setdefault(kind, Counter())[stage] += count
    if not samples:
        return _shares(by_kind.get("", Counter({"not divided": 1})))
    total: dict[str, float] = defaultdict(float)
    for frames in samples:
        stage = kernel_stage(frames) or stage_of(frames[0], rules)
        kind = kind_of(frames[0])
        if stage.startswith("kernel") or (stage != REST and kind == "compiled"):
            total[stage] += 1
            continue
        alike = by_kind.get(kind) or (by_kind.get("") if stage == REST else None) or Counter({stage: 1})
        for other, share in _shares(alike).items():
            total[other] += share
    return _shares(total)


def _inner_frame(stack: str) -> str:
    """The innermost frame that is a function of its own: what headers inline belongs to the one around it."""
    frames = stack.split(";")
    return next((frame for frame in reversed(frames) if ".h:" not in frame), frames[-1])


def _shares(counts: Mapping[str, float]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: counts[name] / total for name in sorted(counts, key=lambda name: -counts[name])}


def table(account: dict[str, Any], smallest: float = 0.005) -> str:
    """The account as a Markdown table. Stages below `smallest` of their process are added up as others."""
    lines = ["| Process, thread | Stage | ns an event | Share |", "|---|---|---:|---:|"]
    for process in account["processes"]:
        whole = process["ns_per_event"]
        lines.append(f"| **{process['name']}** | | **{whole:,.0f}** | **100%** |")
        for thread in process["threads"]:
            share = thread["ns_per_event"] / whole
            if share < smallest:
                continue
            lines.append(f"| `{thread['name']}` | | {thread['ns_per_event']:,.0f} | {share:.0%} |")
            shown = [each for each in thread["stages"] if each["ns_per_event"] / whole >= smallest]
            for each in shown:
                lines.append(f"| | {each['name']} | {each['ns_per_event']:,.0f} | {each['ns_per_event'] / whole:.1%} |")
            others = thread["ns_per_event"] - sum(each["ns_per_event"] for each in shown)
            if shown and others / whole >= smallest:
                lines.append(f"| | others | {others:,.0f} | {others / whole:.1%} |")
    return "\n".join(lines) + "\n"

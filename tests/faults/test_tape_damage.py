"""A damaged tape: nothing wrong is ever returned, nobody dies of it, and what was not damaged is saved."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import damage
import msgspec
import pytest

from store_support import fill, open_store, raws

CHILD = Path(damage.__file__)
#: Cases that one child judges; one that dies loses the rest of its share.
SHARE = 500


class Tape:
    """A sound tape in a directory of its own, what was written to it, and the judging of damaged copies."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.truth = damage.build(directory / "sound", random.Random(7))
        (directory / "truth.json").write_bytes(msgspec.json.encode(self.truth))
        self.size = (directory / "sound" / "tape" / "data.mdb").stat().st_size
        self.pages = {int(page): seqs for page, seqs in self.truth["pages"].items()}

    def judge(self, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers to `cases`; fails when a child dies, naming the case."""
        answers: list[dict[str, Any]] = []
        for start in range(0, len(cases), SHARE):
            share = [{**case, "number": start + i} for i, case in enumerate(cases[start : start + SHARE])]
            child = subprocess.run(
                [sys.executable, str(CHILD), str(self.directory)],
                input="".join(json.dumps(case) + "\n" for case in share),
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            lines = child.stdout.splitlines()
            if child.returncode or len(lines) != len(share):
                pytest.fail(f"the child ended with {child.returncode} at {share[len(lines)]}:\n{child.stderr[-3000:]}")
            answers += map(json.loads, lines)
        return answers

    def lost_with(self, pages: set[int]) -> set[int]:
        return {seq for page in pages for seq in self.pages.get(page, ())}


@pytest.fixture(scope="module")
def tape() -> Iterator[Tape]:
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="tapebus-", dir=memory if os.access(memory, os.W_OK) else None))
    yield Tape(directory)
    shutil.rmtree(directory, ignore_errors=True)


def check(
    tape: Tape, cases: list[dict[str, Any]], damaged: list[set[int]], figures: dict[str, Any], spare: bool = True
) -> None:
    """Judge `cases`, whose damage lies on the pages `damaged`; with `spare` nothing else may be lost."""
    began = time.monotonic()
    answers = tape.judge(cases)
    figures["cases"] = len(cases)
    figures["wrong_data_returned"] = sum(len(each["wrong"]) for each in answers)
    figures["reader"] = dict(Counter(each["reader"] for each in answers))
    figures["tapes_replaced"] = sum(each["bus"]["replaced"] for each in answers)
    missing = [set(each["bus"]["missing"]) for each in answers]
    allowed = [tape.lost_with(pages) for pages in damaged]
    outside = [sorted(lost - may) for lost, may in zip(missing, allowed, strict=True)]
    events = len(tape.truth["events"]) * len(cases)
    spared = events - sum(map(len, allowed))
    figures["events_recovered"] = f"{100 * (1 - sum(map(len, missing)) / events):.3f} %"
    figures["outside_damaged_pages_recovered"] = f"{100 * (1 - sum(map(len, outside)) / max(1, spared)):.3f} %"
    figures["small_records_lost"] = sum(each["bus"]["books"] for each in answers)
    figures["dead_letters_lost"] = sum(each["bus"]["dead"] for each in answers)
    figures["ms_per_case"] = round((time.monotonic() - began) * 1e3 / len(cases), 1)
    for case, answer, beyond in zip(cases, answers, outside, strict=True):
        assert not answer["wrong"], (case, answer["wrong"][:5])
        assert not answer["bus"]["problems"], (case, answer["bus"]["problems"][:5])
        if spare:
            assert not beyond, (case, "lost although their pages are sound", beyond[:5], len(beyond))
            assert not answer["bus"]["books"], (case, answer["bus"])


def test_a_flipped_bit_anywhere_loses_at_most_the_block_it_is_in(tape, size, chance, figures):
    count = size(200, 2000, 10_000)
    bits = [chance.randrange(tape.size * 8) for _ in range(count)]
    # the meta pages decide over everything and are two of many: a tenth of the flips is theirs
    bits[: count // 10] = [
        chance.randrange(8192) // 4096 * 32768 + chance.randrange(152 * 8) for _ in bits[: count // 10]
    ]
    # a last page that names too early an end, of either meta page
    bits[:2] = [1095, 32768 + 1095]
    cases = [{"kind": "flip", "bits": [bit]} for bit in bits]
    check(tape, cases, [{bit // 32768} for bit in bits], figures)


def test_a_tape_cut_short_anywhere_says_what_was_lost_with_the_end(tape, size, chance, figures):
    sizes = [chance.randrange(tape.size) for _ in range(size(20, 200, 500))]
    sizes[:4] = [0, 1, 4096, 8192]
    pages = range(tape.size // 4096)
    cases = [{"kind": "cut", "size": each} for each in sizes]
    # the list of free pages may be behind the cut: what only it could tell from garbage is then not taken
    check(tape, cases, [set(pages[each // 4096 :]) for each in sizes], figures, spare=False)


def test_a_zeroed_page_loses_at_most_the_blocks_on_it(tape, size, chance, figures):
    last = tape.size // 4096
    pages = [chance.randrange(last) for _ in range(size(20, 100, 200))]
    pages[:2] = [0, 1]
    check(tape, [{"kind": "zero", "pages": [page]} for page in pages], [{page} for page in pages], figures)


def test_meta_pages_that_changed_places_or_are_both_gone_cost_no_event(tape, figures):
    check(tape, [{"kind": "swap"}, {"kind": "zero", "pages": [0, 1]}], [set(), set()], figures)


@pytest.mark.parametrize("lock", ["deleted", "empty", "garbage"])
def test_a_lost_or_broken_lock_file_is_made_anew(tape, lock, chance, tmp_path):
    shutil.copytree(tape.directory / "sound", tmp_path / "copy")
    file = tmp_path / "copy" / "tape" / "lock.mdb"
    if lock == "deleted":
        file.unlink()
    else:
        file.write_bytes(b"" if lock == "empty" else chance.randbytes(file.stat().st_size))
    store = open_store(tmp_path / "copy")
    assert store.notices == []
    assert {seq: raw.hex() for seq, raw in enumerate(raws(store.blocks()), store.first_seq())} == tape.truth["events"]
    fill(store, 1)
    store.close()

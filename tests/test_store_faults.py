"""The store when things break: killed writers, full disks, failing disks, damaged files, forks, other processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest

import tapebus_store
from tapebus.errors import CorruptError, StoreError, StoreFull
from tapebus.store import Commit, Unit
from tapebus_store import quarantine
from tapebus_store.pages import PageFile

sys.path.insert(0, str(Path(__file__).parent))
from store_support import fill, open_store, raws, upkeep

CHILD = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from store_support import fill, open_store
    store = open_store(Path(sys.argv[1]))
    while True:
        fill(store, 1, per_block=4)
        store.maintain(1e12)
        print(store.last_seq(), flush=True)
    """
)


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def output(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out


@pytest.mark.parametrize("commits", [3, 40, 150])
def test_a_killed_writer_loses_nothing_it_reported(tmp_path: Path, commits: int) -> None:
    process = child(CHILD, tmp_path)
    assert process.stdout is not None
    reported = 0
    for line in process.stdout:
        reported = int(line)
        if reported >= commits * 4:
            break
    process.send_signal(signal.SIGKILL)
    rest = process.communicate(timeout=60)[0].split("\n")
    reported = max([reported, *(int(line) for line in rest[:-1] if line)])

    store = open_store(tmp_path)
    assert store.last_seq() >= reported
    found = raws(store.blocks())
    assert [int(raw.split(b":")[0]) for raw in found] == list(range(1, store.last_seq() + 1))
    fill(store, 1)
    store.close()


def test_a_reader_in_another_process_sees_a_gapless_tape_while_it_is_written_and_sealed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 1)
    process = child(
        """
import sys, tapebus_store
from pathlib import Path
from store_support import raws
reader = tapebus_store.tapebus_open_store(Path(sys.argv[1]), {}, True)
print("ready", flush=True)
while reader.last_seq() < 2000:
    seqs = [int(raw.split(b":")[0]) for raw in raws(reader.blocks())]
    assert seqs == list(range(1, len(seqs) + 1)), seqs
print(len(raws(reader.blocks())), reader.stats()["map_size"])
""",
        tmp_path,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    while store.last_seq() < 2000:
        fill(store, 1, size=1000)
        store.maintain(1e12)
    count, map_size = output(process).split()
    assert int(count) >= 2000
    assert int(map_size) > 0
    store.close()


def killed_reader(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that was killed inside a read transaction."""
    process = child(
        """
import sys, time, tapebus_store
from pathlib import Path
reader = tapebus_store.tapebus_open_store(Path(sys.argv[1]), {}, True)
with reader._env.reading():
    print("holding", flush=True)
    time.sleep(60)
""",
        tmp_path,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate()
    return process


def test_the_file_stops_growing_once_a_killed_reader_is_cleared_away(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 5)
    killed_reader(tmp_path)

    def pages_of(commits: int) -> int:
        before = store._env.env.info()["last_pgno"]
        for number in range(commits):
            store.commit(Commit(units=[Unit("c", number, namespace="n", state={"k": bytes(20_000)})]))
        return int(store._env.env.info()["last_pgno"]) - before

    held = pages_of(50)
    store.maintain(1e12)
    pages_of(10)
    assert held > 50 * 5
    assert pages_of(50) == 0
    store.close()


def test_a_killed_reader_does_not_keep_old_pages(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 1)
    process = killed_reader(tmp_path)
    before = store.stats()["readers"]
    store.maintain(1e12)
    assert f"\n{process.pid:>10} " not in store._env.env.readers()
    assert store.stats()["readers"] <= before
    store.close()


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_state_that_passes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    made = fill(store, 10)
    big = Commit(units=[Unit("c", 7, namespace="n", state={"k": os.urandom(1 << 20)})])
    with file_limit(1 << 18):
        for _ in range(3):
            with pytest.raises(StoreFull, match="no space left on the disk"):
                store.commit(big)
        assert raws(store.blocks()) == raws(made)
    assert store.cursors() == {}
    store.commit(big)
    assert store.cursors()["c"].cursor == 7
    store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_a_full_file_system_is_a_state_that_passes(tmp_path: Path) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False)
    if mount.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        store = open_store(tmp_path)
        made = fill(store, 10)
        ballast = tmp_path / "ballast"
        ballast.write_bytes(bytes(700_000))
        big = Commit(units=[Unit("c", 7, namespace="n", state={"k": os.urandom(400_000)})])
        with pytest.raises(StoreFull, match="no space left on the disk"):
            store.commit(big)
        ballast.unlink()
        store.commit(big)
        assert raws(store.blocks()) == raws(made)
        store.close()
        again = open_store(tmp_path)
        assert again.cursors()["c"].cursor == 7
        again.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_after_an_io_error_no_commit_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    made = fill(store, 2)

    def fail(*_: object) -> None:
        raise lmdb.Error("mdb_txn_commit: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_put", fail)
        with pytest.raises(StoreError, match=r"the commit failed: .*Input/output error") as raised:
            fill(store, 1)
    assert not isinstance(raised.value, StoreFull)
    assert raised.value.exit_code == 74
    for attempt in (lambda: fill(store, 1), lambda: store.commit(Commit(settled=[1]))):
        with pytest.raises(StoreError, match="restart the bus"):
            attempt()
    assert raws(store.blocks()) == raws(made)
    store.close()

    asked: list[tuple[str, ...]] = []
    run = quarantine._run

    def note(module: str, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[bytes]:
        asked.append((module, *arguments))
        return run(module, *arguments, timeout=timeout)

    monkeypatch.setattr(quarantine, "_run", note)
    again = open_store(tmp_path)
    assert asked == [("tapebus_store.preflight", str(tmp_path / "tape"), "recent")]
    assert raws(again.blocks()) == raws(made)
    again.close()
    asked.clear()
    open_store(tmp_path).close()
    assert asked == []


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5])
def test_a_truncated_file_is_refused_to_readers_and_replaced_by_what_is_sound(tmp_path: Path, part: float) -> None:
    store = open_store(tmp_path)
    made = raws(fill(store, 100, size=500))
    store.close()
    data = tmp_path / "tape" / "data.mdb"
    os.truncate(data, int(data.stat().st_size * part))
    with pytest.raises(CorruptError, match=r"damaged .*start the bus"):
        tapebus_store.tapebus_open_store(tmp_path, {}, True)
    store = open_store(tmp_path)
    holes = {seq for first, last in store.holes() for seq in range(first, last + 1)}
    assert raws(store.blocks()) == [raw for seq, raw in enumerate(made, 1) if seq not in holes]
    assert store.last_seq() == 500
    assert [each.name for each in data.parent.glob("data.mdb.damaged-*")] == store.stats()["damaged_files"]
    assert len(store.notices) == 1
    fill(store, 1)
    assert raws(store.blocks(500))
    store.close()
    again = open_store(tmp_path)
    assert again.notices == []
    again.close()


def test_half_a_page_behind_the_last_commit_is_not_taken_for_damage(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 3)
    store.close()
    with (tmp_path / "tape" / "data.mdb").open("ab") as file:
        file.write(bytes(1536))  # a commit that the power cut ended
    store = open_store(tmp_path)
    assert len(raws(store.blocks())) == 15
    fill(store, 30)
    store.close()


def test_what_lmdb_leaves_of_a_commit_whose_last_write_failed_is_not_taken_for_damage(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    made = fill(store, 3)
    store.close()
    data = tmp_path / "tape" / "data.mdb"
    with PageFile(data) as file:
        older = min((0, 1), key=lambda number: file.metas[number].txn)
    with data.open("r+b") as file:
        file.seek(4096 * older + 128)  # the root of the tree of databases
        file.write((1 << 20).to_bytes(8, "little"))
    for _ in range(2):
        store = open_store(tmp_path)
        assert store._env.notices == []
        assert raws(store.blocks()) == raws(made)
        made += fill(store, 1)
        store.close()


def test_a_first_start_that_was_cut_short_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "tape").mkdir()
    (tmp_path / "tape" / "new.mdb").write_bytes(bytes(4096 + 512))
    (tmp_path / "tape" / "new.mdb-lock").write_bytes(b"")
    store = open_store(tmp_path)
    fill(store, 1)
    store.close()
    assert {each.name for each in (tmp_path / "tape").iterdir()} == {
        "data.mdb",
        "lock.mdb",
        "mark",
        "reserve",
    }


def test_a_file_that_is_no_tape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tape").mkdir()
    (tmp_path / "tape" / "data.mdb").write_bytes(os.urandom(8192))
    with pytest.raises(CorruptError, match="restore it from a backup"):
        open_store(tmp_path)
    open_store(tmp_path / "other").close()


def test_sealing_leaves_a_damaged_block_in_place_and_goes_on(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    made = fill(store, 40)
    with store._env.env.begin(write=True) as txn:
        key = (51).to_bytes(8, "big")
        value = bytearray(txn.get(key, db=store._env.dbs["blocks"]))
        value[-1] ^= 1
        txn.put(key, bytes(value), db=store._env.dbs["blocks"])
    upkeep(store)
    assert store.stats()["blocks_damaged"] == 1
    with pytest.raises(CorruptError, match=r"bus_seq 51\.\.55"):
        list(store.blocks())
    assert raws(store.blocks(55), 55) == raws(made, 55)[: 200 - 55]
    store.close()


def test_a_forked_child_cannot_harm_the_parents_tape(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
import tapebus_store
from tapebus.errors import StoreError
from store_support import fill, open_store
data = Path(sys.argv[1])
store = open_store(data)
fill(store, 2)
pid = os.fork()
if pid == 0:
    try:
        store.last_seq()
    except StoreError as error:
        assert "opened before this process was forked" in str(error)
        store.close()
        try:
            tapebus_store.tapebus_open_store(data, {}, True)
        except StoreError as error:
            assert "spawn or exec" in str(error)
            os._exit(0)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
fill(store, 1)
store.close()
open_store(data).close()
"""
    output(child(code, tmp_path))


def test_a_forked_child_does_not_hold_the_directory(tmp_path: Path) -> None:
    code = """
import os, sys, signal
from pathlib import Path
from store_support import open_store
store = open_store(Path(sys.argv[1]))
pid = os.fork()
if pid == 0:
    signal.pause()
store.close()
open_store(Path(sys.argv[1])).close()
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
"""
    output(child(code, tmp_path))

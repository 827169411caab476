"""The end of a process that publishes, in each state of the bus and in each way to end, fork or multiply."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bus_states import STATES, Child, entering

from bus_support import wait_until
from tapebus import Tape

CALLS = 100
#: Seconds that an exit may take longer with a publisher than without: the promise, room for a machine with other
#: work, and what would be a hang and no delay on any machine.
PROMISE_S, ROOM_S, HANG_S = 0.2, 0.5, 10.0


def exits(state, count):
    """How long `count` processes took from their last word to their end, once the fault was there."""
    spent = []
    with contextlib.ExitStack() as held:
        children = [held.enter_context(Child(state, CALLS)) for _ in range(count)]
        for child in children:
            child.hear()
        state.fault()
        for child in children:
            child.say("go")
            child.hear()
            child.say("exit")
            last_word = child.hear()["at"]
            assert child.process.wait(30) == 0
            spent.append(time.monotonic() - last_word)
    return spent


BARE = "import time, json, msgspec, zmq, tapebus.publisher\nprint(time.monotonic(), flush=True)"


def bare_exit():
    process = subprocess.Popen([sys.executable, "-c", BARE], stdout=subprocess.PIPE, text=True)
    with process:
        last_word = float(process.stdout.readline())
        process.wait()
    return time.monotonic() - last_word


@pytest.mark.parametrize("state", STATES)
def test_no_state_of_the_bus_keeps_a_process_from_ending(state, make_bus, size, figures):
    total = size(16, 300, 1000)
    baseline = sorted(bare_exit() for _ in range(3))[1]
    spent = []
    while len(spent) < total // len(STATES):
        with entering(state, make_bus) as bus:
            spent += exits(bus, min(20, total // len(STATES) - len(spent)))
    added = sorted(each - baseline for each in spent)
    figures.update(
        exits=len(added), added_p50_ms=round(added[len(added) // 2] * 1e3, 1), added_max_ms=round(added[-1] * 1e3, 1)
    )
    assert added[len(added) // 2] <= PROMISE_S + ROOM_S
    assert added[-1] <= HANG_S


#: Every way ends by itself, publishes all its numbers once, and gives each process an account of its own.
HEAD = """
import os, sys, threading, time
from tapebus import Publisher
pub = Publisher("ways", sys.argv[1])
def publish(first, last, pub=pub):
    for n in range(first, last):
        assert pub.publish("market_data", {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2, "volume": float(n)})
"""
WAYS = {
    "a fork that the parent waits for": """
publish(0, 50)
pid = os.fork()
if pid == 0:
    publish(100, 150)
    assert pub.flush(20)
    os._exit(0)
publish(50, 100)
assert pub.flush(20) and os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
""",
    "a fork before the first event": """
pid = os.fork()
publish(100, 150) if pid == 0 else publish(0, 100)
assert pub.flush(20)
if pid: assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
""",
    "a fork while other threads publish": """
threads = [threading.Thread(target=publish, args=(k * 50, k * 50 + 50)) for k in range(3)]
for each in threads: each.start()
pids = [os.fork() for _ in range(1)]
if 0 in pids:
    pub.close()
    os._exit(0)
for each in threads: each.join()
assert pub.flush(20) and all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in pids)
""",
    "multiprocessing with fork": """
import multiprocessing
if __name__ == "__main__":
    publish(0, 50)
    def child(k):
        publish(50 + k * 50, 100 + k * 50)
        assert pub.flush(20)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=child, args=(k,)) for k in range(2)]
    for each in children: each.start()
    for each in children: each.join()
    assert [each.exitcode for each in children] == [0, 0] and pub.flush(20)
""",
    "multiprocessing with spawn": """
import concurrent.futures, multiprocessing
def child():
    publish(100, 150)
    return pub.flush(20)
if __name__ == "__main__":
    publish(0, 100)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(child).result()
    assert pub.flush(20)
""",
    "a thread pool": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(5) as pool:
    list(pool.map(lambda k: publish(k * 30, k * 30 + 30), range(5)))
assert pub.flush(20)
""",
    "asyncio tasks": """
import asyncio
async def one(k):
    for n in range(k * 10, k * 10 + 10):
        publish(n, n + 1)
        await asyncio.sleep(0)
async def main():
    await asyncio.gather(*(one(k) for k in range(15)))
    assert await asyncio.to_thread(pub.flush, 20)
asyncio.run(main())
""",
    "os._exit after a flush": """
publish(0, 150)
assert pub.flush(20)
os._exit(0)
""",
    "sys.exit in a with block": """
with pub:
    publish(0, 150)
    sys.exit(0)
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_multiply_or_end_delivers_each_event_once_under_its_own_account(way, embed, tmp_path):
    bus = embed(["schema", "store"])
    script = tmp_path / "way.py"
    script.write_text(HEAD + WAYS[way])
    done = subprocess.run([sys.executable, str(script), bus.acked], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with bus.tape() as tape:
        assert sorted(int(event.data.volume) for event in tape.read(topics=["market_data"])) == list(range(150))
    books = [each for each in bus.runtime.stats()["producers"] if each["source"] == "ways"]
    assert sum(each["stored"] for each in books) == 150
    assert all(each["highest_seq"] == each["stored"] and not each["unexplained"] for each in books)


DAEMONS = """
import sys, threading
from tapebus import Publisher
pubs = [Publisher(f"daemon{k}", sys.argv[1]) for k in range(3)]
begun = threading.Barrier(4)
def forever(pub):
    begun.wait()
    while True:
        pub.publish("market_data", {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2})
for pub in pubs:
    threading.Thread(target=forever, args=(pub,), daemon=True).start()
begun.wait()
"""


@pytest.mark.parametrize("state", ["up", "absent"])
def test_daemon_threads_that_publish_through_the_end_of_the_interpreter_do_no_harm(state, make_bus, size):
    with entering(state, make_bus) as bus:
        for _ in range(size(3, 30, 100)):
            done = subprocess.run(
                [sys.executable, "-c", DAEMONS, bus.endpoint], timeout=30, capture_output=True, text=True
            )
            assert (done.returncode, done.stderr) == (0, "")


APP = """
import os
from tapebus import Publisher
pub = Publisher("webapp", os.environ["BUS"])
pub.publish("user_action", {"user_id": "0", "action": "import"})
pub.flush(10)

def app(environ, start_response):
    name = environ["PATH_INFO"].strip("/")
    kept = pub.publish("user_action", {"user_id": str(os.getpid()), "action": name})
    start_response("200 OK" if kept else "500 Dropped", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
"""


def test_a_publisher_made_before_gunicorn_forks_serves_every_worker(make_bus, tmp_path, free_ports, size):
    pytest.importorskip("gunicorn")
    import httpx

    bus = make_bus(["schema", "store"]).start()
    (port,) = free_ports(1)
    (tmp_path / "webapp.py").write_text(APP)
    requests = size(60, 1000, 5000)
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "3", "--bind", f"127.0.0.1:{port}"]
    environ = {**bus.environ(), "BUS": bus.acked}
    log = (tmp_path / "gunicorn.log").open("wb")
    with log, subprocess.Popen([*command, "webapp:app"], cwd=tmp_path, env=environ, stderr=log, stdout=log) as server:
        try:
            wait_until(lambda: _answers(port), "gunicorn to answer")
            workers = {httpx.get(f"http://127.0.0.1:{port}/r{n}").raise_for_status().text for n in range(requests)}
            server.terminate()
            assert server.wait(30) == 0, Path(log.name).read_text()
        finally:
            server.kill()
    with Tape.open(bus.data_dir) as tape:
        found = [(e.data.user_id, e.data.action) for e in tape.read(topics=["user_action"])]
    assert [action for _, action in found].count("import") == 1
    assert sorted(action for _, action in found if action.startswith("r")) == sorted(f"r{n}" for n in range(requests))
    assert {pid for pid, action in found if action.startswith("r")} == workers
    books = [each for each in bus.stats()["producers"] if each["source"] == "webapp"]
    assert len(books) >= 1 + len(workers)
    assert all(not each["in_flight"] and not each["unexplained"] for each in books)


def _answers(port):
    import httpx

    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/up").status_code == 200
    return False

"""Threads carry names that ``top -H`` and ``perf`` show."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from bus_support import wait_until
from tapebus import Publisher
from tapebus.threads import show_name

linux = pytest.mark.skipif(sys.platform != "linux", reason="threads have such names on Linux only")


def names(pid: int) -> set[str]:
    return {path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm")}


@linux
def test_the_threads_of_a_running_bus_are_told_apart_by_the_system(bus):
    wanted = {"tb-ingest", "tb-tape", "tb-dispatch", "tb-feed", "tb-control", "tb-log", "tb-telegram"}
    wait_until(lambda: wanted <= names(bus.process.pid), f"threads named {wanted}, not {names(bus.process.pid)}")


@linux
def test_the_sender_of_a_publisher_is_told_apart_and_the_program_keeps_its_name(bus):
    before = Path(f"/proc/{os.getpid()}/comm").read_text()
    with Publisher("a-long-source-name", bus.acked) as publisher:
        assert publisher.publish("user_action", {"user_id": "u", "action": "a"})
        wait_until(lambda: "tb-sender-a-lon" in names(os.getpid()), "the sender's name")
    assert Path(f"/proc/{os.getpid()}/comm").read_text() == before


@pytest.mark.parametrize("name", ["tapebus-ünï-çödé-nämé", "tapebus-", "x" * 100])
def test_no_name_is_an_error(name):
    raised: list[BaseException] = []

    def run() -> None:
        try:
            show_name()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    assert not raised

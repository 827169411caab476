"""A recorded day flat out: every quote on the tape once, in order, and on the feed as far as it keeps up."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import zipfile

import pytest

from bus_support import PATIENCE, listening, wait_until
from tapebus import Tape

QUOTES = 87_833


@pytest.mark.slow
def test_all_quotes_of_a_day_are_on_the_tape_once_and_on_the_feed(make_bus, shared_data):
    file = shared_data / "ticks" / "oanda_eurusd_20140508.zip"
    with zipfile.ZipFile(file) as archive, archive.open(archive.namelist()[0]) as member:
        rows = [line.split(",") for line in io.TextIOWrapper(member) if line.strip()]
    expected = [(float(row[1]), float(row[2])) for row in rows]
    assert len(expected) == QUOTES
    bus = make_bus(["schema", "store"], "[feed]\nhwm = 1000000\n").start()
    fed: list[int] = []
    heard = threading.Event()

    def listen(socket) -> None:
        while not heard.is_set():
            if socket.poll(20):
                topic, body = socket.recv_multipart()
                if topic == b"bitten.market_data":
                    fed.append(int(body.rsplit(b":", 1)[1][:-1]))

    with listening(None, bus.feed, b"bitten.") as socket:
        # any message shows that the bus knows the subscription
        subscribed = subscribe(bus, socket)
        assert subscribed
        thread = threading.Thread(target=listen, args=(socket,))
        thread.start()
        command = [sys.executable, "-m", "tapebus", "replay", str(file), "--speed", "max", "--endpoint", bus.acked]
        run = subprocess.run(
            [*command, "--config", str(bus.config_file)], capture_output=True, text=True, check=False, timeout=90
        )
        assert run.returncode == 0, run.stderr
        with Tape.open(bus.data_dir) as tape:
            kept = [(e.bus_seq, e.data.bid, e.data.ask, e.timestamp) for e in tape.read(topics=["market_data"])]
        # the newest is never what a feed that is behind drops
        wait_until(lambda: fed and fed[-1] == kept[-1][0], "the last quote on the feed")
        heard.set()
        thread.join(PATIENCE)
    assert [(bid, ask) for _, bid, ask, _ in kept] == expected
    assert [round(at % 86400 * 1000) for *_, at in kept] == [round(float(row[0])) for row in rows]
    # each once and in order; at this speed the feed may fall behind, and says what it left out
    seqs = [seq for seq, *_ in kept]
    assert fed == sorted(set(fed)) and set(fed) <= set(seqs)
    assert len(seqs) - len(fed) <= bus.stats()["feed"]["lost"]
    books = [book for book in bus.stats()["producers"] if book["stored"] == QUOTES]
    assert [(book["in_flight"], book["unexplained"]) for book in books] == [(0, 0)]
    assert bus.stop() == 0


def subscribe(bus, socket) -> bool:
    """Publish until the feed repeats it."""
    from tapebus import Publisher

    with Publisher("probe", endpoint=bus.acked) as publisher:
        for _ in range(1000):
            publisher.publish("user_action", {"user_id": "0", "action": "probe"})
            publisher.flush(PATIENCE)
            if socket.poll(20):
                return True
    return False
